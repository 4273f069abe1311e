"""Answers of students and baselines on evaluation sets, against full prompts."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from method_world import LABELS, SETS, SHOTS, TRANSFER, VERBALISERS, World, naive_calibrated, naive_scores, raw_params, rows_of

from pipeline.teachers import scorer as scorer_module
from pipeline.targets.calibration import Combination
from pipeline.errors import MismatchError, UsageError
from pipeline.evaluation.predict import combination_of, predict_baseline, teacher_contexts
from pipeline.files import context_id, example_id
from pipeline.params import parse_params
from pipeline.schema import CONTEXTS, PREDICTIONS, read_table, write_table
from pipeline.task import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    return World(tmp_path_factory.mktemp("evaluation"), model_folder("llama"), model_folder("llama", seed=1))


@pytest.fixture
def own_world(world, tmp_path):
    return world.copied(tmp_path / "copy")


def assert_predictions(table, expected):
    """`expected`: rows of set, context, text, gold label and probabilities, in order."""
    assert table.schema.equals(PREDICTIONS)
    rows = table.to_pylist()
    assert len(rows) == len(expected)
    for row, (name, context, text, label, probabilities) in zip(rows, expected, strict=True):
        assert (row["set"], row["context_id"]) == (name, context)
        assert (row["example_id"], row["label"]) == (example_id({"text": text}), label)
        assert np.log(row["probabilities"]) == pytest.approx(np.log(probabilities), abs=1e-3)
        assert row["predicted"] == LABELS[int(np.argmax(row["probabilities"]))]


def test_a_student_s_predictions_are_those_of_the_plain_forward_on_the_bare_query(world, tokenizer):
    folder = world.artifacts / "students" / "cd"
    expected = [
        (name, "", text, label, np.exp(naive_scores(folder, tokenizer, "", text))) for name, pairs in SETS.items() for text, label in pairs
    ]
    assert_predictions(world.student(), expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"template": "{text} It was"}, "template"),
        ({"verbalisers": VERBALISERS | {"positive": " great"}}, "verbalisers"),
        ({"verbalisers": {"negative": " bad", "positive": " good"}}, "verbalisers"),
    ],
)
def test_a_student_of_another_template_or_other_verbalisers_is_refused_with_both(world, changes, what):
    task = Task(world.task.params.model_copy(update=changes))
    with pytest.raises(MismatchError) as caught:
        world.student(task)
    for part in (str(world.artifacts / "students" / "cd"), f"trained with {what}", repr(changes[what]), "run `dvc repro`"):
        assert part in str(caught.value)


def test_every_context_on_its_own_is_calibrated_by_itself(world, tokenizer):
    target = raw_params()["targets"]["few"]
    folder = world.artifacts / "models" / "first"
    expected = [
        (name, context_id(context), text, label, naive_calibrated(world, tokenizer, target, folder, context, text))
        for name, pairs in SETS.items()
        for context in SHOTS
        for text, label in pairs
    ]
    assert_predictions(world.baseline("few", ensemble=False), expected)


def test_contexts_of_several_teachers_are_each_answered_by_their_own_model(world, tokenizer):
    target = raw_params()["targets"]["mix"]
    asked = [("first", SHOTS[0]), ("first", SHOTS[1]), ("second", "")]
    expected = [
        (name, context_id(context), text, label, naive_calibrated(world, tokenizer, target, folder, context, text))
        for name, pairs in SETS.items()
        for folder, context in ((world.artifacts / "models" / model, context) for model, context in asked)
        for text, label in pairs
    ]
    assert_predictions(world.baseline("mix", ensemble=False), expected)


def test_the_ensemble_is_the_weighted_mean_of_the_calibrated_answers(world, tokenizer):
    target = raw_params()["targets"]["mix"]
    asked = [("first", SHOTS[0], 3 / 8), ("first", SHOTS[1], 3 / 8), ("second", "", 1 / 4)]
    expected = []
    for name, pairs in SETS.items():
        for text, label in pairs:
            each = [naive_calibrated(world, tokenizer, target, world.artifacts / "models" / m, context, text) for m, context, _ in asked]
            expected.append((name, "", text, label, sum(weight * p for (*_, weight), p in zip(asked, each, strict=True))))
    assert_predictions(world.baseline("mix", ensemble=True), expected)


def test_an_ensemble_of_log_probabilities_is_the_geometric_mean(world, tokenizer):
    asked = [("second", "", 0.5), ("first", SHOTS[0], 0.25), ("first", SHOTS[1], 0.25)]
    expected = []
    for name, pairs in SETS.items():
        for text, label in pairs:
            p = np.exp(sum(w * naive_scores(world.artifacts / "models" / model, tokenizer, context, text) for model, context, w in asked))
            expected.append((name, "", text, label, p / p.sum()))
    assert_predictions(world.baseline("geometric", ensemble=True), expected)


def test_the_ensemble_of_the_transfer_set_would_be_the_targets(world):
    """Baselines and targets are made by the same arithmetic from the same calibration."""
    sets = {"transfer": [row | {"label": LABELS[0]} for row in rows_of([(text, None) for text in TRANSFER])]}
    table = predict_baseline("base", world.calibration("mix"), True, world.task, sets, world.artifacts, world.work, 1)
    targets = read_table(world.artifacts / "targets" / "mix" / "targets.parquet", pa.schema([PREDICTIONS.field("probabilities")]))
    assert np.allclose(table["probabilities"].to_pylist(), targets["probabilities"].to_pylist(), atol=1e-6)


def test_no_prediction_is_lost_where_two_models_answer_in_the_same_contexts(world):
    """Either every (model, context) has its rows, or such a baseline is refused."""
    raw = raw_params()
    raw["baselines"]["icl_two_models"] = {"prompts": "targets/two_models", "contexts": "each"}
    try:
        parse_params(raw)
        table = world.baseline("two_models", ensemble=False)
    except UsageError:
        return
    assert len(table) == 2 * len(SHOTS) * sum(map(len, SETS.values()))


def test_an_example_in_two_sets_is_answered_alike_and_asked_once(own_world):
    shutil.rmtree(own_world.work)
    rows = own_world.student().to_pylist()
    shared = [row["probabilities"] for row in rows if row["example_id"] == example_id({"text": "a film"})]
    assert len(shared) == 2
    assert shared[0] == shared[1]
    files = own_world.work.glob("scores/*/part-*.parquet")
    assert sum(pq.read_metadata(file).num_rows for file in files) == len({text for pairs in SETS.values() for text, _ in pairs})


def test_a_second_evaluation_needs_no_model(world, monkeypatch):
    tables = [world.student(), world.baseline("mix", ensemble=True)]
    monkeypatch.setattr(scorer_module, "load_model", None)
    assert [world.student(), world.baseline("mix", ensemble=True)] == tables


def test_baselines_share_the_scores_of_the_same_prompts(own_world, monkeypatch):
    own_world.baseline("mix", ensemble=True)
    monkeypatch.setattr(scorer_module, "load_model", None)
    own_world.baseline("few", ensemble=False)
    own_world.baseline("geometric", ensemble=True)


def test_a_context_that_is_no_longer_there_is_named(own_world):
    path = own_world.artifacts / "data" / "contexts" / "shots.parquet"
    write_table(read_table(path, CONTEXTS).slice(0, 1), path)
    with pytest.raises(MismatchError, match=rf"shots\.parquet: context {context_id(SHOTS[1])[:12]} of target set 'mix' is not in it"):
        own_world.baseline("mix", ensemble=True)


def test_contexts_come_in_the_calibration_s_order(own_world):
    calibration = own_world.calibration("mix")
    calibration["contexts"].reverse()
    assert [row["text"] for row in teacher_contexts(calibration, "few", own_world.artifacts)] == SHOTS[::-1]


def test_a_teacher_that_is_no_longer_the_calibrated_one_is_refused(own_world, model_folder):
    shutil.rmtree(own_world.artifacts / "models" / "first")
    shutil.copytree(model_folder("llama", seed=2), own_world.artifacts / "models" / "first")
    with pytest.raises(MismatchError, match=r"targets/mix/calibration\.json was not made by this run's teacher"):
        own_world.baseline("mix", ensemble=True)


def test_the_combination_is_what_the_calibration_says():
    calibration = {
        "average": "log_probability",
        "temperature": 0.5,
        "contexts": [{"offsets_nats": [0.25, -0.25], "weight": 0.75}, {"offsets_nats": [0.0, 0.0], "weight": 0.25}],
        "by_source": {"tweets": [[1.0, -1.0], [0.5, -0.5]]},
    }
    found = combination_of(calibration, "movie")
    assert isinstance(found, Combination)
    assert found.offsets.tolist() == [[0.25, -0.25], [0.0, 0.0]]
    assert found.weights.tolist() == [0.75, 0.25]
    assert (found.average, found.temperature) == ("log_probability", 0.5)
    assert combination_of(calibration, "tweets").offsets.tolist() == [[1.0, -1.0], [0.5, -0.5]]
