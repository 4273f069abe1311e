"""Bad data files and hostile archives: a row is read or set aside with its reason, or the file is refused; nothing leaves its folder."""

import io
import stat
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_archives import make_tar, make_zip
from faults_world import LARGER, WORKED, count, met
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.archives import extract
from pipeline.data.readers import BadRow, BlankLine, Row, read_rows

ROWS, ARCHIVES = "data files", "archives"


def parquet(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


GOOD = parquet(text=["a film", "b"] * 200)
BAD = {  # format, bytes, and how the first row that is not in order is called; "" where all are, None where the file is refused
    "jsonl: empty": ("jsonl", b"", ""),
    "jsonl: blank lines": ("jsonl", b"\n\n \n", ""),
    "jsonl: no JSON": ("jsonl", b"text", "not JSON"),
    "jsonl: a list": ("jsonl", b"[1]", "not a JSON object"),
    "jsonl: a number": ("jsonl", b"1", "not a JSON object"),
    "jsonl: null": ("jsonl", b"null", "not a JSON object"),
    "jsonl: cut": ("jsonl", b'{"text": "a', "not JSON"),
    "jsonl: deep": ("jsonl", b"[" * 100_000, "not JSON"),
    "jsonl: deep object": ("jsonl", b'{"text":' * 100_000, "not JSON"),
    "jsonl: long integer": ("jsonl", b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
    "jsonl: latin-1": ("jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8"),
    "jsonl: utf-16": ("jsonl", '{"text": "é"}'.encode("utf-16"), "not UTF-8"),
    "jsonl: NUL": ("jsonl", b"\0", "not JSON"),
    "jsonl: raw control character": ("jsonl", b'{"text": "\x01"}', "not JSON"),
    "jsonl: lone surrogate": ("jsonl", b'{"text": "\\ud800"}', ""),
    "jsonl: NaN": ("jsonl", b'{"text": NaN}', ""),
    "jsonl: a key twice": ("jsonl", b'{"text": "a", "text": "b"}', ""),
    "jsonl: byte order mark": ("jsonl", b'\xef\xbb\xbf{"text": "a"}', ""),
    "jsonl: CR alone": ("jsonl", b'{"text": "a"}\r{"text": "b"}', "not JSON"),
    "jsonl: a megabyte": ("jsonl", b'{"text": "' + b"x" * 1_000_000 + b'"}', ""),
    "jsonl: a pickle": ("jsonl", b"\x80\x04\x95\x10", "not UTF-8"),
    "csv: empty": ("csv", b"", ""),
    "csv: other header": ("csv", b"body\na\n", None),
    "csv: column twice": ("csv", b"text,text\na,b\n", None),
    "csv: NUL": ("csv", b"text\na\0b\n", ""),
    "csv: open quote": ("csv", b'text\n"a\nb\n', "not CSV"),
    "csv: text behind a quote": ("csv", b'text\n"a"b\n', "not CSV"),
    "csv: too many columns": ("csv", b"text\na,b\n", "wrong number of columns"),
    "csv: latin-1": ("csv", "text\né\n".encode("latin-1"), "not UTF-8"),
    "csv: utf-16": ("csv", "text\na\n".encode("utf-16"), None),
    "csv: header not UTF-8": ("csv", b"\xff\n", None),
    "csv: a field of a megabyte": ("csv", b"text\n" + b"x" * 1_000_000 + b"\n", "not CSV"),
    "csv: semicolons": ("csv", b"text;label\na;b\n", None),
    "csv: a formula": ("csv", b"text\n\"=cmd|' /C calc'!A0\"\n", ""),
    "csv: CR alone": ("csv", b"text\ra\r", ""),
    "tsv: other header": ("tsv", b"body\na\n", None),
    "tsv: too few columns": ("tsv", b"text\tlabel\na\n", "wrong number of columns"),
    "tsv: not UTF-8": ("tsv", b"text\n\xff\n", "not UTF-8"),
    "tsv: header not UTF-8": ("tsv", b"\xff\n", None),
    "tsv: quotes belong to the text": ("tsv", b'text\n"a\n', ""),
    "parquet: empty": ("parquet", b"", None),
    "parquet: text": ("parquet", b"text\na\n", None),
    "parquet: magic alone": ("parquet", b"PAR1PAR1", None),
    "parquet: cut": ("parquet", GOOD[:-20], None),
    "parquet: beginning lost": ("parquet", GOOD[20:], None),
    "parquet: middle overwritten": ("parquet", GOOD[:8] + b"\xff" * 40 + GOOD[48:], None),
    "parquet: footer overwritten": ("parquet", GOOD[:-60] + b"\xff" * 40 + GOOD[-20:], None),
    "parquet: footer of 4 GB": ("parquet", GOOD[:-8] + b"\xff\xff\xff\xff" + b"PAR1", None),
    "parquet: no such column": ("parquet", parquet(body=["a"]), None),
    "parquet: not UTF-8": ("parquet", parquet(text=pa.array([b"\xff"], pa.binary())), "not UTF-8"),
    "parquet: numbers": ("parquet", parquet(text=[1, 2]), ""),
    "parquet: lists": ("parquet", parquet(text=[["a"], []]), ""),
    "parquet: nulls": ("parquet", parquet(text=pa.nulls(3)), ""),
}


def faults(path, form):
    """The reasons of rows that cannot be read; every row is looked at."""
    read = list(read_rows(path, form, ["text"]))
    assert all(isinstance(row, (Row, BadRow, BlankLine)) for row in read)
    return [row.reason for row in read if isinstance(row, BadRow)]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_set_aside_row_by_row_or_refused(tmp_path, name):
    form, data, reason = BAD[name]
    path = tmp_path / f"rows.{form}"
    path.write_bytes(data)
    found: list[str] = []
    said = met(ROWS, lambda: found.extend(faults(path, form)), None if reason is not None else "rows.")
    if reason is not None:
        assert said is None
        assert reason in found if reason else not found


@settings(max_examples=100 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(["jsonl", "csv", "tsv", "parquet"]), data=st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_refusal(tmp_path, form, data):
    path = tmp_path / "rows"
    path.write_bytes(data if form != "csv" else b"text\n" + data)
    met(ROWS, lambda: faults(path, form))


@settings(max_examples=100 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(GOOD) - 1), bits=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_parquet_file_is_rows_or_a_refusal(tmp_path, place, bits, cut):
    path = tmp_path / "rows.parquet"
    path.write_bytes(GOOD[:place] if cut else GOOD[:place] + bytes([GOOD[place] ^ bits]) + GOOD[place + 1 :])
    met(ROWS, lambda: faults(path, "parquet"))


def tar_with(path, mode="w:gz", **changes):
    with tarfile.open(path, mode) as file:
        info = tarfile.TarInfo(changes.pop("name", "data"))
        for key, value in changes.items():
            setattr(info, key, value)
        if info.isreg():
            info.size = 4
        file.addfile(info, io.BytesIO(b"rows") if info.isreg() else None)
    return path


def zip_with(path, name="data", mode=0, data=b"rows", **changes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        file.writestr(info, data)
    raw = path.read_bytes()
    for old, new in changes.get("patches", []):
        assert old in raw
        raw = raw.replace(old, new)
    path.write_bytes(raw)
    return path


HOSTILE = {  # archive, the member that is asked for, and what the message names; None where the member is taken, to the caller's name
    "tar: a member that leaves its folder": (lambda p: tar_with(p, name="../../out"), "../../out", None),
    "tar: an absolute member": (lambda p: tar_with(p, name="/etc/canary"), "/etc/canary", None),
    "tar: a symlink": (lambda p: tar_with(p, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "data", "a link"),
    "tar: a hard link": (lambda p: tar_with(p, type=tarfile.LNKTYPE, linkname="/etc/passwd"), "data", "a link"),
    "tar: a pipe": (lambda p: tar_with(p, type=tarfile.FIFOTYPE), "data", "a link or a device"),
    "tar: a block device": (lambda p: tar_with(p, type=tarfile.BLKTYPE), "data", "a device"),
    "tar: a folder": (lambda p: tar_with(p, type=tarfile.DIRTYPE), "data", "a folder"),
    "tar: an unknown type": (lambda p: tar_with(p, type=b"Z"), "data", "a.x"),
    "tar: no such member": (lambda p: tar_with(p), "other", "the nearest are"),
    "tar: a name with NUL": (lambda p: tar_with(p), "da\0ta", "the nearest are"),
    "tar.bz2: cut": (lambda p: cut(tar_with(p, "w:bz2"), 20), "data", "a.x"),
    "tar.xz: cut": (lambda p: cut(tar_with(p, "w:xz"), 90), "data", "a.x"),
    "tar.gz: cut": (lambda p: cut(tar_with(p), 20), "data", "a.x"),
    "tar: a bomb": (lambda p: make_tar(p, {"data": bytes(5_000_000)}), "data", "refused as unsafe"),
    "zip: a member that leaves its folder": (lambda p: zip_with(p, "../../out"), "../../out", None),
    "zip: an absolute member": (lambda p: zip_with(p, "/etc/canary"), "/etc/canary", None),
    "zip: a symlink": (lambda p: zip_with(p, mode=stat.S_IFLNK | 0o777), "data", "a link"),
    "zip: a folder": (lambda p: make_zip(p, {"data/": b""}), "data/", "a folder"),
    "zip: a bomb": (lambda p: make_zip(p, {"data": bytes(5_000_000)}), "data", "refused as unsafe"),
    "zip: encrypted": (lambda p: zip_with(p, patches=[(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0")]), "data", "encrypted"),
    "zip: an unknown compression": (lambda p: zip_with(p, patches=[(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x63\0")]), "data", "a.x"),
    "zip: a name that is not UTF-8": (
        lambda p: zip_with(p, "dat\u00e4", patches=[("dat\u00e4".encode(), b"dat\xff\xff")]), "data", "a.x",
    ),
    "zip: another checksum": (lambda p: swap_bytes(zip_with(p, data=b"rows" * 9), b"PK\1\2", 16), "data", "a.x"),
    "zip: cut": (lambda p: cut(zip_with(p), 10), "data", "a.x"),
    "no archive": (lambda p: p.write_bytes(b"rows") and p, "data", "neither a zip nor a tar"),
    "empty": (lambda p: p.write_bytes(b"") or p, "data", "a.x"),
}  # fmt: skip


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])
    return path


def swap_bytes(path, mark, offset):
    data = bytearray(path.read_bytes())
    data[data.index(mark) + offset] ^= 0xFF
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_gives_the_member_or_nothing_at_all(tmp_path, name):
    make, member, named = HOSTILE[name]
    inside = tmp_path / "one" / "two"
    inside.mkdir(parents=True)
    archive = make(inside / "a.x")
    met(ARCHIVES, lambda: extract(archive, [member], inside / "taken"), named)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a.x"} | ({"taken"} if named is None else set()) or (left == {"a.x", "taken"} and not (inside / "taken").stat().st_size)


@settings(max_examples=150 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["w:gz", "w:bz2", "w:xz", "w", "zip"]), place=st.floats(0, 0.999), bits=st.integers(1, 255))
def test_a_damaged_archive_gives_the_member_or_a_refusal(tmp_path, kind, place, bits):
    archive, target = tmp_path / "a.x", tmp_path / "taken"
    target.unlink(missing_ok=True)
    archive.unlink(missing_ok=True)
    whole = zip_with(archive, data=b"rows" * 50) if kind == "zip" else tar_with(archive, kind)
    data = bytearray(whole.read_bytes())
    data[int(len(data) * place)] ^= bits
    archive.write_bytes(data)
    met(ARCHIVES, lambda: extract(archive, ["data"], target))


def test_a_chain_of_archives_is_not_followed_further_than_asked(tmp_path):
    archive = make_zip(tmp_path / "0.zip", {"inner": b"rows"})
    for depth in range(1, 20):
        archive = make_zip(tmp_path / f"{depth}.zip", {"inner": archive.read_bytes()})
    extract(archive, ["inner"] * 20, tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"rows"
    count(ARCHIVES, WORKED)
    met(ARCHIVES, lambda: extract(archive, ["inner"] * 21, tmp_path / "again"), "neither a zip nor a tar")
