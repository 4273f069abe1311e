"""The tables of the study: means over draws, differences from the method that is the best in the mean, parts by size."""

import json

import pytest
from polars import read_ndjson

from benchmarks.study.__main__ import COSTS, FIGURES, WORKSPACES, differences, gather, means, parts_of, write_files
from pipeline.files import write_json

PLAN = {"per_label": [8, 4], "draws": [10, 12], "tasks": {"film": {}, "sms": {"pool": "pool.jsonl"}}}
ACCURACY = {"sms-10": {"encoder": 0.9, "setfit": 0.8, "linear": 0.95}, "sms-12": {"encoder": 0.8, "setfit": 0.85, "linear": 0.5}}


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, methods in ACCURACY.items():
        write_json({"student": "encoder"}, WORKSPACES / part / "artifacts" / "best.json")
        for method, accuracy in methods.items():
            sets = {
                "one": {"accuracy": accuracy, "macro_f1": accuracy, "ece": 0.1},
                "other": {"accuracy": 1.0, "macro_f1": 1.0, "ece": 0.0},
            }
            write_json({"sets": sets}, WORKSPACES / part / "metrics" / "eval" / f"{method}.json")
        write_json({"latency_ms": 4.0, "peak_rss_bytes": 5e8}, WORKSPACES / part / "metrics" / "cost" / "encoder.json")
    write_json({"seconds": 80.0}, WORKSPACES / "sms-10" / "metrics" / "runtime" / "student-encoder.json")
    return gather(parts_of(PLAN))


def test_a_task_of_files_has_parts_of_each_size_and_the_default_run_of_one():
    assert list(parts_of(PLAN)) == ["film-10", "sms-10", "film-12", "sms-12", "sms-10-4", "sms-12-4"]
    assert parts_of(PLAN)["sms-12-4"] == ("sms", 12, 4)


@pytest.mark.parametrize(("labels", "drawn"), [(4, {"ham": 4, "spam": 4}), ("random", {"ham": 16, "spam": 1})])
def test_labelled_rows_are_as_many_of_each_label_or_as_they_come(tmp_path, labels, drawn):
    rows = [{"text": f"text {n}", "label": "spam" if n < 6 else "ham"} for n in range(1000)]
    for name in ("pool", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files = {name: f"{name}.jsonl" for name in ("pool", "test")}
    plan = {"data": tmp_path, "sizes": {"unlabelled": 30, "test": 20}, "per_label": [8], "tasks": {"sms": files}}
    write_files(plan, ("sms", 10, labels), tmp_path / "part")
    labelled, unlabelled, test = (read_ndjson(tmp_path / "part" / f"{name}.jsonl") for name in ("labelled", "unlabelled", "test"))
    assert dict(labelled["label"].value_counts().rows()) == drawn
    assert (len(unlabelled), len(test)) == (30, 20)
    assert not set(unlabelled["text"]).intersection(labelled["text"])


def test_a_task_of_another_size_is_a_column_of_its_own(found):
    write_json({"student": "encoder"}, WORKSPACES / "sms-1-16" / "artifacts" / "best.json")
    sets = {"one": dict.fromkeys(FIGURES, 0.5)}
    write_json({"sets": sets}, WORKSPACES / "sms-1-16" / "metrics" / "eval" / "encoder.json")
    assert gather({"sms-1-16": ("sms", 1, 16)})["task"].unique().to_list() == ["sms-16"]


def test_figures_are_means_over_sets_and_draws(found):
    assert "| encoder | 92.5 / 92.5 / 5.0 |" in means(found, FIGURES)
    assert "| the chosen student | 92.5 / 92.5 / 5.0 |" in means(found, FIGURES)
    assert "| linear | 86.2 / 86.2 / 5.0 |" in means(found, FIGURES)
    assert "| encoder | 4.0 / 500.0 / 80.0 |" in means(found, COSTS)
    assert "| setfit | – / – / – |" in means(found, COSTS)


def test_the_best_baseline_is_the_one_with_the_best_mean(found):
    assert "| the best baseline | +1.2 (-2.5 to +5.0) / +1.2 (-2.5 to +5.0), setfit |" in differences(found)
