"""Made-up rows of a store and of a score cache, and a writer that captures them as a teacher's stage does."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.encodings import columns_of, encode
from pipeline.cache.folder import described_task, write_cache
from pipeline.cache.store import Store
from pipeline.files import sha256_text
from pipeline.params import CacheParams, TaskParams
from pipeline.schema import SCORES, STORED
from pipeline.task import Task

TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " negative", "positive": " positive"}))
CACHE = CacheParams(top_k=4)
IDENTITY = {"weights": "w", "dtype": "float32", "cache": CACHE.model_dump(mode="json"), "completions": [[1], [2]]}
ENGINE = {"name": "made up"}
VOCABULARY = 40
ENCODINGS = ["top_k", "top_k_tail", "sampled", "hybrid", "full"]


def keys(count: int, first: int = 0) -> list[str]:
    """Hashes of prompts."""
    return [sha256_text(f"prompt {number}") for number in range(first, first + count)]


def seed_of(*parts: str) -> int:
    """A number that follows from texts."""
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:6], "big")


def stored(own: Sequence[str], batch: Sequence[str] = ()) -> pa.Table:
    """Rows of `schema.STORED`. Their last bits depend on what else is in the batch, as those of a matrix product may."""
    rounding = seed_of(*sorted(batch)) % 1000 * 1e-5
    random = [np.random.default_rng(seed_of(key)) for key in own]
    logits = torch.from_numpy(np.stack([r.normal(0, 3, VOCABULARY) for r in random]) + rounding * np.arange(VOCABULARY)).float()
    uniforms = torch.tensor([r.random() for r in random])
    columns: dict[str, Any] = {
        "prompt_sha": list(own),
        "prompt_tokens": [5 + seed_of(key) % 30 for key in own],
        "label_logprobs": logits.log_softmax(-1)[:, :2].tolist(),
        "label_bounds": [[]] * len(logits),
        "completion_ids": [[]] * len(own),
        "completion_logprobs": [[]] * len(own),
        **columns_of(encode(logits, CACHE, uniforms), np.ones(len(own), dtype=int)),
    }
    arrays = [columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type) for f in STORED]
    return pa.table(arrays, schema=STORED)


def rows(count: int, context: str = "c") -> pa.Table:
    """Rows of `schema.SCORES`: examples e0, e1, …"""
    own = stored(keys(count)) if count else STORED.empty_table()
    ids = {"context_id": [context] * count, "example_id": [f"e{number}" for number in range(count)]}
    return pa.table({**ids, **{name: own[name] for name in STORED.names}}, schema=SCORES)


def about(**changes: Any) -> dict[str, Any]:
    """What a capture puts into the manifest."""
    return {
        "teacher": "few_shot",
        "model": "models/tiny",
        "identity": IDENTITY,
        "cache": CACHE.model_dump(mode="json"),
        "task": described_task(TASK),
        "labels": list(TASK.labels),
        "contexts": [{"context_id": "c", "name": "orders/0", "tokens": 9}],
        "content_free": [],
        "engines": [ENGINE],
        **changes,
    }


def divide(wanted: Sequence[str]) -> list[list[str]]:
    """Parts of three, shortest prompts first."""
    ordered = sorted(wanted, key=lambda key: (seed_of(key) % 30, key))
    return [ordered[start : start + 3] for start in range(0, len(ordered), 3)]


def score(store: Store, wanted: Sequence[str], before: Callable[[int], None] = lambda _: None) -> list[str]:
    """Score what a store lacks, in the parts of the whole request; `before(n)` is called before the n-th. Returns what was scored."""
    scored: list[str] = []
    with store.request(wanted):
        missing = set(store.missing(wanted))
        lacking = [[key for key in part if key in missing] for part in divide(wanted)]
        for number, own in enumerate(filter(None, lacking)):
            before(number)
            store.write(stored(own, own), 1.0, ENGINE)
            scored += own
    return scored


def capture(work: Path, output: Path, count: int, before: Callable[[int], None] = lambda _: None) -> list[str]:
    """Write the cache of `count` prompts through the store, as a teacher's stage does. Returns the prompts that were scored."""
    store, wanted = Store(work, IDENTITY), keys(count)
    scored = score(store, wanted, before)
    found = store.read(wanted)
    ids = {"context_id": ["c"] * count, "example_id": [f"e{number}" for number in range(count)]}
    table = pa.table({**ids, **{name: found[name] for name in STORED.names}}, schema=SCORES)
    write_cache(output, [table], about(engines=store.engines(wanted)))
    return scored


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def flip(file: Path, position: float = 0.5) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[min(int(len(data) * position), len(data) - 1)] ^= 1
    file.write_bytes(data)


def random_logits(positions: int = 6, vocabulary: int = 40, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    """[positions, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocabulary, generator=generator) * scale


def table_of(
    logits: torch.Tensor, params: CacheParams, uniforms: Any = None, lengths: Any = None, hidden: torch.Tensor | None = None
) -> pa.Table:
    """Logits as a cache has them."""
    uniforms = torch.full((len(logits),), 0.3) if uniforms is None else uniforms
    lengths = np.ones(len(logits), dtype=int) if lengths is None else np.array(lengths)
    return pa.table(columns_of(encode(logits, params, uniforms, hidden), lengths))


def params_of(encoding: str, **changes: Any) -> CacheParams:
    """Small, exact numbers."""
    return CacheParams.model_validate({"encoding": encoding, "top_k": 5, "samples": 4, "resolution_nats": None, **changes})
