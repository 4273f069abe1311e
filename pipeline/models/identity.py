"""What a model folder is, by content: hashes of its weights and of its tokenizer. Without torch, so that asking is quick."""

import time
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptError
from pipeline.files import read_json, write_json
from pipeline.files import sha256_file, sha256_json, sha256_text

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")
FETCH_RECORD = "source.json"
SETTLED_NS = 2_000_000_000
PLACE_KEYS = ("name_or_path", "is_local", "local_files_only")
"""Entries of tokenizer_config.json that say where the tokenizer came from, not what it does."""


def weights_sha256(folder: Path, remembered: Path | None = None) -> str:
    """One hash of a model's config and weights, by content; file times and names of folders do not count.

    Hashes of files are kept in the folder `remembered`, where one is given, and used again for as long as a file has not been touched.
    """
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return sha256_json({file.name: sha256_file(file) if remembered is None else _remembered(file, remembered) for file in files})


def check_fetched(folder: Path, weights: str) -> None:
    """Raise CorruptError where `weights`, the hash of a folder's weights, is not the one of what `fetch` put there; others pass."""
    record = folder / FETCH_RECORD
    if not record.is_file():
        return
    files = read_json(record).get("files", {})
    fetched = {name: sha256 for name, sha256 in sorted(files.items()) if name.endswith(".safetensors") or name == "config.json"}
    if sha256_json(fetched) != weights:
        raise CorruptError(f"{folder}: its weights or config are not those that were fetched; run `dvc repro --force fetch`.")


def _remembered(file: Path, folder: Path) -> str:
    """A file's sha256, read from its bytes if anything about it differs from when it was last read.

    The time of the last change of its inode, which no program can set, is part of what is compared. A file changed less than `SETTLED_NS`
    ago is not remembered: a second change could bear the same time.
    """
    started, state = time.time_ns(), _state(file)
    note = folder / f"{sha256_text(str(file.resolve()))[:32]}.json"
    try:
        kept = read_json(note)
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, dict) and kept.get("state") == state and isinstance(kept.get("sha256"), str):
        return kept["sha256"]
    found = sha256_file(file)
    if _state(file) == state and max(state["ctime_ns"], state["mtime_ns"]) < started - SETTLED_NS:
        write_json({"state": state, "sha256": found}, note)
    return found


def _state(file: Path) -> dict[str, int]:
    about = file.stat()
    return {
        "device": about.st_dev,
        "inode": about.st_ino,
        "bytes": about.st_size,
        "mtime_ns": about.st_mtime_ns,
        "ctime_ns": about.st_ctime_ns,
    }


def tokenizer_sha256(folder: Path) -> str:
    """One hash of the tokenizer's files and settings, by content."""
    files: dict[str, Any] = {name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        entries = read_json(settings)
        if not isinstance(entries, dict):
            raise CorruptError(f"{settings}: is no object; make the folder again.")
        files[settings.name] = {key: value for key, value in entries.items() if key not in PLACE_KEYS}
    return sha256_json(files)
