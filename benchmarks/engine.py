"""One engine on one set of prompts, in a process of its own: `python -m benchmarks.engine NAME MODEL PROMPTS.json`, figures to stdout."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.flops import product_rate, shared_prefix_flops
from pipeline.engine.batches import token_budget
from pipeline.engine.generic import GenericEngine
from pipeline.engine.shared_prefix import SharedPrefixEngine
from pipeline.models.loading import load_model
from pipeline.models.machine import DTYPES, default_device, memory_bytes, use_machine
from pipeline.models.packed import PackedModel

BATCH = 8


def plain(model: PreTrainedModel, prompts: dict[str, Any]) -> Tensor:
    """Full prompts, one by one: label logits [N, L]."""
    rows = []
    for query in prompts["query_ids"]:
        logits = model(input_ids=torch.tensor([prompts["context_ids"] + query]), use_cache=False, logits_to_keep=1).logits[0, -1]
        rows.append(_labels(logits.log_softmax(-1), prompts))
    return torch.stack(rows)


def plain_batched(model: PreTrainedModel, prompts: dict[str, Any]) -> Tensor:
    """Full prompts in batches of 8, padded on the left, as `transformers` users write it."""
    rows = []
    for start in range(0, len(prompts["query_ids"]), BATCH):
        batch = [prompts["context_ids"] + query for query in prompts["query_ids"][start : start + BATCH]]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
        rows.append(torch.stack([_labels(row, prompts) for row in out.log_softmax(-1)]))
    return torch.cat(rows)


def generic(model: PreTrainedModel, prompts: dict[str, Any]) -> Tensor:
    """The project's path for every architecture."""
    engine = GenericEngine(model, prompts["completions"], 32, _budget(model))
    return engine.score(prompts["context_ids"], prompts["query_ids"]).label_logprobs


def shared_prefix(model: PreTrainedModel, prompts: dict[str, Any]) -> Tensor:
    """The project's fast path, the context's reading included."""
    engine = SharedPrefixEngine(PackedModel(model), prompts["completions"], 32, _budget(model))
    return engine.score(prompts["context_ids"], prompts["query_ids"]).label_logprobs


ENGINES: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Tensor]] = {
    "plain": plain,
    "plain_batched": plain_batched,
    "generic": generic,
    "shared_prefix": shared_prefix,
}


def _labels(log_probabilities: Tensor, prompts: dict[str, Any]) -> Tensor:
    return log_probabilities[[ids[0] for ids in prompts["completions"]]]


def _budget(model: PreTrainedModel) -> int:
    return token_budget(model, memory_bytes(default_device()))


def main() -> None:
    """Print seconds, label log-probabilities, memory and, for the fast path, the limit's seconds."""
    name, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    prompts = json.loads(file.read_text("utf-8"))
    use_machine(None)
    model = load_model(folder, DTYPES[prompts["dtype"]])
    rate = product_rate(model)
    with torch.inference_mode():
        warm_up = prompts | {"query_ids": prompts["query_ids"][:BATCH], "context_ids": prompts["context_ids"][:64]}
        ENGINES[name](model, warm_up)
        times, answers = [], torch.empty(0)
        for _ in range(prompts["repeats"]):
            start = time.perf_counter()
            answers = ENGINES[name](model, prompts)
            times.append(time.perf_counter() - start)
            rate = max(rate, product_rate(model))
    figures = {
        "seconds": min(times),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answers": answers.tolist(),
        "product_flops_per_s": rate,
        "limit_seconds": shared_prefix_flops(model, len(prompts["context_ids"]), [len(query) for query in prompts["query_ids"]]) / rate,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
