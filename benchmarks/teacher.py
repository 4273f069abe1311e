"""`make bench-teacher`: the teacher's engines side by side with plain transformers, lm-evaluation-harness, llama.cpp and the limit.

Every engine answers the same prompts in a process of its own; answers are compared with plain transformers' before a time counts. A slow
engine answers fewer of the queries: its rate does not depend on their number.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environments import python_of
from benchmarks.flops import FORMULA
from benchmarks.machine import about
from benchmarks.prompts import LABELS, build, texts
from pipeline.files import write_json
from pipeline.models.loading import load_tokenizer

MODEL = Path("artifacts/models/smollm2")
QUERY_TOKENS = 48
QUERIES = 128
SLOW = {0: 32, 256: 16, 1024: 8, 4096: 4}
"""Queries that engines without a shared context answer, by the context's tokens."""
TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 0.5}
LM_EVAL = ["torch", "lm_eval[hf]==0.4.13"]
LLAMA_CPP = ["llama-cpp-python==0.3.36", "numpy"]


def main(
    contexts: str = "0,256,1024,4096",
    engines: str = "plain,plain_batched,lm_eval,generic,shared_prefix",
    dtype: str = "float32",
    gguf: Path | None = None,
    output: Path = Path("benchmarks/results/teacher.json"),
) -> None:
    """Measure, print a table, write JSON. `llama_cpp` among the engines needs `--gguf`; it compiles for minutes."""
    machine = about() | {"dtype": dtype, "texts": texts()[1], "formula_of_limit": FORMULA}
    rows: list[dict[str, Any]] = []
    for tokens in map(int, contexts.split(",")):
        rows += _at(tokens, engines.split(","), dtype, gguf)
        _print(rows)
        write_json({"machine": machine, "rows": rows}, output)  # a run that is cut off keeps what it has measured
    if 1024 in map(int, contexts.split(",")):
        for count in (32, 512):
            rows += _at(1024, ["shared_prefix"], dtype, gguf, count)
        _print_line(rows)
    write_json({"machine": machine, "rows": rows}, output)
    print(f"written to {output}")


def _at(context: int, engines: list[str], dtype: str, gguf: Path | None, count: int = QUERIES) -> list[dict[str, Any]]:
    """Rows of all engines at one length of context."""
    prompts = build(load_tokenizer(MODEL), context, QUERY_TOKENS, count)
    given = asdict(prompts) | {"labels": LABELS, "dtype": dtype}
    rows, reference = [], None
    for engine in engines:
        fast = engine in {"shared_prefix", "llama_cpp"}
        number = count if fast else min(count, SLOW[context])
        part = given | {name: given[name][:number] for name in ("queries", "query_ids")} | {"repeats": 3 if fast or context == 0 else 1}
        print(f"{engine}, {len(prompts.context_ids)} context tokens, {number} queries …", file=sys.stderr, flush=True)
        figures = _run(engine, part, gguf)
        if figures is None:
            continue
        answers = torch.tensor(figures["answers"])
        reference = answers if reference is None else reference
        both = min(len(answers), len(reference))
        difference = float((answers[:both] - reference[:both]).abs().max())
        if engine != "llama_cpp" and difference > TOLERANCE_NATS[dtype]:  # llama.cpp multiplies quantised activations
            raise SystemExit(f"{engine}: answers differ by {difference:.1e} nats from {engines[0]}'s; its time means nothing")
        shape = {
            "context_tokens": context,
            "context_tokens_exact": len(prompts.context_ids),
            "query_tokens": sum(map(len, prompts.query_ids)) / count,
            "queries": number,
        }
        kept = {key: figures[key] for key in ("seconds", "peak_rss_bytes", "model_bytes", "product_flops_per_s") if key in figures}
        rows.append(
            {"engine": engine, **shape, "examples_per_s": number / figures["seconds"], "largest_difference_nats": difference, **kept}
        )
        if engine == "shared_prefix":
            rows.append({"engine": "limit", **shape, "examples_per_s": number / figures["limit_seconds"], "peak_rss_bytes": None})
    return rows


def _run(engine: str, prompts: dict[str, Any], gguf: Path | None) -> dict[str, Any] | None:
    """Figures of one engine's process; None where its environment cannot be made."""
    python: Path | None = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        write_json(prompts, file)
        command = ["-m", "benchmarks.engine", engine, str(MODEL), str(file)]
        if engine == "lm_eval":
            python, command = python_of("lm_eval", LM_EVAL), ["benchmarks/lm_eval_engine.py", str(MODEL), str(file)]
        elif engine == "llama_cpp":
            if gguf is None:
                raise SystemExit("llama_cpp needs --gguf FILE: the model's GGUF file")
            python, command = python_of("llama_cpp", LLAMA_CPP), ["benchmarks/llama_cpp_engine.py", str(gguf), str(file)]
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
    fast = next((row["examples_per_s"] for row in own if row["engine"] == "shared_prefix"), None)
    table = Table(title=f"{own[0]['context_tokens_exact']:,} context tokens, queries of {own[0]['query_tokens']:.0f}")
    for name in ("engine", "examples/s", "s/example", "fast path is so many times faster", "peak memory", "differs by"):
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


def _print_line(rows: list[dict[str, Any]]) -> None:
    """Seconds against the number of queries: a line that starts at the context's cost."""
    own = [row for row in rows if row["engine"] == "shared_prefix" and row["context_tokens"] == 1024]
    for row in sorted(own, key=lambda row: row["queries"]):
        memory = f"{row['peak_rss_bytes'] / 1e6:,.0f} MB"
        print(f"shared_prefix, 1,024 context tokens: {row['queries']} queries in {row['seconds']:.2f} s, {memory}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
