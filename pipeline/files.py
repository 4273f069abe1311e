"""Files that are whole or not there: written under a temporary name, synced to disk, renamed.

`os.replace` is atomic, so a reader sees the old file or the new one; the sync before it keeps a power cut from leaving a name without
its bytes. Nothing is ever appended to a file that DVC may have linked.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ShotlessError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_full(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turn "no space left" while `path` is written into a ShotlessError that says where, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free = shutil.disk_usage(path.parent).free
        raise ShotlessError(
            f"{path}: the disk is full ({free:,} bytes free there), so it was not written; what was written before is whole and stays. "
            "Make room and run again."
        ) from error


def write_text(text: str, path: Path) -> None:
    """Write a file of UTF-8 text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: Any, path: Path) -> None:
    """Write JSON that a person can read and that is byte-identical for equal values."""
    write_text(json_text(value), path)


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class Readable(Protocol):
    """A path, or what stands for one in a remote store (`pipeline.places`)."""

    def read_text(self, encoding: str) -> str:
        """The whole file."""
        ...


def read_json(path: Readable) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot sync folders does it on its own."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
