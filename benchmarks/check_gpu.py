"""`make check-gpu`: the default model on a GPU, in less than ten minutes. JSON lines to stdout and `benchmarks/results/check_gpu.jsonl`.

It needs what `make run` leaves, and no network; vLLM is measured where it is installed. It exits with 2 if torch sees no GPU.
"""

import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import student, teacher
from benchmarks.engine import TOP_K
from benchmarks.machine import about
from benchmarks.prompts import PREPARED, build
from pipeline.models.folders import load_model, load_tokenizer
from pipeline.models.machine import DTYPES, default_device, fast_dtype
from pipeline.models.trained import load_tokens
from pipeline.params import CacheParams, load_params
from pipeline.schema import Prompt
from pipeline.task import Task
from pipeline.teachers.engines import open_engine

RESULTS = Path("benchmarks/results/check_gpu.jsonl")
CONTEXTS = (0, 1024, 4096)
ENGINES = ["plain", "plain_batched", "generic", "shared_prefix", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
STEPS, BATCH_SIZE = 24, 16


def main() -> None:
    """Run all checks; each figure is written as soon as it is known."""
    if not torch.cuda.is_available():
        print("check-gpu: torch sees no GPU (torch.cuda.is_available() is false); nothing was checked", file=sys.stderr)
        raise SystemExit(2)
    gpu = torch.cuda.get_device_properties(0)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("", "utf-8")
    _say("machine", about() | {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "cuda": torch.version.cuda})
    check(fast_dtype(default_device()))


def check(dtype: str) -> None:
    """The probe and the teacher's engines in `dtype`, then training, which is float32."""
    _say("probe", probe(dtype))
    for context in CONTEXTS:
        for row in teacher.rows_at(context, ENGINES, dtype, {}):
            _say("teacher", row)
    with tempfile.TemporaryDirectory() as scratch:
        lesson = student.write_lesson(teacher.MODEL, PREPARED, STEPS * BATCH_SIZE, Path(scratch) / "lesson.json")
        for name in ("full", "trainer_padded"):
            _say("student", {"name": name} | student.measure(sys.executable, name, teacher.MODEL, lesson, STEPS, BATCH_SIZE))


def probe(dtype: str) -> dict[str, Any]:
    """Which engine a capture would use on this device, why, and how long finding out took."""
    prompts = asdict(build(load_tokenizer(teacher.MODEL), 1024, teacher.QUERY_TOKENS, 8))
    asked = [Prompt((*prompts["context_ids"], *query)) for query in prompts["query_ids"]]
    model, tokens = load_model(teacher.MODEL, DTYPES[dtype], default_device()), load_tokens(Task(load_params().task), teacher.MODEL)
    start = time.perf_counter()
    engine = open_engine(model, tokens, CacheParams(top_k=TOP_K), asked)
    return {"dtype": dtype, "engine": engine.name, "reason": engine.reason, "seconds": time.perf_counter() - start}


def _say(what: str, figures: dict[str, Any]) -> None:
    line = json.dumps({"what": what} | figures)
    print(line, flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
