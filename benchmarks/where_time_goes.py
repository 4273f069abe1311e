"""Where the fast path's time goes: `python -m benchmarks.where_time_goes MODEL PROMPTS.json`, seconds by kind of operation to stdout."""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine import answering
from pipeline.models.folders import load_model
from pipeline.models.machine import DTYPES, use_machine

KINDS = {
    "products with weights": ("aten::mm", "aten::addmm"),
    "attention to the context": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "attention to a row's own tokens": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::amax", "aten::index", "aten::log"),
    "merging the two": ("aten::lerp", "aten::sigmoid"),
    "activations": ("aten::silu_", "aten::silu", "aten::mul_", "aten::gelu"),
    "norms, rotary positions, residuals": (
        "aten::mul",
        "aten::add",
        "aten::pow",
        "aten::mean",
        "aten::sum",
        "aten::cat",
        "aten::neg",
        "aten::rsqrt",
    ),
    "copies": ("aten::copy_",),
}


def main() -> None:
    """Print seconds by kind; what is none of `KINDS` is "the rest", mostly the interpreter's own time."""
    folder, prompts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    use_machine(None)
    model = load_model(folder, DTYPES[prompts["dtype"]])
    answer = answering("shared_prefix", model, prompts["completions"])
    answer(prompts | {"context_ids": prompts["context_ids"][:64]})
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as run:
        answer(prompts)
    own = {event.key: event.self_cpu_time_total / 1e6 for event in run.key_averages()}
    seconds = {kind: sum(own.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    print(json.dumps(seconds | {"the rest": sum(own.values()) - sum(seconds.values())}))


if __name__ == "__main__":
    main()
