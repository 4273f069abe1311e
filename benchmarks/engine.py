"""One engine on one set of prompts, in a process of its own: `python -m benchmarks.engine NAME MODEL PROMPTS.json`, figures to stdout."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.flops import product_rate, shared_prefix_flops
from pipeline.models.folders import load_model
from pipeline.models.machine import DTYPES, default_device, memory_bytes, use_machine
from pipeline.models.packed import PackedModel
from pipeline.models.process import peak_rss_bytes
from pipeline.params import CacheParams
from pipeline.schema import Prompt
from pipeline.teachers.engines import Engine, token_budget

BATCH = 64 if torch.cuda.is_available() else 8
TOP_K = 32
Prompts = dict[str, Any]
"""`prompts.Prompts` as JSON."""


def plain(model: PreTrainedModel, prompts: Prompts) -> Tensor:
    """Full prompts, one by one: label log-probabilities [N, L]."""
    rows = []
    for query in prompts["query_ids"]:
        ids = torch.tensor([prompts["context_ids"] + query], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        rows.append(_labels(logits.log_softmax(-1), prompts))
    return torch.stack(rows)


def plain_batched(model: PreTrainedModel, prompts: Prompts) -> Tensor:
    """Full prompts in batches of `BATCH`, padded on the left, as `transformers` users write it."""
    rows = []
    for start in range(0, len(prompts["query_ids"]), BATCH):
        batch = [prompts["context_ids"] + query for query in prompts["query_ids"][start : start + BATCH]]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
        rows.append(torch.stack([_labels(row, prompts) for row in out.log_softmax(-1)]))
    return torch.cat(rows)


def answering(name: str, model: PreTrainedModel, completions: Any) -> Callable[[Prompts], Tensor]:
    """What answers prompts with label log-probabilities [N, L]; the project's engines are set up once."""
    if name in {"plain", "plain_batched"}:
        return partial({"plain": plain, "plain_batched": plain_batched}[name], model)
    budget = token_budget(model, memory_bytes(default_device()))
    packed = PackedModel(model) if name == "shared_prefix" else None
    engine = Engine(model, packed, completions, CacheParams(top_k=TOP_K), budget)

    def answer(prompts: Prompts) -> Tensor:
        whole = [Prompt((*prompts["context_ids"], *query)) for query in prompts["query_ids"]]
        return engine.score(whole, prompts["context_ids"]).label_logprobs

    return answer


def _labels(log_probabilities: Tensor, prompts: Prompts) -> Tensor:
    return log_probabilities[[ids[0] for ids in prompts["completions"]]]


def main() -> None:
    """Print seconds, label log-probabilities, memory and, for the fast path, the limit's seconds."""
    name, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    prompts = json.loads(file.read_text("utf-8"))
    use_machine(None)
    if name in {"plain", "plain_batched"}:  # as their users have torch, with the library that it takes by itself
        torch.set_float32_matmul_precision("highest")
    model = load_model(folder, DTYPES[prompts["dtype"]], default_device())
    rate = product_rate(model)
    with torch.inference_mode():
        answer = answering(name, model, prompts["completions"])
        times, answers = [], torch.empty(0)
        for _ in range(prompts["repeats"]):
            # warms up, and makes the fast path forget the context: its reading is part of every time
            answer(prompts | {"query_ids": prompts["query_ids"][:BATCH], "context_ids": prompts["context_ids"][:64]})
            start = time.perf_counter()
            answers = answer(prompts).cpu()  # a GPU has answered only then
            times.append(time.perf_counter() - start)
            rate = max(rate, product_rate(model))
    figures = {
        "seconds": min(times),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "answers": answers.tolist(),
        "product_flops_per_s": rate,
        "limit_seconds": shared_prefix_flops(model, len(prompts["context_ids"]), [len(query) for query in prompts["query_ids"]]) / rate,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
