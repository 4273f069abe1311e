"""A student over HTTP: `POST /predict`, `GET /health`, `GET /metrics`.

`/predict` takes `{"inputs": [...]}`, each input a text or an object of the template's fields, and returns `{"predictions": [...]}` in the
same order. What a request may cost is bounded before it costs it: bytes of the body while it is read, then rows, then characters of a
field. A row over a limit gets an error, a request over one is refused as a whole.

There is no authentication and no encryption, and a client may take as long as it likes over a request's head: if strangers can reach it,
put a reverse proxy in front that has all three.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import ClientDisconnect

from pipeline.serving.log import PredictionLog
from pipeline.serving.predictor import Prediction, Predictor

CLIENT_GONE = 499  # nginx's status for it, so that such requests are counted apart from the server's faults
BODY_SCHEMA = {"schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array"}}}}


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
    """Rows of concurrent requests that share a pass; a request that has more gets a pass alone."""
    waiting_rows: int = 1024
    """Rows that wait before further requests are told to come back later (503)."""


class Batcher:
    """Concurrent requests share forward passes: what arrived while the model was busy is answered in its next pass.

    A request that finds the model idle is answered at once, alone: there is no timer, so no request waits for others that may not come.
    `answer` runs in one thread, and the event loop stays free.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], list[Prediction]], limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self._queue: deque[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]] = deque()
        self._model = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._passes: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Rows that wait for a pass."""
        return sum(len(rows) for rows, _ in self._queue)

    async def ask(self, rows: Sequence[Any]) -> list[Prediction]:
        """The predictions of `rows`, in order. Raises HTTPException 503 at once if too many rows wait."""
        if self._queue and self.waiting + len(rows) > self._limits.waiting_rows:
            raise HTTPException(503, "too many inputs are waiting; try again later", {"Retry-After": "1"})
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, future))
        one_pass = asyncio.create_task(self._pass(future))  # a task, so that a client that goes away does not end a pass that others share
        self._passes.add(one_pass)
        one_pass.add_done_callback(self._passes.discard)
        return await future

    async def _pass(self, own: asyncio.Future[list[Prediction]]) -> None:
        """Answer the requests at the head of the queue, unless another pass has answered `own`."""
        async with self._model:
            if own.done():
                return
            requests = self._next()
            rows = [row for asked, _ in requests for row in asked]
            try:
                found = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, rows))
            except Exception as error:  # whatever it is, each of the requests that share the pass fails with it  # noqa: BLE001
                for _, future in requests:
                    if not future.done():
                        future.set_exception(error)
                return
            for asked, future in requests:
                answers = [next(found) for _ in asked]
                if not future.done():
                    future.set_result(answers)

    def _next(self) -> list[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]]:
        """The requests of the next pass, in the order of their arrival; those whose client has gone are dropped."""
        taken: list[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]] = []
        count = 0
        while self._queue and (not taken or count + len(self._queue[0][0]) <= self._limits.batch_rows):
            rows, future = self._queue.popleft()
            if not future.done():
                taken.append((rows, future))
                count += len(rows)
        return taken


class Telemetry:
    """What `/metrics` shows of one server, in Prometheus' text format."""

    def __init__(self, predictor: Predictor, log: PredictionLog | None) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("shotless_requests", "Requests to /predict by status code.", ["status"], registry=registry)
        self.seconds = Histogram("shotless_request_seconds", "Seconds from a request's arrival to its answer.", registry=registry)
        self.answers = Counter("shotless_answers", "Rows answered, by label.", ["label"], registry=registry)
        self.row_errors = Counter("shotless_row_errors", "Rows that could not be answered.", registry=registry)
        buckets = [bound / 20 for bound in range(1, 21)]
        self.confidence = Histogram("shotless_confidence", "Confidence of answers.", registry=registry, buckets=buckets)
        for label in predictor.labels:  # shown from the start, with 0
            self.answers.labels(label)
        if log is not None:
            lost = Gauge("shotless_log_lines_lost", "Lines that the predictions log could not take.", registry=registry)
            lost.set_function(lambda: log.lost)

    def count(self, predictions: Sequence[Prediction]) -> None:
        """Count a request's rows."""
        for prediction in predictions:
            if prediction.label is None or prediction.confidence is None:
                self.row_errors.inc()
            else:
                self.answers.labels(prediction.label).inc()
                self.confidence.observe(prediction.confidence)


def make_app(predictor: Predictor, limits: Limits | None = None, log: PredictionLog | None = None) -> FastAPI:
    """The application for one student. Inputs are logged after their answer was sent."""
    bounds = limits or Limits()
    telemetry = Telemetry(predictor, log)
    fields = predictor.task.fields
    batcher = Batcher(predictor.predict, bounds)
    app = FastAPI(title=f"shotless: {predictor.student.name}")

    @app.post("/predict", openapi_extra={"requestBody": {"content": {"application/json": BODY_SCHEMA}}})
    async def predict(request: Request, background: BackgroundTasks) -> dict[str, Any]:
        """Answer inputs."""
        start = time.perf_counter()
        status = 500
        try:
            inputs = _inputs(await read_body(request, bounds), bounds.rows)
            predictions = await _predictions(inputs)
            status = 200
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            telemetry.requests.labels(str(status)).inc()
            telemetry.seconds.observe(time.perf_counter() - start)
        telemetry.count(predictions)
        answers = [prediction.as_json() for prediction in predictions]
        if log is not None:
            asked = [value if isinstance(value, dict) else {fields[0]: value} for value in inputs]
            rows = [({name: value.get(name) for name in fields}, answer) for value, answer in zip(asked, answers, strict=True)]
            background.add_task(log.append, rows)  # in a thread
        return {"student": predictor.student.name, "predictions": answers}

    async def _predictions(inputs: list[Any]) -> list[Prediction]:
        """Predictions in order; rows over the limit of characters never reach the model."""
        long = {place for place, value in enumerate(inputs) if _longest(value) > bounds.chars}
        found = iter(await batcher.ask([value for place, value in enumerate(inputs) if place not in long]))
        fault = Prediction(error=f"too long: more than {bounds.chars:,} characters")
        return [fault if place in long else next(found) for place in range(len(inputs))]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Which student answers, and how many rows wait."""
        return {
            "status": "ok",
            "student": predictor.student.name,
            "weights_sha256": predictor.weights_sha256,
            "labels": list(predictor.labels),
            "fields": list(fields),
            "engine": predictor.engine.name,
            "waiting_rows": batcher.waiting,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(telemetry.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return app


async def read_body(request: Request, limits: Limits) -> bytes:
    """A request's body, read no further than its limit and no longer than its seconds. Raises HTTPException 408, 413, 415 or 499."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header content-type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise HTTPException(413, f"the body is larger than {limits.body_bytes:,} bytes; send fewer inputs a request")
                parts.append(part)
    except TimeoutError:
        reason = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise HTTPException(408, reason, {"connection": "close"}) from None
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
