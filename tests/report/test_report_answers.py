"""The report of a task with free answers: numbers by hand from made-up answers, on the page, in the JSON and on the terminal."""

import json
from io import StringIO

import pyarrow as pa
import pytest
from report_files import PROJECT
from rich.console import Console
from ruamel.yaml import YAML

from pipeline.params import parse_params
from pipeline.report.build import build_report
from pipeline.report.summary import print_summary
from pipeline.schema import ANSWERS, write_table
from pipeline.schema import examples as example_schema

GOOD, BAD = '{"sentiment": "positive", "because": "a joy"}', '{"sentiment": "negative", "because": "<b>flat</b>"}'
SAID = {"teacher": [GOOD, BAD, GOOD, BAD], "untouched": ["what?", GOOD, GOOD, ""], "cd": [GOOD, BAD, GOOD, GOOD]}
GOLD = ["positive", "negative", "positive", "negative"]


@pytest.fixture
def params():
    raw = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    raw["task"] = {
        "template": "Review: {text}\nJSON:",
        "completion": {"stop": ["}"], "form": {"keys": {"sentiment": ["negative", "positive"], "because": []}, "label": "sentiment"}},
    }
    model = next(iter(raw["models"]))
    raw["contexts"] = {"few": {"demonstrations": 0, "instruction": "Answer so.", "tokenizer": f"models/{model}"}}
    raw["teachers"] = {"few": {"model": f"models/{model}", "contexts": "few"}}
    raw["targets"] = {}
    raw["students"] = {"cd": {"base": f"models/{model}", "learn_from": "scores/few", "steps": 5, "learning_rate": 1e-4}}
    raw["baselines"] = {
        "teacher": {"prompts": "scores/few", "contexts": "each"},
        "untouched": {"prompts": f"models/{model}", "contexts": "each"},
    }
    raw["evaluation"]["reference"] = "teacher"
    return parse_params(raw)


@pytest.fixture
def folder(params, tmp_path):
    for method, said in SAID.items():
        rows = [
            {"set": name, "context_id": "", "example_id": f"{name}{n}", "label": GOLD[n], "answer": f" {answer}\n", "tokens": 10 + n}
            for name in params.data.evaluation
            for n, answer in enumerate(said)
        ]
        write_table(pa.Table.from_pylist(rows, ANSWERS), tmp_path / "artifacts" / "predictions" / f"{method}.parquet")
    for name in params.data.evaluation:
        rows = [
            {"example_id": f"{name}{n}", "label": GOLD[n], "completion": None, "source": "s", "line": n, "text": f"<i>text {n}</i>"}
            for n in range(4)
        ]
        path = tmp_path / "artifacts" / "data" / "evaluation" / f"{name}.parquet"
        write_table(pa.Table.from_pylist(rows, example_schema(("text",))), path)
    build_report(params, tmp_path)
    return tmp_path / "report"


def test_the_json_has_every_share_with_its_interval(params, folder):
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found["reference"] == "teacher"
    for name in params.data.evaluation:
        cd, untouched, teacher = (found["methods"][method]["sets"][name] for method in ("cd", "untouched", "teacher"))
        assert (teacher["well_formed"], cd["well_formed"], untouched["well_formed"]) == (1.0, 1.0, 0.5)
        assert (teacher["accuracy"], cd["accuracy"], untouched["accuracy"]) == (1.0, 0.75, 0.25)
        assert cd["agreement"] == {"text": 0.75, "sentiment": 0.75, "because": 0.75}
        assert untouched["agreement"] == {"text": 0.25, "sentiment": 0.25, "because": 0.25}
        assert "agreement" not in teacher
        assert cd["tokens"] == 11.5
        assert untouched["well_formed_ci95"][0] < 0.5 < untouched["well_formed_ci95"][1]
        assert found["sets"][name]["n"] == 4


def test_the_page_shows_answers_side_by_side_and_escapes_them(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 12
    assert "what? (ill-formed)" in page
    assert "&lt;i&gt;text" in page
    assert "<i>text" not in page
    assert "<b>flat" not in page
    assert 'id="answers"' in page
    assert "<script" not in page


def test_the_same_inputs_give_the_same_bytes(params, folder):
    before = (folder / "index.html").read_bytes()
    build_report(params, folder.parent)
    assert (folder / "index.html").read_bytes() == before


def test_the_terminal_s_table_has_means_over_sets(folder):
    out = StringIO()
    print_summary(folder, Console(file=out, width=100))
    line = next(line for line in out.getvalue().splitlines() if line.lstrip().startswith("cd"))
    assert [cell.strip() for cell in line.split("│")] == ["cd", "100.0", "75.0", "75.0", "75.0", "11.5"]
