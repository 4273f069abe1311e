"""Target sets on disk against the definition, from a cache of a small random model."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax

from pipeline.errors import UsageError
from pipeline.evaluation.predict import combination_of
from pipeline.files import read_json
from pipeline.files import context_id, example_id
from pipeline.params import CacheParams, TargetParams, TaskParams, TeacherParams, parse_params
from pipeline.schema import CONTEXTS, SCORES, TARGETS, examples, read_table, write_table
from pipeline.targets.build import build_targets
from pipeline.task import Task
from pipeline.teachers.capture import capture

TASK = Task(TaskParams(template="{text} ->", verbalisers={"negative": " bad", "positive": " good"}))
TEXTS = [*(f"a film about number {n}" for n in range(7)), *(f"the kettle of shop {n} leaks" for n in range(5))]
SOURCES = ["films"] * 7 + ["kettles"] * 5


@pytest.fixture(scope="module")
def captured(model_folder, tmp_path_factory):
    """A folder with a transfer set of two sources, and a teacher's scores of it in two contexts."""
    root = tmp_path_factory.mktemp("targets")
    rows = [
        {"example_id": example_id({"text": text}), "label": None, "completion": None, "source": source, "line": n, "text": text}
        for n, (text, source) in enumerate(zip(TEXTS, SOURCES, strict=True), 1)
    ]
    transfer = root / "transfer.parquet"
    write_table(pa.Table.from_pylist(rows, examples(["text"])), transfer)
    contexts = root / "shots.parquet"
    shown = ["it is good\n", "it is bad\n"]
    write_table(
        pa.Table.from_pylist(
            [{"context_id": context_id(t), "name": f"shots/{n}", "text": t, "example_ids": [], "tokens": 1} for n, t in enumerate(shown)],
            CONTEXTS,
        ),
        contexts,
    )
    shutil.copytree(model_folder("llama"), root / "models/llama")
    capture("few", root / "models/llama", contexts, transfer, root / "scores/few", TASK, CacheParams(), "float32", root / "work", 1)
    return root


def built(root, name, **settings):
    params = TargetParams(teachers={"few": 1.0}, **settings)
    teacher = TeacherParams(model="models/llama", contexts="shots")
    texts = read_table(root / "transfer.parquet", examples(["text"]))
    build_targets(name, params, {"few": teacher}, TASK, texts, root / "scores", root / name, root / f"{name}.json")
    return read_table(root / name / "targets.parquet", TARGETS), read_json(root / name / "calibration.json")


def naive(root, rows):
    """Batch-calibrated mean over contexts of the rows' answers, from the score cache, by the definition."""
    table = pa.concat_tables([pa.parquet.read_table(file) for file in sorted((root / "scores/few").glob("*.parquet"))])
    assert set(SCORES.names) & set(table.column_names)
    found = {(row["context_id"], row["example_id"]): row["label_logprobs"] for row in table.to_pylist()}
    contexts = dict.fromkeys(context for context, _ in found)
    wanted = [example_id({"text": TEXTS[n]}) for n in rows]
    each = []
    for context in contexts:
        logp = np.log(softmax(np.array([found[context, one] for one in wanted], dtype=np.float64), axis=-1))
        each.append(softmax(logp - logp.mean(0), axis=-1))
    return np.mean(each, axis=0)


def test_calibration_by_source_is_that_of_each_source_alone(captured):
    table, calibration = built(captured, "apart", calibrate_by="source")
    values = np.array(table["probabilities"].to_pylist())
    films, kettles = range(7), range(7, 12)
    assert np.allclose(values[films], naive(captured, films), atol=1e-6)
    assert np.allclose(values[kettles], naive(captured, kettles), atol=1e-6)
    whole, pooled = built(captured, "whole")
    assert np.allclose(np.array(whole["probabilities"].to_pylist()), naive(captured, range(12)), atol=1e-6)
    assert not np.allclose(values, np.array(whole["probabilities"].to_pylist()), atol=1e-4)
    assert pooled["by_source"] == {}
    assert list(calibration["by_source"]) == ["films", "kettles"]


def test_a_target_set_of_some_sources_has_their_rows_alone_and_is_calibrated_on_them(captured):
    table, _ = built(captured, "kettles", sources=["kettles"])
    assert table["example_id"].to_pylist() == [example_id({"text": text}) for text in TEXTS[7:]]
    assert np.allclose(np.array(table["probabilities"].to_pylist()), naive(captured, range(7, 12)), atol=1e-6)


def test_a_baseline_takes_the_shift_of_its_set_s_source_where_there_is_one(captured):
    _, calibration = built(captured, "apart", calibrate_by="source")
    pooled = combination_of(calibration, "unknown").offsets
    assert np.array_equal(pooled, [context["offsets_nats"] for context in calibration["contexts"]])
    assert np.array_equal(combination_of(calibration, "films").offsets, calibration["by_source"]["films"])
    assert not np.allclose(combination_of(calibration, "films").offsets, pooled, atol=1e-4)


def test_a_teacher_may_be_calibrated_otherwise_than_the_others(captured):
    _, own = built(captured, "own", calibration="batch", calibrations={"few": "none"})
    assert np.array_equal([context["offsets_nats"] for context in own["contexts"]], np.zeros((2, 2)))
    plain, _ = built(captured, "plain", calibration="none")
    table, _ = built(captured, "own", calibration="batch", calibrations={"few": "none"})
    assert table.equals(plain)


def test_calibrations_of_teachers_that_are_not_there_are_refused(raw_params):
    raw_params["targets"]["mix"]["calibrations"] = {"other": "none"}
    with pytest.raises(UsageError, match=r"targets\.mix: calibrations: other is none of its teachers; choose of: few_shot, tuned, zero"):
        parse_params(raw_params)


def test_calibration_by_source_without_batch_calibration_is_refused(raw_params):
    raw_params["targets"]["few_shot_raw"]["calibrate_by"] = "source"
    with pytest.raises(UsageError, match=r"targets\.few_shot_raw: `calibrate_by: source` is for `calibration: batch`.*'none'"):
        parse_params(raw_params)


def test_sources_beside_are_known_ones_and_others(raw_params):
    raw_params["data"]["transfer"]["beside"] = {"blogs": 10}
    with pytest.raises(UsageError, match=r"data\.transfer\.beside: no 'blogs'; choose one of: amazon, editorials, movie"):
        parse_params(raw_params)
    raw_params["data"]["transfer"]["beside"] = {"tweets": 10}
    raw_params["targets"]["mix"]["sources"] = ["amazon"]
    with pytest.raises(UsageError, match=r"targets\.mix\.sources: no 'amazon'; choose one of: movie, tweets"):
        parse_params(raw_params)
    raw_params["data"]["transfer"]["beside"] = {"movie": 10}
    with pytest.raises(UsageError, match=r"'movie' is data\.transfer\.source itself"):
        parse_params(raw_params)
