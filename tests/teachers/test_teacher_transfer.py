"""The transfer set read from its file as it is needed: the same queries as in memory, one row group at a time."""

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.teachers.asked import Query
from pipeline.errors import CorruptError, UsageError
from pipeline.files import example_id
from pipeline.schema import TableFile, examples, write_table
from pipeline.teachers.transfer import Joined, TransferSet

QUERIES = [Query(example_id({"text": f"text {number}"}), {"text": f"text {number}"}, f"answer {number}") for number in range(11)]
SLICES = [
    slice(None),
    slice(0, 4),
    slice(3, 5),
    slice(2, 10),
    slice(8, 99),
    slice(5, 5),
    slice(9, 2),
    slice(-3, None),
    slice(None, None, -2),
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Row groups of 4 rows."""
    monkeypatch.setattr(schema, "ROWS_PER_GROUP", 4)
    rows = [
        {"example_id": query.example_id, "label": None, "completion": query.answer, "source": "s", "line": line, **query.fields}
        for line, query in enumerate(QUERIES, 1)
    ]
    path = tmp_path / "transfer.parquet"
    write_table(pa.Table.from_pylist(rows, examples(("text",))), path)
    return path


@pytest.mark.parametrize("part", SLICES, ids=str)
def test_a_slice_has_the_queries_of_the_same_slice_in_memory(file, part):
    transfer = TransferSet(file, ("text",))
    assert transfer[part] == QUERIES[part]
    assert Joined(QUERIES[:2], TransferSet(file, ("text",)))[part] == [*QUERIES[:2], *QUERIES][part]


def test_single_queries_and_all_in_turn_are_those_in_memory(file):
    for found, expected in (
        (TransferSet(file, ("text",)), QUERIES),
        (Joined(QUERIES[:2], TransferSet(file, ("text",))), [*QUERIES[:2], *QUERIES]),
    ):
        assert len(found) == len(expected)
        assert list(found) == expected
        assert [found[place] for place in (-1, 4, 0, -len(expected))] == [expected[place] for place in (-1, 4, 0, -len(expected))]
        for place in (len(expected), -len(expected) - 1):
            with pytest.raises(IndexError):
                found[place]


def test_memory_holds_one_row_group(file):
    rows = TableFile(file, examples(("text",)))
    for start in range(11):
        rows.rows(start, start + 1)
        held = rows._held
        assert held is not None
        assert len(held[1]) <= 4


def test_a_file_that_is_missing_or_has_other_columns_is_refused(file, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        TransferSet(tmp_path / "nothing.parquet", ("text",))
    with pytest.raises(CorruptError, match="no column 'title'"):
        TransferSet(file, ("title",))
