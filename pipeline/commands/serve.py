"""`shotless serve`: a student over HTTP."""

import ipaddress
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.students import quiet_libraries, student_folder


def serve(
    student: Annotated[str, typer.Option(help="Name of a student, or its folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 1_000_000,
    max_rows: Annotated[int, typer.Option(min=1, help="Inputs of a request.")] = 256,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a field.")] = 10_000,
    body_seconds: Annotated[float, typer.Option(min=0.001, help="What a client may take for a request's head, and for its body.")] = 30.0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of concurrent requests that share a pass.")] = 64,
    waiting_rows: Annotated[int, typer.Option(min=1, help="Rows that may wait before requests are refused with 503.")] = 1024,
    log: Annotated[Path | None, typer.Option(help="Append to this predictions log, for `shotless monitor`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
) -> None:
    """Answer over HTTP: POST /predict, GET /health, GET /metrics (Prometheus)."""
    folder = student_folder(student)
    quiet_libraries()

    import uvicorn

    from pipeline.serving.log import PredictionLog
    from pipeline.serving.deadline import with_deadline
    from pipeline.serving.predictor import Predictor
    from pipeline.serving.server import Limits, make_app

    if not _is_loopback(host):
        print(f"listening on {host}: anyone who reaches it can ask; there is no authentication and no encryption", file=sys.stderr)
    predictor = Predictor(folder, threads)
    journal = PredictionLog(log, predictor.student.weights_sha256) if log else None
    limits = Limits(max_body_bytes, max_rows, max_chars, body_seconds, batch_rows, waiting_rows)
    print(f"{predictor.student.name}: {', '.join(predictor.labels)}; engine {predictor.engine.engine.name}", file=sys.stderr, flush=True)
    http = with_deadline(body_seconds)
    uvicorn.run(make_app(predictor, limits, journal), host=host, port=port, log_level="info", access_log=False, http=http)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
