"""Checked examples: labels by the rule, bad values with their reason, each text once; and the stage that writes a source."""

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.examples import BadValueError, SourceExamples, check_limit, label_reader, read_source, read_written_source, write_source
from pipeline.errors import UsageError
from pipeline.files import Folders, sha256_json
from pipeline.params import LabelRule, Params, SourceParams, TaskParams, parse_params
from pipeline.task import Task

TASK = Task(TaskParams(template="Q: {text} A:", verbalisers={"negative": " no", "positive": " yes"}))


def read(tmp_path: Path, rows: list[Any], form: str = "jsonl", task: Task = TASK, **entry: Any) -> SourceExamples:
    """Read rows as the source `mine`; `entry` are further params of it."""
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return read_source("mine", SourceParams.model_validate({"path": path.name} | entry), path, task)


def reasons(source: SourceExamples) -> list[tuple[int, str, str]]:
    return [(entry.line, entry.field, entry.reason) for entry in source.quarantine]


def labels(source: SourceExamples) -> dict[str, str | None]:
    return {example.fields["text"]: example.label for example in source.examples}


def test_each_bad_value_has_its_line_field_and_reason(tmp_path: Path) -> None:
    rows = [
        {"text": " kept &amp; stripped ", "label": "positive"},
        {"text": "  ", "label": "positive"},
        {"text": 5, "label": "positive"},
        {"text": None, "label": "positive"},
        {"label": "positive"},
        {"text": "nul \0 in it", "label": "positive"},
        {"text": "\ud800", "label": "positive"},
        "not json",
        {"text": "a\tb\nc\x0cd\u2028e", "label": "positive"},
        {"text": "\u200b \ufeff", "label": "positive"},
    ]
    source = read(tmp_path, rows)
    assert reasons(source) == [
        (2, "text", "empty"),
        (3, "text", "not a text"),
        (4, "text", "missing"),
        (5, "text", "missing"),
        (6, "text", "control character"),
        (7, "text", "lone surrogate"),
        (8, "", "not JSON"),
        (10, "text", "empty"),
    ]
    assert json.loads(source.quarantine[5].json_line())["value"] == "U+D800 in '\\ud800'"
    first, last = source.examples
    assert last.fields == {"text": "a\tb\nc\x0cd\u2028e"}, "white space is not a control character"
    assert first.fields == {"text": "kept &amp; stripped"}
    assert first.example_id == sha256_json({"text": "kept &amp; stripped"})
    assert (first.label, first.line, first.source) == ("positive", 1, "mine")


def test_a_row_whose_label_cannot_be_read_keeps_its_text_without_a_label(tmp_path: Path) -> None:
    values: list[Any] = [["positive"], {"is": "positive"}, "great", 7]
    source = read(tmp_path, [{"text": f"t{i}", "label": value} for i, value in enumerate(values)] + [{"text": "t4"}])
    assert labels(source) == dict.fromkeys(("t0", "t1", "t2", "t3", "t4"))
    several = "several labels in a row are not supported"
    found = [several, several, "unknown label", "unknown label", "missing"]
    assert reasons(source) == [(line, "label", reason) for line, reason in enumerate(found, 1)]
    assert source.bad_rows == 5


RULES: list[tuple[dict[str, Any], dict[str, str], list[Any], list[str | None]]] = [
    # rule, verbalisers, values in the file, labels
    (
        {},
        {"true": " yes", "false": " no"},
        [True, False, "true", "True", "FALSE ", None, ""],
        ["true", "false", "true", "true", "false", None, None],
    ),
    ({}, {"1": " yes", "0": " no"}, [1, 0, 1.0, "1", "0.0", " 1 ", float("nan"), "1.00"], ["1", "0", "1", "1", "0", "1", None, "1"]),
    ({}, {"True": " yes", "False": " no"}, [True, "True", "true"], ["True", "True", "True"]),
    ({}, {"1.0": " one", "1": " uno"}, ["1.0", "1"], ["1.0", "1"]),  # spelt in the file as in the params
    (
        {},
        {"1": " yes", "0": " no", "-1": " bad"},
        ["1,0", "0,00", "+1", "-0.0", -1.0, Decimal("1.00"), "nan", "<NA>"],
        ["1", "0", "1", "0", "-1", "1", None, None],
    ),
    (
        {},
        {"none": " none", "1,000": " many", "n/a": " unknown"},
        ["none", "1,000", "n/a", "NaN", "\xa0 none"],
        ["none", "1,000", "n/a", None, "none"],
    ),
    ({}, {"café": " coffee", "[a, b]": " both"}, ["cafe\u0301", "café ", "[a, b] "], ["café", "café", "[a, b]"]),
    ({}, {"0.5": " half", "-1": " minus"}, [0.5, "0.5", -1, -1.0, "-1"], ["0.5", "0.5", "-1", "-1", "-1"]),
    (
        {"values": {"1": "positive", "0": "negative", "true": "positive", "skip": ""}},
        {"negative": " no", "positive": " yes"},
        [1, 0, "1", 1.0, True, "skip", None],
        ["positive", "negative", "positive", "positive", "positive", None, None],
    ),
    (
        {"values": {"": "negative", "x": "positive"}},
        {"negative": " no", "positive": " yes"},
        [None, " ", "x"],
        ["negative", "negative", "positive"],
    ),
]


@pytest.mark.parametrize(("rule", "verbalisers", "values", "expected"), RULES)
def test_one_rule_spells_labels_whatever_their_type(rule: Any, verbalisers: Any, values: list[Any], expected: list[str | None]) -> None:
    label_of = label_reader(LabelRule.model_validate(rule), Task(TaskParams(template="{text}", verbalisers=verbalisers)))
    assert [label_of(value) for value in values] == expected


@pytest.mark.parametrize("value", [["a", "b"], [], {"a": 1}, ["a"], "['a', 'b']", '["a"]', "{'a', 'b'}", "[1, 2]"])
def test_several_labels_in_a_row_are_refused_wherever_a_label_is_read(value: Any) -> None:
    for rule in (LabelRule(), LabelRule(values={"a": "positive"})):
        with pytest.raises(BadValueError) as bad:
            label_reader(rule, TASK)(value)
        assert bad.value.reason == "several labels in a row are not supported"


def test_booleans_and_floats_of_a_parquet_file_are_labels_as_in_json(tmp_path: Path) -> None:
    for values, names in (([True, False], ("true", "false")), ([1.0, 0.0], ("1", "0")), ([1, 0], ("1", "0"))):
        task = Task(TaskParams(template="{text}", verbalisers={names[0]: " yes", names[1]: " no"}))
        rows = [{"text": "a", "label": values[0]}, {"text": "b", "label": values[1]}]
        assert (
            labels(read(tmp_path, rows, "parquet", task)) == labels(read(tmp_path, rows, "jsonl", task)) == {"a": names[0], "b": names[1]}
        )


def test_a_rating_becomes_a_label_by_its_sign_beyond_the_threshold(tmp_path: Path) -> None:
    ratings = [1.0, 1.01, -1.01, -1, 0, "3", " -3e0 ", None, "", "many", float("nan"), float("inf"), True, "1_0", 10**400]
    source = read(tmp_path, [{"text": f"t{i}", "label": rating} for i, rating in enumerate(ratings)], label={"threshold": 1.0})
    assert {text: label for text, label in labels(source).items() if label} == {
        "t1": "positive",
        "t2": "negative",
        "t5": "positive",
        "t6": "negative",
    }
    assert source.counts["left_out_by_label_rule"] == 4, "1.0, -1, 0 and null"
    assert reasons(source) == [(line, "label", "not a number") for line in range(9, 16)]


def test_a_source_without_labels_needs_no_label_column(tmp_path: Path) -> None:
    source = read(tmp_path, [{"text": "a"}, {"text": "b"}], label=None)
    assert labels(source) == {"a": None, "b": None}
    assert source.counts["label_shares"] == {}
    assert source.counts["left_out_by_label_rule"] == 0


def test_each_text_is_kept_once_and_conflicting_labels_leave_it_without_one(tmp_path: Path) -> None:
    rows = [("a", "positive"), ("b", "positive"), ("a ", "positive"), ("b", "negative"), ("c", None), ("b", "positive"), ("c", "negative")]
    source = read(tmp_path, [{"text": text, "label": label} for text, label in rows])
    assert [(e.line, e.label) for e in source.examples] == [(1, "positive"), (2, None), (5, "negative")]
    assert reasons(source) == [(line, "", "conflicting labels") for line in (2, 4, 6)]
    assert source.quarantine[1].value == "positive on line 2, negative on line 4, positive on line 6: b"
    assert source.bad_rows == 0


def test_of_several_answers_to_one_text_the_first_is_kept(tmp_path: Path) -> None:
    task = Task(TaskParams.model_validate({"template": "{text}", "completion": {"source": "given"}}))
    rows = [{"text": "a", "reply": "one"}, {"text": "a", "reply": "two"}, {"text": "b", "reply": " "}]
    source = read(tmp_path, rows, task=task, label=None, completion="reply")
    assert [(e.fields["text"], e.completion) for e in source.examples] == [("a", "one")]
    assert source.counts["exact_repeats_removed"] == 1
    assert reasons(source) == [(3, "reply", "empty")]


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"text": draw.choice(["a", "b", "c", "", "d"]), "label": draw.choice(["positive", "negative", None, "x"])} for _ in range(99)]
    source = read(tmp_path, [*rows, "", "{"])
    counts = source.counts
    of_fields = sum(counts["quarantined"].get(reason, 0) for reason in ("empty", "not JSON"))
    assert counts["rows"] == 100 == of_fields + counts["exact_repeats_removed"] + counts["examples"]
    assert len(source.quarantine) == sum(counts["quarantined"].values()) + counts["conflicting_labels_removed"]
    assert counts["labelled"] == sum(label is not None for label in labels(source).values())


def test_labels_change_no_text(tmp_path: Path) -> None:
    """Gold labels never choose unlabelled texts: whatever the labels are, the same texts come out, from the same lines."""
    draw = random.Random(1)
    texts = [f"text {draw.randrange(30)}" for _ in range(60)]
    found = []
    for _ in range(10):
        rows = [{"text": text, "label": draw.choice(["positive", "negative", None, "x", ["positive"]])} for text in texts]
        found.append([(example.fields, example.line) for example in read(tmp_path, rows).examples])
    assert all(one == found[0] for one in found)


def test_slices_are_spelt_as_labels_are_and_are_unknown_if_a_row_does_not_say(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "positive", "subcase": " swap ", "region": 3},
        {"text": "b", "label": "negative", "subcase": None, "region": True},
        {"text": "c", "label": "negative", "subcase": "", "region": 1.5},
        {"text": "d", "label": "negative", "region": "x", "other": 1},
        {"text": "e", "label": "negative", "subcase": ["swap"], "region": "x"},
    ]
    source = read(tmp_path, rows, slices={"kind": "subcase", "place": "region"})
    assert [tuple(e.slices.values()) for e in source.examples] == [("swap", "3"), (None, "true"), (None, "1.5"), (None, "x")]
    assert reasons(source) == [(5, "subcase", "several slices in a row are not supported")]
    with pytest.raises(UsageError, match=r"no column 'region'; the columns are: label, subcase, text"):
        read(tmp_path, [{"text": "a", "label": "positive", "subcase": "swap"}], slices={"kind": "subcase", "place": "region"})


def test_a_jsonl_file_without_the_column_at_all_names_the_keys_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'text'; the columns are: review, stars"):
        read(tmp_path, [{"review": "a", "stars": 1}, {"review": "b"}], label=None)
    with pytest.raises(UsageError, match=r"no column 'label'.*write `label: null`"):
        read(tmp_path, [{"text": "a"}, {"text": "b"}])


def test_rows_of_a_folder_lead_back_to_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, rows in enumerate(
        [[("a", "positive"), ("", "negative")], [("b", "positive"), ("a", "positive")], [("b", "negative"), ("c", "positive")]]
    ):
        content = "text;label\n" + "".join(f"{text};{label}\n" for text, label in rows)
        (folder / f"part-{number}.csv").write_text(content)
    params = SourceParams(path="shards", files="part-*.csv", delimiter=";", encoding="utf-8")
    source = read_source("mine", params, folder, TASK)
    places = {example.fields["text"]: source.place(example.line) for example in source.examples}
    assert places == {"a": ("part-0.csv", 2), "b": ("part-1.csv", 2), "c": ("part-2.csv", 3)}
    found = [(entry.file, entry.line, entry.reason) for entry in source.quarantine]
    conflict = "conflicting labels"
    assert found == [("part-0.csv", 3, "empty"), ("part-1.csv", 2, conflict), ("part-2.csv", 2, conflict)]
    assert source.counts["files"] == {"part-0.csv": 0, "part-1.csv": 3, "part-2.csv": 6}
    (folder / "part-3.json").write_text('[{"x": 1}]')
    with pytest.raises(UsageError, match=r"no column 'text'; the columns are: x"):
        read_source("mine", SourceParams(path="shards", files="*.json", label=None), folder, TASK)


def test_a_file_that_is_absent_or_has_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row in this file"):
        read(tmp_path, [])
    with pytest.raises(UsageError, match=r"data\.sources\.mine\.path: .* is not a file or folder"):
        read_source("mine", SourceParams(path="none.csv"), tmp_path / "none.csv", TASK)


def test_more_bad_rows_than_the_limit_are_refused_with_the_first_of_them(tmp_path: Path) -> None:
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


@pytest.fixture
def params(tmp_path: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Params:
    """The shipped params with a file of three good rows and a bad one as the source `movie`; the working folder is `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    rows = [("1.5", "a fine film"), ("0", "a film"), ("2", ""), ("-2", "a dull film")]
    Path("rows.tsv").write_text("".join(f"{rating}\t{text}\n" for rating, text in rows))
    raw_params["data"]["sources"]["movie"] |= {"path": "rows.tsv", "columns": ["rating", "text"], "slices": {"stars": "rating"}}
    raw_params["data"]["bad_rows_limit"] = 0.3
    return parse_params(raw_params)


def test_a_source_is_written_and_read_again(params: Params) -> None:
    folders = Folders.here()
    write_source("movie", params, folders)
    entry, task = params.data.sources["movie"], Task(params.task)
    found, again = read_source("movie", entry, Path("rows.tsv"), task), read_written_source("movie", entry, task, folders)
    assert again.examples == found.examples
    assert [(e.label, e.slices) for e in again.examples] == [
        ("positive", {"stars": "1.5"}),
        (None, {"stars": "0"}),
        ("negative", {"stars": "-2"}),
    ]
    assert (again.name, again.file, again.counts) == ("movie", "rows.tsv", found.counts)
    (line,) = Path("artifacts/sources/movie/quarantine.jsonl").read_text().splitlines()
    expected = {"source": "movie", "file": "rows.tsv", "line": 3, "field": "text", "reason": "empty", "value": ""}
    assert json.loads(line) == expected


def test_too_many_bad_rows_end_the_stage_and_leave_the_quarantine_to_look_at(params: Params) -> None:
    data = params.data.model_copy(update={"bad_rows_limit": 0.2})
    with pytest.raises(UsageError, match=r"1 of 4 rows of rows\.tsv cannot be used \(25\.0%\)"):
        write_source("movie", params.model_copy(update={"data": data}), Folders.here())
    assert [path.name for path in Path("artifacts/sources/movie").iterdir()] == ["quarantine.jsonl"]
