"""Files that are whole or absent, their hashes, and the manifest of a folder that travels.

A file is written beside its place, synced to disk and renamed, so a reader sees the old file or the new one. Everything is hashed with
sha256 over canonical bytes, never with Python's `hash()`, so a key means the same in every process and on every machine.

A folder that travels (a score cache, a student) has a `manifest.json` with the sha256 of each file. It is written last: its presence means
that the folder is complete. DVC checks everything else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import CorruptError, ShotlessError

MANIFEST = "manifest.json"
LOCK_SECONDS = 3600


@dataclass(frozen=True)
class Folders:
    """Where a run keeps its files: `artifacts` and `metrics` are tracked by DVC, `work` survives an interrupted stage."""

    artifacts: Path
    metrics: Path
    work: Path

    @classmethod
    def here(cls, project: Path = Path()) -> "Folders":
        """The folders of a project; `$SHOTLESS_WORK` sets the place of `work`, so that several workspaces can share it."""
        return cls(project / "artifacts", project / "metrics", Path(os.environ.get("SHOTLESS_WORK", project / ".work")))


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of `text` in UTF-8."""
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form: sorted keys, no white space, UTF-8."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def sha256_ids(*parts: Iterable[int]) -> str:
    """Hex sha256 of one or several lists of token ids, as little-endian 32-bit integers with 0xFFFFFFFF between lists."""
    lists = (b"".join(i.to_bytes(4, "little") for i in ids) for ids in parts)
    return sha256_bytes(b"\xff\xff\xff\xff".join(lists))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it if the block ends well, removed if not. Parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a file of UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(value: Any, path: Path) -> None:
    """Write JSON that a person can read; equal values give equal bytes."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CorruptError if it is not JSON, FileNotFoundError if it is absent."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON ({error}). Run the stage that writes it again.") from None


def write_manifest(folder: Path, about: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
    """Write `folder/manifest.json`: the entries of `about`, then `files` with sha256 and bytes of each file.

    `names` are the files to list; by default every file below the folder. `about` must not have the key `files`.
    """
    paths = [folder / name for name in names] if names is not None else [path for path in folder.rglob("*") if path.is_file()]
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(paths)
        if path.name != MANIFEST
    }
    write_json({**about, "files": listed}, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest. Raises ShotlessError if it has none, because it is incomplete. Its files are not read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise ShotlessError(f"{folder / MANIFEST}: missing, so this folder is not complete. `dvc repro` writes it.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptError(f"{folder / MANIFEST}: not a manifest. Run the stage that writes it again.")
    return manifest


def check_manifest(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> dict[str, Any]:
    """A folder's manifest, after every file in it was compared with its hash. Raises CorruptError naming each file that differs."""
    manifest, faults = read_manifest(folder), []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            faults.append(f"{path}: {size:,} bytes, its manifest says {entry['bytes']:,}")
        elif (found := sha256(path)) != entry["sha256"]:
            faults.append(f"{path}: sha256 {found[:12]}…, its manifest says {entry['sha256'][:12]}…")
    if faults:
        remedy = f"{folder} is damaged or was changed by hand. Make it again with `dvc repro`, or copy it whole."
        raise CorruptError("\n".join([*faults, remedy]))
    return manifest


@contextmanager
def one_writer(lock: Path) -> Iterator[None]:
    """Hold the lock file `lock`, so that a second run waits. Raises ShotlessError after an hour."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise ShotlessError(f"{lock}: another run has held this lock for {LOCK_SECONDS} s. Wait for it, or end it and run again.") from None
