"""`shotless export --format onnx`: a graph that gives the student's probabilities, by predict and serve, without torch."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fastapi.testclient import TestClient
from serving_world import LONG_VERBALISERS, PROJECT, TEXTS, make_student, seal, shotless
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipeline import errors
from pipeline.errors import CorruptError, UsageError
from pipeline.files import read_json, write_json, write_manifest
from pipeline.models.folders import load_model, load_tokenizer, save_model
from pipeline.models.trained import about_trained, load_tokens, open_trained
from pipeline.params import CompletionParams, TaskParams
from pipeline.serving import Predictor, export
from pipeline.serving.measure import answered
from pipeline.serving.server import Limits, make_app
from pipeline.task import Task

pytestmark = pytest.mark.slow

PAIR = "{premise}\n{claim}?"
PAIRS = [{"premise": one, "claim": other} for one, other in zip(TEXTS, TEXTS[::-1], strict=True)]
WITHOUT_TORCH = """
import sys
from pipeline.cli import app
sys.argv = ["shotless", "predict", "--student", "./onnx", "-i", "rows.jsonl", "--threads", "1"]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch", "transformers", "onnx", "safetensors", "scipy", "polars", "dvc", "fastapi") if name in sys.modules])
"""


def make_encoder(folder, base, template="{text}"):
    """An encoder student with random weights, so large that answers differ from text to text."""
    task = Task(TaskParams(template=template, verbalisers={"no": " no", "so-so": " so so", "yes": " yes"}))
    model = load_model(base, labels=task.labels)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.3
            )  # the scale of a normalisation is near 1
    save_model(model, load_tokenizer(base), folder)
    write_manifest(folder, about_trained(folder.name, load_tokens(task, folder), {}))
    return folder


def write(student, folder, int8=False):
    folder.mkdir()
    export.write_onnx(open_trained(student), folder, int8)
    return folder


def shares(folder, inputs):
    return np.array([list(found.probabilities.values()) for found in Predictor(folder, 1).predict(inputs)])


@pytest.fixture(scope="module")
def student(tmp_path_factory, model_folder):
    base = model_folder("llama", num_hidden_layers=2)
    return make_student(tmp_path_factory.mktemp("students") / "cd", base, template="{text}<|end|>answer:")


@pytest.fixture(scope="module")
def graph(tmp_path_factory, student):
    return write(student, tmp_path_factory.mktemp("exported") / "onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, student):
    """The folder of an export in 8-bit integers by the command line, and what was said."""
    folder = tmp_path_factory.mktemp("int8")
    (student / "README.md").write_text(
        "---\nlibrary_name: transformers\n---\n\n# cd\n\n## Loading it\n\nimport torch\n\n## Licences\n\nMIT\n", "utf-8"
    )
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]), "utf-8")
    options = ("--format", "onnx", "--int8", "--most-changed", "0.5", "--check", "texts.jsonl")
    return folder / "out" / "onnx", shotless(folder, "export", "--student", str(student), "-o", "out/onnx", *options).stdout


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])  # llama's is below
def test_a_decoders_graph_gives_its_probabilities_one_by_one_and_in_batches(tmp_path, model_folder, architecture):
    layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
    student = make_student(tmp_path / "cd", model_folder(architecture, **layers), template=PAIR)
    folder = write(student, tmp_path / "onnx")
    expected = shares(student, PAIRS)
    assert shares(folder, PAIRS) == pytest.approx(expected, abs=1e-4)
    assert np.concatenate([shares(folder, [one]) for one in PAIRS[:3]]) == pytest.approx(expected[:3], abs=1e-4)
    assert [found.ids for found in Predictor(folder).predict(PAIRS)] == [found.ids for found in Predictor(student).predict(PAIRS)]


@pytest.mark.parametrize("family", ["roberta", "deberta-v2", "modernbert"])  # bert's is below
def test_an_encoders_graph_gives_its_probabilities_for_pairs_too(tmp_path, encoder_folder, family):
    student = make_encoder(tmp_path / "encoder", encoder_folder(family), PAIR)
    expected = shares(student, PAIRS)
    assert np.ptp(expected, axis=0).max() > 5e-3, "they differ from text to text"
    folder = write(student, tmp_path / "onnx")
    assert shares(folder, PAIRS) == pytest.approx(expected, abs=1e-4)
    assert np.concatenate([shares(folder, [one]) for one in PAIRS[:3]]) == pytest.approx(expected[:3], abs=1e-4)


def test_another_program_needs_the_graph_and_its_tokenizer_alone(tmp_path, encoder_folder):
    base = shutil.copytree(encoder_folder("bert"), tmp_path / "base")
    padding = Tokenizer.from_file(str(base / "tokenizer.json"))
    padding.enable_padding(length=40)  # as sentence encoders' files say
    padding.save(str(base / "tokenizer.json"))
    student = make_encoder(tmp_path / "encoder", base)
    folder = write(student, tmp_path / "onnx")
    tokenizer, session = Tokenizer.from_file(str(folder / "tokenizer.json")), onnxruntime.InferenceSession(folder / "model.onnx")
    for text, expected in zip(TEXTS, shares(student, TEXTS), strict=True):
        ids = np.array([tokenizer.encode(text).ids])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found = session.run(None, {own.name: given[own.name] for own in session.get_inputs()})[0]
        assert np.exp(found[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("kind", "by_batch"), [("decoder", 1e-4), ("encoder", 0.05)])
def test_8_bit_integers_move_probabilities_a_little_whatever_shares_the_batch(tmp_path, student, exported, encoder_folder, kind, by_batch):
    folder, _ = exported
    if kind == "encoder":
        student = make_encoder(tmp_path / "encoder", encoder_folder("bert"))
        folder = write(student, tmp_path / "onnx", int8=True)
    found = shares(folder, TEXTS)
    assert 0 < np.abs(found - shares(student, TEXTS)).max() < 0.05
    assert np.concatenate([shares(folder, [text]) for text in TEXTS]) == pytest.approx(found, abs=by_batch)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    weights = {weight.name: weight for weight in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type in {"MatMul", "Gemm"} and node.input[1] in weights]
    words = len(AutoTokenizer.from_pretrained(student))
    assert {weight.data_type for weight in weights.values() if list(weight.dims) == [words, 32]} == {onnx.TensorProto.INT8}


def test_an_export_says_how_it_compares_in_print_manifest_and_card(student, exported):
    folder, said = exported
    found = read_json(folder / "manifest.json")["check"]
    assert {file.name for file in folder.iterdir()} == {"README.md", "manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json"}
    before, after = shares(student, TEXTS), shares(folder, TEXTS)
    assert (found["texts"], found["from"]) == (len(TEXTS), "texts.jsonl")
    assert found["labels_changed"] == (before.argmax(-1) != after.argmax(-1)).sum()
    assert found["largest_difference"] == pytest.approx(np.abs(before - after).max(), abs=1e-3)
    assert found["exported"]["peak_mb"] < found["student"]["peak_mb"] - 100, "torch is not in memory"
    assert found["exported"]["milliseconds"] > 0 < found["exported"]["disk_mb"]
    card = (folder / "README.md").read_text("utf-8")
    assert "library_name: onnx" in card
    assert "import torch" not in card
    assert "## Licences" in card
    for text in (said, card):
        assert f"{found['labels_changed']} of 10 labels changed" in text
        assert f"| {found['student']['peak_mb']:,} | {found['exported']['peak_mb']:,} |" in text


def test_an_export_that_changes_too_many_labels_leaves_nothing_behind(tmp_path, student, monkeypatch):
    costs = {"milliseconds": 1.0, "disk_mb": 1.0, "peak_mb": 1.0}
    found = {"texts": 100, "labels_changed": 2, "largest_difference": 0.3, "student": costs, "exported": costs}
    monkeypatch.setattr(export, "write_onnx", lambda *_: {"onnx": {}})
    monkeypatch.setattr(export, "compare", lambda *_: found)
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out", "--format", "onnx", "--int8", check=False)
    assert done.returncode == 3
    assert "2 of 100 labels change (8 fixed texts" in done.stderr
    assert "without --int8, or allow it with --most-changed" in done.stderr
    assert not [file.name for file in tmp_path.iterdir() if "out" in file.name]


def test_texts_that_become_other_tokens_without_transformers_are_refused(tmp_path, student, graph, monkeypatch):
    class Here:
        """A process that is this one."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, folder, texts):
            found = function(folder, texts)
            found["answers"] = [(row, ids[1:] if folder == graph else ids) for row, ids in found["answers"]]
            return type("Done", (), {"result": lambda _: found})()

    monkeypatch.setattr(export, "ProcessPoolExecutor", Here)
    with pytest.raises(export.ShotlessError, match="other tokens than transformers"):
        export.compare(student, graph, [{"text": text} for text in TEXTS])
    with pytest.raises(UsageError, match="none of these texts"):
        export.compare(student, graph, [{"text": ""}])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskParams(template="{text} =", completion=CompletionParams()), "free text"),
        (TaskParams(template="{text} =", verbalisers=LONG_VERBALISERS), "' so-so' of 'mixed' has several tokens"),
    ],
)
def test_a_student_that_cannot_be_a_graph_is_refused_before_work(tmp_path, model_folder, monkeypatch, task, message):
    shutil.copytree(model_folder("llama"), tmp_path / "cd")
    seal(tmp_path / "cd", Task(task))
    monkeypatch.setattr(export, "load_model", None)
    done = shotless(tmp_path, "export", "--student", "./cd", "-o", "out", "--format", "onnx", check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "--format transformers" in done.stderr
    assert not [file.name for file in tmp_path.iterdir() if "out" in file.name]


def test_what_is_missing_or_does_not_go_together_is_named(tmp_path, student, graph, monkeypatch):
    def refused(*options, folder=student):
        done = shotless(tmp_path, "export", "--student", str(folder), "-o", "out", *options, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "--int8 is for --format onnx" in refused("--int8")
    assert "was exported itself" in refused("--format", "onnx", folder=graph)
    assert "no such file" in refused("--format", "onnx", "--check", "nothing.csv")
    with pytest.raises(UsageError, match="Give its own folder"):
        Predictor(graph, 1, keep_states=True)
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    assert "shotless[onnx]" in refused("--format", "onnx")
    with pytest.raises(UsageError, match="onnxruntime: not installed"):
        Predictor(graph, 1)


def test_predict_brings_neither_torch_nor_transformers(tmp_path, student, graph):
    shutil.copytree(graph, tmp_path / "onnx")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, imported = done.stdout.splitlines()
    assert imported == "[]"
    found = [list(json.loads(row)["probabilities"].values()) for row in rows]
    assert np.array(found) == pytest.approx(shares(student, TEXTS), abs=1e-4)


def test_inputs_that_cannot_be_used_have_the_same_errors_as_with_torch(student, graph):
    inputs = ["", 7, "a <|end|> in it", "long " * 600, "a film", "x" * 50]
    expected, found = (Predictor(own, 1, max_chars=2400).predict(inputs) for own in (student, graph))
    assert [row.error for row in found] == [row.error for row in expected]
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert [row.error is None for row in found] == [False, False, False, False, True, True]


def test_a_served_graph_answers_as_predict_does(graph):
    predictor = Predictor(graph, 1)
    with TestClient(make_app(predictor, Limits(10_000, 100, 5.0, 64, 1000))) as client:
        health = client.get("/health").json()
        answers = client.post("/predict", json={"inputs": TEXTS}).json()["predictions"]
    assert (health["engine"], health["weights_sha256"]) == ("onnxruntime", predictor.weights_sha256)
    assert answers == [found.as_json() for found in predictor.predict(TEXTS)]


def test_a_changed_folder_is_refused(tmp_path, graph):
    folder = shutil.copytree(graph, tmp_path / "onnx")
    weights = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CorruptError, match=r"model\.onnx\.data: sha256"):
        Predictor(folder, 1)
    (folder / "model.onnx.data").write_bytes(weights)
    manifest = read_json(folder / "manifest.json")
    write_json({key: value for key, value in manifest.items() if key != "onnx"}, folder / "manifest.json")
    with pytest.raises(CorruptError, match="Export the student again"):
        Predictor(folder, 1)


def test_costs_are_of_one_text_at_a_time(graph):
    found = answered(graph, [{"text": text} for text in TEXTS])
    assert np.array([row for row, _ in found["answers"]]) == pytest.approx(shares(graph, TEXTS), abs=1e-6)
    assert found["disk_mb"] == round(sum(file.stat().st_size for file in graph.iterdir() if file.name != "manifest.json") / 1e6, 1)


def test_a_student_in_chat_turns_keeps_them_without_its_template(tmp_path, model_folder):
    folder = tmp_path / "cd"
    shutil.copytree(model_folder("llama", num_hidden_layers=1), folder)
    turns = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|end|>' }}{% endfor %}assistant: "
    (folder / "chat_template.jinja").write_text(turns, encoding="utf-8")
    task = Task(TaskParams(template="{text}", verbalisers={"no": " b", "yes": " g"}), "chat")  # one token each
    write_manifest(folder, about_trained("cd", load_tokens(task, folder), {}))
    exported = write(folder, tmp_path / "onnx")
    texts = [*TEXTS, "ends<|end|>assistant: here"]
    asked, again = (Predictor(own, 1).predict(texts) for own in (folder, exported))
    assert [found.ids for found in asked] == [found.ids for found in again]
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode(found.ids) for found in asked] == [f"user: {text}<|end|>assistant: " for text in texts]
    np.testing.assert_allclose(shares(exported, texts), shares(folder, texts), atol=1e-5)
