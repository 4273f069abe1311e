"""Checked examples: labels by the rule, bad values with their reason, repeats and conflicts."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.examples import SourceExamples, check_limit, read_source
from pipeline.errors import UsageError
from pipeline.files import example_id
from pipeline.params import LabelRule, SourceParams, TaskParams
from pipeline.task import Task

TASK = Task(TaskParams(template="Q: {text} A:", verbalisers={"negative": " no", "positive": " yes"}, max_chars=20))


def read(tmp_path: Path, rows: list[Any], rule: dict[str, Any] | str | None = "as it stands", form: str = "jsonl") -> SourceExamples:
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    label = LabelRule() if rule == "as it stands" else None if rule is None else LabelRule.model_validate(rule)
    params = SourceParams.model_validate({"origin": {"source": "local", "path": "x"}, "format": form})
    return read_source("mine", params.model_copy(update={"label": label}), path, TASK)


def read_sliced(tmp_path: Path, rows: list[dict[str, Any]]) -> SourceExamples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    slices = {"kind": "subcase", "place": "region"}
    params = SourceParams.model_validate({"origin": {"source": "local", "path": "x"}, "format": "jsonl", "slices": slices})
    return read_source("mine", params, path, TASK)


def reasons(source: SourceExamples) -> list[tuple[int, str, str]]:
    return [(entry.line, entry.field, entry.reason) for entry in source.bad]


def test_each_bad_value_has_its_line_field_and_reason(tmp_path: Path) -> None:
    good = {"text": " kept &amp; stripped ", "label": "positive"}
    source = read(
        tmp_path,
        [
            good,
            {"text": "  ", "label": "positive"},
            {"text": "x" * 21, "label": "positive"},
            {"text": 5, "label": "positive"},
            {"text": None, "label": "positive"},
            {"label": "positive"},
            {"text": "a", "label": "great"},
            {"text": "b", "label": ["positive"]},
            {"text": "c"},
            {"text": "nul \0 in it", "label": "positive"},
            {"text": "\ud800", "label": "positive"},
            "not json",
        ],
    )
    assert reasons(source) == [
        (2, "text", "empty"),
        (3, "text", "too long"),
        (4, "text", "not a text"),
        (5, "text", "missing"),
        (6, "text", "missing"),
        (7, "label", "unknown label"),
        (8, "label", "not a label"),
        (9, "label", "missing"),
        (10, "text", "control character"),
        (11, "text", "lone surrogate"),
        (12, "", "not JSON"),
    ]
    (example,) = source.examples
    assert example.values == ("kept &amp; stripped",)
    assert example.example_id == example_id({"text": "kept &amp; stripped"})
    assert (example.label, example.line, example.source) == ("positive", 1, "mine")


def test_white_space_inside_a_text_is_no_control_character(tmp_path: Path) -> None:
    source = read(tmp_path, [{"text": "a\tb\nc\x0cd\u2028e", "label": "positive"}])
    assert source.bad == []


def test_a_rating_becomes_a_label_by_its_sign_beyond_the_threshold(tmp_path: Path) -> None:
    ratings = [1.0, 1.01, -1.01, -1, 0, "3", " -3e0 ", None, "", "many", float("nan"), float("inf"), True, "1_0", 10**400]
    rows = [{"text": f"t{i}", "label": rating} for i, rating in enumerate(ratings)]
    source = read(tmp_path, rows, {"threshold": 1.0})
    assert [(e.values[0], e.label) for e in source.examples] == [
        ("t1", "positive"),
        ("t2", "negative"),
        ("t5", "positive"),
        ("t6", "negative"),
    ]
    assert source.left_out == 4, "1.0, -1, 0 and null"
    assert {reason for _, _, reason in reasons(source)} == {"not a number"}
    assert [line for line, _, _ in reasons(source)] == [9, 10, 11, 12, 13, 14, 15]


def test_a_map_of_values_takes_numbers_and_truth_values_as_they_are_written(tmp_path: Path) -> None:
    values = {"1": "positive", "0": "negative", "true": "positive", "skip": ""}
    labels = [1, 0, "1", 1.0, True, "skip", None, 2, 0.5]
    source = read(tmp_path, [{"text": f"t{i}", "label": v} for i, v in enumerate(labels)], {"values": values})
    assert [e.label for e in source.examples] == ["positive", "negative", "positive", "positive", "positive"]
    assert source.left_out == 2
    assert reasons(source) == [(8, "label", "unknown label"), (9, "label", "unknown label")]


def test_integer_labels_of_a_parquet_file_are_mapped(tmp_path: Path) -> None:
    source = read(
        tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 0}], {"values": {"1": "positive", "0": "negative"}}, "parquet"
    )
    assert [(e.line, e.label) for e in source.examples] == [(1, "positive"), (2, "negative")]


def test_a_source_without_labels_needs_no_label_column(tmp_path: Path) -> None:
    source = read(tmp_path, [{"text": "a"}, {"text": "b"}], None)
    assert [e.label for e in source.examples] == [None, None]
    assert source.counts()["label_shares"] == {}


def test_the_first_of_exact_repeats_is_kept_and_conflicts_are_kept_out(tmp_path: Path) -> None:
    rows = [("a", "positive"), ("b", "positive"), ("a ", "positive"), ("b", "negative"), ("c", "negative"), ("b", "positive")]
    source = read(tmp_path, [{"text": text, "label": label} for text, label in rows])
    assert [(e.line, e.label) for e in source.examples] == [(1, "positive"), (5, "negative")]
    assert source.repeats == 1
    assert [(entry.line, entry.reason) for entry in source.conflicts] == [(n, "conflicting labels") for n in (2, 4, 6)]
    assert source.conflicts[1].value.startswith("negative here, positive on line 2")
    assert source.bad == []


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    rows = [{"text": f"t{i % 7}", "label": ["positive", None, "x"][i % 3]} for i in range(50)]
    counts = read(tmp_path, [*rows, "", "{"]).counts()
    parts = ("left_out_by_label_rule", "exact_repeats_removed", "conflicting_labels_removed", "examples")
    assert counts["rows"] == 51 == sum(counts["quarantined"].values()) + sum(counts[part] for part in parts)
    assert counts["blank_lines"] == 1


def test_more_bad_rows_than_the_limit_stop_the_run_with_the_first_of_them(tmp_path: Path) -> None:
    source = read(tmp_path, [{"text": f"t{i}", "label": "positive"} for i in range(98)] + [{"text": "", "label": "positive"}] * 2)
    check_limit(source, 0.02, tmp_path / "quarantine.jsonl")
    with pytest.raises(UsageError) as error:
        check_limit(source, 0.01, tmp_path / "quarantine.jsonl")
    for part in (
        "data.sources.mine",
        "2 of 100 rows of rows.jsonl",
        "2.0%",
        "rows.jsonl:99: text: empty",
        "quarantine.jsonl",
        "bad_rows_limit",
    ):
        assert part in str(error.value)


def test_a_jsonl_file_without_the_column_at_all_names_the_keys_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'text'; the columns are: review, stars"):
        read(tmp_path, [{"review": "a", "stars": 1}, {"review": "b"}], None)
    with pytest.raises(UsageError, match=r"no column 'label'.*write `label: null`"):
        read(tmp_path, [{"text": "a"}, {"text": "b"}])


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row in this file"):
        read(tmp_path, [])


def test_slices_are_read_as_labels_are_and_are_unknown_where_a_row_does_not_say(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "positive", "subcase": " swap ", "region": 3},
        {"text": "b", "label": "negative", "subcase": None, "region": True},
        {"text": "c", "label": "negative", "subcase": "", "region": 1.5},
        {"text": "d", "label": "negative", "region": "x", "other": 1},
        {"text": "e", "label": "negative", "subcase": ["swap"], "region": "x"},
    ]
    source = read_sliced(tmp_path, rows)
    assert [e.slices for e in source.examples] == [("swap", "3"), (None, "true"), (None, "1.5"), (None, "x")]
    assert [e.label for e in source.examples] == ["positive", "negative", "negative", "negative"]
    assert reasons(source) == [(5, "subcase", "not a slice's name")]


def test_a_slice_column_that_no_row_has_is_refused_with_the_keys_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'region'; the columns are: label, subcase, text"):
        read_sliced(tmp_path, [{"text": "a", "label": "positive", "subcase": "swap"}])
