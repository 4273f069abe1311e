"""The benchmark's rows on a small model: all read the same rows, and count the same tokens."""

import json

import pytest
import torch

from benchmarks import student as benchmark
from benchmarks import student_rows
from benchmarks.training_limit import limits
from pipeline.models.folders import load_model

LESSON = {
    "rows": [{"text": f"text {n}", "ids": list(range(3, 8 + n)), "label": n % 2, "answer": " good"} for n in range(4)],
    "completions": [[5], [9]],
}


QUERY_TOKENS = sum(len(row["ids"]) for row in LESSON["rows"])


@pytest.mark.parametrize("name", student_rows.TUNINGS)
def test_own_rows_count_the_query_tokens_of_each_step(model_folder, name):
    tokens = student_rows.own(name, load_model(model_folder()), LESSON, 2, 2)
    assert len(tokens) == 2
    assert sum(tokens) == QUERY_TOKENS


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_padded_trainer_counts_the_same_tokens(model_folder):
    tokens = student_rows.trainer_padded(load_model(model_folder()), str(model_folder()), LESSON, 2, 2)
    assert len(tokens) == 2
    assert sum(tokens) == QUERY_TOKENS


def test_the_ends_of_steps_are_noted_for_any_optimizer():
    ends = student_rows.steps_ended()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.step()
    assert len(ends) == 2
    assert ends == sorted(ends)


def test_parts_of_a_run_are_put_together(tmp_path):
    file, about = tmp_path / "student.json", {"model": "m", "steps": 12, "rounds": 2}
    first = [{"name": "full", "tokens_per_s": 1.0}, {"name": "lora", "tokens_per_s": 2.0}]
    file.write_text(json.dumps(benchmark.merged(first, about | {"matrix_operations_per_s": 7.0}, file, ("model", "steps"))))
    later = benchmark.merged([{"name": "lora", "tokens_per_s": 3.0}], about | {"rounds": 1}, file, ("model", "steps"))
    assert [(row["name"], row["tokens_per_s"]) for row in later["rows"]] == [("full", 1.0), ("lora", 3.0)]
    assert later["matrix_operations_per_s"] == 7.0
    other = benchmark.merged([{"name": "lora", "tokens_per_s": 3.0}], about | {"steps": 6}, file, ("model", "steps"))
    assert [row["name"] for row in other["rows"]] == ["lora"]


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
