"""Files that are whole or not there: written under a temporary name, synced to disk, renamed.

`os.replace` is atomic, so a reader sees the old file or the new one; the sync before it keeps a power cut from leaving a name without
its bytes, and folders are synced after it, so that the name itself stays. Nothing is ever appended to a file that DVC may have linked.
What a killed run leaves behind under a temporary name goes when the file is written again: its lock died with its writer.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from pipeline.errors import CorruptError, NotJsonError, ShotlessError, of_system
from pipeline.hashing import sha256_json

LOCK_SECONDS = 3600
SEAL = "sealed_sha256"
"""The entry of a sealed JSON object that holds the hash of the others."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    with disk_full(path):
        make_folder(path.parent)
        remove_leftovers(path)
        handle, temporary = _locked_temporary(path)
    try:
        with disk_full(path):
            yield temporary
            temporary.chmod(0o644)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, with a lock that tells it from what a killed run left behind."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # another run took it for a leftover before it was locked
            if Path(name).stat().st_ino == os.fstat(handle).st_ino:
                return handle, Path(name)
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` whose writers have died."""
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if not (left.name.startswith(f".{path.name}.") and left.suffix == ".tmp"):
            continue
        with suppress(FileNotFoundError, BlockingIOError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into a ShotlessError that says where, and that nothing is lost."""
    try:
        with _system_errors():
            yield
    except OSError as error:
        there = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(there).free
            raise ShotlessError(
                f"{path}: the disk is full ({free:,} bytes free there), so it was not written; what was written before is whole and stays. "
                "Make room and run again."
            ) from error
        if (said := of_system(error)) is None:
            raise
        raise ShotlessError(f"{path}: cannot be written: {said}") from error


@contextmanager
def _system_errors() -> Iterator[None]:
    """An error of safetensors that stands for one of the system, as an OSError: its message has the number, its attributes nothing."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (error if number is None else OSError(int(number[1]), str(error))) from error


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Be the only run that writes a folder, which is made; a second one waits.

    The folder itself is held: a lock file in it would become part of an artifact. DVC may put another folder in its place.
    """
    for turn in range(LOCK_SECONDS * 10):
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_ino == folder.stat().st_ino:
                    yield
                    return
        finally:
            os.close(handle)
        if turn == 0:
            print(f"{folder}: another run is writing it; waiting for its end", file=sys.stderr, flush=True)
        time.sleep(0.1)
    raise ShotlessError(f"{folder}: another run has been writing it for {LOCK_SECONDS} s; wait for it, or end it and run again.")


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, each durable in the one above it."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else disk_full(path):  # a file system that cannot sync folders does it on its own
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make durable what other libraries wrote into a folder: every file, then every folder, its own name last."""
    for path in sorted(folder.rglob("*"), key=lambda path: (path.is_dir(), path)):
        sync(path)
    sync(folder)
    sync(folder.parent)


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
    """Read a JSON file. Raises NotJsonError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"{path}: not JSON ({error}); run the stage that writes it again.") from None


def write_sealed_json(value: dict[str, Any], path: Path) -> None:
    """Write a JSON object with the hash of its contents as its last entry."""
    write_json(value | {SEAL: sha256_json(value)}, path)


def read_sealed_json(path: Readable, may_lack_seal: bool = False) -> dict[str, Any]:
    """A sealed object, without its seal. Raises CorruptError where its contents are not those that were sealed.

    `may_lack_seal` is for files that earlier versions wrote without one and that are kept for long.
    """
    value = read_json(path)
    written = value.pop(SEAL, None) if isinstance(value, dict) else None
    if written is None and may_lack_seal:
        return value
    if written is None:
        raise CorruptError(f"{path}: has no {SEAL}, so it is damaged or of another version; run the stage that writes it again.")
    if (found := sha256_json(value)) != written:
        said = f"{path}: its contents have sha256 {found[:12]}…, and were written with {str(written)[:12]}…"
        raise CorruptError(f"{said}; run the stage that writes it again.")
    return value
