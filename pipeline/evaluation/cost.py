"""What an answer costs: prompt tokens, latency, memory, throughput, each method measured in a process that does only this.

One by one, an example is answered with its full prompts, as by a caller without a prefix cache: one in each context, or one for each window
of its text. Batches go through the engine that predictions are made with. A student is measured with one thread too, in batches on fewer
examples. Figures are facts of one machine and say which. They are not outputs of DVC, and they carry the hash of what was measured, so that
the report can tell figures of another model.
"""

import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.evaluation.metrics import Json
from pipeline.evaluation.predictions import Answering
from pipeline.files import Folders, sha256_json, write_json
from pipeline.models.folders import load_model, server_of, weights_sha256
from pipeline.models.forward import plain_logits
from pipeline.models.machine import DTYPES, cpu_info, default_device, use_machine
from pipeline.models.packed import Row
from pipeline.models.process import cores, peak_rss_bytes
from pipeline.models.trained import load_tokens
from pipeline.params import Params, TaskParams
from pipeline.schema import Context, Example, Prompt
from pipeline.task import Task, TaskTokens
from pipeline.teachers.engines import LABELS_ONLY, Engine, open_engine

THROUGHPUT_EXAMPLES = 32
ONE_THREAD_EXAMPLES = 16
PROBES = 3
Asked = Sequence[Sequence[Sequence[Prompt]]]
"""Prompts of each window of each example in each context."""


def measure_method(name: str, models: Sequence[Answering], params: Params, folders: Folders, examples: Sequence[Example]) -> Json:
    """Measure a method on the first of `examples` and write its figures (`measure`) to metrics/cost/NAME.json.

    `models` are from `predictions.models_of`. An ensemble's answer takes all of them in all their contexts; of seeds, and of contexts on
    their own, the first is measured.
    """
    if name not in params.baselines or params.baselines[name].contexts == "each":
        models = [replace(models[0], contexts=models[0].contexts[:1])]
    timed, threads = min(params.evaluation.cost_examples, len(examples)), params.runtime.threads or cores()
    asked = examples[: max(timed, THROUGHPUT_EXAMPLES)]
    if any(server_of(model.folder) for model in models):
        figures = measure_served(models, params, examples[:timed], threads)
    else:
        figures = measured_apart(name, models, params.task, asked, timed, threads, name in params.students)
    write_json(figures, folders.metrics / "cost" / f"{name}.json")
    return figures


def measured_apart(
    name: str,
    models: Sequence[Answering],
    task: TaskParams,
    examples: Sequence[Example],
    timed: int,
    threads: int,
    one_thread: bool = False,
) -> Json:
    """`measure` of the method `name` in a process that does only this. Raises ShotlessError if that is killed."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(measure, models, task, examples, timed, threads, one_thread).result()
    except BrokenProcessPool:
        raise ShotlessError(f"The process that measures the cost of {name} was killed, perhaps for lack of memory. Run it again.") from None


def measure_served(models: Sequence[Answering], params: Params, examples: Sequence[Example], threads: int) -> Json:
    """Figures of `measure` for models of which one at least is behind a server: examples one by one, as asked."""
    task, seconds, counted = Task(params.task), [], list[int]()
    with ExitStack() as stack:
        scorers = [stack.enter_context(replace(model, work=None).scorer(task, params)) for model in models]
        asked = list(zip(scorers, models, strict=True))
        for example in (examples[0], *examples):  # the first to warm up
            start = time.perf_counter()
            rows = [scorer.asked_again(model.contexts, [example]) for scorer, model in asked]
            seconds.append(time.perf_counter() - start)
            counted += [count for own in rows for count in own["prompt_tokens"].to_pylist()] if len(seconds) > 1 else []
        subject = [[scorer.identity, [context.context_id for context in model.contexts]] for scorer, model in asked]
    latency = 1000 * float(np.median(seconds[1:]))
    return {
        "measured": {
            "subject": sha256_json(subject),
            "examples": len(examples),
            "batched": len(examples),
            "device": "server",
            "processor": "a server",
            "dtypes": sorted({model.dtype for model in models} - {"server"}),
            "threads": threads,
            "torch": torch.__version__,
        },
        "prompt_tokens": sum(counted) / len(examples),
        "latency_ms": round(latency, 2),
        "forward_passes": len(counted) / len(examples),
        "throughput": {"examples": len(examples), "examples_per_second": round(1000 / latency, 3), "engine": "server"},
    }


def measure(
    models: Sequence[Answering], task: TaskParams, examples: Sequence[Example], timed: int, threads: int, one_thread: bool = False
) -> Json:
    """Answer the first `timed` examples one by one, after one to warm up, then all in batches, and return the figures.

    `measured` (`subject`, the hash of weights and prompts; number of `examples` one by one and `batched`; the machine); `prompt_tokens` of
    an example; `latency_ms`, the median; `peak_rss_bytes` up to the batches, with Python and its libraries; `peak_device_bytes` on a GPU;
    `parameters`, `disk_bytes`; `forward_passes` of an example; `throughput` {`examples`, `examples_per_second`, `engine`}; `one_thread`
    {`latency_ms`, `throughput`}, if asked for and on a CPU.
    """
    device = default_device()
    one_thread = one_thread and device.type == "cpu"
    counts = list(dict.fromkeys([threads, 1] if one_thread else [threads]))  # of threads
    use_machine(threads)
    keys = [(model.folder, model.dtype, model.format) for model in models]
    tokens = {key: load_tokens(Task(task, model.format), model.folder) for key, model in zip(keys, models, strict=True)}

    def prompts_of(own: TaskTokens, context: Context) -> list[list[Prompt]]:
        return [own.prompts(context, windows) for windows in own.windows(context, examples)]

    asked = [(model, [prompts_of(tokens[key], one) for one in model.contexts]) for key, model in zip(keys, models, strict=True)]
    subject = [[weights_sha256(model.folder), [[prompt.ids for one in own for prompt in one] for own in each]] for model, each in asked]
    passes = [(key, own) for key, (_, prompts) in zip(keys, asked, strict=True) for own in prompts]  # a context's prompts of each example
    networks = {(folder, dtype): load_model(folder, DTYPES[dtype], device) for folder, dtype in dict.fromkeys(key[:2] for key in keys)}
    by_network = [(networks[key[:2]], [own for place, own in passes if place == key]) for key in tokens]
    latencies = [_latency_ms(by_network, timed, count) for count in counts]
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
        "prompt_tokens": sum(len(prompt.ids) for _, own in passes for one in own[:timed] for prompt in one) / timed,
        "latency_ms": latencies[0],
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(network.num_parameters() for network in networks.values()),
        "disk_bytes": sum(file.stat().st_size for folder in {key[0] for key in keys} for file in folder.iterdir() if file.is_file()),
        "forward_passes": sum(len(one) for _, own in passes for one in own[:timed]) / timed,
    }
    if device.type == "cuda":
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    engines, opened = [], dict[PreTrainedModel, Engine]()
    for own, (network, prompts) in zip(tokens.values(), by_network, strict=True):
        if network in opened:  # asked in another format, with other tokens for its labels
            engine = Engine(network, opened[network].packed, own.completions, LABELS_ONLY, opened[network].token_budget)
        else:
            probes = [one[0] for one in max(prompts, key=lambda own: len(own[0][0].ids))[:PROBES]]
            engine = opened[network] = open_engine(network, own, LABELS_ONLY, probes)
        engines.append((engine, prompts))
    few = min(len(examples), ONE_THREAD_EXAMPLES)
    batched = [_throughput(engines, len(examples) if count == threads else few, count) for count in counts]
    figures["throughput"] = batched[0]
    if one_thread:
        figures["one_thread"] = {"latency_ms": latencies[-1], "throughput": batched[-1]}
    return figures


@torch.inference_mode()
def _latency_ms(asked: Sequence[tuple[PreTrainedModel, Asked]], examples: int, threads: int) -> float:
    """The median time of the plain forward passes that one example's answer takes."""
    use_machine(threads)
    seconds = []
    for number in (0, *range(examples)):  # the first to warm up
        start = time.perf_counter()
        for network, prompts in asked:
            for own in prompts:
                for prompt in own[number]:
                    plain_logits(network, [Row(prompt.ids)])[0].cpu()  # a GPU has answered only now
        seconds.append(time.perf_counter() - start)
    return round(1000 * float(np.median(seconds[1:])), 2)


def _throughput(engines: Sequence[tuple[Engine, Asked]], examples: int, threads: int) -> Json:
    use_machine(threads)
    start = time.perf_counter()
    for engine, prompts in engines:
        for own in prompts:
            engine.score([prompt for one in own[:examples] for prompt in one]).label_logprobs.cpu()
    rate = round(examples / (time.perf_counter() - start), 3)
    names = ", ".join(dict.fromkeys(engine.name for engine, _ in engines))
    return {"examples": examples, "examples_per_second": rate, "engine": names}
