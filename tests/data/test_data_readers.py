"""Every row of a file comes out, with its line: as values, or as a bad row with a reason."""

import csv
import gzip
import io
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook

from pipeline.data.readers import MISSING, BadRow, Row, read_rows
from pipeline.errors import UsageError
from pipeline.params.data import form_of

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\t\r\n\0'), min_size=1, max_size=20)
"""Without quotes: a tsv file of `"` and `"` on two lines may be one quoted text of two lines."""
LONG = "x" * 140_000
"""Longer than the limit that the csv module has by default."""


def written(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path: Path, form: str, content: bytes | str, asked: list[str], columns: list[str] | None = None, **said: str) -> list[Any]:
    """Rows as (line, *values) and bad rows as (line, reason)."""
    found = read_rows(written(tmp_path, content), form, asked, columns, **said)
    return [(r.line, *r.values) if isinstance(r, Row) else (r.line, r.reason) for r in found]


# tsv


def test_quotes_in_a_tsv_are_text_and_either_line_end_will_do(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", '\ufeffid\ttext\r\n1\t"open\r\n2\tit\'s "so" so\n\n3\ta,b', ["text", "id"])
    assert found == [(2, '"open', "1"), (3, 'it\'s "so" so', "2"), (5, "a,b", "3")]


def test_other_line_separators_do_not_split_a_record(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", "a\u2028b\x0bc\x85d\t1\ne\t2\n", ["x"], ["x", "y"])
    assert found == [(1, "a\u2028b\x0bc\x85d"), (2, "e")]


def test_bad_tsv_rows_are_named_with_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, "tsv", b"a\t1\nb\nc\t\xff\nd\t4\t5\n\xc3\xa9\t5\n", ["x"], ["x", "y"])
    assert found == [(1, "a"), (2, "wrong number of columns"), (3, "not UTF-8"), (4, "wrong number of columns"), (5, "é")]


# csv


def test_a_csv_record_of_several_lines_has_the_line_it_begins_on(tmp_path: Path) -> None:
    found = read(tmp_path, "csv", 'text,label\n"two\r\nlines, ""quoted""",positive\n\nplain,negative\n', ["label", "text"])
    assert found == [(2, "positive", 'two\r\nlines, "quoted"'), (5, "negative", "plain")]


@pytest.mark.parametrize(
    ("content", "bad", "good"),
    [
        # quotes that nobody doubled; the record ends on line 3
        ('"She said "never again" and left.\nWe will too",bad\n"fine",good\n', [2, 3], [(4, "fine", "good")]),
        # the text's second line begins afresh with quotes, its third with the quote that ends it
        ('"He said "no".\n"Never", she cried.\n",bad\nfine,good\n', [2, 3, 4], [(5, "fine", "good")]),
        # as many quotes as a whole record has, and lines with as many commas
        ('"a 5" pipe\nsecond, line\nthird line",good\n"fine",good\n', [2, 3, 4], [(5, "fine", "good")]),
        # a broken record of one line, a whole one of two
        ('"a" b" c,good\nfine,good\n"two\nlines",bad\n', [2], [(3, "fine", "good"), (4, "two\nlines", "bad")]),
        ('"a "great" film\nof four\nlines, he said: ""no"" to it\nreally",good\n"fine",good\n', [2, 3, 4, 5], [(6, "fine", "good")]),
        ('"a"b,good\n"fine",good\n', [2], [(3, "fine", "good")]),
        # a quote that is never closed may have swallowed every line behind it
        ('a,b\n"open,b\nc,d\ne,f\n', [3, 4, 5], [(2, "a", "b")]),
        # a backslash in the rest of a broken record, and escapes before it
        ('"a \\"b\\"",good\n"a "5 c\nin d\\e",bad\nfine,good\n', [3, 4], [(2, 'a "b"', "good"), (5, "fine", "good")]),
        # a quote inside a field without quotes is text
        ('a 5" pipe,b\nc,d\n', [], [(2, 'a 5" pipe', "b"), (3, "c", "d")]),
    ],
)
def test_no_part_of_a_broken_csv_record_becomes_a_row(tmp_path: Path, content: str, bad: list[int], good: list[Any]) -> None:
    found = read(tmp_path, "csv", "text,label\n" + content, ["text", "label"])
    assert [row for row in found if row[1] == "not CSV"] == [(line, "not CSV") for line in bad]
    assert [row for row in found if row[1] != "not CSV"] == good


def with_stray_quotes(draw: random.Random, delimiter: str) -> tuple[str, list[str | None]]:
    """A table as a csv writer writes it, but for one record whose text has quotes that nobody doubled; and the texts, None for that one."""
    rows, content, broken = draw.randint(2, 12), io.StringIO(), draw.randrange(2)
    writer = csv.writer(content, delimiter=delimiter, quoting=draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), lineterminator="\n")
    writer.writerows([("text", "label"), ('a ""quoted"" text', "good")])
    texts: list[str | None] = ['a ""quoted"" text']
    for row in range(rows):
        words = [f"r{row}w{at}" for at in range(draw.randint(3, 12))]
        text = "".join(word + draw.choice([" ", " ", ". ", "\n", f"{delimiter} "]) for word in words)
        if row == broken:
            for word in draw.sample(words[1:-1], min(len(words) - 2, draw.randint(1, 3))):
                text = text.replace(f" {word} ", draw.choice([' "{}" ', ' {}" ', ' "{} ']).format(word))
            content.write(f'"{text}"{delimiter}bad\n' if '"' in text else "")
            texts.append(None)
        else:
            writer.writerow((text, draw.choice(["good", "bad"])))
            texts.append(text)
    return content.getvalue(), texts


@pytest.mark.parametrize(("form", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_half_a_text_never_has_a_label_and_the_texts_around_it_are_read(tmp_path: Path, form: str, delimiter: str) -> None:
    lost = held = 0
    for seed in range(400):
        content, texts = with_stray_quotes(random.Random(seed), delimiter)
        found = [row[1] for row in read(tmp_path, form, content, ["text", "label"]) if row[2:] and row[2] in {"good", "bad"}]
        whole = [text for text in texts if text]
        half = [text for text in found if text not in whole and text.count("w") < content.count(f"r{texts.index(None) - 1}w")]
        assert not half, content
        lost, held = lost + len(whole) - sum(text in whole for text in found), held + len(whole)
    assert lost / held < 0.01


TABLES: dict[str, tuple[str, str | bytes, dict[str, str], list[Any]]] = {
    # format, content behind the header `text`, `label`; what is said of the file; rows
    "backslashes": (
        "csv",
        'text,label\n"a \\"great\\" film\nreally",good\n"fine",good\n',
        {},
        [(2, 'a "great" film\nreally', "good"), (4, "fine", "good")],
    ),
    "backslashes that are text": (
        "csv",
        'text,label\n"in C:\\new, \\"x\\"",good\nC:\\top,bad\n',
        {},
        [(2, 'in C:\\new, "x"', "good"), (3, "C:\\top", "bad")],
    ),
    "a path before a quote": (
        "csv",
        'text,label\n"C:\\temp\\",good\n"a ""b""",bad\n',
        {},
        [(2, "C:\\temp\\", "good"), (3, 'a "b"', "bad")],
    ),
    "an escaped comma": ("csv", "text,label\na\\, b,good\nfine,bad\n", {}, [(2, "a, b", "good"), (3, "fine", "bad")]),
    "both ways to write a quote": ("csv", 'text;label\n"a \\"b\\" ""c""";good\n', {}, [(2, 'a "b" "c"', "good")]),
    "Excel's line for the delimiter": ("csv", 'sep=|\r\ntext|label\r\n"a, b; c"|good\r\n', {}, [(3, "a, b; c", "good")]),
    "a space behind each comma": ("csv", '"text", "label"\n"a, b", good\n', {}, [(2, "a, b", "good")]),
    "a delimiter that is said": ("csv", "text^label\na, b^good\n", {"delimiter": "^"}, [(2, "a, b", "good")]),
    "an encoding that is said": ("csv", "text,label\nżółć,good\n".encode("cp1250"), {"encoding": "cp1250"}, [(2, "żółć", "good")]),
    "UTF-8 that is said, with its mark": ("tsv", "\ufefftext\tlabel\né\tgood\n", {"encoding": "utf-8"}, [(2, "é", "good")]),
    "UTF-16 without a mark": ("csv", "text\tlabel\né\tgood\n".encode("utf-16-be"), {}, [(2, "é", "good")]),
    "a tsv of pandas": (
        "tsv",
        'text\tlabel\n"He said ""fine"""\tgood\n"two\nlines"\tbad\n',
        {},
        [(2, 'He said "fine"', "good"), (3, "two\nlines", "bad")],
    ),
    "a tsv in which everything is quoted": ("tsv", '"text"\t"label"\n"a"\t"good"\n', {}, [(2, "a", "good")]),
    "a tsv that holds tabs": (
        "tsv",
        'text\tlabel\n"a\tb"\tgood\n27" wide\tbad\n"c\td"\tbad\n',
        {},
        [(2, "a\tb", "good"), (3, '27" wide', "bad"), (4, "c\td", "bad")],
    ),
    "a tsv of MySQL": ("tsv", 'text\tlabel\n"a \\"b\\"\nc"\tgood\n', {}, [(2, 'a "b"\nc', "good")]),
    "a tsv with a broken record": (
        "tsv",
        'text\tlabel\n"She said "never".\nWe will too"\tbad\nfine\tgood\n',
        {},
        [(2, "not CSV"), (3, "not CSV"), (4, "fine", "good")],
    ),
    "a tsv without quoting": (
        "tsv",
        'text\tlabel\n"Great" they said\tgood\nit\'s "so" so\tbad\n"open\tgood\n"whole"\tbad\n',
        {},
        [(2, '"Great" they said', "good"), (3, 'it\'s "so" so', "bad"), (4, '"open', "good"), (5, '"whole"', "bad")],
    ),
    "a record of two lines with a column too many": (
        "csv",
        'text,label\n"a\nb",good,x\nfine,good\n',
        {},
        [(2, "wrong number of columns"), (3, "wrong number of columns"), (4, "fine", "good")],
    ),
    "a record whose rest looks like a row": (
        "csv",
        'text,label\n"a 5", b, c\nd",good\nfine,good\n',
        {},
        [(2, "wrong number of columns"), (3, "wrong number of columns"), (4, "fine", "good")],
    ),
    "a record of two lines that is not UTF-8": (
        "csv",
        b'text,label\n"caf\xe9\nb",good\ncaf\xc3\xa9,good\n',
        {},
        [(2, "not UTF-8"), (3, "not UTF-8"), (4, "café", "good")],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_however_a_program_wrote_it(tmp_path: Path, name: str) -> None:
    form, content, said, expected = TABLES[name]
    assert read(tmp_path, form, content, ["text", "label"], **said) == expected


@pytest.mark.parametrize(
    ("form", "content", "expected"),
    [
        ("tsv", b'text\tlabel\n"He said ""fine"""\tgood\n"two\nlines"\tbad\n', [(2, 'He said "fine"'), (3, "two\nlines")]),
        ("csv", gzip.compress("text;x\né;1\n".encode("cp1252"), mtime=0), [(2, "é")]),
        ("json", b'{"text": "a"}\n{"text": "b"}', [(1, "a"), (2, "b")]),
        ("jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), [(1, "a")]),
    ],
)
def test_a_pipe_is_read_as_a_file_is(tmp_path: Path, form: str, content: bytes, expected: list[Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    found = list(read_rows(tmp_path / "pipe", form, ["text"]))
    writer.join()
    assert [(row.line, *row.values) for row in found if isinstance(row, Row)] == expected


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
    ends = [sum(value.count("\n") for value in (row.values if isinstance(row, Row) else [row.value])) for row in found]
    covered = [line for row, end in zip(found, ends, strict=True) for line in range(row.line, row.line + end + 1)]
    assert covered == sorted(set(covered))
    lines = content.split("\n")
    assert not any(lines[number - 1] for number in set(range(2, len(lines) + 1)).difference(covered)), "the others are blank"


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
    assert capsys.readouterr().err == f"{tmp_path / 'file'}: not UTF-8; read as Windows-1252, since no `encoding` is said\n"
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
@pytest.mark.slow
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
    "jsonl: blank lines": ("jsonl", b"\n \n", []),
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
    "json: a list": ("json", b'[{"text": "a"},\n {"text": "b"}, 3, {}]', [(1, "a"), (2, "b"), (3, "not a JSON object"), (4, MISSING)]),
    "json: an object with a list": ("json", b'{"version": "1", "data": [{"text": "a"}], "n": {}}', [(1, "a")]),
    "json: JSON lines": ("json", b'{"text": "a"}\n{"text": "b"}\n', [(1, "a"), (2, "b")]),
    "json: two lists": ("json", b'{"data": [], "more": []}', "neither a list of objects nor an object with one list, as `data`"),
    "json: columns": ("json", b'{"text": {"0": "a"}, "label": {"0": "x"}}', "neither a list of objects nor"),
    "json: cut": ("json", b'[{"text": "a"},', "file: not JSON (Expecting value: line 1 column 16"),
    "json: deep": ("json", b"[" * 200_000, "file: not JSON ("),
    "json: UTF-16": ("json", '[{"text": "é"}]'.encode("utf-16"), [(1, "é")]),
    "jsonl: gzip": ("jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), [(1, "a")]),
    "json: gzip": ("json", gzip.compress(b'[{"text": "a"}]', mtime=0), [(1, "a")]),
    "csv: gzip of Windows-1252": ("csv", gzip.compress('text;x\n"é\né";1\n'.encode("cp1252"), mtime=0), [(2, "é\né")]),
    "tsv: gzip": ("tsv", gzip.compress(b"text\tx\na\t1\n", mtime=0), [(2, "a")]),
    "csv: a cut gzip file": ("csv", gzip.compress(b"text\n" + b"a\n" * 9999, mtime=0)[:-20], "a gzip file that is cut or damaged"),
    "xlsx: text": ("xlsx", b"text\na\n", "file: not a readable .xlsx file"),
    "jsonl: byte order mark": ("jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n', [(1, "a")]),
    "csv: empty": ("csv", b"", []),
    "csv: NUL": ("csv", b"text\na\0b\n", [(2, "a\0b")]),
    "csv: too many columns": ("csv", b"text\na,b\nc\n", [(2, "wrong number of columns"), (3, "c")]),
    "csv: CR alone": ("csv", b"text\ra\rb", [(2, "a"), (3, "b")]),
    "csv: byte order mark": ("csv", b"\xef\xbb\xbftext\na\n", [(2, "a")]),
    "csv: no such column": ("csv", b"review,stars\na,1\n", "file: no column 'text'; the columns are: review, stars"),
    "csv: a column twice": ("csv", b"text,text\na,b\n", "it has 2 columns 'text'"),
    "csv: header not UTF-8": ("csv", b"\xff,text\n\xc3\xa9,b", "the header on line 1 cannot be read: not UTF-8"),
    "csv: not UTF-16": ("csv", b"\xff\xfe\x00\xd8\n\0", "file: not utf-16 throughout"),
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


# workbooks


def test_a_workbooks_first_sheet_is_read_with_its_types(tmp_path: Path) -> None:
    book = Workbook()
    for row in [("text", "label", None), ("two\nlines", True, "far"), (), ("_x000D_ é", 1.0), ("=1+1", None), (None, 3)]:
        book.worksheets[0].append(row)
    book.create_sheet("other").append(("x",))
    book.save(tmp_path / "book.xlsx")
    found = list(read_rows(tmp_path / "book.xlsx", None, ["label", "text"]))
    assert found == [Row(2, (True, "two\nlines")), Row(4, (1, "\r é")), Row(6, (3, None))], "a formula that was never computed is empty"
    with pytest.raises(UsageError, match=r"no column 'x'; the columns are: label, text"):
        list(read_rows(tmp_path / "book.xlsx", None, ["x"]))


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "book.xlsx").touch()
    with pytest.raises(UsageError, match=r"openpyxl, which is not installed.*the extra `xlsx`"):
        list(read_rows(tmp_path / "book.xlsx", None, ["x"]))


# folders


def shards(folder: Path) -> None:
    for name, texts in (("2024/part-0.jsonl", ["a", "b"]), ("2024/part-1.jsonl.gz", ["c"]), ("2025/part-0.jsonl", [])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


@pytest.mark.parametrize(
    ("files", "expected"),
    [(None, "abc"), ("**/part-0.*", "ab"), ("2024/*.gz", "c"), ("*/part-?.jsonl", "ab"), ("2025/*", "")],
)
def test_a_folders_files_are_read_one_after_another(tmp_path: Path, files: str | None, expected: str) -> None:
    shards(tmp_path)
    for hidden in ("_SUCCESS", ".part-0.jsonl.crc", "README.md", "2024/_meta.json"):
        (tmp_path / hidden).write_text("x")
    found = [row for row in read_rows(tmp_path, None, ["text"], files=files) if isinstance(row, Row)]
    assert "".join(row.values[0] for row in found) == expected
    if files is None:
        assert [(row.file, row.line) for row in found] == [("2024/part-0.jsonl", 1), ("2024/part-0.jsonl", 2), ("2024/part-1.jsonl.gz", 1)]


def test_a_folder_of_parquet_shards(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"part-{number:05}.parquet").write_bytes(parquet(text=[f"{number}"]))
    assert [row.values[0] for row in read_rows(tmp_path, None, ["text"]) if isinstance(row, Row)] == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("names", "said", "expected"),
    [
        (["a.csv", "b.parquet"], {}, r"files of several formats \(csv, parquet\). Say which are meant with `files`"),
        (["a.txt"], {}, r"no file that ends with one of \.csv, \.json,"),
        ([], {}, "no file that ends with"),
        (["a.csv"], {"files": "*.jsonl"}, r"files '\*\.jsonl': no file"),
    ],
)
def test_a_folder_that_does_not_say_what_to_read_is_refused(tmp_path: Path, names: list[str], said: dict[str, str], expected: str) -> None:
    for name in names:
        (tmp_path / name).write_text("text\na\n")
    with pytest.raises(UsageError, match=expected):
        list(read_rows(tmp_path, None, ["text"], **said))


def test_files_without_an_ending_are_read_if_their_format_is_said(tmp_path: Path) -> None:
    (tmp_path / "part-00000").write_text("text\na\n")
    assert list(read_rows(tmp_path, "csv", ["text"])) == [Row(2, ("a",), "part-00000")]
    with pytest.raises(UsageError, match=r"part-00000: the name does not end with one of .*say its format"):
        list(read_rows(tmp_path / "part-00000", None, ["text"]))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("A.CSV", "csv"),
        ("my/a.json.gz", "json"),
        ("a.ndjson", "jsonl"),
        ("a.v2.tsv.GZ", "tsv"),
        ("a.xlsx", "xlsx"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("csv", None),
        ("a.csv.zip", None),
    ],
)
def test_the_format_is_what_the_name_ends_with(name: str, form: str | None) -> None:
    assert form_of(name) == form
