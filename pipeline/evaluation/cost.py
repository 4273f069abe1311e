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
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.evaluation.metrics import Json
from pipeline.evaluation.predictions import Answering, models_of, read_sets
from pipeline.files import Folders, read_json, sha256_json, write_json
from pipeline.models.folders import load_model, server_of, weights_sha256
from pipeline.models.forward import plain_logits
from pipeline.models.machine import DTYPES, cpu_info, default_device, use_machine
from pipeline.models.packed import Row
from pipeline.models.process import cores, peak_rss_bytes
from pipeline.models.trained import load_tokens
from pipeline.params import Format, Params, TaskParams
from pipeline.schema import Context, Example, Prompt
from pipeline.task import Task, TaskTokens
from pipeline.teachers.engines import LABELS_ONLY, Engine, open_engine

THROUGHPUT_EXAMPLES = 16
ONE_THREAD_EXAMPLES = 8
Key = tuple[Path, str, Format]
Asked = Sequence[Sequence[Sequence[Prompt]]]
"""Prompts of each window of each example in each context."""


def measure_costs(params: Params, folders: Folders) -> None:
    """Write metrics/cost/NAME.json (`measure`) of every student and baseline, and artifacts/costs.json: method → subject of its figures.

    The first texts of the first evaluation set are asked. An ensemble's answer takes all of its models in all their contexts; of seeds, and
    of contexts on their own, the first is measured. What was measured here before is not measured again, by whichever method. Free text has
    no cost table: nothing is measured for it.
    """
    methods = [*params.baselines, *params.students] if params.task.completion is None else []
    folder, examples, subjects = folders.metrics / "cost", next(iter(read_sets(params, folders).values())), dict[str, str]()
    for name in methods:
        figures = _figures(name, models_of(name, params, folders), params, examples, folder)
        write_json(figures, folder / f"{name}.json")
        subjects[name] = figures["measured"]["subject"]
    write_json(subjects, folders.artifacts / "costs.json")


def _figures(name: str, models: Sequence[Answering], params: Params, examples: Sequence[Example], folder: Path) -> Json:
    """Figures of a method; those in `folder` if they are of the same subject, measured alike."""
    if name not in params.baselines or params.baselines[name].contexts == "each":
        models = [replace(models[0], contexts=models[0].contexts[:1])]
    timed, threads = min(params.evaluation.cost_examples, len(examples)), params.runtime.threads or cores()
    asked, one_thread = examples[: max(timed, THROUGHPUT_EXAMPLES)], name in params.students
    if any(server_of(model.folder) for model in models):
        return measure_served(models, params, examples[:timed], threads)
    about = measured_on(models, params.task, asked, timed, threads)
    for earlier in map(read_json, sorted(folder.glob("*.json"))):
        if earlier["measured"] == about and ("one_thread" in earlier or not one_thread):
            return earlier
    return {"measured": about} | measured_apart(name, models, params.task, asked, timed, threads, one_thread)


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
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # its libraries are loaded once, for all that is measured
        with ProcessPoolExecutor(1, context) as process:
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

    `prompt_tokens` of an example; `latency_ms`, the median; `peak_rss_bytes` up to the batches, with Python and its libraries;
    `peak_device_bytes` on a GPU; `parameters`, `disk_bytes`; `forward_passes` of an example; `throughput` {`examples`,
    `examples_per_second`, `engine`}; `one_thread` {`latency_ms`, `throughput`}, if asked for and on a CPU.
    """
    device = default_device()
    one_thread = one_thread and device.type == "cpu"
    counts = list(dict.fromkeys([threads, 1] if one_thread else [threads]))  # of threads
    use_machine(threads)
    tokens, asked = _asked(models, task, examples)
    networks = {key[:2]: load_model(key[0], DTYPES[key[1]], device) for key in tokens}
    passes = [(key, own) for key, prompts in asked for own in prompts]  # a context's prompts of each example
    by_network = [(networks[key[:2]], [own for place, own in passes if place == key]) for key in tokens]
    latencies = [_latency_ms(by_network, timed, count) for count in counts]
    figures = {
        "prompt_tokens": sum(len(prompt.ids) for _, own in passes for one in own[:timed] for prompt in one) / timed,
        "latency_ms": latencies[0],
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(network.num_parameters() for network in networks.values()),
        "disk_bytes": sum(file.stat().st_size for folder in {key[0] for key in tokens} for file in folder.iterdir() if file.is_file()),
        "forward_passes": sum(len(one) for _, own in passes for one in own[:timed]) / timed,
    }
    if device.type == "cuda":
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    engines, opened = [], dict[PreTrainedModel, Engine]()
    for own, (network, prompts) in zip(tokens.values(), by_network, strict=True):
        if network in opened:  # asked in another format, with other tokens for its labels
            engine = Engine(network, opened[network].packed, own.completions, LABELS_ONLY, opened[network].token_budget)
        else:
            probe = min(prompts, key=lambda own: len(own[0][0].ids))[0][:1]  # evaluation has probed longer ones
            engine = opened[network] = open_engine(network, own, LABELS_ONLY, probe)
        engines.append((engine, prompts))
    few = min(len(examples), ONE_THREAD_EXAMPLES)
    batched = [_throughput(engines, len(examples) if count == threads else few, count) for count in counts]
    figures["throughput"] = batched[0]
    if one_thread:
        figures["one_thread"] = {"latency_ms": latencies[-1], "throughput": batched[-1]}
    return figures


def measured_on(models: Sequence[Answering], task: TaskParams, examples: Sequence[Example], timed: int, threads: int) -> Json:
    """What is measured, by content (`subject`, the hash of weights and prompts), how many `examples` one by one and `batched`, and on what.

    Times are equal if these are, up to what else the machine does.
    """
    device = default_device()
    names = (line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    ids = [[[prompt.ids for one in own for prompt in one] for own in each] for _, each in _asked(models, task, examples)[1]]
    weights = [model.identity["weights"] if model.identity else weights_sha256(model.folder) for model in models]
    return {
        "subject": sha256_json([list(each) for each in zip(weights, ids, strict=True)]),
        "examples": timed,
        "batched": len(examples),
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "dtypes": sorted({model.dtype for model in models}),
        "threads": threads,
        "torch": torch.__version__,
    }


def _asked(
    models: Sequence[Answering], task: TaskParams, examples: Sequence[Example]
) -> tuple[dict[Key, TaskTokens], list[tuple[Key, list[Sequence[Sequence[Prompt]]]]]]:
    """Tokens by model, number format and prompt format; and each model's prompts of the examples' windows in each of its contexts."""
    keys: list[Key] = [(model.folder, model.dtype, model.format) for model in models]
    tokens = {key: load_tokens(Task(task, key[2]), key[0]) for key in dict.fromkeys(keys)}

    def prompts_of(own: TaskTokens, context: Context) -> list[list[Prompt]]:
        return [own.prompts(context, windows) for windows in own.windows(context, examples)]

    return tokens, [(key, [prompts_of(tokens[key], one) for one in model.contexts]) for key, model in zip(keys, models, strict=True)]


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
