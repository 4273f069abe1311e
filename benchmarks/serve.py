"""`make bench-serve`: requests a second that `shotless serve` answers, one text each → benchmarks/results/serve.json and a table.

The server is a process of its own, of any folder that `shotless serve` takes. Each client is a thread with one connection that asks, waits
for the answer, and asks again. Clients and server share the machine's cores: the figures are of both together.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import about
from benchmarks.student import merged
from pipeline.errors import UsageError
from pipeline.files import read_json, write_json
from pipeline.models.process import cores, peak_rss_bytes
from pipeline.params import TaskParams
from pipeline.schema import read_examples

COMPARED = ("processor", "cores")
START_SECONDS = 120.0
SHARED = "server and clients share the cores"


def main(
    student: Annotated[Path, typer.Option(help="A student's folder, or an exported one.")] = Path("artifacts/students/cd"),
    transfer: Annotated[Path, typer.Option(help="The texts, as `prepare` writes them.")] = Path("artifacts/data/transfer.parquet"),
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,16",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each number of clients.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds before these.")] = 2.0,
    results: Path = Path("benchmarks/results/serve.json"),
) -> None:
    """Measure, print, write. Rows of other students stay in the JSON."""
    if not (student / "manifest.json").is_file() or not transfer.is_file():
        raise UsageError(f"{student / 'manifest.json'} and {transfer} are needed; `make run` makes them, --student names another folder.")
    task = TaskParams.model_validate(read_json(student / "manifest.json")["task"])
    bodies = [json.dumps({"inputs": [example.fields]}).encode() for example in read_examples(transfer, task.fields)]
    rows = []
    with serving(student) as (port, process):
        for count in map(int, clients.split(",")):
            print(f"{student}: {count} clients", file=sys.stderr, flush=True)
            ask(port, bodies, count, warm_up)
            started, used = time.perf_counter(), _cpu_seconds(process)
            times = ask(port, bodies, count, seconds)
            rate, (p50, p95) = len(times) / (time.perf_counter() - started), np.percentile(times, [50, 95])
            row = {"name": f"{student}, {count} clients", "student": str(student), "clients": count, "requests": len(times)}
            row |= {"requests_per_s": rate, "p50_ms": 1000 * float(p50), "p95_ms": 1000 * float(p95)}
            row |= {"server_cpu_ms_per_request": 1000 * (_cpu_seconds(process) - used) / len(times)}
            rows.append(row | {"peak_rss_mb": peak_rss_bytes(process) / 1e6})  # so far
    whole = merged(rows, about() | {"cores": cores(), "seconds": seconds, "notes": [SHARED]}, results, COMPARED)
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(whole, results)
    _print(whole)
    print(f"written to {results}")


def _cpu_seconds(process: int) -> float:
    times = psutil.Process(process).cpu_times()
    return times.user + times.system


@contextmanager
def serving(student: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a server that has answered its first request for health."""
    command = [sys.executable, "-c", "from pipeline.cli import app; app()", "serve", "--student", f"{student.resolve()}/", "--port", "0"]
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch) / "said"
        with said.open("wb") as file, subprocess.Popen(command, stderr=file) as server:
            try:
                end = time.monotonic() + START_SECONDS
                while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", said.read_text("utf-8"))):
                    if server.poll() is not None or time.monotonic() > end:
                        raise SystemExit(f"shotless serve did not start; its last words: {said.read_text('utf-8')[-2000:]}")
                    time.sleep(0.05)
                yield int(found[1]), server.pid
            finally:
                server.terminate()


def ask(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """Seconds of each request that some clients had answered; after `seconds` they ask no more. Each has texts of its own."""
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        connection, times = HTTPConnection("127.0.0.1", port, timeout=60), list[float]()
        while (started := time.perf_counter()) < end:
            body = bodies[(number + clients * len(times)) % len(bodies)]
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                raise SystemExit(f"the server said {answer.status}: {said[:500]!r}")
            times.append(time.perf_counter() - started)
        connection.close()
        return times

    with ThreadPoolExecutor(clients) as threads:
        return [one for own in threads.map(client, range(clients)) for one in own]


def _print(found: dict[str, Any]) -> None:
    table = Table(title=f"One text a request; {SHARED}, {found['cores']}", title_justify="left")
    for name in ("student", "clients", "requests/s", "p50, ms", "p95, ms", "server's CPU, ms a request", "server's peak memory"):
        table.add_column(name, justify="left" if name == "student" else "right")
    for row in found["rows"]:
        figures = (f"{row[key]:,.1f}" for key in ("requests_per_s", "p50_ms", "p95_ms", "server_cpu_ms_per_request"))
        table.add_row(row["student"], str(row["clients"]), *figures, f"{row['peak_rss_mb']:,.0f} MB")
    Console(width=120).print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
