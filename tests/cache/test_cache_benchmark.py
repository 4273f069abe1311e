"""The cache's benchmark, on random positions: what it counts, and that its rows are what the issue's readers expect."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.cache import _encodings, _measure
from benchmarks.cache_positions import Positions
from pipeline.params import CacheParams


@pytest.fixture(scope="module")
def positions():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(60, 500, generator=generator) * 3
    return Positions(teacher, teacher + torch.randn(60, 500, generator=generator), 6)


def test_bytes_are_those_of_the_columns_that_hold_distributions(positions):
    row = _measure(positions, CacheParams())
    assert row["bytes_per_position"] == pytest.approx(sum(row["column_bytes"].values()))
    assert row["column_bytes"]["sampled_ids"] > 0
    assert "example_id" not in row["column_bytes"]
    assert row["row_bytes"] > 64  # two hashes a row, in hex, hardly compress
    assert {"retained_mass", "truncation_nats", "quantisation_nats", "gradient_cosine"} <= set(row)


def test_more_draws_are_more_bytes_and_less_error(positions):
    few, many = (_measure(positions, CacheParams(samples=samples)) for samples in (16, 96))
    assert few["bytes_per_position"] < many["bytes_per_position"]
    assert few["gradient_cosine"] < many["gradient_cosine"]
    assert few["truncation_rms_nats"] > many["truncation_rms_nats"]


def test_every_encoding_is_compared():
    assert {params.encoding for params in _encodings()} == {"top_k", "top_k_tail", "sampled", "hybrid", "full"}


def test_another_hash_seed_gives_the_same_bytes():
    code = (
        "import hashlib, numpy as np, pyarrow as pa, torch\n"
        "from pipeline.cache.encodings import columns_of, encode\n"
        "from pipeline.cache.rows import parquet_bytes\n"
        "from pipeline.teachers.scores import Reading\n"
        "from pipeline.params import CacheParams\n"
        "logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))\n"
        "uniforms = np.concatenate(Reading((), CacheParams()).uniforms([1, 2], [[3], [4, 5]], [[6, 7], [8, 9, 10]]))\n"
        "table = pa.table(columns_of(encode(logits, CacheParams(), torch.from_numpy(uniforms)), np.array([2, 3])))\n"
        "print(hashlib.sha256(parquet_bytes(table)).hexdigest())\n"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 65
