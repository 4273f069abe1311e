"""What a student does not answer: teachers give it, once, within a limit, in their own time; the log is a source of the next run."""

import asyncio
import csv
import json
import threading
from contextlib import chdir
from pathlib import Path

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from serving_world import LONG_VERBALISERS, choose, make_student, seal, shotless
from small_project import OLD, make_project, small_params

from pipeline.data.examples import write_source
from pipeline.data.prepare import prepare
from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.evaluation.predictions import models_of, predict
from pipeline.files import Folders
from pipeline.models.folders import build_model
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE, Threshold
from pipeline.params import parse_params
from pipeline.schema import TARGETS, Example, read_examples, read_table, write_table
from pipeline.serving import Predictor
from pipeline.serving.fallback import Fallback
from pipeline.serving.files import PredictionLog
from pipeline.serving.server import Limits, make_app
from pipeline.targets.build import build_targets
from pipeline.task import Task
from pipeline.teachers.capture import capture
from pipeline.teachers.scorer import LocalBackend

NEW = [
    f"{one}, then {other}" for one in ("a cold picture", "lifeless", "we were bored", "what a service") for other in ("late", "warm", "x")
]
LIMITS = Limits(body_bytes=50_000, rows=50, body_seconds=5, batch_rows=64, waiting_rows=1024)


def run_teacher(root, raw):
    """The stages from the sources to the target set."""
    params, folders = parse_params(raw), Folders.here()
    for name in params.data.sources:
        write_source(name, params, folders)
    build_model(root / "mine" / "model", folders.artifacts / "models" / "tiny")
    prepare(params, folders)
    capture("few_shot", params, folders)
    build_targets("few_shot", params.targets["few_shot"], Task(params.task), folders)
    return params


@pytest.fixture
def project(tmp_path, model_folder):
    """A project after its targets, with a student that agrees with its teacher if it is surer than the middle one of the texts."""
    make_project(tmp_path, model_folder("llama"))
    student = make_student(tmp_path / "artifacts" / "students" / "cd", model_folder("llama", seed=3))
    choose(tmp_path)
    said = [found.probabilities for found in Predictor(student, 1).predict(OLD)]
    scores = np.log([list(shares.values()) for shares in said]).astype(np.float32)
    sure = scores.max(-1) > np.median(scores.max(-1))
    targets = np.where(sure[:, None] == (scores == scores.max(-1, keepdims=True)), 0.9, 0.1).astype(np.float32)
    times = 10
    columns = [OLD * times, list(scores) * times, list(targets) * times, np.zeros(len(OLD) * times, dtype=np.float32)]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, HELD_BACK, strict=True)]
    write_table(pa.Table.from_arrays(arrays, schema=HELD_BACK), student / HELD_BACK_FILE)
    seal(student, Task(parse_params(small_params()).task))
    with chdir(tmp_path):
        run_teacher(tmp_path, small_params())
        yield tmp_path


@pytest.fixture
def params():
    return parse_params(small_params())


@pytest.fixture
def predictor(project):
    return Predictor(project / "artifacts" / "students" / "cd", 1, agree=0.9)


@pytest.fixture
def fallback(predictor, params):
    return Fallback("few_shot", predictor, params, Folders.here())


@pytest.fixture
def prompts(monkeypatch):
    """How many prompts the teacher's model was asked, a number for each time."""
    asked, real = [], LocalBackend._rows
    monkeypatch.setattr(LocalBackend, "_rows", lambda own, job: asked.append(len(job.prompts)) or real(own, job))
    return asked


def pairs(predictor, texts):
    return list(zip(texts, predictor.predict(texts), strict=True))


@pytest.mark.slow
def test_a_text_of_the_transfer_set_gets_its_target_and_no_prompt_is_asked(predictor, fallback, prompts):
    rows = pairs(predictor, OLD)
    found = fallback.answer(rows)
    targets = {
        row["example_id"]: row["probabilities"]
        for row in read_table(Path("artifacts/targets/few_shot/targets.parquet"), TARGETS).to_pylist()
    }
    assert {one.answered for _, one in rows} == {True, False}
    for (text, own), one in zip(rows, found, strict=True):
        assert one.answered
        if own.answered:
            assert (one.by, one.student_answer, one.probabilities) == ("cd", None, own.probabilities)
        else:
            assert (one.by, one.student_answer) == ("few_shot", own)
            assert list(one.probabilities.values()) == pytest.approx(targets[Example({"text": text}).example_id], abs=1e-6)
            assert one.confidence == one.probabilities[one.label] == max(one.probabilities.values())
    assert prompts == []
    assert fallback.counts == {"answered": sum(not own.answered for _, own in rows), "over the limit": 0, "failed": 0}


@pytest.mark.slow
def test_a_new_text_is_answered_as_the_baseline_answers_it_and_asked_once(predictor, fallback, params, prompts):
    predictor.threshold = Threshold(1.1, 0.0)
    found = fallback.answer(pairs(predictor, NEW))
    assert sum(prompts) == 2 * len(NEW)  # contexts
    assert fallback.answer(pairs(predictor, NEW)) == found
    assert sum(prompts) == 2 * len(NEW)
    table = predict(
        "teacher", models_of("teacher", params, Folders.here()), params, Folders.here(), {"new": [Example({"text": text}) for text in NEW]}
    )
    assert [one.label for one in found] == table["predicted"].to_pylist()
    assert np.array([list(one.probabilities.values()) for one in found]) == pytest.approx(
        np.array(table["probabilities"].to_pylist()), abs=1e-5
    )


@pytest.mark.slow
def test_the_log_is_a_source_and_only_what_was_not_asked_before_is_asked(project, prompts):
    (project / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in NEW), "utf-8")
    options = ["--agree", "0.9", "--fallback", "few_shot", "--log", "served.jsonl", "--threads", "1"]
    done = shotless(project, "predict", "-i", "new.jsonl", *options)
    rows = list(map(json.loads, done.stdout.splitlines()))
    handed = [text for text, row in zip(NEW, rows, strict=True) if row["by"] == "few_shot"]
    assert 0 < len(handed) < len(NEW)
    assert f"handed back to few_shot: {len(handed)} answered, 0 over the limit, 0 failed" in done.stderr
    for row in rows:
        assert row["answered"]
        assert ("student_answer" in row) == (row["by"] == "few_shot")
        assert not row.get("student_answer", {}).get("answered")
    assert sum(prompts) == 2 * len(handed)
    prompts.clear()
    raw = small_params()
    raw["data"]["sources"]["served"] = {"path": "served.jsonl", "where": {"by": "few_shot"}, "label": None}
    raw["data"]["transfer"] = {"source": "served"}
    run_teacher(project, raw)
    assert sorted(one.fields["text"] for one in read_examples(project / "artifacts/data/transfer.parquet", ["text"])) == sorted(handed)
    assert prompts == []
    del raw["data"]["sources"]["served"]["where"]
    run_teacher(project, raw)
    assert sum(prompts) == 2 * (len(NEW) - len(handed))


@pytest.mark.slow
def test_tables_say_who_answered_and_what_the_student_said(project):
    (project / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in NEW), "utf-8")
    options = ["--agree", "0.9", "--fallback", "few_shot", "--most-handed-back", "1", "--threads", "1"]
    for form in ("csv", "parquet"):
        shotless(project, "predict", "-i", "new.jsonl", "-o", f"new.{form}", *options)
    with (project / "new.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["answered"] for row in rows].count("false") > 0
    [handed] = [row for row in rows if row["by"] == "few_shot"]
    assert handed["student_label"] in {"negative", "positive"}
    assert 0.5 <= float(handed["student_confidence"]) <= 1
    assert handed["answered"] == "true"
    assert {row["student_label"] for row in rows if row["by"] == "cd"} == {""}
    whole = pq.read_table(project / "new.parquet").select(rows[0]).to_pylist()
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in whole] == [
        {key: value.capitalize() if value in {"true", "false"} else value for key, value in row.items()} for row in rows
    ]


@pytest.mark.slow
def test_beyond_the_limit_the_students_answer_stays_unanswered(predictor, params):
    predictor.threshold = Threshold(1.1, 0.0)
    fallback = Fallback("few_shot", predictor, params, Folders.here(), most=3)
    found = [*fallback.answer(pairs(predictor, NEW[:2])), *fallback.answer(pairs(predictor, NEW[2:]))]
    assert [one.by for one in found] == ["few_shot"] * 3 + ["cd"] * (len(NEW) - 3)
    assert [one.answered for one in found] == [True] * 3 + [False] * (len(NEW) - 3)
    assert fallback.counts == {"answered": 3, "over the limit": len(NEW) - 3, "failed": 0}


@pytest.mark.slow
def test_a_teacher_that_fails_costs_its_answers_and_is_named_once(predictor, fallback, monkeypatch, capsys):
    predictor.threshold = Threshold(1.1, 0.0)
    [(scorer, _)] = fallback._asked
    real = scorer.label_scores

    def fail(*_):
        raise ShotlessError("servers.big: gave no answer")

    monkeypatch.setattr(scorer, "label_scores", fail)
    rows = pairs(predictor, NEW)
    for _ in range(2):
        assert [one.probabilities for one in fallback.answer(rows)] == [own.probabilities for _, own in rows]
    assert fallback.counts == {"answered": 0, "over the limit": 0, "failed": 2 * len(NEW)}
    assert capsys.readouterr().err.count("few_shot gave no answer: servers.big: gave no answer. Answers go on") == 1
    monkeypatch.setattr(scorer, "label_scores", real)
    assert {one.by for one in fallback.answer(rows)} == {"few_shot"}


@pytest.mark.slow
def test_a_text_that_cannot_be_asked_costs_no_other_one_its_answer(predictor, fallback, monkeypatch):
    predictor.threshold = Threshold(1.1, 0.0)
    [(scorer, _)] = fallback._asked
    real = scorer.label_scores

    def refuse(contexts, examples, title):
        if any(one.fields["text"] == NEW[4] for one in examples):
            raise UsageError("too long")
        return real(contexts, examples, title)

    monkeypatch.setattr(scorer, "label_scores", refuse)
    found = fallback.answer([*pairs(predictor, NEW), *pairs(predictor, [""])])
    assert [one.by for one in found] == ["few_shot"] * 4 + ["cd"] + ["few_shot"] * (len(NEW) - 5) + [None]
    assert fallback.counts["failed"] == 1


@pytest.mark.slow
def test_over_http_the_student_goes_on_while_the_teacher_answers(predictor, fallback, tmp_path, monkeypatch):
    rows = pairs(predictor, NEW)
    sure, unsure = (next(text for text, own in rows if own.answered is answered) for answered in (True, False))
    free, entered, real = threading.Event(), threading.Event(), fallback._ask
    monkeypatch.setattr(fallback, "_ask", lambda examples: entered.set() or (free.wait(20) and real(examples)))
    log = tmp_path / "served.jsonl"
    app = make_app(predictor, LIMITS, PredictionLog(log, "f" * 64), fallback)

    async def main():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as client:
            waiting = asyncio.create_task(client.post("/predict", json={"inputs": [unsure, sure, ""]}))
            await asyncio.to_thread(entered.wait, 20)
            quick = await client.post("/predict", json={"inputs": [sure]})
            assert not waiting.done()
            free.set()
            return quick.json()["predictions"], (await waiting).json()["predictions"]

    quick, answers = asyncio.run(asyncio.wait_for(main(), 30))
    assert [one.get("by") for one in [*quick, *answers]] == ["cd", "few_shot", "cd", None]
    own = dict(rows)[unsure]
    assert answers[0]["student_answer"]["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
    logged = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [one["student"] for one in logged] == ["f" * 16] * 4
    assert [{key: value for key, value in one.items() if key not in {"time", "student", "fields"}} for one in logged] == [*quick, *answers]
    with TestClient(app) as client:
        assert client.get("/health").json()["fallback"] == "few_shot"
        shown = client.get("/metrics").text
    assert 'shotless_handed_back{end="answered"} 1.0' in shown
    assert 'shotless_threshold_total{answered="false"} 1.0' in shown


@pytest.mark.slow
def test_what_cannot_work_is_refused_at_the_start(project, predictor, params):
    (project / "rows.jsonl").write_text('{"text": "a film"}\n', "utf-8")
    for options, words in (
        (["--fallback", "few_shot"], "Set one with --agree"),
        (["--most-handed-back", "3"], "Name a target set with --fallback"),
        (["--agree", "0.9", "--fallback", "big"], "targets: no 'big'; choose one of: few_shot"),
    ):
        done = shotless(project, "predict", "-i", "rows.jsonl", "--threads", "1", *options, check=False)
        assert (done.returncode, done.stdout, words in done.stderr) == (2, "", True), done.stderr
    other = parse_params(small_params() | {"task": {"template": "Review: {text}\nSentiment:", "verbalisers": LONG_VERBALISERS}})
    with pytest.raises(MismatchError, match="verbalisers"):
        Fallback("few_shot", predictor, other, Folders.here())
    (project / "artifacts" / "targets" / "few_shot" / "calibration.json").unlink()
    with pytest.raises(UsageError, match=r"Run `dvc repro targets@few_shot`"):
        Fallback("few_shot", predictor, params, Folders.here())
