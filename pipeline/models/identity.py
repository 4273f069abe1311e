"""What a model folder is, by content: hashes of its weights and of its tokenizer. Without torch, so that asking is quick."""

import json
from pathlib import Path
from typing import Any

from pipeline.hashing import sha256_file, sha256_json

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")
PLACE_KEYS = ("name_or_path", "is_local", "local_files_only")
"""Entries of tokenizer_config.json that say where the tokenizer came from, not what it does."""


def weights_sha256(folder: Path) -> str:
    """One hash of a model's config and weights, by content; file times and names of folders do not count."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return sha256_json({file.name: sha256_file(file) for file in files})


def tokenizer_sha256(folder: Path) -> str:
    """One hash of the tokenizer's files and settings, by content."""
    files: dict[str, Any] = {name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        entries = json.loads(settings.read_text(encoding="utf-8"))
        files[settings.name] = {key: value for key, value in entries.items() if key not in PLACE_KEYS}
    return sha256_json(files)
