"""Target sets on disk against the definition, from a made-up cache: two contexts, two sources, two labels."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax
from score_rows import IDENTITY, TASK, about, rows, stored

from pipeline.cache.folder import CACHES, cache_manifest, described_task, read_cache, write_cache
from pipeline.errors import MismatchError, UsageError
from pipeline.files import Folders, read_json, sha256_json, write_json
from pipeline.params import TargetParams, TaskParams, parse_params
from pipeline.schema import LABELLED, SCORES, STORED, TARGETS, Context, Example, read_table, write_examples, write_table
from pipeline.targets.build import build_targets
from pipeline.targets.calibration import combination_of
from pipeline.targets.learning import Judged, learn_pool
from pipeline.task import Task

EXAMPLES = [
    *(Example({"text": f"a film about number {n}"}, source="films", line=n) for n in range(7)),
    *(Example({"text": f"the kettle of shop {n} leaks"}, source="kettles", line=n) for n in range(5)),
]
FREE = Example({"text": "N/A"})
CONTEXTS = [Context("orders/0", "one"), Context("orders/1", "two")]


def write_teacher(folders, name, task=TASK, examples=(FREE, *EXAMPLES)):
    """Write a cache of made-up scores; returns them by (context_id, example_id), in the order of sorted labels."""
    found = stored([f"{name} {context.name} {example.example_id}" for context in CONTEXTS for example in examples])
    ids = [(context.context_id, example.example_id) for context in CONTEXTS for example in examples]
    columns = {"context_id": [one for one, _ in ids], "example_id": [other for _, other in ids]}
    table = pa.table({**columns, **{column: found[column] for column in STORED.names}}, schema=SCORES)
    listed = [{"context_id": context.context_id, "name": context.name, "tokens": 9} for context in CONTEXTS]
    described = about(task=described_task(task), labels=list(task.labels), contexts=listed, content_free=[FREE.example_id])
    write_cache(folders.artifacts / "teachers" / name, [table], described)
    return dict(zip(ids, np.array(found["label_logprobs"].to_pylist()), strict=True))


@pytest.fixture
def folders(tmp_path):
    found = Folders(tmp_path / "artifacts", tmp_path / "metrics", tmp_path / "work")
    write_examples(EXAMPLES, ["text"], found.artifacts / "data" / "transfer.parquet")
    return found


@pytest.fixture
def scores(folders):
    return write_teacher(folders, "few")


def built(folders, name="set", task=TASK, **settings):
    build_targets(name, TargetParams.model_validate({"teachers": {"few": 1.0}, **settings}), task, folders)
    folder = folders.artifacts / "targets" / name
    return np.array(read_table(folder / "targets.parquet", TARGETS)["probabilities"].to_pylist()), read_json(folder / "calibration.json")


def naive(scores, chosen):
    """The mean over contexts of batch_log-calibrated answers to some examples, by the definition."""
    each = []
    for context in CONTEXTS:
        logp = np.log(softmax(np.array([scores[context.context_id, EXAMPLES[n].example_id] for n in chosen]), axis=-1))
        each.append(softmax(logp - logp.mean(0), axis=-1))
    return np.mean(each, axis=0)


def test_a_target_set_is_what_its_definition_says(folders, scores):
    values, calibration = built(folders)
    assert np.allclose(values, naive(scores, range(12)), atol=1e-6)
    assert calibration["by_source"] == {}
    assert read_table(folders.artifacts / "targets/set/targets.parquet", TARGETS)["example_id"].to_pylist() == [
        e.example_id for e in EXAMPLES
    ]


def test_calibration_by_source_is_that_of_each_source_alone(folders, scores):
    values, calibration = built(folders, calibrate_by="source")
    assert np.allclose(values[:7], naive(scores, range(7)), atol=1e-6)
    assert np.allclose(values[7:], naive(scores, range(7, 12)), atol=1e-6)
    assert list(calibration["by_source"]) == ["films", "kettles"]
    assert np.array_equal(combination_of(calibration, "films").offsets, calibration["by_source"]["films"])
    pooled = combination_of(calibration, "unknown").offsets
    assert np.array_equal(pooled, [context["offsets"] for context in calibration["contexts"]])
    assert not np.allclose(combination_of(calibration, "films").offsets, pooled, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "contextual", "batch", "batch_log"])
@pytest.mark.parametrize("average", ["probability", "log_probability"])
def test_calibration_json_puts_the_same_calibration_to_other_inputs(folders, scores, kind, average):
    values, calibration = built(folders, calibration=kind, average=average, temperature=0.7)
    raw = np.array([[scores[context.context_id, example.example_id] for example in EXAMPLES] for context in CONTEXTS])
    assert np.allclose(combination_of(calibration, "films").ensemble(raw), values, atol=1e-6)


def test_calibration_json_says_what_each_teacher_is(folders, scores):
    _, calibration = built(folders)
    assert calibration["labels"] == ["negative", "positive"]
    assert calibration["teachers"] == {
        "few": {"model": "models/tiny", "contexts": "orders", "dtype": "float32", "cache": about()["cache"], "identity": IDENTITY}
    }
    assert [(context["teacher"], context["name"], context["context_id"], context["weight"]) for context in calibration["contexts"]] == [
        ("few", context.name, context.context_id, 0.5) for context in CONTEXTS
    ]


def test_teachers_share_by_weight_and_their_contexts_share_it(folders, scores):
    other = write_teacher(folders, "zero")
    values, calibration = built(folders, teachers={"few": 1.0, "zero": 3.0}, calibration="none")
    assert [context["weight"] for context in calibration["contexts"]] == [0.125, 0.125, 0.375, 0.375]
    asked = [(context.context_id, EXAMPLES[4].example_id) for context in CONTEXTS]
    expected = sum(share * softmax(found[key]) for share, found in ((0.125, scores), (0.375, other)) for key in asked)
    assert np.allclose(values[4], expected, atol=1e-6)


def test_a_teacher_may_be_calibrated_otherwise_than_the_others(folders, scores):
    values, own = built(folders, calibrations={"few": "none"})
    assert [context["calibration"] for context in own["contexts"]] == ["none", "none"]
    assert np.array_equal(values, built(folders, calibration="none")[0])


def test_the_order_of_labels_in_params_changes_nothing(folders, scores):
    """Finding 14: vectors follow the sorted labels, which are stored beside them."""
    turned = Task(TaskParams(template=TASK.params.template, verbalisers=dict(reversed(TASK.params.verbalisers.items()))))
    before = built(folders, "before")
    after = built(folders, "after", task=turned)
    assert np.array_equal(before[0], after[0])
    assert before[1] | {"targets": ""} == after[1] | {"targets": ""}
    write_teacher(folders, "few", task=turned)
    assert np.array_equal(before[0], built(folders, "again")[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": "{text} It was"}, r"task\.template: 'Review: \{text\}"),
        ({"verbalisers": {"negative": " positive", "positive": " negative"}}, r"task\.verbalisers\.negative: ' negative', this run has"),
    ],
)
def test_scores_of_another_task_are_refused_with_what_differs(folders, scores, change, named):
    with pytest.raises(MismatchError, match=named):
        built(folders, task=Task(TASK.params.model_copy(update=change)))


def test_a_cache_that_lacks_an_example_is_refused(folders):
    write_teacher(folders, "few", examples=[FREE, *EXAMPLES[:9]])
    with pytest.raises(
        MismatchError, match=rf"3 examples of the transfer set are not in it, first {EXAMPLES[9].example_id[:12]}\. Run `dvc"
    ):
        built(folders)


def test_caches_that_students_may_learn_whole_are_named_by_their_manifests_hash(folders, scores):
    write_cache(folders.artifacts / "teachers" / "reader", [rows(3)], about())
    built(folders, auxiliary_caches=["reader", "few"])
    named = read_json(folders.artifacts / "targets" / "set" / CACHES)
    expected = {name: sha256_json(cache_manifest(folders.artifacts / "teachers" / name)) for name in ("reader", "few")}
    assert {name: entry["manifest_sha256"] for name, entry in named.items()} == expected


def test_the_metrics_are_those_of_the_files(folders, scores):
    values, _ = built(folders, calibration="batch")
    metrics = read_json(folders.metrics / "targets" / "set.json")
    assert metrics["rows"] == 12
    assert metrics["label_shares"]["positive"] == pytest.approx((values.argmax(-1) == 1).mean(), abs=1e-6)
    assert metrics["mean_confidence"] == pytest.approx(values.max(-1).mean(), abs=1e-6)
    raw = np.array([scores[CONTEXTS[0].context_id, example.example_id] for example in EXAMPLES])
    first = metrics["teachers"]["few"]["contexts"]["orders/0"]
    assert first["shares_raw"]["negative"] == pytest.approx((raw.argmax(-1) == 0).mean(), abs=1e-6)
    assert first["offset_probability"]["negative"] == pytest.approx(softmax(raw, -1).mean(0)[0] - 0.5, abs=1e-6)


def test_calibrations_of_teachers_that_are_not_there_are_refused(raw_params):
    raw_params["targets"]["few_shot"]["calibrations"] = {"other": "none"}
    with pytest.raises(UsageError, match=r"targets\.few_shot: calibrations: other not among its teachers; choose from: few_shot"):
        parse_params(raw_params)


def test_calibration_by_source_without_batch_calibration_is_refused(raw_params):
    raw_params["targets"]["own"] = {"teachers": {"few_shot": 1.0}, "calibration": "none", "calibrate_by": "source"}
    with pytest.raises(UsageError, match=r"targets\.own: `calibrate_by: source` is for `batch` or `batch_log`.*'none'"):
        parse_params(raw_params)
    del raw_params["targets"]["own"]["calibration"]
    assert parse_params(raw_params).targets["own"].calibration == "batch_log"


# --- what labelled examples and shares change

SHOWN = [Example({"text": f"labelled {n}"}, label=("negative", "positive")[n % 2], source="films", line=n) for n in range(12)]


@pytest.fixture
def labelled(folders):
    """Labelled examples, and a teacher that knows them beside one that does not; the gold labels' numbers, and {teacher: [C, M, L]}."""
    gold, rng, found = np.arange(12) % 2, np.random.default_rng(3), {}
    write_examples(SHOWN, ["text"], folders.artifacts / "data" / "demonstrations.parquet")
    for name, strength in (("few", 3.0), ("other", 0.0)):
        write_teacher(folders, name)
        scores = rng.normal(size=(2, 12, 2)) + strength * np.eye(2)[gold]
        found[name] = scores
        rows = [
            {"context_id": context.context_id, "example_id": example.example_id, "label_logprobs": scores[c, m].astype(np.float32)}
            for c, context in enumerate(CONTEXTS)
            for m, example in enumerate(SHOWN)
        ]
        write_table(pa.Table.from_pylist(rows, schema=LABELLED), folders.artifacts / "labelled" / f"{name}.parquet")
    return gold, found


BOTH = {"few": 1.0, "other": 1.0}


def test_weights_are_learnt_from_labelled_examples_and_serve_other_inputs(folders, labelled):
    gold, scores = labelled
    values, calibration = built(folders, teachers=BOTH, calibration="none", weights="learned", temperature="learned")
    voters = np.stack([np.log(softmax(own, axis=-1).mean(0)) for own in scores.values()])
    pool = learn_pool(Judged(voters, gold))
    assert calibration["scales"] == pytest.approx(pool.scales.tolist(), abs=1e-4)
    assert calibration["bias"] == pytest.approx(pool.bias.tolist(), abs=1e-4)
    assert calibration["scales"][0] > 1.5 * calibration["scales"][1]
    raw = np.array([[scored[c.context_id, e.example_id] for e in EXAMPLES] for scored in caches(folders) for c in CONTEXTS])
    assert np.allclose(combination_of(calibration, "films").ensemble(raw), values, atol=1e-6)
    metrics = read_json(folders.metrics / "targets" / "set.json")
    assert metrics["labelled"]["rows"] == 12
    assert metrics["labelled"]["after"]["log_loss"] < metrics["labelled"]["before"]["log_loss"]
    assert metrics["labelled"]["teachers"]["few"]["accuracy"] > metrics["labelled"]["teachers"]["other"]["accuracy"]
    assert metrics["teachers"]["few"]["weight"] == pytest.approx(pool.scales[0] / pool.scales.sum(), abs=1e-4)


def caches(folders):
    """{(context_id, example_id): label log-probabilities} of each teacher."""
    for name in BOTH:
        rows = read_cache(folders.artifacts / "teachers" / name).rows
        keys = zip(rows["context_id"].to_pylist(), rows["example_id"].to_pylist(), strict=True)
        yield dict(zip(keys, rows["label_logprobs"].to_pylist(), strict=True))


def test_a_learnt_temperature_sharpens_or_flattens_the_given_average(folders, labelled):
    gold, scores = labelled
    plain, _ = built(folders, teachers=BOTH, calibration="none")
    values, calibration = built(folders, teachers=BOTH, calibration="none", temperature="learned")
    mean = np.concatenate([softmax(own, axis=-1) for own in scores.values()]).mean(0)
    pool = learn_pool(Judged(np.log(mean)[None], gold))
    assert calibration["scales"] == pytest.approx(pool.scales.tolist(), abs=1e-4)
    assert np.allclose(values, softmax(pool.scales[0] * np.log(plain) + pool.bias, axis=-1), atol=1e-4)


@pytest.mark.parametrize(
    ("prior", "shares"),
    [("equal", [0.5, 0.5]), ({"negative": 3, "positive": 1}, [0.75, 0.25]), ("labelled", [0.9, 0.1])],
)
def test_a_prior_gives_the_texts_its_shares(folders, scores, prior, shares):
    write_json({"negative": 90, "positive": 10}, folders.artifacts / "data" / "label_counts.json")
    values, _ = built(folders, prior=prior)
    assert np.allclose(values.mean(0), shares, atol=1e-5)
    about = read_json(folders.metrics / "targets" / "set.json")["prior"]
    assert list(about["shares"].values()) == pytest.approx(shares)
    assert about["before"].keys() == about["shares"].keys()


def test_an_estimated_prior_has_an_interval(folders, labelled):
    values, _ = built(folders, teachers=BOTH, weights="learned", temperature="learned", prior="estimate")
    about = read_json(folders.metrics / "targets" / "set.json")["prior"]
    assert values.mean(0) == pytest.approx(list(about["shares"].values()), abs=1e-4)
    assert all(about["low"][label] <= about["high"][label] for label in about["shares"])


def test_labels_of_one_example_each_teach_nothing(folders, labelled, capsys):
    for name in BOTH:
        write_table(LABELLED.empty_table(), folders.artifacts / "labelled" / f"{name}.parquet")
    values, _ = built(folders, teachers=BOTH, temperature="learned")
    assert "one example of each" in capsys.readouterr().out
    assert np.array_equal(values, built(folders, teachers=BOTH)[0])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"weights": "learned", "temperature": 0.7}, "as sharp as the labels say"),
        ({"prior": "estimate"}, "needs probabilities that labels have corrected"),
        ({"prior": "uniform"}, "prior"),
    ],
)
def test_what_cannot_work_is_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        TargetParams.model_validate({"teachers": {"few": 1.0}, **settings})
