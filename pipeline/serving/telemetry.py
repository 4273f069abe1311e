"""What `/metrics` shows, in Prometheus' text format: requests, rows, answers, confidence, batches, memory of the process."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest

from pipeline.serving.predictor import Prediction
from pipeline.serving.student import Student


class Telemetry:
    """Counters of one server; a registry of its own, so that two servers in one process do not share them."""

    def __init__(self, student: Student) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        known = Info("shotless_student", "The student that answers.", registry=self.registry)
        known.info({"name": student.name, "weights_sha256": student.weights_sha256})
        self.requests = Counter("shotless_requests", "Requests to /predict by status code.", ["status"], registry=self.registry)
        self.seconds = Histogram("shotless_request_seconds", "Seconds from a request's arrival to its answer.", registry=self.registry)
        self.answers = Counter("shotless_answers", "Rows answered, by label.", ["label"], registry=self.registry)
        self.row_errors = Counter("shotless_row_errors", "Rows that could not be answered.", registry=self.registry)
        tenths = [bound / 20 for bound in range(1, 21)]
        self.confidence = Histogram("shotless_confidence", "Confidence of answers.", registry=self.registry, buckets=tenths)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
        self.batch_rows = Histogram("shotless_batch_rows", "Rows answered in one pass.", registry=self.registry, buckets=sizes)
        for label in student.task.labels:  # shown from the start, with 0
            self.answers.labels(label)

    def count(self, predictions: Iterable[Prediction]) -> None:
        """Count a request's rows."""
        for prediction in predictions:
            if prediction.label is None or prediction.confidence is None:
                self.row_errors.inc()
            else:
                self.answers.labels(prediction.label).inc()
                self.confidence.observe(prediction.confidence)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)
