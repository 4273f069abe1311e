"""What `shotless review` asks about: undecided texts that differ, labels that all voters contradict; and the file that it writes."""

import itertools
from contextlib import chdir
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from score_rows import about, stored
from serving_world import make_student, shotless
from small_project import OLD, make_project, small_params

from pipeline.cache.folder import described_task, write_cache
from pipeline.data.examples import read_source, read_written_source, write_source
from pipeline.files import Folders
from pipeline.params import SourceParams, parse_params
from pipeline.review import choose, suspects
from pipeline.schema import LABELLED, SCORES, STORED, Context, write_examples, write_table
from pipeline.targets.build import build_targets
from pipeline.task import Task

RNG = np.random.default_rng(0)


def test_each_cluster_gives_its_least_decided_side_and_no_row_twice():
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    states = np.concatenate([centre + RNG.normal(size=(20, 2)) for centre in centres])
    probabilities = np.tile([0.999, 0.001], (60, 1))
    undecided = [3, 25, 47]
    probabilities[undecided] = 0.5
    assert sorted(choose(probabilities, states, 3)) == undecided


@pytest.mark.parametrize("most", [1, 4, 9, 20])
def test_as_many_as_asked_or_as_there_are_least_decided_first(most):
    first = RNG.uniform(0.5, 1, 9)
    probabilities = np.stack([first, 1 - first], -1)
    rows = choose(probabilities, RNG.normal(size=(9, 3)), most)
    assert len(set(rows)) == len(rows) == min(most, 9)
    assert first[rows].tolist() == sorted(first[rows])


def test_a_suspect_is_a_row_whose_label_no_voter_names_and_all_name_the_same_other():
    voters = RNG.dirichlet(np.full(3, 0.3), (3, 200))
    gold = RNG.integers(0, 3, 200)
    found = suspects(voters, gold)
    naive = {row for row in range(200) if len({int(v[row].argmax()) for v in voters}) == 1 and voters[0, row].argmax() != gold[row]}
    assert set(found) == naive
    assert naive
    sure = [voters[:, row].mean(0).max() for row in found]
    assert all(a >= b for a, b in itertools.pairwise(sure))


@pytest.fixture(scope="module")
def project(tmp_path_factory, model_folder):
    """A project after its student's training, with a teacher that names the other label for the first of four demonstrations."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, model_folder("llama"))
    params, contexts = parse_params(small_params()), [Context("orders/0", "one"), Context("orders/1", "two")]
    task, ids = Task(params.task), [context.context_id for context in contexts]
    with chdir(folder):
        folders = Folders.here()
        for name in params.data.sources:
            write_source(name, params, folders)
        transfer, labelled = (read_written_source(name, params.data.sources[name], task, folders).examples for name in ("pile", "gold"))
        write_examples(transfer, task.fields, folders.artifacts / "data" / "transfer.parquet")
        write_examples(labelled, task.fields, folders.artifacts / "data" / "demonstrations.parquet")
        keys = [(context, example.example_id) for context in ids for example in transfer]
        found = stored([f"{context} {example}" for context, example in keys])
        columns = {"context_id": [context for context, _ in keys], "example_id": [example for _, example in keys]}
        table = pa.table({**columns, **{column: found[column] for column in STORED.names}}, schema=SCORES)
        listed = [{"context_id": context.context_id, "name": context.name, "tokens": 9} for context in contexts]
        described = about(task=described_task(task), labels=list(task.labels), contexts=listed, content_free=[transfer[0].example_id])
        write_cache(folders.artifacts / "teachers" / "few_shot", [table], described)
        sure = {label: [-0.1 if label == own else -3.0 for own in task.labels] for label in task.labels}
        says = {e.example_id: sure["positive" if e is labelled[0] else str(e.label)] for e in labelled}
        rows = [{"context_id": context, "example_id": one, "label_logprobs": says[one]} for context in ids for one in says]
        write_table(pa.Table.from_pylist(rows, schema=LABELLED), folders.artifacts / "labelled" / "few_shot.parquet")
        build_targets("few_shot", params.targets["few_shot"], task, folders)
    make_student(folder / "artifacts" / "students" / "cd", model_folder("llama"))
    return folder


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_file_is_a_source_with_suspects_that_keep_their_label_and_texts_that_wait_for_one(project, form):
    done = shotless(project, "review", "--student", "cd", "--most", "5", "--threads", "1", "--output", f"todo.{form}")
    assert done.stderr.strip().endswith(f"todo.{form}: 5 texts to label next, 1 labels to look at again; fill in `label`")
    read = {"csv": pl.read_csv, "jsonl": pl.read_ndjson, "parquet": pl.read_parquet}[form]
    rows = read(project / f"todo.{form}").to_dicts()
    suspect = {"text": "terrible food", "label": "negative", "why": "suspect", "suggested": "positive", "file": "gold.jsonl", "line": 1}
    assert {key: value for key, value in rows[0].items() if key != "probability"} == suspect
    assert {(row["why"], row["label"], row["file"]) for row in rows[1:]} == {("next", None, "pile.jsonl")}
    assert all(row["text"] == OLD[row["line"] - 1] and 0.5 <= row["probability"] <= 1 for row in rows[1:])

    source = read_source("reviewed", SourceParams(path=f"todo.{form}"), project / f"todo.{form}", Task(parse_params(small_params()).task))
    assert (source.bad_rows, source.counts["labelled"], source.counts["left_out_by_label_rule"]) == (0, 1, 5)
    again = shotless(project, "review", "--student", "cd", "--output", f"todo.{form}", check=False)
    assert (again.returncode, "exists, and may hold labels" in again.stderr) == (2, True)


def test_a_student_that_is_not_of_a_target_set_is_refused(project, model_folder):
    make_student(project / "artifacts" / "students" / "other", model_folder("llama"))
    done = shotless(project, "review", "--student", "other", "--output", "o.csv", check=False)
    assert done.returncode == 2
    assert "review asks a student that learnt from a target set of params.yaml: cd." in done.stderr
    assert not Path(project / "o.csv").exists()
