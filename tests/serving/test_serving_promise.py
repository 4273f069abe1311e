"""`--agree` and `--right`: what is not answered, in every output, over HTTP and from an export; and what cannot be promised."""

import json

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient
from serving_world import TEXTS, choose, hold_back, make_student, shotless

from pipeline.errors import UsageError
from pipeline.files import read_manifest, sha256_json, write_manifest
from pipeline.models.trained import open_trained
from pipeline.serving import Predictor
from pipeline.serving.export import write_onnx
from pipeline.serving.predictor import Prediction
from pipeline.serving.server import Limits, make_app

FARTHEST = 9.0
LEARNT_TEXT = "funny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """A project whose student agreed with its teacher in its surer half, with a file of labels that it is right in."""
    root = tmp_path_factory.mktemp("project")
    student = make_student(root / "artifacts" / "students" / "cd", model_folder("llama"))
    choose(root)
    sure = sorted(one.confidence for one in Predictor(student, 1).predict(TEXTS))[len(TEXTS) // 2]
    scores = [np.log([share, 1 - share]) for share in np.linspace(max(sure, 0.5) + 1e-4, 0.99, 200)]
    scores += [np.log([share, 1 - share]) for share in np.linspace(0.5, sure - 1e-4, 200)]
    rows = [(one, [0.9, 0.1] if n < 200 else [0.1, 0.9], FARTHEST * n / 400) for n, one in enumerate(scores)]
    states = [one.state for one in Predictor(student, 1, keep_states=True).predict(TEXTS)]
    ids = [sha256_json({"text": LEARNT_TEXT}), *(f"learnt {n}" for n in range(len(states) - 1))]
    hold_back(student, rows, list(zip(ids, states, strict=True)))
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    labelled = [{"text": f"{text} {n}"} for n in range(12) for text in TEXTS]
    found = Predictor(student, 1).predict(labelled)
    labelled = [{**row, "gold": one.label} for row, one in zip(labelled, found, strict=True)] + [{"text": LEARNT_TEXT, "gold": "positive"}]
    (root / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled), "utf-8")
    return root


@pytest.fixture(scope="module")
def student(folder):
    return folder / "artifacts" / "students" / "cd"


@pytest.mark.slow
def test_what_is_under_the_threshold_is_marked_in_every_output(folder, student):
    predictor = Predictor(student, 1, agree=0.95)
    answers = predictor.predict(TEXTS)
    expected = [one.confidence >= predictor.threshold.confidence for one in answers]
    assert [one.answered for one in answers] == expected
    assert {True, False} == set(expected)
    for form in ("jsonl", "csv", "parquet"):
        done = shotless(folder, "predict", "--input", "rows.jsonl", "--output", f"out.{form}", "--agree", "0.95")
        assert f"answered: {sum(expected)} of {len(TEXTS)}" in done.stderr.splitlines()[-1]
        read = {"jsonl": pl.read_ndjson, "csv": pl.read_csv, "parquet": pl.read_parquet}[form](folder / f"out.{form}")
        assert read["answered"].to_list() == expected
    shotless(folder, "predict", "--input", "rows.jsonl", "--output", "plain.csv")
    assert "answered" not in pl.read_csv(folder / "plain.csv").columns
    assert "answered" not in Prediction("a", 1.0, {"a": 1.0}).as_json()


def test_a_temperature_sharpens_probabilities_and_moves_no_label(folder, student, tmp_path, model_folder):
    other = make_student(tmp_path / "cold", model_folder("llama"))
    write_manifest(other, {key: value for key, value in read_manifest(other).items() if key != "files"} | {"temperature": 0.25})
    for plain, cold in zip(Predictor(student, 1).predict(TEXTS), Predictor(other, 1).predict(TEXTS), strict=True):
        shares = np.array(list(plain.probabilities.values())) ** 4
        assert np.allclose(list(cold.probabilities.values()), shares / shares.sum(), atol=1e-6)
        assert cold.label == plain.label


def test_a_text_unlike_all_that_was_learnt_is_not_answered(student):
    predictor = Predictor(student, 1, agree=0.95)
    novelty = predictor.threshold.novelty
    assert novelty.most == pytest.approx(np.quantile(FARTHEST * np.arange(400) / 400, 0.99), rel=1e-5)
    sure = [text for text, one in zip(TEXTS, predictor.predict(TEXTS), strict=True) if one.answered]
    novelty.most = -1.0
    assert not any(one.answered for one in predictor.predict(sure))


def test_what_cannot_be_promised_is_refused_before_answering(folder, tmp_path, model_folder):
    done = shotless(folder, "predict", "--input", "rows.jsonl", "--agree", "0.99", check=False)
    assert done.returncode == 2
    assert not done.stdout
    for said in ("99.0% cannot be promised", "can; it takes about", "never fewer than 299", "students.cd.held_back", "dvc repro"):
        assert said in " ".join(done.stderr.split())
    old = make_student(tmp_path / "old", model_folder("llama"))
    with pytest.raises(UsageError, match=r"has no held_back\.parquet.*dvc repro"):
        Predictor(old, 1, agree=0.9)


def test_being_right_takes_labels_that_were_not_learnt(folder):
    options = ("--labelled", "labelled.jsonl", "--label", "gold")
    done = shotless(folder, "predict", "--input", "rows.jsonl", "--right", "0.95", *options)
    assert done.stderr.splitlines()[-1].startswith("answered: ")
    done = shotless(folder, "predict", "--input", "rows.jsonl", "--right", "0.99", *options, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert "has 120 labelled texts (and 1 that it learnt from, which say nothing). 99.0% cannot be promised from" in said
    for wrong in (["--right", "0.9"], [*options], ["--right", "0.9", "--agree", "0.9", *options]):
        assert shotless(folder, "predict", "--input", "rows.jsonl", *wrong, check=False).returncode == 2


@pytest.mark.slow
def test_an_export_keeps_the_threshold_and_says_that_it_has_no_gate(folder, student, tmp_path):
    graph = folder / "graph"
    graph.mkdir()
    write_onnx(open_trained(student), graph, False)
    predictor = Predictor(graph, 1, agree=0.95)
    assert predictor.threshold.novelty is None
    answers = predictor.predict(TEXTS)
    assert [one.answered for one in answers] == [one.confidence >= predictor.threshold.confidence for one in answers]
    assert {one.answered for one in answers} == {True, False}
    done = shotless(folder, "predict", "--student", "./graph", "--input", "rows.jsonl", "--agree", "0.95")
    assert done.stderr.count("it has no hidden states to tell them by") == 1


def test_metrics_count_what_is_answered_and_what_is_not(student):
    predictor = Predictor(student, 1, agree=0.95)
    client = TestClient(make_app(predictor, Limits(100_000, 100, 5.0, 64, 1024)))
    found = client.post("/predict", json={"inputs": TEXTS}).json()["predictions"]
    text = client.get("/metrics").text
    for answered in (True, False):
        count = sum(one["answered"] is answered for one in found)
        assert f'shotless_threshold_total{{answered="{str(answered).lower()}"}} {float(count)}' in text
