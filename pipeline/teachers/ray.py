"""The teacher on Ray's workers: an actor each, which loads the model once. Rows have the bytes that one process would give them.

The process that asks plans and writes: workers are sent token ids and send rows back, so the store has one writer. Ray starts a worker that
dies again and gives it its jobs again; an error of the code ends the run, with what is written kept. Each worker needs the model's folder
under the same path.
"""

import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.models.process import cores
from pipeline.schema import Prompt
from pipeline.teachers.scorer import Job, LocalBackend, Scorer

IN_FLIGHT = 2  # jobs that a worker has been sent: the next one is there when one ends
ATTEMPTS = 3  # workers that may die with a job in hand before the job is taken to be the reason
START_SECONDS = 3600.0  # in which one worker has to be ready: a large model takes minutes to load, and machines may have to be started
LOCAL_STORE_BYTES = 256 << 20  # Ray's shared memory for results on their way, if Ray is started here
ALIKE = ("name", "token_budget", "device", "threads")
"""What all workers must agree in, since results depend on it; the identity has the libraries' versions."""


class ScoringWorker:
    """The actor. Its constructor loads nothing, so that what goes wrong comes back as the error of a call."""

    def __init__(self, settings: dict[str, Any], identity: Mapping[str, Any], probe: Sequence[Prompt], threads: int) -> None:
        """`settings` are arguments of `Scorer`, `identity` is what its own has to be."""
        self._settings, self._identity, self._probe, self._threads = settings, identity, probe, threads

    @cached_property
    def _loaded(self) -> tuple[LocalBackend, dict[str, Any]]:
        scorer, who = Scorer(**self._settings, work=None, threads=self._threads), f"worker {os.getpid()} on {socket.gethostname()}"
        if different := [key for key, value in self._identity.items() if scorer.identity.get(key) != value]:
            found = ", ".join(f"{key} {scorer.identity.get(key)!r} instead of {self._identity[key]!r}" for key in different)
            raise MismatchError(f"{scorer.model_folder} of {who}: {found}. Give all machines the same model and libraries.")
        assert isinstance(scorer.backend, LocalBackend)
        return scorer.backend, {**scorer.backend.open(self._probe), "threads": self._threads, "who": who}

    def report(self) -> tuple[dict[str, Any], None]:
        """The engine's report and who reports; no rows. Raises MismatchError if the identity differs here."""
        return self._loaded[1], None

    def score(self, job: Job) -> tuple[dict[str, Any], tuple[pa.Table, float]]:
        """The report; the rows of a job and the seconds that they took."""
        backend, report = self._loaded
        return report, next(backend.score([job]))

    def distributions(self, prompt: Prompt, shared: tuple[int, ...]) -> torch.Tensor:
        """See `LocalBackend.distributions`."""
        return self._loaded[0].distributions(prompt, shared)


class RayBackend:
    """A pool of workers, each busy with its own jobs: `count` of them, or one for each GPU, or for each machine if there is none."""

    note = ""

    def __init__(self, settings: dict[str, Any], identity: Mapping[str, Any], count: int | None, threads: int | None) -> None:
        self._settings, self._identity, self._count, self._threads = settings, identity, count, threads
        self._ray: Any = None
        self._waiting: dict[Any, tuple[Any, Job | None]] = {}  # reference to a call → worker, job; None: its first report
        self._ready: dict[Any, str] = {}  # worker → who it is
        self._first: dict[str, Any] = {}

    def open(self, probe: Sequence[Prompt]) -> dict[str, Any]:
        """Start the workers at the first call; returns when one is ready. Later work has no longer prompts.

        Raises UsageError if Ray is not installed or has no room for them, ShotlessError if a worker cannot be made ready.
        """
        if self._ray is None:
            self._ray = connect(self._count)
            count, threads, gpus = shape_of(self._ray.nodes(), self._count, self._threads)
            options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": ATTEMPTS - 1}
            actor = self._ray.remote(ScoringWorker).options(**options)
            self._given = [self._ray.put(value) for value in (self._settings, self._identity, probe)]  # for workers that start again
            for worker in [actor.remote(*self._given, threads) for _ in range(count)]:
                self._waiting[worker.report.remote()] = worker, None
            self._next(START_SECONDS)
        return {key: self._first[key] for key in ("name", "reason", "token_budget", "device")}

    def score(self, jobs: Iterable[Job]) -> Iterator[tuple[pa.Table, float]]:
        """Each job's rows and seconds as they are done; free workers take the next. Raises ShotlessError naming the job and its end."""
        left = iter(jobs)
        while True:
            for worker in self._ready:
                while sum(other is worker for other, _ in self._waiting.values()) < IN_FLIGHT and (job := next(left, None)) is not None:
                    self._waiting[worker.score.remote(job)] = worker, job
            if all(job is None for _, job in self._waiting.values()):
                return
            if (scored := self._next()) is not None:
                yield scored

    def distributions(self, prompt: Prompt, shared: tuple[int, ...]) -> torch.Tensor:
        """Those of one of the workers."""
        worker, who = next(iter(self._ready.items()))
        return self._get(worker.distributions.remote(prompt, shared), who)

    def close(self) -> None:
        """End the workers. A Ray that was started here ends with the process."""
        for worker in {**self._ready, **dict(self._waiting.values())}:
            self._ray.kill(worker)
        self._ready, self._waiting = {}, {}

    def _next(self, timeout: float | None = None) -> tuple[pa.Table, float] | None:
        """What the next call that is done gives; None if it was a worker's first report."""
        done, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=timeout)
        if not done:
            raise ShotlessError(f"no worker of Ray was ready after {timeout:.0f} s. `ray status` says what it waits for.")
        worker, job = self._waiting.pop(done[0])
        if job is None:
            what = "nothing was scored: a worker of Ray"
        else:
            what = f"{len(job.prompts)} prompts from {job.prompts[0].prompt_sha[:12]} on: {self._ready[worker]}"
        report, scored = self._get(done[0], what)
        self._note(worker, report)
        return scored

    def _note(self, worker: Any, report: dict[str, Any]) -> None:
        """Note who a worker is, which changes when it dies. Raises ShotlessError if its results would be other than the first one's."""
        first = self._first = self._first or report
        if different := [key for key in ALIKE if report[key] != first[key]]:
            found = ", ".join(f"{key} {report[key]!r}" for key in different)
            raise ShotlessError(
                f"{report['who']} has {found}, and the first one {', '.join(repr(first[key]) for key in different)}: their rows would "
                "differ. Give the teacher machines of one kind, or set teachers.*.dtype and runtime.threads."
            )
        if (before := self._ready.get(worker, report["who"])) != report["who"]:
            print(f"{before} died. {report['who']} took its place and did what it had again.", file=sys.stderr)
        self._ready[worker] = report["who"]

    def _get(self, reference: Any, what: str) -> Any:
        """The result of a call. Raises UsageError or ShotlessError saying `what` failed and why."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            kind = UsageError if isinstance(cause, UsageError) else ShotlessError
            raise kind(f"{what}: {type(cause).__name__}: {cause}") from None
        except self._ray.exceptions.RayError as error:
            raise ShotlessError(f"{what}: died {ATTEMPTS} times. Ray says: {' '.join(str(error).split())}") from None


def connect(workers: int | None) -> Any:
    """The module `ray`, connected to `$RAY_ADDRESS`, or to a Ray of this process. Raises UsageError if it is missing or does not answer."""
    try:
        import ray
    except ImportError:
        raise UsageError(
            "runtime.engine is `ray`, and Ray is not installed. Run `pip install -c constraints.txt 'shotless[ray]'`, or set it to `local`."
        ) from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports on its users
    address = os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        how |= {"num_cpus": max(cores(), workers or 1), "object_store_memory": LOCAL_STORE_BYTES}
    try:
        ray.init(address=address or "local", **how)
    except ConnectionError as error:
        raise UsageError(f"$RAY_ADDRESS is {address!r}, and no Ray answers there: {error}") from None
    return ray


def shape_of(nodes: Sequence[Mapping[str, Any]], workers: int | None, threads: int | None) -> tuple[int, int, int]:
    """Number of workers, and threads and GPUs of each: `workers`, or one for each GPU of the `nodes`, or for each node if they have none.

    Each has `threads` of one machine, or as many as leave room for all. Raises UsageError if they do not fit.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]  # a head may give none
    free = [int(resources.get("CPU", 0)) for resources in alive]
    gpus = sum(int(resources.get("GPU", 0)) for resources in alive)
    workers = workers or gpus or len(alive)
    fitting = [each for each in range(1, max(free, default=0) + 1) if sum(count // each for count in free) >= workers]
    if not fitting or (threads or 1) > fitting[-1]:
        asked = f"{workers} workers" + (f" of {threads} threads" if threads else "")
        raise UsageError(f"runtime.workers: {asked} do not fit Ray's machines, which have {free} cores. Lower it, or add machines.")
    if gpus and workers > gpus:
        raise UsageError(f"runtime.workers: {workers} workers need a GPU each, and Ray's machines have {gpus}. Lower it to {gpus}.")
    return workers, threads or fitting[-1], 1 if gpus else 0
