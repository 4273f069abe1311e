"""The whole prepare stage on a small task of a user's own: files, counts, rules, bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.data.fetch import fetch
from pipeline.data.prepare import prepare
from pipeline.errors import UsageError
from pipeline.params import Params, parse_params
from pipeline.schema import CONTEXTS, examples, read_table

PROJECT = Path(__file__).resolve().parents[2]
NOUNS = ["harbour", "violin", "planet", "kitchen", "marble", "lantern", "meadow", "engine", "pepper", "window", "castle", "ribbon"]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join([*draw.sample(NOUNS, 3), f"{draw.getrandbits(48):x}"]) for _ in range(count)]


@pytest.fixture
def project(tmp_path: Path, raw_params: dict[str, Any], model_folder: Callable[..., Path]) -> dict[str, Any]:
    """Params of a task with a csv, a jsonl and a tsv file of the user's own, in `tmp_path`."""
    mine, others = texts(60, 0), texts(30, 1)
    (tmp_path / "demos.csv").write_text("review,stars\n" + "".join(f'"{t}",{i % 2}\n' for i, t in enumerate(mine[:20])), encoding="utf-8")
    pool = [*mine[20:], others[0].upper() + "!", mine[25], "  ", "x" * 3000]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pool), encoding="utf-8")
    (tmp_path / "test.tsv").write_bytes("".join(f"{(-1) ** i * 2.5}\t{t}\r\n" for i, t in enumerate(others)).encode())
    shutil.copytree(model_folder(), tmp_path / "tiny")
    raw_params["models"] = {"tiny": {"source": "local", "path": str(tmp_path / "tiny")}}
    local = {name: {"source": "local", "path": str(tmp_path / name)} for name in ("demos.csv", "pool.jsonl", "test.tsv")}
    raw_params["data"] = {
        "sources": {
            "demos": {
                "origin": local["demos.csv"],
                "format": "csv",
                "fields": {"text": "review"},
                "label": {"column": "stars", "values": {"0": "negative", "1": "positive"}},
            },
            "pool": {"origin": local["pool.jsonl"], "format": "jsonl", "label": None},
            "test": {
                "origin": local["test.tsv"],
                "format": "tsv",
                "columns": ["rating", "text"],
                "label": {"column": "rating", "threshold": 1.0},
            },
        },
        "demonstrations": {"source": "demos", "per_label": 3},
        "transfer": {"source": "pool"},
        "evaluation": {"test": {"source": "test", "domain": "out", "per_label": 10}},
        "bad_rows_limit": 0.1,
    }
    raw_params["contexts"] = {
        "none": {"demonstrations": 0, "tokenizer": "models/tiny"},
        "orders": {"demonstrations": 4, "count": 3, "tokenizer": "models/tiny"},
    }
    for entry in (entry for block in ("tunings", "teachers", "students") for entry in raw_params[block].values()):
        entry["model" if "model" in entry else "base"] = "models/tiny"
    return raw_params


def run(raw: dict[str, Any], folder: Path) -> Params:
    params = parse_params(raw)
    fetch(params, folder / "artifacts")
    prepare(params, folder / "artifacts", folder / "metrics" / "prepare.json")
    return params


def test_a_users_own_files_become_examples_contexts_and_counts(project: dict[str, Any], tmp_path: Path) -> None:
    run(project, tmp_path)
    data, schema = tmp_path / "artifacts" / "data", examples(["text"])
    shown, learnt = (read_table(data / f"{name}.parquet", schema).to_pylist() for name in ("demonstrations", "transfer"))
    held_out = read_table(data / "evaluation" / "test.parquet", schema).to_pylist()
    assert (len(shown), len(held_out)) == (6, 20)
    assert {row["label"] for row in learnt} == {None}, "gold labels of the transfer set never leave the raw data"
    assert all(" " in row["text"] and row["source"] == "pool" for row in learnt)
    lines = (tmp_path / "test.tsv").read_text(encoding="utf-8").splitlines()
    assert all(lines[row["line"] - 1].endswith(row["text"]) for row in held_out), "a line leads back to the raw file"
    contexts = read_table(data / "contexts" / "orders.parquet", CONTEXTS).to_pylist()
    assert [row["name"] for row in contexts] == ["orders/0", "orders/1", "orders/2"]
    assert {i for row in contexts for i in row["example_ids"]} <= {row["example_id"] for row in shown}
    assert read_table(data / "contexts" / "none.parquet", CONTEXTS).to_pylist()[0]["text"] == ""

    counts = json.loads((tmp_path / "metrics" / "prepare.json").read_text())
    assert counts["leaks_left"] == 0
    pool = counts["sources"]["pool"]
    assert (pool["rows"], pool["quarantined"], pool["exact_repeats_removed"]) == (44, {"empty": 1, "too long": 1}, 1)
    removed = counts["roles"]["transfer"]["copies_of_evaluation_removed"]["test"]
    assert counts["roles"]["transfer"]["drawn"] == len(learnt) == 41 - removed
    assert counts["roles"]["evaluation"]["test"]["labels"] == {"negative": 10, "positive": 10}
    quarantine = [json.loads(line) for line in (data / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["file"], entry["line"], entry["field"], entry["reason"]) for entry in quarantine[:2]] == [
        ("pool.jsonl", 43, "text", "empty"),
        ("pool.jsonl", 44, "text", "too long"),
    ]
    assert len(quarantine) == 2 + removed
    assert all(len(entry["value"]) <= 80 for entry in quarantine)


def test_a_slice_column_reaches_the_evaluation_set_and_nothing_that_is_learnt_from(project: dict[str, Any], tmp_path: Path) -> None:
    project["data"]["sources"]["test"]["slices"] = {"stars": "rating"}
    run(project, tmp_path)
    data = tmp_path / "artifacts" / "data"
    held_out = read_table(data / "evaluation" / "test.parquet", examples(["text"], ["stars"])).to_pylist()
    assert {(row["label"], row["slice.stars"]) for row in held_out} == {("positive", "2.5"), ("negative", "-2.5")}
    for name in ("demonstrations", "transfer"):
        assert pq.read_schema(data / f"{name}.parquet").names == examples(["text"]).names


def test_a_copy_of_an_evaluation_text_in_the_pool_is_quarantined_with_its_original(project: dict[str, Any], tmp_path: Path) -> None:
    project["data"]["evaluation"]["test"]["per_label"] = None
    run(project, tmp_path)
    quarantine = [json.loads(line) for line in (tmp_path / "artifacts/data/quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    (entry,) = [entry for entry in quarantine if "copy_of" in entry]
    assert (entry["file"], entry["line"], entry["reason"]) == ("pool.jsonl", 41, "copy of an evaluation example")
    assert entry["copy_of"] == {"set": "test", "source": "test", "line": 1, "similarity": 1.0}


def test_too_many_bad_rows_stop_the_run_and_leave_the_quarantine_to_look_at(project: dict[str, Any], tmp_path: Path) -> None:
    project["data"]["bad_rows_limit"] = 0.01
    with pytest.raises(UsageError, match=r"data\.sources\.pool: 2 of 44 rows of pool\.jsonl cannot be used"):
        run(project, tmp_path)
    assert len((tmp_path / "artifacts/data/quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert not (tmp_path / "artifacts/data/transfer.parquet").exists()


def test_a_source_that_was_not_fetched_is_named(project: dict[str, Any], tmp_path: Path) -> None:
    params = run(project, tmp_path)
    shutil.rmtree(tmp_path / "artifacts" / "raw" / "pool")
    with pytest.raises(UsageError, match=r"source 'pool' was not fetched; run `dvc repro fetch`"):
        prepare(params, tmp_path / "artifacts", tmp_path / "metrics.json")


def command(stage: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage as DVC does."""
    own = os.environ | {"PYTHONPATH": str(PROJECT)} | environment
    return subprocess.run([sys.executable, "-m", stage], cwd=folder, env=own, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_process_with_another_hash_seed_writes_the_same_bytes(project: dict[str, Any], tmp_path: Path) -> None:
    run(project, tmp_path)
    expected = contents(tmp_path / "artifacts" / "data"), contents(tmp_path / "metrics")
    shutil.rmtree(tmp_path / "metrics")
    YAML(typ="safe", pure=True).dump(project, tmp_path / "params.yaml")
    done = command("stages.prepare", tmp_path, PYTHONHASHSEED="12345")
    assert done.returncode == 0, done.stderr
    assert (contents(tmp_path / "artifacts" / "data"), contents(tmp_path / "metrics")) == expected
    assert "copies of evaluation examples kept out" in done.stdout


def test_a_user_error_ends_with_a_message_and_exit_code_2(project: dict[str, Any], tmp_path: Path) -> None:
    project["data"]["sources"]["pool"]["origin"]["path"] = "no/such.jsonl"
    project["models"]["tiny"] = {"source": "hub", "repo": "owner/name", "revision": "0" * 40, "licence": "MIT"}
    YAML(typ="safe", pure=True).dump(project, tmp_path / "params.yaml")
    done = command("stages.fetch", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.sources.pool.origin.path: 'no/such.jsonl' does not exist")
    assert "Traceback" not in done.stderr
