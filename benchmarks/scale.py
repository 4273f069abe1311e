"""`python -m benchmarks.scale [ROWS …]`: a plan of 10⁵, 10⁶ and 10⁷ rows is made, written, read and shuffled, in bounded memory.

Everything around the model is what a capture runs: the request and its plan, parts in the store, the store opened again by another process,
a cache made of it, the cache read at random in the order of an epoch. The rows are made up and the smallest there are (labels and one
entry), so that time and memory are those of keys, files and folders and not of distributions, which `make bench-reads` measures; and the
cache is compressed as fast as the store is, where a capture takes the time for a tenth less. Each step is a process of its own, so that
peaks of memory are its own.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from benchmarks import cache_reads
from benchmarks.machine import about
from pipeline.cache import rows as rows_module
from pipeline.cache.folder import read_manifest, write_cache
from pipeline.cache.keys import Key, Request
from pipeline.cache.reader import CacheReader
from pipeline.cache.store import Store
from pipeline.files import write_json
from pipeline.files import sha256_text
from pipeline.models.memory import peak_rss_bytes
from pipeline.params import CacheParams
from pipeline.schema import SCORES
from pipeline.students.batches import permutation

RESULTS = Path("benchmarks/results/scale.json")
ROWS = (10**5, 10**6, 10**7)
STEPS: tuple[str, ...] = ("plan", "write", "open", "cache", "read", "shuffle")
PARAMS = CacheParams(encoding="top_k_tail", top_k=1)
ROWS_A_PART, BATCH, SHUFFLED = 256, 64, 20_000
FINGERPRINT = cache_reads.FINGERPRINT.model_copy(update={"cache": PARAMS.model_dump(mode="json")})
CONTEXT = "c" * 64
Step = Callable[[Path, int], dict[str, Any]]


def examples(rows: int) -> Iterator[str]:
    """Ids of so many examples."""
    return (sha256_text(str(number)) for number in range(rows))


@lru_cache
def _numbers(count: int) -> pa.Table:
    """So many rows without keys of their own."""
    row = {"label_logprobs": [-0.5, -1.0], "prompt_tokens": 40, "topk_ids": [[7]], "topk_logprobs": [[-0.5]], "log_z": [9.0]}
    row |= {"completion_ids": [], "completion_logprobs": [], "tail_mass": [0.25]}
    empty = {field.name: [] if pa.types.is_list(field.type) else "" for field in SCORES}
    return pa.Table.from_pylist([empty | row] * count, SCORES)


def made_up(keys: tuple[Key, ...]) -> pa.Table:
    """Rows that differ in their keys alone."""
    rows = _numbers(len(keys))
    for name, values in (
        ("context_id", [key[0] for key in keys]),
        ("example_id", [key[1] for key in keys]),
        ("prompt_sha", [key[1] for key in keys]),
    ):
        place = SCORES.get_field_index(name)
        rows = rows.set_column(place, SCORES.field(place), pa.array(values, SCORES.field(place).type))
    return rows


def plan(folder: Path, rows: int) -> dict[str, Any]:
    """The request and the parts of all its blocks, none of them scored."""
    request, store = Request([CONTEXT], examples(rows)), Store(folder / "planned", FINGERPRINT)
    with store.lock():
        parts = sum(1 for _ in store.parts(request, _divide))
    return {"parts": parts}


def write(folder: Path, rows: int) -> dict[str, Any]:
    """Every part into the store."""
    request, store = Request([CONTEXT], examples(rows)), Store(folder / "work", FINGERPRINT)
    with store.lock():
        for part in store.parts(request, _divide):
            store.write(part, made_up(part.keys), 1.0)
    return {"bytes": sum(file.stat().st_size for file in store.folder.glob("part-*.parquet"))}


def reopen(folder: Path, rows: int) -> dict[str, Any]:
    """The store by another process, with a request for all it holds: nothing is missing."""
    request, store = Request([CONTEXT], examples(rows)), Store(folder / "work", FINGERPRINT)
    with store.lock():
        missing = int(store.missing(request).sum())
    assert not missing
    return {"rows_timed": store.seconds(request)[1]}


def cache(folder: Path, rows: int) -> dict[str, Any]:
    """The store's rows as a cache."""
    request, store = Request([CONTEXT], examples(rows)), Store(folder / "work", FINGERPRINT)
    rows_module.SHARD_LEVEL = rows_module.STORE_LEVEL
    write_cache(folder / "cache", store.read(request), FINGERPRINT, {"content_free": []})
    manifest = read_manifest(folder / "cache")
    return {"shards": len(manifest["shards"]), "bytes": manifest["totals"]["bytes"]}


def read(folder: Path, rows: int) -> dict[str, Any]:
    """Every shard verified and decoded, then batches of an epoch's order."""
    with CacheReader(folder / "cache", folder / "work") as reader:
        started = time.perf_counter()
        for shard in range(0, rows, reader.manifest["shards"][0]["rows"]):
            reader.take([shard])
        decoded, handles = time.perf_counter(), psutil.Process().num_fds()
        order = permutation(list(examples(rows)), 0, 0)
        ordered = time.perf_counter()
        for start in range(0, min(rows, SHUFFLED), BATCH):
            reader.take(order[start : start + BATCH])
        done = time.perf_counter()
    rate = round(min(rows, SHUFFLED) / (done - ordered), 0)
    return {
        "decode_s": round(decoded - started, 1),
        "shuffled_rows_per_s": rate,
        "open_files": handles,
        "open_files_allowed": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def shuffle(folder: Path, rows: int) -> dict[str, Any]:  # noqa: ARG001  each step takes both
    """The order of one epoch."""
    ids = list(examples(rows))
    started = time.perf_counter()
    permutation(ids, 0, 0)
    return {"epoch_s": round(time.perf_counter() - started, 2)}


def _divide(keys: list[Key]) -> list[list[Key]]:
    return [keys[start : start + ROWS_A_PART] for start in range(0, len(keys), ROWS_A_PART)]


def main(arguments: list[str]) -> None:
    """The parent starts one child a step, `STEP FOLDER ROWS`; numbers alone are the sizes to measure."""
    if arguments and arguments[0] in STEPS:
        step, folder, rows = arguments
        steps: dict[str, Step] = dict(zip(STEPS, (plan, write, reopen, cache, read, shuffle), strict=True))
        before, started, worked = peak_rss_bytes(), time.perf_counter(), time.process_time()
        found = steps[step](Path(folder), int(rows))
        print(
            json.dumps(
                {
                    "seconds": round(time.perf_counter() - started, 1),
                    "cpu_seconds": round(time.process_time() - worked, 1),
                    "peak_rss_bytes": peak_rss_bytes(),
                    "peak_rss_bytes_before": before,
                    **found,
                }
            )
        )
        return
    results = []
    for rows in map(int, arguments) if arguments else ROWS:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir="."))
        try:
            for step in STEPS:
                command = [sys.executable, "-m", "benchmarks.scale", step, str(folder), str(rows)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                print(f"{rows:,} rows, {step}: {found}", flush=True)
                results.append({"rows": rows, "step": step, **found})
        finally:
            shutil.rmtree(folder)
    write_json({"machine": about(), "steps": results}, RESULTS)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main(sys.argv[1:])
