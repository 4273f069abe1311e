"""The benchmark's rows on a small model: all read the same rows, and count the same tokens."""

import json

import pytest
import torch

from benchmarks import student as benchmark
from benchmarks import student_rows
from benchmarks.training_limit import limits
from pipeline.models.loading import load_model

LESSON = {
    "rows": [{"text": f"text {n}", "ids": list(range(3, 8 + n)), "label": n % 2, "answer": " good"} for n in range(4)],
    "completions": [[5], [9]],
}


@pytest.mark.parametrize("name", student_rows.TUNINGS)
def test_own_rows_count_the_query_tokens(model_folder, name):
    tokens, seconds = student_rows.own(name, load_model(model_folder()), LESSON, 2, 4)
    assert tokens == 2 * sum(len(row["ids"]) for row in LESSON["rows"])
    assert seconds > 0


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_padded_trainer_counts_the_same_tokens(model_folder):
    tokens, _ = student_rows.trainer_padded(load_model(model_folder()), str(model_folder()), LESSON, 2, 4)
    assert tokens == 2 * sum(len(row["ids"]) for row in LESSON["rows"])


def test_the_peak_is_that_of_the_block():
    with student_rows.peak_rss() as peak:
        block = torch.ones(30_000_000)
        assert float(block.sum()) > 0
        torch.ones(3_000_000).sum()
    assert peak["bytes"] > 60e6


def test_the_limit_counts_the_layers_matrices(model_folder):
    found = limits(model_folder(), 16)
    width, keys, inner = 32, 16, 64
    assert found.parameters == 4 * (2 * width * width + 2 * width * keys + 3 * width * inner)
    assert found.tokens_per_s["limit_full"] * 6 * found.parameters == pytest.approx(found.operations_per_s)
    assert found.tokens_per_s["limit_bitfit"] == pytest.approx(1.5 * found.tokens_per_s["limit_full"])
    assert found.tokens_per_s["limit_full"] < found.tokens_per_s["limit_lora"] < found.tokens_per_s["limit_bitfit"]


def test_the_table_says_how_far_the_aims_are():
    rows = [
        {"name": "full", "tokens_per_s": 150.0, "peak_rss_above_model_bytes": 1000},
        {"name": "lora", "tokens_per_s": 180.0, "peak_rss_above_model_bytes": 300},
        {"name": "trainer_padded", "tokens_per_s": 75.0, "peak_rss_above_model_bytes": 3000},
        {"name": "limit_full", "tokens_per_s": 180.0, "peak_rss_above_model_bytes": None},
    ]
    text = benchmark.table(rows, ["left out: x"])
    assert "full is 2.00× the padded Trainer" in text
    assert "full takes 1.20× the limit's time" in text
    assert "lora takes 30% of full's peak" in text
    assert "lora is 1.20× full's speed" in text
    assert text.endswith("left out: x")
    assert json.dumps(rows)
