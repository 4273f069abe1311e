"""`make bench-teacher`: the teacher's engines beside plain transformers, lm-evaluation-harness, llama.cpp, a server and the limit.

Every engine answers the same prompts in a process of its own; answers are compared with plain transformers' before a time counts. A slow
engine answers fewer of the queries: its rate does not depend on their number. llama.cpp compiles for minutes, so it runs where it is asked
for (`--engines …,llama_cpp`) and its figures are kept, with machine and date, in `benchmarks/llama_cpp.json`; other runs show those.
A server that is running is asked as a teacher behind it is (`--engines …,server --server URL --server-model NAME`).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environments import llama_cpp_python, python_of
from benchmarks.flops import FORMULA
from benchmarks.machine import about
from benchmarks.prompts import LABELS, build, texts
from pipeline.files import write_json
from pipeline.models.folders import load_tokenizer

MODEL = Path("artifacts/models/smollm2")
GGUF = Path("downloads/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
QUERY_TOKENS = 48
QUERIES = 128
SLOW = {0: 32, 256: 16, 1024: 8, 4096: 4}
"""Queries that engines without a shared context answer, by the context's tokens."""
TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 0.5}
LM_EVAL = ["torch", "lm_eval[hf]==0.4.13"]
KEPT = Path("benchmarks/llama_cpp.json")
LINE = (40, 80, 160)
"""Numbers of queries behind one context of 1,024 tokens, to show that time grows with queries alone."""


def main(
    contexts: str = "0,256,1024,4096",
    engines: str = "plain,plain_batched,lm_eval,generic,shared_prefix",
    dtype: str = "float32",
    gguf: Path = GGUF,
    server: str = "http://127.0.0.1:8080/v1",
    server_model: str = "smollm2",
    output: Path = Path("benchmarks/results/teacher.json"),
) -> None:
    """Measure, print tables, write JSON. `--gguf` is llama.cpp's model, by default the file that the default run's model was made from."""
    arguments = {"llama_cpp": [str(gguf)], "server": [server, server_model]}
    machine = about() | {"dtype": dtype, "texts": texts()[1], "formula_of_limit": FORMULA}
    rows: list[dict[str, Any]] = []
    for tokens in map(int, contexts.split(",")):
        rows += rows_at(tokens, engines.split(","), dtype, arguments)
        _print(rows)
        write_json({"machine": machine, "rows": rows}, output)  # a run that is cut off keeps what it has measured
    measured = {"machine": machine, "rows": rows}
    if 1024 in map(int, contexts.split(",")) and "shared_prefix" in engines:
        line = [
            row for count in LINE for row in rows_at(1024, ["shared_prefix"], dtype, arguments, count) if row["engine"] == "shared_prefix"
        ]
        _print_line(line)
        measured |= {"line": line, "profile_seconds": _profile(dtype)}
        _print_profile(measured["profile_seconds"])
    write_json(measured, output)
    kept = [row for row in rows if row["engine"] == "llama_cpp"]
    if kept:
        write_json({"machine": machine, "date": datetime.now(UTC).date().isoformat(), "rows": kept}, KEPT)
    print(f"written to {output}")


def rows_at(context: int, engines: list[str], dtype: str, arguments: dict[str, list[str]], count: int = QUERIES) -> list[dict[str, Any]]:
    """Rows of all engines at one length of context; `arguments` are those of engines that take some."""
    prompts = build(load_tokenizer(MODEL), context, QUERY_TOKENS, count)
    given = asdict(prompts) | {"labels": LABELS, "dtype": dtype}
    rows, reference = [], None
    for engine in engines:
        fast = engine in {"shared_prefix", "llama_cpp", "vllm", "server"}
        number = count if fast or torch.cuda.is_available() else min(count, SLOW[context])
        part = given | {name: given[name][:number] for name in ("queries", "query_ids")} | {"repeats": 3 if fast or context == 0 else 1}
        print(f"{engine}, {len(prompts.context_ids)} context tokens, {number} queries …", file=sys.stderr, flush=True)
        figures = _run(engine, part, arguments)
        if figures is None:
            continue
        answers = torch.tensor(figures["answers"])
        reference = answers if reference is None else reference
        both = min(len(answers), len(reference))
        difference = float((answers[:both] - reference[:both]).abs().max())
        if engine not in {"llama_cpp", "server"} and difference > TOLERANCE_NATS[dtype]:  # these may multiply quantised activations
            raise SystemExit(f"{engine}: answers differ by {difference:.1e} nats from {engines[0]}'s; its time means nothing")
        shape = {
            "context_tokens": context,
            "context_tokens_exact": len(prompts.context_ids),
            "query_tokens": sum(map(len, prompts.query_ids)) / count,
            "queries": number,
        }
        kept = {
            key: figures[key]
            for key in ("seconds", "peak_rss_bytes", "peak_device_bytes", "model_bytes", "product_flops_per_s")
            if key in figures
        }
        rows.append(
            {"engine": engine, **shape, "examples_per_s": number / figures["seconds"], "largest_difference_nats": difference, **kept}
        )
        if engine == "shared_prefix":
            rows.append({"engine": "limit", **shape, "examples_per_s": number / figures["limit_seconds"], "peak_rss_bytes": None})
    return rows


def _run(engine: str, prompts: dict[str, Any], arguments: dict[str, list[str]]) -> dict[str, Any] | None:
    """Figures of one engine's process (or of the profiler's); None where its environment cannot be made."""
    python: Path | None = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        write_json(prompts, file)
        command = ["-m", "benchmarks.engine", engine, str(MODEL), str(file)]
        if engine == "lm_eval":
            python, command = python_of("lm_eval", LM_EVAL), ["benchmarks/lm_eval_engine.py", str(MODEL), str(file)]
        elif engine == "llama_cpp":
            python, command = llama_cpp_python(), ["benchmarks/llama_cpp_engine.py", *arguments[engine], str(file)]
        elif engine == "server":
            command = ["-m", "benchmarks.server_engine", str(file), *arguments[engine]]
        elif engine == "vllm":
            command = ["benchmarks/vllm_engine.py", str(MODEL), str(file)]
        elif engine == "profile":
            command = ["-m", "benchmarks.where_time_goes", str(MODEL), str(file)]
        if python is None:
            return None
        quiet = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        child = subprocess.run([str(python), *command], env=quiet, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise SystemExit(f"{engine} ended with {child.returncode}; its last words: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _print(rows: list[dict[str, Any]]) -> None:
    """The table of the last context's rows."""
    context = rows[-1]["context_tokens"]
    own = [row for row in rows if row["context_tokens"] == context]
    if KEPT.is_file() and not any(row["engine"] == "llama_cpp" for row in own):
        kept = json.loads(KEPT.read_text("utf-8"))
        label = f"llama_cpp, of {kept['date']} on {kept['machine']['processor']}"
        own += [row | {"engine": label} for row in kept["rows"] if row["context_tokens"] == context]
    fast = next((row["examples_per_s"] for row in own if row["engine"] == "shared_prefix"), None)
    table = Table(title=f"{own[0]['context_tokens_exact']:,} context tokens, queries of {own[0]['query_tokens']:.0f}")
    for name in ("engine", "examples/s", "s/example", "speed-up of the fast path", "peak memory", "differs by"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in own:
        rate, memory = row["examples_per_s"], row["peak_rss_bytes"]
        table.add_row(
            row["engine"],
            f"{rate:,.2f}",
            f"{1 / rate:.4f}",
            "" if fast is None else f"{fast / rate:.2f}",
            "" if memory is None else f"{memory / 1e6:,.0f} MB",
            f"{row['largest_difference_nats']:.0e} nats" if "largest_difference_nats" in row else "",
        )
    Console().print(table)


def _profile(dtype: str) -> dict[str, float]:
    """Seconds by kind of operation, of `QUERIES` queries behind a context of 1,024 tokens."""
    prompts = build(load_tokenizer(MODEL), 1024, QUERY_TOKENS, QUERIES)
    found = _run("profile", asdict(prompts) | {"dtype": dtype}, {})
    assert found is not None
    return found


def _print_profile(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    table = Table("where the fast path's time goes, 1,024 context tokens", "seconds", "share")
    for kind, value in sorted(seconds.items(), key=lambda pair: -pair[1]):
        table.add_row(kind, f"{value:.2f}", f"{value / total:.0%}")
    Console().print(table)


def _print_line(line: list[dict[str, Any]]) -> None:
    """Seconds against the number of queries: a line that starts at the context's cost, and its slope."""
    table = Table("queries behind one context of 1,024 tokens", "seconds", "peak memory", "plain transformers would read")
    for row in line:
        tokens = row["queries"] * (row["context_tokens_exact"] + row["query_tokens"])
        table.add_row(f"{row['queries']}", f"{row['seconds']:.2f}", f"{row['peak_rss_bytes'] / 1e6:,.0f} MB", f"{tokens:,.0f} tokens")
    Console().print(table)
    first, last = line[0], line[-1]
    slope = (last["seconds"] - first["seconds"]) / (last["queries"] - first["queries"])
    print(f"{first['seconds'] - slope * first['queries']:.2f} s for the context, {slope:.4f} s for each query")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
