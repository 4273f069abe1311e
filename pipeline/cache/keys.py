"""Keys of rows: a request for them, their digests, and an index that finds them among the files of a store.

A request for a million rows, or an index of them, is kept in few bytes a row: a request as the contexts and examples whose product it is,
an example's id as the 32 bytes that its hex digits stand for, an index as 128-bit digests in sorted arrays.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

Key = tuple[str, str]
"""context_id, example_id."""
KEY = ["context_id", "example_id"]


class ExampleIds(Sequence[str]):
    """Ids of examples, hex sha256, in 36 bytes each."""

    def __init__(self, ids: Iterable[str]) -> None:
        data = bytearray()
        for example in ids:
            data += bytes.fromhex(example)
        self._ids = np.frombuffer(data, dtype="S32")  # no copy: of 10⁷ ids one would be 320 MB
        self.order: np.ndarray = np.argsort(self._ids, kind="stable").astype(np.int32)
        """Places in rising order of the ids."""

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._ids[place : place + 1 or None].tobytes().hex()  # a scalar of numpy would lose zero bytes at its end

    def find(self, ids: Iterable[str]) -> np.ndarray:
        """The place of each id, -1 where it is none of these, [N] int64; of equal ones the first."""
        wanted = np.frombuffer(b"".join(map(bytes.fromhex, ids)), dtype="S32")
        if not len(self):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._ids, wanted, sorter=self.order).clip(max=len(self) - 1)
        places = self.order[at].astype(np.int64)
        return np.where(self._ids[places] == wanted, places, -1)

    @property
    def all_different(self) -> bool:
        """Whether no id stands here twice."""
        rising = self._ids[self.order]
        return not bool((rising[1:] == rising[:-1]).any())


class Request(Sequence[Key]):
    """The product of contexts and examples, contexts outermost."""

    def __init__(self, contexts: Sequence[str], examples: Iterable[str]) -> None:
        self.contexts = contexts
        self.examples = examples if isinstance(examples, ExampleIds) else ExampleIds(examples)

    def __len__(self) -> int:
        return len(self.contexts) * len(self.examples)

    @overload
    def __getitem__(self, place: int) -> Key: ...
    @overload
    def __getitem__(self, place: slice) -> list[Key]: ...
    def __getitem__(self, place: int | slice) -> Key | list[Key]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        context, example = divmod(place % len(self), len(self.examples))
        return self.contexts[context], self.examples[example]

    def holds(self, keys: Sequence[Key]) -> np.ndarray:
        """Which of some keys it asks for, [N] bool."""
        contexts = set(self.contexts)
        return np.array([context in contexts for context, _ in keys], dtype=bool) & (self.examples.find(key for _, key in keys) >= 0)


def blocks(request: Sequence[Key], rows: int) -> Iterator[list[Key]]:
    """A request in blocks of `rows` keys."""
    for start in range(0, len(request), rows):
        yield list(request[start : start + rows])


def digests(keys: Iterable[Key]) -> np.ndarray:
    """128-bit digests of keys, [N, 2] uint64."""
    data = b"".join(hashlib.blake2b(f"{context}\n{example}".encode(), digest_size=16).digest() for context, example in keys)
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)


def digest(keys: Sequence[Key]) -> str:
    """A name for a list of keys in their order: 32 hex digits."""
    return hashlib.blake2b(digests(keys).tobytes(), digest_size=16).hexdigest()


def keys_of(rows: pa.Table) -> list[Key]:
    """The keys of a table's rows."""
    return list(zip(*(rows[name].to_pylist() for name in KEY), strict=True))


class KeyIndex:
    """Where rows lie: (file number, row in it) by key. Of rows with the same key the one that was added first is found."""

    def __init__(self) -> None:
        self._digests = np.empty((0, 2), dtype=np.uint64)  # sorted by the first half, then by order of addition
        self._places = np.empty((0, 2), dtype=np.int32)
        self._added: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, file: int, keys: Sequence[Key]) -> None:
        """The rows of a file, in its order."""
        places = np.empty((len(keys), 2), dtype=np.int32)
        places[:, 0], places[:, 1] = file, np.arange(len(keys))
        self._added.append((digests(keys), places))

    def find(self, keys: Sequence[Key]) -> np.ndarray:
        """[N, 2] int32: file number and row of each key, −1 where there is none."""
        self._merge()
        wanted = digests(keys)
        found = np.full((len(wanted), 2), -1, dtype=np.int32)
        if not len(self._digests):
            return found
        place = np.searchsorted(self._digests[:, 0], wanted[:, 0])
        open_rows = np.arange(len(wanted))
        while len(open_rows):  # more than once only where the first halves of two digests are equal
            at = place[open_rows]
            inside = at < len(self._digests)
            open_rows, at = open_rows[inside], at[inside]
            alike = self._digests[at, 0] == wanted[open_rows, 0]
            open_rows, at = open_rows[alike], at[alike]
            same = self._digests[at, 1] == wanted[open_rows, 1]
            found[open_rows[same]] = self._places[at[same]]
            open_rows = open_rows[~same]
            place[open_rows] += 1
        return found

    def _merge(self) -> None:
        if self._added:
            every = np.concatenate([self._digests, *(part for part, _ in self._added)])
            places = np.concatenate([self._places, *(part for _, part in self._added)])
            order = np.argsort(every[:, 0], kind="stable")
            self._digests, self._places, self._added = every[order], places[order], []
