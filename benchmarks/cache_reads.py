"""`python -m benchmarks.cache_reads`: writing and reading a cache of a million made-up rows, beside what the fastest student here eats.

Each figure is taken in a process of its own, so that peaks of memory are its own. Rows are as the default capture keeps them (top 32 and
the tail at one answer position, about 600 bytes decoded); their numbers are random, so that nothing compresses better than in earnest.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import about
from pipeline.cache.encodings import columns_of, encode
from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.folder import read_manifest, write_cache
from pipeline.cache.keys import KEY, Key, Request
from pipeline.cache.reader import CacheReader
from pipeline.cache.store import Store
from pipeline.files import write_json
from pipeline.files import sha256_text
from pipeline.models.memory import peak_rss_bytes
from pipeline.params import CacheParams
from pipeline.schema import SCORES

RESULTS = Path("benchmarks/results/cache_reads.json")
ROWS = (100_000, 1_000_000)
BATCHES = (16, 256)
SECONDS = 10.0
STUDENT_ROWS_PER_S = 50.0
"""More than any student trains here: 10 to 50 rows/s (`make bench-student`)."""
PARAMS = CacheParams()
FINGERPRINT = Fingerprint(
    weights="made up",
    tokenizer="made up",
    template="{text}",
    verbalisers={"a": " a", "b": " b"},
    completions=[[1], [2]],
    dtype="float32",
    cache=PARAMS.model_dump(mode="json"),
    completion=None,
)


def made_up(keys: tuple[Key, ...], generator: torch.Generator) -> pa.Table:
    """Rows of random logits over a vocabulary of 512."""
    count = len(keys)
    logits = torch.randn(count, 512, generator=generator) * 3
    labels = logits.log_softmax(-1)[:, :2].numpy()
    columns: dict[str, Any] = dict(zip(KEY, map(list, zip(*keys, strict=True)), strict=True))
    columns |= {"prompt_sha": [sha256_text(example) for _, example in keys], "prompt_tokens": [40] * count}
    columns |= {"label_logprobs": list(labels), "completion_ids": [[]] * count, "completion_logprobs": [[]] * count}
    columns |= columns_of(encode(logits, PARAMS, torch.zeros(count)), np.ones(count, dtype=np.int64))
    arrays = [value if isinstance(value, pa.Array) else pa.array(value, SCORES.field(name).type) for name, value in columns.items()]
    return pa.table(dict(zip(columns, arrays, strict=True))).select(SCORES.names).cast(SCORES)


def write(folder: Path, rows: int) -> dict[str, Any]:
    """A capture without its model: rows into the store, the store into a cache."""
    request = Request(["c" * 64], [sha256_text(str(number)) for number in range(rows)])
    before, started, generator = peak_rss_bytes(), time.perf_counter(), torch.Generator().manual_seed(0)
    store = Store(folder / "work", FINGERPRINT)
    with store.lock():
        for part in store.parts(request, lambda keys: [keys[start : start + 256] for start in range(0, len(keys), 256)]):
            store.write(part, made_up(part.keys, generator))
    stored, store_peak = time.perf_counter(), peak_rss_bytes()
    write_cache(folder / "cache", store.read(request), FINGERPRINT, {})
    return {
        "peak_rss_bytes_with_keys": before,
        "peak_rss_bytes_store": store_peak,
        "peak_rss_bytes": peak_rss_bytes(),
        "store_rows_per_s": round(rows / (stored - started), 1),
        "cache_rows_per_s": round(rows / (time.perf_counter() - stored), 1),
        "bytes_per_row": round(read_manifest(folder / "cache")["totals"]["bytes"] / rows, 1),
    }


def read(folder: Path, batch: int) -> dict[str, Any]:
    """Opening, decoding and a shuffled read."""
    before, started = peak_rss_bytes(), time.perf_counter()
    reader = CacheReader(folder / "cache", folder / "work")
    opened = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(reader))
    for start in range(0, len(reader), 4096):
        reader.take([start])  # touches every shard: each is verified and decoded once
    decoded, done = time.perf_counter(), 0
    while time.perf_counter() - decoded < SECONDS and done + batch <= len(order):
        reader.take(order[done : done + batch])
        done += batch
    return {
        "batch": batch,
        "open_s": round(opened - started, 5),
        "verify_and_decode_s": round(decoded - opened, 2),
        "shuffled_rows_per_s": round(done / (time.perf_counter() - decoded), 1),
        "peak_rss_bytes_before": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main(arguments: list[str]) -> None:
    """The parent starts one child a figure: `write FOLDER ROWS` and `read FOLDER BATCH`."""
    if arguments:
        what, folder, number = arguments
        print(json.dumps((write if what == "write" else read)(Path(folder), int(number))))
        return
    results = []
    for rows in ROWS:
        folder = Path(tempfile.mkdtemp(prefix="cache-reads-", dir="."))
        try:
            written = _child("write", folder, rows)
            print(f"{rows:,} rows written: {written}", flush=True)
            for batch in BATCHES:
                found = _child("read", folder, batch)
                ratio = found["shuffled_rows_per_s"] / STUDENT_ROWS_PER_S
                print(f"{rows:,} rows read: {found}, {ratio:,.0f} times the fastest student", flush=True)
                results.append({"rows": rows, **written, **found, "times_fastest_student": round(ratio, 1)})
        finally:
            shutil.rmtree(folder)
    write_json({"machine": about(), "rows": results}, RESULTS)
    print(f"written to {RESULTS}")


def _child(what: str, folder: Path, number: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cache_reads", what, str(folder), str(number)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
