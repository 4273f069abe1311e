"""Every row of a file comes out, with its line: as values, or as a bad row with a reason."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.readers import MISSING, BadRow, BlankLine, Row, read_rows
from pipeline.errors import UsageError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\0"), min_size=1, max_size=20)


def written(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_quotes_in_a_tsv_are_text_and_either_line_end_will_do(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufeffid\ttext\r\n1\t"open\r\n2\tit\'s "so" so\n\n3\ta,b')
    assert list(read_rows(path, "tsv", ["text", "id"])) == [
        Row(2, ('"open', "1")),
        Row(3, ('it\'s "so" so', "2")),
        BlankLine(4),
        Row(5, ("a,b", "3")),
    ]


def test_other_line_separators_do_not_split_a_record(tmp_path: Path) -> None:
    path = written(tmp_path, "a\u2028b\x0bc\x85d\t1\ne\t2\n")
    assert [row.line for row in read_rows(path, "tsv", ["x"], ["x", "y"])] == [1, 2]


def test_bad_tsv_rows_are_named_with_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, b"a\t1\nb\nc\t\xff\nd\t4\t5\ne\t5\n")
    rows = list(read_rows(path, "tsv", ["x"], ["x", "y"]))
    assert [(row.line, row.reason) for row in rows if isinstance(row, BadRow)] == [
        (2, "wrong number of columns"),
        (3, "not UTF-8"),
        (4, "wrong number of columns"),
    ]
    assert [row.line for row in rows if isinstance(row, Row)] == [1, 5]


def test_a_csv_record_of_several_lines_has_the_line_it_begins_on(tmp_path: Path) -> None:
    path = written(tmp_path, 'text,label\n"two\r\nlines, ""quoted""",positive\nplain,negative\n')
    assert list(read_rows(path, "csv", ["label", "text"])) == [
        Row(2, ("positive", 'two\r\nlines, "quoted"')),
        Row(4, ("negative", "plain")),
    ]


def test_a_csv_quote_that_is_never_closed_counts_every_line_it_swallows(tmp_path: Path) -> None:
    path = written(tmp_path, 'text,label\na,b\n"open,b\nc,d\ne,f\n')
    rows = list(read_rows(path, "csv", ["text"]))
    assert rows[0] == Row(2, ("a",))
    assert [(row.line, row.reason) for row in rows[1:]] == [(3, "not CSV"), (4, "not CSV"), (5, "not CSV")]  # type: ignore[union-attr]


def test_a_csv_row_that_is_not_utf8_does_not_stop_the_rest(tmp_path: Path) -> None:
    path = written(tmp_path, b"text,label\ncaf\xe9,a\ncaf\xc3\xa9,b\n")
    bad, good = read_rows(path, "csv", ["text"])
    assert isinstance(bad, BadRow)
    assert (bad.line, bad.reason, bad.value) == (2, "not UTF-8", "caf\\xe9,a")
    assert good == Row(3, ("café",))


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_what_a_csv_writer_writes_is_read(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    sink = io.StringIO()
    csv.writer(sink).writerows([("x", "y"), *rows])
    path = written(tmp_path_factory.mktemp("csv"), sink.getvalue())
    assert [row.values for row in read_rows(path, "csv", ["x", "y"]) if isinstance(row, Row)] == rows


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


def test_bad_jsonl_lines_are_named_with_their_line(tmp_path: Path) -> None:
    deep = "[" * 200_000
    path = written(tmp_path, b'{"text": "a"}\n[1]\n{"text": \n\n"x"\n{"other": 1}\n\xff\n' + deep.encode() + b"\n")
    rows = list(read_rows(path, "jsonl", ["text"]))
    assert rows[0] == Row(1, ("a",))
    assert rows[5] == Row(6, (MISSING,))
    reasons = [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]
    assert reasons == [(2, "not a JSON object"), (3, "not JSON"), (5, "not a JSON object"), (7, "not UTF-8"), (8, "not JSON")]
    assert rows[3] == BlankLine(4)


def test_a_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", None], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": text, "label": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "p")
    first, bad, last = read_rows(tmp_path / "p", "parquet", ["text", "label"])
    assert first == Row(1, ("good", "a"))
    assert bad == BadRow(2, "text", "not UTF-8", "caf\\xe9")
    assert last == Row(3, (None, "a"))


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, form: str) -> None:
    path = tmp_path / "rows"
    if form == "parquet":
        pq.write_table(pa.table({"review": ["x"], "stars": [1]}), path)
    else:
        path.write_text("review,stars\nx,1\n".replace(",", "," if form == "csv" else "\t"))
    with pytest.raises(UsageError, match=r"rows: no column 'text'; the columns are: review, stars"):
        list(read_rows(path, form, ["text"]))  # type: ignore[arg-type]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'text' is there 2 times"):
        list(read_rows(written(tmp_path, "text,text\n1,2\n"), "csv", ["text"]))


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a Parquet file"):
        list(read_rows(written(tmp_path, "text\n"), "parquet", ["text"]))
    with pytest.raises(UsageError, match="the header on line 1 cannot be read: not UTF-8"):
        list(read_rows(written(tmp_path, b"\xff\xfe\x00\n"), "csv", ["text"]))
