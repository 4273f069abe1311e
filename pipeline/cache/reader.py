"""Random access to the rows of a cache at training speed, in memory that does not grow with the cache.

Parquet is small, and slow to read at random. A shard is therefore decoded once, when its first row is asked for and after its sha256 has
been verified, into an uncompressed Arrow file that is memory-mapped: rows are then copied out of it without parsing. The file lies under
the work folder and has no name, so that it vanishes with the process however that ends, and no other process can read a stale one. Disk
pays for it (about the size of the decoded rows), memory does not: pages that were touched are given back to the kernel every few rows,
which keeps them in its cache for as long as nothing else needs the room.
"""

import mmap
import resource
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.folder import MANIFEST, read_manifest, read_shard
from pipeline.cache.keys import KEY, Key, KeyIndex, keys_of
from pipeline.errors import UsageError
from pipeline.files import disk_full
from pipeline.places import Place
from pipeline.schema import SCORES

MAPPED_BYTES = 32 << 20
"""Pages of the maps that stay in memory at most."""
FAULT_BYTES = 64 << 10
"""What the kernel maps around a page that is touched."""
SPARE_HANDLES = 512
"""Open files of everything else in the process."""


@dataclass(frozen=True)
class _Mapped:
    """A decoded shard: a map of a nameless file, and the rows that lie in it."""

    pages: mmap.mmap
    rows: pa.RecordBatch


class CacheReader:
    """Rows of a finished cache by number, in the order of `read_cache`.

    Opening reads the manifest alone. `columns` limits what is decoded; a `fingerprint` is compared with the manifest's.
    Raises what `read_manifest` raises, and MismatchError where the fingerprint differs.
    """

    def __init__(self, folder: Place, work: Path, columns: Sequence[str] | None = None, fingerprint: Fingerprint | None = None) -> None:
        self.folder, self.work = folder, work
        self.manifest: dict[str, Any] = read_manifest(folder)
        if fingerprint is not None:
            fingerprint.check(self.manifest["fingerprint"], folder / MANIFEST)
        self.schema = SCORES if columns is None else pa.schema([SCORES.field(name) for name in columns])
        self._ends = np.cumsum([shard["rows"] for shard in self.manifest["shards"]], dtype=np.int64)
        _allow_handles(len(self._ends), folder)
        self._mapped: dict[int, _Mapped] = {}
        self._index: KeyIndex | None = None
        self._touched = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back maps and disk. Tables that were taken stay valid; a row that is asked for later is decoded again."""
        self._mapped.clear()

    def take(self, row_numbers: Sequence[int] | np.ndarray) -> pa.Table:
        """Rows [N] by number in the order asked for, repeats included, as a table of one chunk that owns its memory.

        Raises UsageError where a number is not in the cache, CorruptError where a shard is not the one that its manifest names.
        """
        wanted = np.asarray(row_numbers, dtype=np.int64)
        if not len(wanted):
            return self.schema.empty_table()
        if wanted.min() < 0 or wanted.max() >= len(self):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise UsageError(f"{self.folder}: there is no row {outside}; it has {len(self):,} rows, counted from 0.")
        shards = np.searchsorted(self._ends, wanted, side="right")
        batches, order = [], []
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            mapped = self._shard(shard)
            start = int(self._ends[shard]) - len(mapped.rows)
            batches.append(mapped.rows.take(pa.array(wanted[places] - start)))
            order.append(places)
            self._touched += min(len(mapped.pages), len(places) * len(self.schema) * FAULT_BYTES)
            if self._touched > MAPPED_BYTES:
                self._give_back()
        rows = pa.Table.from_batches(batches).combine_chunks()
        return rows if len(order) == 1 else rows.take(pa.array(np.argsort(np.concatenate(order)))).combine_chunks()

    def find(self, keys: Iterable[Key]) -> np.ndarray:
        """Row numbers [N] int64 of (context_id, example_id) pairs, −1 where there is none. The first call reads the keys of all rows."""
        if self._index is None:
            self._index = KeyIndex()
            for shard in range(len(self._ends)):
                self._index.add(shard, keys_of(read_shard(self.folder, self.manifest["shards"][shard], KEY)))
        places = self._index.find(list(keys)).astype(np.int64)
        starts = np.concatenate([[0], self._ends])
        return np.where(places[:, 0] < 0, -1, starts[places[:, 0]] + places[:, 1])

    def _shard(self, number: int) -> _Mapped:
        if number not in self._mapped:
            rows = read_shard(self.folder, self.manifest["shards"][number], self.schema.names).combine_chunks()
            self._mapped[number] = _mapped(rows, self.work)
        return self._mapped[number]

    def _give_back(self) -> None:
        self._touched = 0
        for mapped in self._mapped.values():
            mapped.pages.madvise(mmap.MADV_DONTNEED)


def _mapped(rows: pa.Table, work: Path) -> _Mapped:
    work.mkdir(parents=True, exist_ok=True)
    with disk_full(work / "decoded rows"), tempfile.TemporaryFile(dir=work) as file:
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), rows.schema) as writer:
            writer.write_table(rows)
        file.flush()
        pages = _map(file.fileno())
    del rows
    pa.default_memory_pool().release_unused()
    return _Mapped(pages, pa.ipc.open_file(pa.py_buffer(pages)).get_batch(0))


def _map(handle: int) -> mmap.mmap:
    """A read-only map of an open file that outlives its handle."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)


def _allow_handles(maps: int, folder: Place) -> None:
    """Let this process have a file open for each map, as far as the system lets it.

    Python keeps a handle of its own for each map, which it can be told not to since 3.13. A cache of 10⁷ rows has 610 shards, and 1,024
    handles are what many systems begin with. Raises UsageError where the system does not allow as many.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = maps + SPARE_HANDLES
    if sys.version_info >= (3, 13) or allowed >= needed:
        return
    if 0 <= most < needed:
        raise UsageError(f"{folder}: has {maps:,} shards, and this process may have {most:,} files open; raise `ulimit -Hn` to {needed:,}.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
