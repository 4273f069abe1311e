"""`make bench-cache`: bytes of the score cache against what it loses, on real reviews and the real model; and the loss's time and memory.

Each encoding is written to Parquet as shards are, read back, and compared with the whole distributions (`pipeline/cache/fidelity.py`).
`bytes_per_position` counts the compressed chunks of the columns that hold distributions, lists and all, a row being one review's positions;
the row's keys (ids, sha256 of the prompt) and the file's footer stand apart as `row_bytes`. The teacher has demonstrations in its prompt,
the student none; `truncation_nats` is of that student's KL to the teacher.

Sizes that others publish stand in the table as they are published. Their rows of errors are of the same entries, exact: DistillKit keeps a
top k, renormalised; Megatron a top k and one more entry for the rest.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cache_positions import Positions, real_positions
from benchmarks.machine import about
from pipeline.cache.distributions import decode
from pipeline.cache.encodings import columns_of, encode
from pipeline.cache.fidelity import fidelity
from pipeline.cache.folder import SHARD_LEVEL
from pipeline.cache.store import write_rows
from pipeline.files import sha256_json, write_json
from pipeline.params import CacheParams
from pipeline.schema import SCORES

KEYS = (
    "context_id",
    "example_id",
    "prompt_sha",
    "prompt_tokens",
    "label_logprobs",
    "label_bounds",
    "completion_ids",
    "completion_logprobs",
)
TOP_K = (8, 16, 32, 50, 64, 128)
SAMPLES = (16, 32, 64, 96, 128)
HYBRID = (32, 48, 64, 96, 128, 192)
RESOLUTIONS = (None, 1 / 16, 1 / 4)
PUBLISHED = {
    "DistillKit": (114, CacheParams(encoding="top_k", top_k=50, resolution_nats=None)),
    "Megatron": (640, CacheParams(encoding="top_k_tail", top_k=128, resolution_nats=None)),
}
LOSSES = (("log_softmax", 0), ("whole", 0), ("checkpoint", 2**22), ("fused", 2**20), ("fused", 2**22), ("fused", 2**24))


def main(reviews: int = 200, positions: int = 6, loss_positions: int = 1024, output: Path = Path("benchmarks/results/cache.json")) -> None:
    """Measure, print tables, write JSON."""
    print(f"{reviews} reviews, {positions} positions each, with and without demonstrations …", file=sys.stderr, flush=True)
    real = real_positions(reviews, positions)
    rows = []
    for params in _encodings():
        rows.append({"encoding": params.encoding, "k": _k(params, real.teacher.shape[-1]), **_measure(real, params)})
    for name, (size, params) in PUBLISHED.items():
        rows.append({"encoding": name, "k": params.top_k, **_measure(real, params), "bytes_per_position": size, "row_bytes": None})
    _print(rows)
    losses = [_loss(how, loss_positions, at_once) for how, at_once in LOSSES]
    _print_losses(losses)
    write_json({"machine": about(), "positions": reviews * positions, "rows": rows, "losses": losses}, output)
    print(f"written to {output}")


def _encodings() -> list[CacheParams]:
    """All that are compared: every size at the default resolution, some sizes at the others."""
    kinds: list[dict[str, Any]] = [{"encoding": "top_k", "top_k": 50}]
    kinds += [{"encoding": "top_k_tail", "top_k": k} for k in TOP_K]
    kinds += [{"encoding": "sampled", "samples": m} for m in SAMPLES]
    kinds += [{"encoding": "hybrid", "samples": m} for m in HYBRID]
    found = [CacheParams.model_validate(kind) for kind in kinds]
    again: list[dict[str, Any]] = [{"encoding": "top_k_tail", "top_k": 50}, {"encoding": "hybrid", "samples": 96}]
    found += [CacheParams.model_validate({**kind, "resolution_nats": r}) for kind in again for r in RESOLUTIONS if r != 1 / 16]
    return [*found, CacheParams(encoding="full")]


def _k(params: CacheParams, vocabulary: int) -> int:
    """Entries that are kept at most; for draws, what `samples` is."""
    return {"sampled": params.samples, "hybrid": params.samples, "full": vocabulary}.get(params.encoding, params.top_k)


def _measure(real: Positions, params: CacheParams) -> dict[str, Any]:
    """Figures of one encoding, through a Parquet file."""
    count, each = len(real.teacher), real.each
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count))
    table = _rows(columns_of(encode(real.teacher, params, uniforms), np.full(count // each, each)), count // each)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shard.parquet"
        write_rows(table, file, SHARD_LEVEL)
        sizes = _column_bytes(file)
        of_keys = file.stat().st_size - sum(size for name, size in sizes.items() if name not in KEYS)
        cached = decode(pq.read_table(file), params)
    figures = fidelity([(real.teacher.log_softmax(-1), cached, real.student)], params.resolution_nats)
    kept, drawn = (cached.log_probabilities > -torch.inf).sum(-1), (cached.sampled_weights > 0).sum(-1)
    return {
        "bytes_per_position": sum(size for name, size in sizes.items() if name not in KEYS) / count,
        "resolution_nats": params.resolution_nats,
        **figures,
        "row_bytes": of_keys / (count // each),
        "kept_entries": float(kept.double().mean()),
        "drawn_entries": float(drawn.double().mean()),
        "column_bytes": {name: size / count for name, size in sizes.items() if name not in KEYS},
    }


def _rows(columns: dict[str, pa.Array], count: int) -> pa.Table:
    """Whole rows of the cache: the keys are what they look like in one, a hash of each row's number."""
    hashes = [sha256_json(["example", number]) for number in range(count)]
    keys: dict[str, Any] = {
        "context_id": [sha256_json("context")] * count,
        "example_id": hashes,
        "prompt_sha": [sha256_json(["prompt", name]) for name in hashes],
        "prompt_tokens": [430] * count,
        "label_logprobs": [[]] * count,
        "label_bounds": [[]] * count,
        "completion_ids": [[]] * count,
        "completion_logprobs": [[]] * count,
    }
    arrays = columns | {name: pa.array(values, SCORES.field(name).type) for name, values in keys.items()}
    return pa.table([arrays[name] for name in SCORES.names], schema=SCORES)


def _column_bytes(file: Path) -> dict[str, int]:
    """Compressed bytes of each column of the schema."""
    metadata, sizes = pq.read_metadata(file), dict.fromkeys(SCORES.names, 0)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return sizes


def _loss(how: str, positions: int, logits_at_once: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cache_loss", how, str(positions), str(logits_at_once)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"loss": how, "positions": positions, "logits_at_once": logits_at_once, **json.loads(child.stdout.splitlines()[-1])}


def _print(rows: list[dict[str, Any]]) -> None:
    names = {
        "kept_entries": ("kept", 1),
        "drawn_entries": ("drawn", 1),
        "bytes_per_position": ("bytes", 1),
        "retained_mass": ("retained mass", 3),
        "truncation_nats": ("truncation", 4),
        "truncation_rms_nats": ("rms", 3),
        "quantisation_nats": ("quantisation", 5),
        "gradient_cosine": ("gradient cosine", 4),
        "gradient_cosine_mean": ("mean of positions'", 3),
    }
    table = Table(title=f"{rows[0]['positions']:,.0f} positions; nats of a KL of {rows[0]['student_kl_nats']:.2f}")
    for name in ("encoding", "k", "resolution", *(title for title, _ in names.values())):
        table.add_column(name, justify="left" if name == "encoding" else "right")
    for row in rows:
        figures = [f"{row[name]:.{digits}f}" for name, (_, digits) in names.items()]
        resolution = "exact" if row["resolution_nats"] is None else f"{row['resolution_nats']:g}"
        table.add_row(row["encoding"], str(row["k"]), resolution, *figures)
    Console(width=140).print(table)


def _print_losses(losses: list[dict[str, Any]]) -> None:
    table = Table(title=f"A step of the loss, {losses[0]['positions']:,} positions; the head's gradient alone is 113 MB")
    for name in ("how", "logits at once", "seconds", "memory over the start"):
        table.add_column(name, justify="left" if name == "how" else "right")
    for row in losses:
        at_once = f"{row['logits_at_once']:,}" if row["logits_at_once"] else "all"
        table.add_row(row["loss"], at_once, f"{row['seconds']:.2f}", f"{row['added_bytes'] / 1e6:,.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
