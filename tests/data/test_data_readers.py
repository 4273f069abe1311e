"""Every row of a file comes out, with its line: as values, or as a bad row with a reason."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.readers import MISSING, BadRow, BlankLine, Row, read_rows
from pipeline.errors import UsageError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\0"), min_size=1, max_size=20)
LONG = "x" * 140_000
"""Longer than the limit that the csv module has by default."""


def written(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path: Path, form: str, content: bytes | str, asked: list[str], columns: list[str] | None = None) -> list[Any]:
    """Rows as (line, *values) and bad rows as (line, reason); blank lines as they are."""
    found = read_rows(written(tmp_path, content), form, asked, columns)
    return [(r.line, *r.values) if isinstance(r, Row) else (r.line, r.reason) if isinstance(r, BadRow) else r for r in found]


# tsv


def test_quotes_in_a_tsv_are_text_and_either_line_end_will_do(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", '\ufeffid\ttext\r\n1\t"open\r\n2\tit\'s "so" so\n\n3\ta,b', ["text", "id"])
    assert found == [(2, '"open', "1"), (3, 'it\'s "so" so', "2"), BlankLine(4), (5, "a,b", "3")]


def test_other_line_separators_do_not_split_a_record(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", "a\u2028b\x0bc\x85d\t1\ne\t2\n", ["x"], ["x", "y"])
    assert found == [(1, "a\u2028b\x0bc\x85d"), (2, "e")]


def test_bad_tsv_rows_are_named_with_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", b"a\t1\nb\nc\t\xff\nd\t4\t5\n\xc3\xa9\t5\n", ["x"], ["x", "y"])
    assert found == [(1, "a"), (2, "wrong number of columns"), (3, "not UTF-8"), (4, "wrong number of columns"), (5, "é")]


# csv


def test_a_csv_record_of_several_lines_has_the_line_it_begins_on(tmp_path: Path) -> None:
    found = read(tmp_path, "csv", 'text,label\n"two\r\nlines, ""quoted""",positive\n\nplain,negative\n', ["label", "text"])
    assert found == [(2, "positive", 'two\r\nlines, "quoted"'), BlankLine(4), (5, "negative", "plain")]


@pytest.mark.parametrize(
    ("content", "bad", "good"),
    [
        # quotes that nobody doubled; the record ends on line 3
        ('"She said "never again" and left.\nWe will too",bad\n"fine",good\n', [2, 3], [(4, "fine", "good")]),
        # quotes escaped with a backslash
        ('"a \\"great\\" film\nreally",good\n"fine",good\n', [2, 3], [(4, "fine", "good")]),
        ('"a "great" film\nof four\nlines, he said: ""no"" to it\nreally",good\n"fine",good\n', [2, 3, 4, 5], [(6, "fine", "good")]),
        ('"a"b,good\n"fine",good\n', [2], [(3, "fine", "good")]),
        # a quote that is never closed may have swallowed every line behind it
        ('a,b\n"open,b\nc,d\ne,f\n', [3, 4, 5], [(2, "a", "b")]),
        # a quote inside a field without quotes is text
        ('a 5" pipe,b\nc,d\n', [], [(2, 'a 5" pipe', "b"), (3, "c", "d")]),
    ],
)
def test_no_part_of_a_broken_csv_record_becomes_a_row(tmp_path: Path, content: str, bad: list[int], good: list[Any]) -> None:
    found = read(tmp_path, "csv", "text,label\n" + content, ["text", "label"])
    assert [row for row in found if row[1] == "not CSV"] == [(line, "not CSV") for line in bad]
    assert [row for row in found if row[1] != "not CSV"] == good


def test_a_long_csv_field_is_one_field(tmp_path: Path) -> None:
    content = f'id,text,html,label\n1,a fine film,"<p>{LONG}</p>\n</html>",good\n2,"one {LONG}\ntwo",x,bad\n3,dull,x,bad\n'
    found = read(tmp_path, "csv", content, ["text", "label"])
    assert found == [(2, "a fine film", "good"), (4, f"one {LONG}\ntwo", "bad"), (6, "dull", "bad")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(breaks=st.lists(st.sampled_from(['"', '\\"', "\n", "x", '""', ","]), min_size=1, max_size=12), before=st.integers(0, 3))
def test_rows_before_a_broken_record_are_read_and_every_line_is_accounted_for(tmp_path: Path, breaks: list[str], before: int) -> None:
    """Whatever a record looks like: what comes before it is untouched, and each of the file's lines is a row's, bad, or blank."""
    content = "text,label\n" + "".join(f'"row {i}",good\n' for i in range(before)) + '"' + "".join(breaks) + '",bad\n'
    found = list(read_rows(written(tmp_path, content), "csv", ["text", "label"]))
    assert [row.values for row in found[:before] if isinstance(row, Row)] == [(f"row {i}", "good") for i in range(before)]
    lines = content.count("\n")
    covered = set[int]()
    for row, following in zip(found, [*(row.line for row in found[1:]), lines + 1], strict=True):
        assert row.line not in covered
        covered |= {row.line} if isinstance(row, BlankLine) else set(range(row.line, following))
    assert covered == set(range(2, lines + 1))


def test_a_csv_row_that_is_not_utf8_does_not_stop_the_rest(tmp_path: Path) -> None:
    bad, good = read_rows(written(tmp_path, b"text,label\ncaf\xe9,a\ncaf\xc3\xa9,b\n"), "csv", ["text"])
    assert bad == BadRow(2, "", "not UTF-8", "caf\\xe9,a")
    assert good == Row(3, ("café",))


EUROPEAN = st.text("abéß;,|'\" \t\n", min_size=1, max_size=20)


@given(
    rows=st.lists(st.tuples(EUROPEAN, EUROPEAN), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
)
def test_what_a_csv_writer_writes_is_read(
    rows: list[tuple[str, str]], delimiter: str, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Case: a European Excel separates by semicolons and writes Windows-1252, or tabs and UTF-16."""
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("x;1", "y"), *rows])
    path = written(tmp_path_factory.mktemp("csv"), sink.getvalue().encode(encoding))
    assert [row.values for row in read_rows(path, "csv", ["x;1", "y"]) if isinstance(row, Row)] == rows


def test_a_file_of_another_encoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = "text;label\n" + '"Café, très bon";ja\nnaja;nein\n' * 20
    assert read(tmp_path, "csv", content.encode("cp1252"), ["label", "text"])[:2] == [(2, "ja", "Café, très bon"), (3, "nein", "naja")]
    assert capsys.readouterr().err == f"{tmp_path / 'file'}: not UTF-8; read as Windows-1252\n"
    read(tmp_path, "csv", content, ["label", "text"])
    assert capsys.readouterr().err == ""


def test_no_delimiter_that_gives_the_columns_is_an_error_that_lists_most_of_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'text'; the columns are: id, label, review"):
        read(tmp_path, "csv", "id;label;review\n1;a,b,c,d,e;x\n", ["text", "label"])
    assert read(tmp_path, "csv", "text;x,label\na,b\n", ["label"]) == [(2, "b")], "the header's columns decide, not their number"
    assert read(tmp_path, "csv", "a, b, and c;1\nd;2\n", ["x"], ["x", "y"]) == [(1, "a, b, and c"), (2, "d")], (
        "without a header, their number"
    )


# all formats


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_tsv_and_jsonl_and_parquet_agree(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("formats")
    (folder / "t").write_bytes("".join(f"{x}\t{y}\n" for x, y in rows).encode())
    (folder / "j").write_bytes("".join(json.dumps({"y": y, "x": x, "z": 1}) + "\n" for x, y in rows).encode())
    pq.write_table(pa.table({"y": [y for _, y in rows], "x": [x for x, _ in rows]}), folder / "p")
    expected = [Row(i, row) for i, row in enumerate(rows, start=1)]
    assert list(read_rows(folder / "t", "tsv", ["x", "y"], ["x", "y"])) == expected
    assert list(read_rows(folder / "j", "jsonl", ["x", "y"])) == expected
    assert list(read_rows(folder / "p", "parquet", ["x", "y"])) == expected


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


GOOD = parquet(text=["a film", "b"] * 200)
FILES: dict[str, tuple[str, bytes, Any]] = {  # format, bytes, and the rows of the column `text`; or what the refusal says
    "jsonl: empty": ("jsonl", b"", []),
    "jsonl: blank lines": ("jsonl", b"\n \n", [BlankLine(1), BlankLine(2)]),
    "jsonl: not JSON": ("jsonl", b'text\n{"text": "a"}', [(1, "not JSON"), (2, "a")]),
    "jsonl: not objects": ("jsonl", b"[1]\n1\nnull", [(1, "not a JSON object"), (2, "not a JSON object"), (3, "not a JSON object")]),
    "jsonl: cut": ("jsonl", b'{"text": "a', [(1, "not JSON")]),
    "jsonl: deep": ("jsonl", b"[" * 200_000 + b"\n" + b'{"text":' * 100_000, [(1, "not JSON"), (2, "not JSON")]),
    "jsonl: long integer": ("jsonl", b'{"text": ' + b"9" * 5000 + b"}", [(1, "not JSON")]),
    "jsonl: not UTF-8": ("jsonl", b'{"text": "\xe9"}\n{"text": "\xc3\xa9"}', [(1, "not UTF-8"), (2, "é")]),
    "jsonl: Windows-1252": ("jsonl", b'{"text": "\xe9\x80"}', [(1, "é€")]),
    "jsonl: UTF-16": ("jsonl", '{"text": "é"}\r\n{"text": "b"}'.encode("utf-16"), [(1, "é"), (2, "b")]),
    "jsonl: NUL": ("jsonl", b"\0", [(1, "not JSON")]),
    "jsonl: lone surrogate": ("jsonl", b'{"text": "\\ud800"}', [(1, "\ud800")]),
    "jsonl: no such key": ("jsonl", b'{"other": 1}', [(1, MISSING)]),
    "jsonl: a key twice": ("jsonl", b'{"text": "a", "text": "b"}', [(1, "b")]),
    "jsonl: byte order mark": ("jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n', [(1, "a")]),
    "csv: empty": ("csv", b"", []),
    "csv: NUL": ("csv", b"text\na\0b\n", [(2, "a\0b")]),
    "csv: too many columns": ("csv", b"text\na,b\nc\n", [(2, "wrong number of columns"), (3, "c")]),
    "csv: CR alone": ("csv", b"text\ra\rb", [(2, "a"), (3, "b")]),
    "csv: byte order mark": ("csv", b"\xef\xbb\xbftext\na\n", [(2, "a")]),
    "csv: no such column": ("csv", b"review,stars\na,1\n", "file: no column 'text'; the columns are: review, stars"),
    "csv: a column twice": ("csv", b"text,text\na,b\n", "it has 2 columns 'text'"),
    "csv: header not UTF-8": ("csv", b"\xff,text\n\xc3\xa9,b", "the header on line 1 cannot be read: not UTF-8"),
    "csv: not UTF-16": ("csv", b"\xff\xfe\x00\xd8\n\0", "begins as UTF-16 and is not UTF-16 throughout"),
    "tsv: no such column": ("tsv", b"review\tstars\na\t1\n", "file: no column 'text'; the columns are: review, stars"),
    "tsv: header not UTF-8": ("tsv", b"\xff\n\xc3\xa9", "the header on line 1 cannot be read: not UTF-8"),
    "parquet: empty": ("parquet", b"", "not a Parquet file"),
    "parquet: text": ("parquet", b"text\na\n", "not a Parquet file"),
    "parquet: cut": ("parquet", GOOD[:-20], "not a Parquet file"),
    "parquet: footer overwritten": ("parquet", GOOD[:-60] + b"\xff" * 40 + GOOD[-20:], "not a Parquet file"),
    "parquet: no such column": ("parquet", parquet(review=["x"], stars=[1]), "file: no column 'text'; the columns are: review, stars"),
    "parquet: numbers and nulls": ("parquet", parquet(text=[1, None]), [(1, 1), (2, None)]),
    "parquet: lists": ("parquet", parquet(text=[["a"], []]), [(1, ["a"]), (2, [])]),
    "parquet: a dictionary": ("parquet", parquet(text=pa.array(["a", "b", "a"]).dictionary_encode()), [(1, "a"), (2, "b"), (3, "a")]),
    "parquet: not UTF-8": ("parquet", parquet(text=pa.array([b"good", b"caf\xe9"], pa.binary())), [(1, "good"), (2, "not UTF-8")]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_row_by_row_or_refused(tmp_path: Path, name: str) -> None:
    form, content, expected = FILES[name]
    if isinstance(expected, str):
        with pytest.raises(UsageError) as error:
            read(tmp_path, form, content, ["text"])
        assert expected in str(error.value)
    else:
        assert read(tmp_path, form, content, ["text"]) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(GOOD) - 1), bits=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_parquet_file_gives_its_rows_or_a_refusal(tmp_path: Path, place: int, bits: int, cut: bool) -> None:
    """Page checksums are not written by every program, so a flipped bit may give another text, but never another number of rows."""
    damaged = GOOD[:place] if cut else GOOD[:place] + bytes([GOOD[place] ^ bits]) + GOOD[place + 1 :]
    try:
        found = read(tmp_path, "parquet", damaged, ["text"])
    except UsageError:
        return
    assert not cut
    assert len(found) == 400
