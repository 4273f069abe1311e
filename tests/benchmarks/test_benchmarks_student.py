"""`make bench-student`: the rows of an encoder, on a tiny one."""

import shutil

import pytest
from serving_world import PROJECT, TEXTS

from benchmarks import student
from pipeline.files import read_json, write_json, write_manifest
from pipeline.models.folders import load_model, load_tokenizer, save_model
from pipeline.models.trained import about_trained
from pipeline.params import load_params
from pipeline.schema import Example, write_examples
from pipeline.task import EncoderTokens, Task

pytestmark = pytest.mark.slow

ANSWERING = {"latency_ms", "peak_rss_mb", "disk_mb", "mean_text_tokens"}
TRAINING = {"tokens_per_s", "peak_rss_above_model_bytes"}


@pytest.fixture
def run(tmp_path, model_folder, monkeypatch):
    """Measures the rows of an encoder's student; returns what is on disk then."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    write_examples([Example({"text": text}) for text in TEXTS], ("text",), tmp_path / "transfer.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))

    def measured(folder, only):
        sizes = {"steps": 4, "batch_size": 2, "rounds": 1}
        results = tmp_path / "student.json"
        student.main(model_folder("llama"), tmp_path / "transfer.parquet", folder, only=only, results=results, **sizes)
        return read_json(results)

    return measured


@pytest.fixture
def encoder(tmp_path, encoder_folder):
    """A student's folder of a tiny encoder, for the task of params.yaml."""
    base, folder, task = encoder_folder(), tmp_path / "encoder", Task(load_params(PROJECT / "params.yaml").task)
    tokenizer = load_tokenizer(base)
    save_model(load_model(base, labels=task.labels), tokenizer, folder)
    write_manifest(folder, about_trained("encoder", EncoderTokens(task, tokenizer), {}))
    return folder


def test_an_encoder_is_trained_and_answers_and_its_export_answers(run, encoder, monkeypatch, capsys):
    monkeypatch.setattr(
        student, "export", lambda source, folder: shutil.copytree(source, folder) and None
    )  # tests/serving has the real one
    rows = {row["name"]: row for row in run(encoder, "encoder,encoder_onnx_int8")["rows"]}
    assert rows["encoder"].keys() >= ANSWERING | TRAINING
    assert min(rows["encoder"][key] for key in ANSWERING | TRAINING) > 0
    assert rows["encoder_onnx_int8"].keys() >= ANSWERING
    assert min(rows["encoder_onnx_int8"][key] for key in ANSWERING) > 0
    assert {rows["encoder_onnx_int8"][key] for key in TRAINING} == {None}
    assert "encoder_onnx_int8 takes" in capsys.readouterr().out


def test_an_export_that_fails_leaves_its_row_out_with_the_reason(run, encoder, monkeypatch):
    monkeypatch.setattr(student, "export", lambda *_: "onnx is not installed")
    monkeypatch.setattr(student, "measure", lambda *_: {"tokens_per_s": 9.0, "peak_rss_above_model_bytes": 8})
    monkeypatch.setattr(student, "answer", lambda *_: dict.fromkeys(ANSWERING, 7.0))
    document = run(encoder, "encoder,encoder_onnx_int8")
    assert [row["name"] for row in document["rows"]] == ["encoder"]
    assert document["notes"] == ["encoder_onnx_int8 left out: onnx is not installed"]


def test_without_an_encoder_its_rows_are_left_out_and_the_others_stay(run, tmp_path, capsys):
    kept = {"name": "full", "tokens_per_s": 200.0, "peak_rss_above_model_bytes": 2e9}
    document = run(tmp_path / "nowhere", "encoder")
    write_json(document | {"rows": [kept]}, tmp_path / "student.json")
    assert run(tmp_path / "nowhere", "encoder,encoder_onnx_int8")["rows"] == [kept]
    said = capsys.readouterr().out
    assert f"encoder's rows left out: no {tmp_path / 'nowhere'}. `shotless run student@encoder` makes it." in said
    assert "200.0" in said
