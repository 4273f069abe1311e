"""A student over HTTP: `POST /predict`, `GET /health`, `GET /metrics`.

`/predict` takes `{"inputs": [...]}`, each input a text or an object of the template's fields, and returns `{"predictions": [...]}` in the
same order. What a request may cost is bounded before it costs it: bytes of the body while it is read, then rows, then characters of a
field. A row over a limit gets an error, a request over one is refused as a whole.

There is no authentication and no encryption, and a client may take as long as it likes over a request's head: if strangers can reach it,
put a reverse proxy in front that has all three.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import ClientDisconnect

from pipeline.serving.files import PredictionLog
from pipeline.serving.predictor import Prediction, Predictor

if TYPE_CHECKING:
    from pipeline.serving.fallback import Fallback  # brings torch, which an exported student does without

BODY_SCHEMA = {"schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array"}}}}


@dataclass(frozen=True)
class Limits:
    """What is accepted besides `Predictor(max_chars=…)`; `shotless serve` has the defaults."""

    body_bytes: int
    rows: int  # inputs of a request
    body_seconds: float  # that a client may take to send its body
    batch_rows: int  # of concurrent requests that share a pass; a request that has more gets a pass alone
    waiting_rows: int  # after which further requests are told to come back later (503)


class Batcher:
    """Concurrent requests share forward passes: what arrived while the model was busy is answered in its next pass.

    A request that finds the model idle is answered at once: there is no timer, so no request waits for others that may not come. `answer`
    runs in one thread, and the event loop stays free.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], list[Prediction]], limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self._queue: deque[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._passes: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Rows that wait for a pass."""
        return sum(len(rows) for rows, _ in self._queue)

    async def ask(self, rows: Sequence[Any]) -> list[Prediction]:
        """The predictions of `rows`, in order. Raises HTTPException 503 at once if too many rows wait."""
        if self._queue and self.waiting + len(rows) > self._limits.waiting_rows:
            raise HTTPException(503, "too many inputs are waiting; try again later", {"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Prediction]] = loop.create_future()
        self._queue.append((rows, future))
        if self._passes is None or self._passes.done():
            self._passes = loop.create_task(self._answer_all())  # a task, so that a client that goes away ends no pass that others share
        return await future

    async def _answer_all(self) -> None:
        """Make passes until no request waits. If a pass fails, its requests fail with it, and the next ones do not."""
        while self._queue:
            requests, rows = [], []  # in the order of arrival, without those whose client has gone
            while self._queue and (not requests or len(rows) + len(self._queue[0][0]) <= self._limits.batch_rows):
                asked, future = self._queue.popleft()
                if not future.done():
                    requests.append((asked, future))
                    rows += asked
            try:
                found = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, rows))
            except Exception as error:  # it is raised again, in each request  # noqa: BLE001
                for future in (future for _, future in requests if not future.done()):
                    future.set_exception(error)
                continue
            for asked, future in requests:
                answers = list(islice(found, len(asked)))
                if not future.done():
                    future.set_result(answers)


def make_app(predictor: Predictor, limits: Limits, log: PredictionLog | None = None, fallback: "Fallback | None" = None) -> FastAPI:
    """The application for one student. Inputs are logged after their answer was sent.

    What it does not answer, `fallback` does, in a thread of its own: passes of the student do not wait for it.
    """
    name, fields = predictor.student.name, predictor.task.fields
    batcher = Batcher(predictor.predict, limits)
    teachers = None if fallback is None else Batcher(fallback.answer, limits)
    app = FastAPI(title=f"shotless: {name}")

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    requests = Counter("shotless_requests", "Requests to /predict by status code.", ["status"], registry=registry)
    seconds = Histogram("shotless_request_seconds", "Seconds from a request's arrival to its answer.", registry=registry)
    answered = Counter("shotless_answers", "Rows answered, by label.", ["label"], registry=registry)
    row_errors = Counter("shotless_row_errors", "Rows that could not be answered.", registry=registry)
    buckets = [bound / 20 for bound in range(1, 21)]
    confidence = Histogram("shotless_confidence", "Confidence of the student's answers.", registry=registry, buckets=buckets)
    reached = Counter("shotless_threshold", "Rows by whether they reached the threshold.", ["answered"], registry=registry)
    if fallback is not None:
        handed = Gauge("shotless_handed_back", "Rows that the student did not answer, by what became of them.", ["end"], registry=registry)
        for end in fallback.counts:
            handed.labels(end).set_function(lambda end=end: fallback.counts[end])
    for label in predictor.labels:  # shown from the start, with 0
        answered.labels(label)
    if log is not None:
        lost = Gauge("shotless_log_lines_lost", "Lines that the predictions log could not take.", registry=registry)
        lost.set_function(lambda: log.lost)

    @app.post("/predict", openapi_extra={"requestBody": {"content": {"application/json": BODY_SCHEMA}}})
    async def predict(request: Request, background: BackgroundTasks) -> dict[str, Any]:
        """Answer inputs."""
        status = 500
        try:
            with seconds.time():
                inputs = await read_inputs(request, limits)
                own = predictions = await batcher.ask(inputs)
                if fallback is not None and teachers is not None:
                    rows = list(zip(inputs, own, strict=True))
                    predictions = await teachers.ask(rows) if any(not one.answered for one in own) else fallback.answer(rows)
            status = 200
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            requests.labels(str(status)).inc()
        for of_student, prediction in zip(own, predictions, strict=True):
            if of_student.confidence is None:
                row_errors.inc()
            else:
                answered.labels(prediction.label).inc()
                confidence.observe(of_student.confidence)
                if predictor.threshold is not None:
                    reached.labels(str(of_student.answered).lower()).inc()
        answers = [prediction.as_json() for prediction in predictions]
        if log is not None:
            asked = [value if isinstance(value, dict) else {fields[0]: value} for value in inputs]
            rows = [({field: value.get(field) for field in fields}, answer) for value, answer in zip(asked, answers, strict=True)]
            background.add_task(log.append, rows)  # in a thread
        return {"student": name, "predictions": answers}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Which student answers, and how many rows wait."""
        return {
            "status": "ok",
            "student": name,
            "weights_sha256": predictor.weights_sha256,
            "labels": list(predictor.labels),
            "fields": list(fields),
            "engine": predictor.engine.name,
            **({} if fallback is None else {"fallback": fallback.name}),
            "waiting_rows": batcher.waiting,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return app


async def read_inputs(request: Request, limits: Limits) -> list[Any]:
    """A request's inputs; its body is read no further than its limit and no longer than its seconds.

    Raises HTTPException 408, 413, 415, 422 or 499.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header content-type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise HTTPException(413, f"the body is larger than {limits.body_bytes:,} bytes; send fewer inputs a request")
    except TimeoutError:
        reason = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise HTTPException(408, reason, {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(499, "the client has gone") from None  # nginx's status, so that they are counted apart from the server's faults
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(422, "the body is not JSON") from None
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        raise HTTPException(422, 'send an object with a list: {"inputs": ["a text", …]}')
    if len(inputs) > limits.rows:
        raise HTTPException(422, f"{len(inputs):,} inputs, and a request may have {limits.rows:,}")
    return inputs
