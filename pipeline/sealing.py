"""Parquet files that carry the sha256 of their own bytes and their own name: a flipped bit or a swap is found before a row is read.

The hash stands in the file's metadata, where every Parquet reader shows it and none minds it, and is taken with its own digits as zeros.
Page checksums, which the format has, leave out the footer and the pages' headers. The trade-off: a file is read twice.
"""

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError
from pipeline.places import Place

KEY = "shotless_sha256"
MARK = b"sha256:"
BLANK = MARK + b"0" * 64
AGAIN = "run the stage that writes it again."


def write_sealed_table(table: pa.Table, path: Path, final: Path, rows_per_group: int) -> None:
    """Write one Parquet file, to be renamed to `final`, whose bytes depend on the rows and on that name alone."""
    with pq.ParquetWriter(path, table.schema, compression="zstd", write_statistics=True, write_page_checksum=True) as writer:
        writer.write_table(table, rows_per_group)
        writer.add_key_value_metadata({KEY: (BLANK + _place(final)).decode()})
    with path.open("r+b") as file:
        start, footer = _footer(file)
        place = start + footer.index(BLANK)
        digest = _digest(file, place)
        file.seek(place + len(MARK))
        file.write(digest.encode())


def check_seal(file: BinaryIO, path: Place) -> None:
    """Raise CorruptError where the bytes of an open file, which `path` names, are not those that were sealed."""
    try:
        start, footer = _footer(file)
        place = footer.index(MARK)
        written = footer[place + len(MARK) :][:64].decode()
        found = _digest(file, start + place)
    except (ValueError, struct.error):
        size = file.seek(0, os.SEEK_END)
        raise CorruptError(f"{path}: {size:,} bytes without a seal, so it is damaged or of another version; {AGAIN}") from None
    if found == written and not footer[place + len(BLANK) :].startswith(_place(path)):
        stands = footer[place + len(BLANK) :].split(b"\n")[0].decode(errors="backslashreplace")
        raise CorruptError(f"{path}: was written as {stands.strip()}, so it was put in another's place; {AGAIN}")
    if found != written:
        raise CorruptError(f"{path}: its bytes have sha256 {found[:12]}…, and were sealed with {written[:12]}…; {AGAIN}")


def _place(path: Place) -> bytes:
    """What a file is called, with its folder: one run's files cannot stand for each other."""
    folder, name = str(path.absolute() if isinstance(path, Path) else path).split("/")[-2:]
    return f" {folder}/{name}\n".encode(errors="backslashreplace")


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Where a Parquet file's footer begins, and its bytes. Raises ValueError or struct.error where there is none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = struct.unpack("<I4s", file.read(8))[0]
    if length > size - 8:
        raise ValueError(length)
    file.seek(size - 8 - length)
    return size - 8 - length, file.read(length)


def _digest(file: BinaryIO, place: int) -> str:
    """sha256 of a file whose seal, at `place`, is blank."""
    whole, before = hashlib.sha256(), place
    file.seek(0)
    while piece := file.read(min(1 << 20, before)):
        whole.update(piece)
        before -= len(piece)
    whole.update(BLANK)
    file.seek(place + len(BLANK))
    while piece := file.read(1 << 20):
        whole.update(piece)
    return whole.hexdigest()
