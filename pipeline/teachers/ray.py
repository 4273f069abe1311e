"""The teacher on Ray's workers: an actor each, which loads the model once. Rows have the bytes that one process would give them.

What is planned, and what is written, stays with the process that asks: workers are sent token ids and send rows back, so the store has one
writer. A worker that dies is replaced, and what it had is done again by whichever worker is free; an error of the code ends the run, with
what is written kept. Each worker needs the model's folder under the same path.
"""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.models.machine import cores
from pipeline.params import CacheParams
from pipeline.schema import Prompt
from pipeline.task import Task
from pipeline.teachers.scorer import Job, Scored, Scorer

IN_FLIGHT = 2
"""Jobs that a worker has been sent: the next one is there when one ends."""
ATTEMPTS = 3
"""Workers that may die with a job in hand before the job is taken to be the reason; and of those that die before they are ready."""
WAIT_SECONDS = 60.0
START_SECONDS = 3600.0
"""In which one worker has to be ready: a large model takes minutes to load, and machines may have to be started."""
LOCAL_STORE_BYTES = 256 << 20
"""Ray's shared memory for results on their way, if Ray is started here."""
ALIKE = ("name", "token_budget", "device", "threads")
"""What all workers must agree in, since results depend on it; the identity has the libraries' versions."""


@dataclass(frozen=True)
class Setup:
    """What a worker needs to score a job as any other process would."""

    model_folder: Path
    task: Task
    cache: CacheParams
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """How many workers, and what each has of its machine."""

    workers: int
    threads: int
    gpus: int


class ScoringWorker:
    """The actor. Its constructor does nothing, so that what goes wrong comes back as the error of a call."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._scorer: Any = None

    def load(self, setup: Setup, probe: Sequence[Prompt]) -> dict[str, Any]:
        """Load and probe the model; returns the engine's report and who reports. Raises MismatchError if the identity differs here."""
        scorer = Scorer(setup.model_folder, setup.task, setup.cache, work=None, threads=self._threads, dtype=setup.identity["dtype"])
        if different := [key for key, value in setup.identity.items() if scorer.identity.get(key) != value]:
            found = ", ".join(f"{key} {scorer.identity.get(key)!r} instead of {setup.identity[key]!r}" for key in different)
            raise MismatchError(f"{setup.model_folder} on {socket.gethostname()}: {found}. Give all machines the same model and libraries.")
        self._scorer = scorer
        report = scorer.backend.open(probe)
        return {**report, "threads": self._threads, "host": socket.gethostname(), "pid": os.getpid()}

    def score(self, job: Job) -> Scored:
        """The rows of a job, and the seconds that they took."""
        return next(self._scorer.backend.score([job]))

    def distributions(self, prompt: Prompt, shared: tuple[int, ...]) -> torch.Tensor:
        """See `Backend.distributions`."""
        return self._scorer.backend.distributions(prompt, shared)


class RayBackend:
    """A pool of workers, each busy with its own jobs: `count` of them, or one for each GPU, or for each machine if there is none."""

    def __init__(self, setup: Setup, count: int | None, threads: int | None) -> None:
        self._setup, self._count, self._threads = setup, count, threads
        self._ray: Any = None
        self._waiting: dict[Any, _Sent] = {}
        self._who: dict[Any, str] = {}
        self._starting: set[Any] = set()
        self._deaths_unready, self._seconds_idle = 0, 0.0
        self._report: dict[str, Any] | None = None
        self.pids: dict[Any, int] = {}
        """Of the workers that are ready, on their machines."""

    def open(self, probe: Sequence[Prompt]) -> dict[str, Any]:
        """Start the workers at the first call; returns when one is ready. Later work has no longer prompts.

        Raises UsageError if Ray is not installed or has no room for them, ShotlessError if a worker cannot be made ready.
        """
        if self._ray is None:
            self._ray = connect(self._count)
            self._shape = shape_of(self._ray.nodes(), self._count, self._threads)
            self._given = [self._ray.put(self._setup), self._ray.put(list(probe))]
            for _ in range(self._shape.workers):
                self._start()
        while self._report is None:
            for sent, result in self._finished():
                self._note(sent.actor, result)
        return {key: self._report[key] for key in ("name", "reason", "token_budget", "device")}

    def score(self, jobs: Iterable[Job]) -> Iterator[Scored]:
        """Each job's rows as they are done; `jobs` are taken as workers come free. Raises ShotlessError naming the job and its end."""
        left, again, attempts = iter(jobs), deque[Job](), dict[str, int]()
        while True:
            for actor in list(self.pids):
                while sum(sent.actor is actor for sent in self._waiting.values()) < IN_FLIGHT:
                    job = again.popleft() if again else next(left, None)
                    if job is None:
                        break
                    self._waiting[actor.score.remote(job)] = _Sent(actor, job)
            if not again and not any(sent.job for sent in self._waiting.values()):
                if (job := next(left, None)) is None:
                    return
                again.append(job)  # no worker is ready: wait for one
            for sent, result in self._finished():
                if sent.job is None:
                    self._note(sent.actor, result)
                elif isinstance(result, _Death):
                    name = sent.job.part.name
                    attempts[name] = attempts.get(name, 0) + 1
                    if attempts[name] >= ATTEMPTS:
                        raise ShotlessError(f"{name}: {ATTEMPTS} workers died with this part in hand, the last one: {result.why}")
                    again.append(sent.job)
                else:
                    yield result

    def distributions(self, prompt: Prompt, shared: tuple[int, ...]) -> torch.Tensor:
        """Those of one of the workers."""
        asked: _Sent | None = None
        while True:
            actor = next(iter(self.pids), None)
            if asked is None and actor is not None:
                asked = _Sent(actor, None)
                self._waiting[actor.distributions.remote(prompt, shared)] = asked
            for sent, result in self._finished():
                if sent is not asked:
                    self._note(sent.actor, result)
                elif isinstance(result, _Death):
                    asked = None
                else:
                    return result

    def close(self) -> None:
        """End the workers. A Ray that was started here ends with the process."""
        for actor in {*self.pids, *self._starting}:
            self._ray.kill(actor)
        self.pids.clear()
        self._starting.clear()
        self._waiting.clear()

    def _start(self) -> None:
        options = {"num_cpus": self._shape.threads, "num_gpus": self._shape.gpus, "max_restarts": 0}
        actor = self._ray.remote(ScoringWorker).options(**options).remote(self._shape.threads)
        self._starting.add(actor)
        self._waiting[actor.load.remote(*self._given)] = _Sent(actor, None)

    def _note(self, actor: Any, report: "dict[str, Any] | _Death") -> None:
        """Note that a worker is ready; if it died before, another one has been started."""
        if isinstance(report, _Death):
            return
        who = f"worker {report['pid']} on {report['host']}"
        first = self._report = self._report or report
        if different := [key for key in ALIKE if report[key] != first[key]]:
            found = ", ".join(f"{key} {report[key]!r}" for key in different)
            raise ShotlessError(
                f"{who} has {found}, and the first one {', '.join(repr(first[key]) for key in different)}: their rows would differ. Give "
                "the teacher machines of one kind, or set teachers.*.dtype and runtime.threads."
            )
        self._starting.discard(actor)
        self._who[actor], self.pids[actor], self._deaths_unready = who, report["pid"], 0

    def _finished(self) -> Iterator[tuple["_Sent", Any]]:
        """What has come back: results, and deaths, each with a replacement started. Waits a while if there is nothing.

        Raises ShotlessError for an error of the code, and if no worker is ready within `START_SECONDS`.
        """
        done, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=WAIT_SECONDS)
        self._seconds_idle = 0.0 if done or self.pids else self._seconds_idle + WAIT_SECONDS
        if self._seconds_idle >= START_SECONDS:
            raise ShotlessError(f"no worker of Ray was ready after {START_SECONDS:.0f} s. `ray status` says what it waits for.")
        for reference in done:
            sent = self._waiting.pop(reference)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise self._failed(sent, error) from None
            except self._ray.exceptions.RayError as error:
                yield sent, self._replaced(sent.actor, error)
            else:
                yield sent, result

    def _failed(self, sent: "_Sent", error: Any) -> ShotlessError:
        cause = getattr(error, "cause", None) or error
        kind = UsageError if isinstance(cause, UsageError) else ShotlessError
        what = f"{sent.job.part.name} ({len(sent.job.prompts)} rows)" if sent.job is not None else "no part was begun"
        return kind(f"{what}: {self._who.get(sent.actor, 'a worker of Ray')}: {type(cause).__name__}: {cause}")

    def _replaced(self, actor: Any, error: Exception) -> "_Death":
        why = " ".join(str(error).split())
        if self.pids.pop(actor, None) is not None:
            who = self._who.pop(actor)
            print(f"{who} died. Another one takes its place, and what it had is done again. Ray says: {why}", file=sys.stderr)
            self._start()
        elif actor in self._starting:
            self._starting.remove(actor)
            self._deaths_unready += 1
            if self._deaths_unready >= ATTEMPTS:
                raise ShotlessError(f"{ATTEMPTS} workers of Ray died before they were ready, the last one: {why}")
            self._start()
        return _Death(why)


def connect(workers: int | None) -> Any:
    """The module `ray`, connected: to the cluster at `$RAY_ADDRESS`, else to a Ray that is started here for the time of the process.

    Raises UsageError if Ray is not installed, or no cluster answers.
    """
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


def shape_of(nodes: Sequence[Mapping[str, Any]], workers: int | None, threads: int | None) -> Shape:
    """The division of `ray.nodes()`: `workers`, or one for each GPU, or for each machine if there is none.

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
    return Shape(workers, threads or fitting[-1], 1 if gpus else 0)


@dataclass(frozen=True)
class _Sent:
    actor: Any
    job: Job | None
    """None: it makes itself ready, or is asked for distributions."""


@dataclass(frozen=True)
class _Death:
    why: str
