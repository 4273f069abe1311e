"""The loop, as a user runs it.

Monitor says that retraining is due, the new inputs join the transfer set, the next run asks the teacher about those alone, and the student
is another one.
"""

import json
import shutil
from contextlib import chdir

import polars as pl
from ruamel.yaml import YAML
from serving_world import shotless

from stages import fetch, prepare, student, targets, teacher

FILMS = [
    "a warm film",
    "a dull, lifeless mess",
    "the plot goes nowhere",
    "I loved every minute",
    "strange little picture",
    "so bored",
    "funny",
]
OLD = [f"{film} and {other}" for film in FILMS for other in FILMS[:6]]
NEW = [f"x great N/A x great service number {n} cold food late late x" for n in range(24)]
TASK = {"template": "Review: {text}\nSentiment:", "verbalisers": {"negative": " bad", "positive": " good"}}


def source(path, labelled):
    return {"origin": {"source": "local", "path": path}, "format": "jsonl"} | ({} if labelled else {"label": None})


def small_params():
    return {
        "task": TASK,
        "models": {"tiny": {"source": "local", "path": "mine/model"}},
        "data": {
            "sources": {"pile": source("mine/pile.jsonl", False), "gold": source("mine/gold.jsonl", True)},
            "demonstrations": {"source": "gold", "per_label": 1},
            "transfer": {"source": "pile"},
            "evaluation": {"test": {"source": "gold", "domain": "in", "per_label": 1}},
        },
        "contexts": {"orders": {"demonstrations": 2, "count": 2, "tokenizer": "models/tiny"}},
        "tunings": {},
        "teachers": {"few_shot": {"model": "models/tiny", "contexts": "orders", "cache": {"top_k": 4}}},
        "targets": {"few_shot": {"teachers": {"few_shot": 1.0}}},
        "students": {"cd": {"base": "models/tiny", "learn_from": "targets/few_shot", "steps": 3, "learning_rate": 1e-3}},
        "baselines": {"teacher": {"prompts": "targets/few_shot", "contexts": "ensemble"}},
        "evaluation": {"reference": "teacher"},
        "monitor": {"permutations": 599},
        "runtime": {"threads": 1},
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def repro(folder):
    """The stages up to the student, in the DAG's order, as `dvc repro` runs them: outputs are removed first. Here in one process, which
    saves the seconds that each stage needs to import torch; `tests/real` runs DVC itself.
    """
    with chdir(folder):
        fetch.main()
        prepare.main()
        for stage, name, output in ((teacher, "few_shot", "scores"), (targets, "few_shot", "targets"), (student, "cd", "students")):
            shutil.rmtree(f"artifacts/{output}/{name}", ignore_errors=True)
            stage.main(name)


def scored(folder):
    """(context, example) of every row that the teacher has scored, with repetitions, from the store."""
    parts = sorted((folder / ".work").glob("scores/*/part-*.parquet"))
    return [key for part in parts for key in pl.read_parquet(part, columns=["context_id", "example_id"]).iter_rows()]


def test_new_inputs_are_scored_alone_and_the_student_is_trained_again(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / ".work"))
    shutil.copytree(model_folder("llama"), tmp_path / "mine" / "model")
    write_lines(tmp_path / "mine" / "pile.jsonl", [{"text": text} for text in OLD])
    gold = ["terrible food", "late service once more", "great", "a great, great minute here"]
    write_lines(tmp_path / "mine" / "gold.jsonl", [{"text": t, "label": ("negative", "positive")[n // 2]} for n, t in enumerate(gold)])
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(small_params(), file)
    repro(tmp_path)
    first, weights = scored(tmp_path), (tmp_path / "artifacts/students/cd/model.safetensors").read_bytes()
    transfer = set(pl.read_parquet(tmp_path / "artifacts/data/transfer.parquet")["example_id"])
    assert len(first) == len(set(first)) == 2 * (1 + len(transfer))  # one input without content beside them

    write_lines(tmp_path / "new.jsonl", [{"text": text} for text in NEW])
    due = shotless(tmp_path, "monitor", "--inputs", "new.jsonl", "--student", "cd", check=False)
    assert due.returncode == 3, due.stdout + due.stderr
    assert "Retraining is due" in due.stdout

    with (tmp_path / "mine" / "pile.jsonl").open("a", encoding="utf-8") as file:
        file.write((tmp_path / "new.jsonl").read_text("utf-8"))
    assert shotless(tmp_path, "fresh", check=False).returncode == 1
    repro(tmp_path)
    grown = set(pl.read_parquet(tmp_path / "artifacts/data/transfer.parquet")["example_id"])
    assert transfer < grown
    second = scored(tmp_path)
    assert sorted(set(second) - set(first)) == sorted((context, key) for context in {c for c, _ in first} for key in grown - transfer)
    assert len(second) == len(set(second))  # nothing was scored twice
    assert (tmp_path / "artifacts/students/cd/model.safetensors").read_bytes() != weights
    again = shotless(tmp_path, "monitor", "--inputs", "new.jsonl", "--student", "cd", check=False)
    assert "vocabulary" in again.stdout  # a new student has a new reference, made of the grown transfer set
    assert len(list((tmp_path / ".work" / "reference").glob("*.parquet"))) == 2
