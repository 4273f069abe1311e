"""Predictions of students and baselines on evaluation sets, against full prompts through the plain model."""

import shutil

import numpy as np
import pytest

from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictions import models_of, predict, read_sets
from pipeline.schema import PREDICTIONS, TARGETS, Context, Example, read_table, write_contexts, write_examples
from pipeline.targets.build import build_targets
from pipeline.task import Task


def predicted(world, name):
    params = world.params
    return predict(name, models_of(name, params, world.folders), params, world.folders, read_sets(params, world.folders))


def assert_predictions(world, table, runs, expected):
    """`expected(run, set, text)` are the probabilities."""
    assert table.schema.equals(PREDICTIONS)
    rows = table.to_pylist()
    keys = [(name, run, text, label) for name, pairs in world.sets.items() for run in runs for text, label in pairs]
    assert len(rows) == len(keys)
    for row, (name, run, text, label) in zip(rows, keys, strict=True):
        assert (row["set"], row["run"], row["label"]) == (name, run, label)
        assert row["example_id"] == Example({"text": text}).example_id
        assert np.log(row["probabilities"]) == pytest.approx(np.log(expected(run, name, text)), abs=1e-3)
        assert row["predicted"] == world.labels[int(np.argmax(row["probabilities"]))]


def test_a_student_answers_as_the_plain_forward_on_the_bare_query(world):
    assert_predictions(world, predicted(world, "cd"), [""], lambda _, __, text: world.answer("cd", "", text))


@pytest.mark.slow
def test_every_seed_of_a_student_answers_with_its_own_model(world):
    places = {"seed 4": "", "seed 7": "seeds/7"}
    assert_predictions(world, predicted(world, "several"), list(places), lambda run, _, text: world.answer("several", places[run], text))


MODEL_OF = {"shots/0": "first", "shots/1": "first", "none/0": "second"}


def calibrated(world, number, context, text):
    scores = world.scores(world.artifacts / "models" / MODEL_OF[context], context, text)
    return world.softmax(scores - world.offsets(number))


@pytest.mark.parametrize(("name", "targets"), [("icl", "few"), ("icl_mix", "mix")])
@pytest.mark.slow
def test_every_context_answers_by_its_own_model_calibrated_by_itself(world, name, targets):
    runs = [run for run in MODEL_OF if targets == "mix" or run.startswith("shots")]
    assert_predictions(world, predicted(world, name), runs, lambda run, _, text: calibrated(world, runs.index(run), run, text))


@pytest.mark.slow
def test_the_ensemble_is_the_weighted_mean_of_the_calibrated_answers_pooled(world):
    weights = {"shots/0": 3 / 8, "shots/1": 3 / 8, "none/0": 1 / 4}

    def expected(_, __, text):
        mean = sum(w * calibrated(world, n, context, text) for n, (context, w) in enumerate(weights.items()))
        return world.softmax(1.4 * np.log(mean) + [0.2, -0.1, -0.1])

    assert_predictions(world, predicted(world, "teacher"), [""], expected)


def test_a_set_of_a_source_with_offsets_of_its_own_is_calibrated_by_them(world):
    shifts = {"near": world.offsets(0), "far": [2.0, -1.0, -1.0]}

    def expected(_, name, text):
        return world.softmax(world.scores(world.artifacts / "models" / "second", "none/0", text) - shifts[name])

    assert_predictions(world, predicted(world, "icl_source"), ["none/0"], expected)


@pytest.mark.parametrize("by", ["set", "source"])
@pytest.mark.slow
def test_the_ensemble_of_the_transfer_set_would_be_the_targets(world, by):
    """Baselines and targets are made by the same arithmetic from the same calibration, of caches that were captured."""
    world.raw["targets"]["mix"] |= {"calibrations": {"few": "contextual"}, "calibrate_by": by, "temperature": 0.7}
    for teacher in ("few", "zero"):
        world.capture(teacher)
    build_targets("mix", world.params.targets["mix"], Task(world.params.task), world.folders)
    rows = [row for row in predicted(world, "teacher").to_pylist() if row["set"] == "near"]
    targets = read_table(world.artifacts / "targets" / "mix" / "targets.parquet", TARGETS).to_pylist()
    assert [row["example_id"] for row in rows] == [target["example_id"] for target in targets]
    for row, target in zip(rows, targets, strict=True):
        assert row["probabilities"] == pytest.approx(target["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"template": "{text} It was"}, {"verbalisers": {"positive": " great", "mixed": " so-so", "negative": " bad"}}],
    ids=["template", "verbalisers"],
)
def test_a_student_of_another_task_is_refused(world, changes):
    world.raw["task"] |= changes
    with pytest.raises(MismatchError, match=rf"students/cd: trained with task\.{next(iter(changes))}"):
        models_of("cd", world.params, world.folders)


@pytest.mark.slow
def test_the_order_of_labels_in_params_does_not_matter(world):
    before = predicted(world, "cd"), predicted(world, "teacher")
    world.raw["task"]["verbalisers"] = dict(reversed(world.raw["task"]["verbalisers"].items()))
    assert (predicted(world, "cd"), predicted(world, "teacher")) == before


def test_a_damaged_student_is_refused_by_file(world):
    (world.artifacts / "students" / "several" / "seeds" / "7" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"seeds/7/config\.json: 2 bytes"):
        models_of("several", world.params, world.folders)


def test_a_context_that_changed_is_named(world):
    write_contexts([Context("shots/0", "another")], world.artifacts / "data" / "contexts" / "shots.parquet")
    with pytest.raises(MismatchError, match=r"shots\.parquet: context 'shots/0' is not the one"):
        models_of("icl", world.params, world.folders)


def test_a_teacher_that_is_no_longer_the_calibrated_one_is_refused(world):
    shutil.rmtree(world.artifacts / "models" / "first")
    shutil.copytree(world.model_folder("llama", seed=2), world.artifacts / "models" / "first")
    with pytest.raises(MismatchError, match=r"models/first: not the model"):
        predicted(world, "icl")


def test_slices_come_from_the_file_itself(world):
    examples = [Example({"text": "a film"}, "mixed", slices={"stars": "3", "words": None})]
    write_examples(examples, ("text",), world.artifacts / "data" / "evaluation" / "near.parquet", ("stars", "words"))
    sets = read_sets(world.params, world.folders)
    assert (sets["near"], [example.slices for example in sets["far"]]) == (examples, [{}] * 3)


@pytest.mark.parametrize(("name", "kind"), [("several", "student"), ("icl", "baseline"), ("teacher", "baseline")])
@pytest.mark.slow
def test_the_stage_writes_predictions_and_metrics_of_them(world, name, kind):
    evaluate(name, world.params, world.folders)
    table = read_table(world.artifacts / "predictions" / f"{name}.parquet", PREDICTIONS)
    assert table == predicted(world, name)
    metrics, detail = world.metric("eval", name), world.metric("detail", name)
    assert (metrics["method"], metrics["kind"]) == (name, kind)
    assert metrics["sets"] == evaluate_predictions(table, world.labels, resamples=50, seed=3)
    assert [entry["n"] for entry in metrics["sets"].values()] == [4, 3]
    assert ("contexts" in metrics["sets"]["near"]) == (name != "teacher")
    assert world.metric("summary", name).keys() == {"accuracy_in", "accuracy_lowest", "ece", "log_loss", "macro_f1"}
    assert {entry["dimension"] for entry in detail["slices"]} == {"domain", "label", "length"}
    files = ("artifacts/predictions", "metrics/eval", "metrics/summary", "metrics/detail")
    before = {file: next((world.root / file).iterdir()).read_bytes() for file in files}
    evaluate(name, world.params, world.folders)
    assert before == {file: next((world.root / file).iterdir()).read_bytes() for file in files}


def test_an_unknown_method_is_refused_with_the_choices(world):
    with pytest.raises(UsageError, match="no 'nobody'; choose one of: icl, icl_mix, icl_source, teacher"):
        evaluate("nobody", world.params, world.folders)


def test_an_example_in_two_sets_is_answered_alike(world):
    rows = predicted(world, "cd").to_pylist()
    shared = [row["probabilities"] for row in rows if row["example_id"] == Example({"text": "a film"}).example_id]
    assert len(shared) == 2
    assert shared[0] == shared[1]


@pytest.mark.slow
def test_baselines_share_the_scores_of_the_same_prompts_and_students_leave_none(world, monkeypatch):
    predicted(world, "cd")
    assert not (world.folders.work / "scores").exists()
    first = predicted(world, "teacher")
    monkeypatch.setattr("pipeline.teachers.scorer.load_model", None)
    assert predicted(world, "teacher") == first
    predicted(world, "icl")
    predicted(world, "icl_source")
