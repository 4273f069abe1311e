"""A student over HTTP: `POST /predict`, `GET /health`, `GET /metrics`.

`/predict` takes `{"inputs": [...]}`, each input a text (or an object of the template's fields), and gives `{"predictions": [...]}` in the
same order. What a request may cost is bounded before it costs it: bytes of the body while it is read, then rows, then characters of a
field. A row over a limit has an error of its own, a request over one is refused as a whole. There is no authentication: bind it to a
public address only behind something that has it.
"""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from pipeline.serving.log import PredictionLog
from pipeline.serving.batching import Batcher, OverloadedError
from pipeline.serving.outputs import answer_json
from pipeline.serving.predictor import Prediction, Predictor
from pipeline.serving.telemetry import Telemetry

CLIENT_GONE = 499
"""nginx's status for a client that closed the connection: it counts such requests apart from faults of the server."""
METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """What is accepted."""

    body_bytes: int = 1_000_000
    rows: int = 256
    """Inputs of a request."""
    chars: int = 10_000
    """Characters of a field."""
    body_seconds: float = 30.0
    """What a client may take to send its body."""
    batch_rows: int = 64
    """Rows of concurrent requests that share a pass."""
    waiting_rows: int = 1024
    """Rows that wait before further requests are told to come back later (503)."""


EXAMPLE = {
    "content": {"application/json": {"schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array"}}}}}
}


def make_app(predictor: Predictor, limits: Limits | None = None, log: PredictionLog | None = None) -> FastAPI:
    """The application for one student."""
    bounds = limits or Limits()
    telemetry = Telemetry(predictor.student)
    batcher = Batcher(predictor.predict, bounds.batch_rows, bounds.waiting_rows, telemetry.batch_rows.observe)
    fields = predictor.task.fields

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        async with batcher.running():
            yield

    app = FastAPI(title=f"shotless: {predictor.student.name}", lifespan=lifespan)

    @app.post("/predict", openapi_extra={"requestBody": EXAMPLE})
    async def predict(request: Request) -> dict[str, Any]:
        """Answer inputs."""
        start = time.perf_counter()
        status = 500
        try:
            inputs = _inputs(await _body(request, bounds.body_bytes, bounds.body_seconds), bounds.rows)
            predictions = await _answer(inputs)
            status = 200
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            telemetry.requests.labels(str(status)).inc()
            telemetry.seconds.observe(time.perf_counter() - start)
        telemetry.count(predictions)
        answers = [answer_json(prediction) for prediction in predictions]
        if log is not None:
            log.append(zip([_as_fields(value, fields) for value in inputs], answers, strict=True))
        return {"student": predictor.student.name, "predictions": answers}

    async def _answer(inputs: list[Any]) -> list[Prediction]:
        """Predictions in order; rows over the limit of characters never reach the model."""
        long = {place for place, value in enumerate(inputs) if _longest(value) > bounds.chars}
        try:
            found = iter(await batcher.submit([value for place, value in enumerate(inputs) if place not in long]))
        except OverloadedError:
            raise HTTPException(503, "too many inputs are waiting; try again later", {"Retry-After": "1"}) from None
        fault = Prediction(None, None, None, f"too long: more than {bounds.chars:,} characters")
        return [fault if place in long else next(found) for place in range(len(inputs))]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Which student answers, and how many rows wait."""
        student = predictor.student
        return {
            "status": "ok",
            "student": student.name,
            "weights_sha256": student.weights_sha256,
            "labels": list(predictor.labels),
            "fields": list(fields),
            "engine": predictor.engine.engine.name,
            "waiting_rows": batcher.waiting,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(telemetry.text(), headers={"content-type": METRICS_TYPE})

    return app


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, read no further than its limit and no longer than `seconds`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header content-type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise HTTPException(413, f"the body is larger than {limit:,} bytes; send fewer inputs a request")
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} seconds", {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(CLIENT_GONE, "the client has gone") from None
    return b"".join(parts)


def _inputs(body: bytes, limit: int) -> list[Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(422, "the body is not JSON") from None
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        raise HTTPException(422, 'send an object with a list: {"inputs": ["a text", …]}')
    if len(inputs) > limit:
        raise HTTPException(422, f"{len(inputs):,} inputs, and a request may have {limit:,}")
    return inputs


def _longest(value: Any) -> int:
    values = value.values() if isinstance(value, dict) else [value]
    return max((len(entry) for entry in values if isinstance(entry, str)), default=0)


def _as_fields(value: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """An input as the log keeps it: the template's fields alone."""
    held = value if isinstance(value, dict) else {fields[0]: value}
    return {name: held.get(name) for name in fields}
