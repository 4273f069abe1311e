"""The loop, as a user runs it.

Monitor says that retraining is due, the new inputs join the transfer set, the next run asks the teacher about those alone, and the student
is another one.
"""

import shutil
from contextlib import chdir

import polars as pl
import pytest
from serving_world import shotless
from small_project import make_project, write_lines

from pipeline.params import resolve
from stages import model, prepare, select, source, student, targets, teacher

NEW = [f"x great N/A x great service number {n} cold food late late x" for n in range(24)]


def repro(folder):
    """The stages up to the student, in the DAG's order, as `dvc repro` runs them: outputs are removed first. Here in one process, which
    saves the seconds that each stage needs to import torch; `tests/real` runs DVC itself.
    """
    with chdir(folder):
        resolve()
        model.main("tiny")
        for name in ("pile", "gold"):
            source.main(name)
        prepare.main()
        for stage, name, output in ((teacher, "few_shot", "teachers"), (targets, "few_shot", "targets"), (student, "cd", "students")):
            shutil.rmtree(f"artifacts/{output}/{name}", ignore_errors=True)
            stage.main(name)
        select.main()


def scored(folder):
    """The prompts of all rows that the teacher has scored, with repetitions, from the store."""
    parts = sorted((folder / ".work" / "scores").glob("*/part-*.parquet"))
    return [prompt for part in parts for prompt in pl.read_parquet(part, columns=["prompt_sha"])["prompt_sha"]]


@pytest.mark.slow
def test_new_inputs_are_scored_alone_and_the_student_is_trained_again(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / ".work"))
    make_project(tmp_path, model_folder("llama"))
    repro(tmp_path)
    first, weights = scored(tmp_path), (tmp_path / "artifacts/students/cd/model.safetensors").read_bytes()
    transfer = set(pl.read_parquet(tmp_path / "artifacts/data/transfer.parquet")["example_id"])
    assert len(first) == len(set(first)) == 2 * (1 + len(transfer))  # in 2 contexts, one input without content beside them

    write_lines(tmp_path / "new.jsonl", [{"text": text} for text in NEW])
    due = shotless(tmp_path, "monitor", "--inputs", "new.jsonl", check=False)
    assert due.returncode == 3, due.stdout + due.stderr
    assert "Retraining is due" in due.stdout

    with (tmp_path / "mine" / "pile.jsonl").open("a", encoding="utf-8") as file:
        file.write((tmp_path / "new.jsonl").read_text("utf-8"))
    repro(tmp_path)
    grown = set(pl.read_parquet(tmp_path / "artifacts/data/transfer.parquet")["example_id"])
    assert transfer < grown
    second = scored(tmp_path)
    assert len(second) == len(set(second)) == 2 * (1 + len(grown))  # nothing was scored twice
    assert set(first) < set(second)
    assert (tmp_path / "artifacts/students/cd/model.safetensors").read_bytes() != weights
