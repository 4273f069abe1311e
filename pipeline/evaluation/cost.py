"""What an answer costs: prompt tokens, latency, memory, throughput, each method measured in a process that does only this.

One by one, an example is answered with its full prompts, as by a caller without a prefix cache; batches go through the engine that
predictions are made with. Figures are facts of one machine and say which. They are not outputs of DVC, and they carry the hash of what was
measured, so that the report can tell figures of another model.
"""

import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from pipeline.errors import ShotlessError
from pipeline.evaluation.metrics import Json
from pipeline.evaluation.predictions import Answering
from pipeline.files import Folders, sha256_json, write_json
from pipeline.models.folders import load_model, weights_sha256
from pipeline.models.machine import DTYPES, cpu_info, default_device, use_machine
from pipeline.models.process import cores, peak_rss_bytes
from pipeline.models.trained import load_tokens
from pipeline.params import Params, TaskParams
from pipeline.schema import Example
from pipeline.task import Task
from pipeline.teachers.engines import LABELS_ONLY, open_engine

THROUGHPUT_EXAMPLES = 64
PROBES = 3


def measure_method(name: str, models: Sequence[Answering], params: Params, folders: Folders, examples: Sequence[Example]) -> Json:
    """Measure a method on the first of `examples` and write its figures (`measure`) to metrics/cost/NAME.json.

    `models` are from `predictions.models_of`. An ensemble's answer takes all of them in all their contexts; of seeds, and of contexts on
    their own, the first is measured.
    """
    if name not in params.baselines or params.baselines[name].contexts == "each":
        models = [replace(models[0], contexts=models[0].contexts[:1])]
    timed, threads = min(params.evaluation.cost_examples, len(examples)), params.runtime.threads or cores()
    asked = examples[: max(timed, THROUGHPUT_EXAMPLES)]
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            figures = process.submit(measure, models, params.task, asked, timed, threads).result()
    except BrokenProcessPool:
        raise ShotlessError(f"The process that measures the cost of {name} was killed, perhaps for lack of memory. Run it again.") from None
    write_json(figures, folders.metrics / "cost" / f"{name}.json")
    return figures


def measure(models: Sequence[Answering], task: TaskParams, examples: Sequence[Example], timed: int, threads: int) -> Json:
    """Answer the first `timed` examples one by one, after one to warm up, then all in batches, and return the figures.

    `measured` (`subject`, the hash of weights and prompts; number of `examples` one by one and `batched`; the machine); `prompt_tokens` of
    an example; `latency_ms`, the median; `peak_rss_bytes` up to the batches, with Python and its libraries; `peak_device_bytes` on a GPU;
    `parameters`, `disk_bytes`; `forward_passes` of an example; `throughput` {`examples`, `examples_per_second`, `engine`}.
    """
    use_machine(threads)
    device = default_device()
    tokens = {model.folder: load_tokens(Task(task), model.folder) for model in models}
    asked = [(model, [tokens[model.folder].prompts(context, examples) for context in model.contexts]) for model in models]
    subject = [[weights_sha256(model.folder), [[prompt.ids for prompt in own] for own in prompts]] for model, prompts in asked]
    passes = [((model.folder, model.dtype), own) for model, prompts in asked for own in prompts]  # a context's prompts each
    networks = {key: load_model(key[0], DTYPES[key[1]], device) for key in dict.fromkeys(key for key, _ in passes)}
    seconds = [_seconds([(networks[key], own[number].ids) for key, own in passes]) for number in (0, *range(timed))][1:]
    names = (line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    figures = {
        "measured": {
            "subject": sha256_json(subject),
            "examples": timed,
            "batched": len(examples),
            "device": device.type,
            "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
            "dtypes": sorted({model.dtype for model in models}),
            "threads": threads,
            "torch": torch.__version__,
        },
        "prompt_tokens": sum(len(prompt.ids) for _, own in passes for prompt in own[:timed]) / timed,
        "latency_ms": round(1000 * float(np.median(seconds)), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(network.num_parameters() for network in networks.values()),
        "disk_bytes": sum(file.stat().st_size for folder in tokens for file in folder.iterdir() if file.is_file()),
        "forward_passes": len(passes),
    }
    if device.type == "cuda":
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    total, engines = 0.0, []
    for key, network in networks.items():
        prompts = [own for place, own in passes if place == key]
        engine = open_engine(network, tokens[key[0]], LABELS_ONLY, max(prompts, key=lambda own: len(own[0].ids))[:PROBES])
        engines.append(engine.name)
        start = time.perf_counter()
        for own in prompts:
            engine.score(own).label_logprobs.cpu()
        total += time.perf_counter() - start
    rate = round(len(examples) / total, 3)
    return figures | {"throughput": {"examples": len(examples), "examples_per_second": rate, "engine": ", ".join(dict.fromkeys(engines))}}


@torch.inference_mode()
def _seconds(asked: Sequence[tuple[Any, Sequence[int]]]) -> float:
    """Of the plain forward passes that one example's answer takes."""
    start = time.perf_counter()
    for network, ids in asked:
        logits = network(input_ids=torch.tensor([ids], device=network.device), use_cache=False, logits_to_keep=1).logits
        logits.cpu()  # a GPU has answered only now
    return time.perf_counter() - start
