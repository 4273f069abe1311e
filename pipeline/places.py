"""Where an artifact lies: a folder of this machine, or a URL of a store that pyarrow or fsspec knows (S3, GCS, HDFS, …).

A path stays a `Path`, and nothing about it changes. A URL becomes a `Remote`, which has those methods of `Path` that caches and targets
use, and one for a range of bytes. It lists nothing unless asked to, and keeps no copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.files import replacing
from pipeline.hashing import sha256_bytes, sha256_file


@dataclass(frozen=True)
class Remote:
    """A file or folder of a remote store; `key` is its name there, `url` what a person calls it."""

    filesystem: Any
    """A `pyarrow.fs.FileSystem`: the module is imported where there is a URL."""
    key: str
    url: str

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.filesystem, f"{self.key}/{name}", f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition("/")[2]

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return bool(self.filesystem.get_file_info(self.key).is_file)

    def iterdir(self) -> Iterator["Remote"]:
        """What lies in it: the one method that lists."""
        from pyarrow import fs

        for found in self.filesystem.get_file_info(fs.FileSelector(self.key, allow_not_found=True)):
            yield self / found.base_name

    def read_bytes(self) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self.filesystem.open_input_file(self.key) as file:
            return file.read()

    def read_text(self, encoding: str) -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Bytes from (start, end) for each range, as many as there are."""
        with self.filesystem.open_input_file(self.key) as file:
            return [file.read_at(end - start, start) for start, end in ranges]

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        if not missing_ok or self.is_file():
            self.filesystem.delete_file(self.key)


Place = Path | Remote
"""A folder or file of this machine or of a store."""


def place(where: str | Path) -> Place:
    """The place that a path or URL names. Raises UsageError where nothing here can reach the URL."""
    scheme, separator, rest = str(where).partition("://")
    if not separator:
        return Path(where)
    if scheme == "file":
        return Path(rest)
    bucket, _, key = rest.rstrip("/").partition("/")
    filesystem, root = _filesystem(scheme, bucket)
    return Remote(filesystem, f"{root}/{key}" if key else root, str(where).rstrip("/"))


@lru_cache
def _filesystem(scheme: str, bucket: str) -> tuple[Any, str]:
    """The filesystem of a bucket, and the bucket's own key in it: pyarrow's where it has one, else fsspec's."""
    import pyarrow as pa
    from pyarrow import fs

    url = f"{scheme}://{bucket}"
    try:
        return fs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as refused:
        from fsspec.core import url_to_fs

        try:
            other, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: no filesystem for it here; pyarrow says: {refused}; fsspec says: {error}.") from error
        return fs.PyFileSystem(fs.FSSpecHandler(other)), root.rstrip("/")


def sha256_of(where: Place) -> str:
    """Hex sha256 of a file's bytes; a remote one is fetched for it."""
    return sha256_bytes(where.read_bytes()) if isinstance(where, Remote) else sha256_file(where)


def write_bytes(data: bytes | memoryview, where: Place) -> None:
    """Write a file whole or not at all: renamed into place here, one finished upload in an object store."""
    if isinstance(where, Remote):
        if not where.url.startswith(("s3://", "gs://")):
            where.filesystem.create_dir(where.key.rpartition("/")[0], recursive=True)  # object stores have no folders
        with where.filesystem.open_output_stream(where.key) as stream:
            stream.write(data)
        return
    with replacing(where) as temporary:
        temporary.write_bytes(data)
