"""Content hashes: what an artifact is called and compared by.

Everything is sha256 over canonical bytes, never Python's `hash()`, so that a key means the same in every process and on every machine.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of `text` in UTF-8."""
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form: sorted keys, no white space, UTF-8."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def sha256_ids(ids: Iterable[int]) -> str:
    """Hex sha256 of token ids as little-endian 32-bit integers: the `prompt_sha` of a prompt."""
    return sha256_bytes(b"".join(i.to_bytes(4, "little") for i in ids))


def example_id(fields: dict[str, str]) -> str:
    """The key of an example: sha256 of its input fields. Its label and origin do not count."""
    return sha256_json(fields)


def context_id(text: str) -> str:
    """The key of a context: sha256 of its rendered text. The empty context has one too."""
    return sha256_text(text)
