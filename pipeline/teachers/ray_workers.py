"""Parts of a capture plan on Ray's workers: an actor each, which loads the model once.

What is planned, and what is written, stays with the one process that asks: workers are sent token ids and send rows back, so that the store
has one writer, and its files the names and bytes that it would have written alone. A worker that dies is replaced and what it had is done
again, by whichever worker is free; an error of the code ends the run, with what is written kept. No worker needs to reach the store, and
each needs the model's folder under the same path.
"""

import os
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.store import Part
from pipeline.teachers.ray_cluster import connect, shape_of
from pipeline.teachers.scorer import Scored, Scorer
from pipeline.teachers.sheets import Sheet
from pipeline.errors import ShotlessError, UsageError
from pipeline.models.memory import give_back_memory
from pipeline.models.rows import Completions
from pipeline.params import CacheParams
from pipeline.task import Task

IN_FLIGHT = 2
"""Parts that a worker has been sent: the next one is there when one ends."""
ATTEMPTS = 3
"""Workers that may die with a part in hand before the part is taken to be the reason; and of those that die before they are ready."""
WAIT_SECONDS = 60.0
START_SECONDS = 3600.0
"""In which one worker has to be ready: a large model takes minutes to load, and machines may have to be started."""
ALIKE = ("name", "token_budget", "device", "torch", "transformers", "threads")
"""What all workers must agree in, since results follow from it."""


@dataclass(frozen=True)
class Setup:
    """What a worker needs to score a part as any other process would."""

    model_folder: Path
    task: Task
    cache: CacheParams
    fingerprint: Fingerprint
    probe: Sheet


class ScoringWorker:
    """The actor. Its constructor does nothing, so that what goes wrong comes back as the error of a call."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._scorer: Any = None

    def load(self, setup: Setup) -> dict[str, Any]:
        """Load and probe the model; returns the engine's report and who says so.

        Raises MismatchError where weights or tokenizer are others here, and what `Scorer` raises.
        """
        with tempfile.TemporaryDirectory(prefix="shotless-worker-") as folder:
            scorer = Scorer(setup.model_folder, setup.task, setup.cache, Path(folder), self._threads, setup.fingerprint.dtype)
            setup.fingerprint.check(scorer.fingerprint.model_dump(), setup.model_folder)
            scorer._load(setup.probe)
            self._scorer = scorer
            versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": self._threads}
            return {**scorer.engine_report, **versions, "host": socket.gethostname(), "pid": os.getpid()}

    def score(self, part: Part, sheet: Sheet) -> Scored:
        """The rows of a part, and the seconds that they took."""
        scored = self._scorer._score(self._scorer._choice.engine, part, sheet)
        give_back_memory()
        return scored

    def distributions(self, sheet: Sheet, answers: Completions | None) -> torch.Tensor:
        """What `Scorer.distributions` gives, [P, V] float32."""
        (prefix,) = sheet.prefixes.values()
        return self._scorer._full(sheet, prefix, sheet.queries, answers)


class Workers:
    """A pool of them, each busy with its own parts."""

    def __init__(self, setup: Setup, count: int | None, threads: int | None) -> None:
        """Start `count` workers, or one for each GPU, or for each machine where there is none. Returns when the first one is ready.

        Raises UsageError where Ray is not installed or has no room for them, ShotlessError where a worker cannot be made ready.
        """
        self._ray = connect(count)
        self._shape = shape_of(self._ray.nodes(), count, threads)
        self._setup = self._ray.put(setup)
        self._waiting: dict[Any, _Sent] = {}
        self._who: dict[Any, str] = {}
        self._starting: set[Any] = set()
        self._deaths_unready, self._seconds_idle = 0, 0.0
        self.report: dict[str, Any] | None = None
        """Of the engine, the same on all workers."""
        self.pids: dict[Any, int] = {}
        """Of the workers that are ready, on their machines."""
        for _ in range(self._shape.workers):
            self._start()
        while self.report is None:
            for sent, result in self._finished():
                self._ready(sent.actor, result)

    def score(self, jobs: Iterable[tuple[Part, Sheet]]) -> Iterator[Scored]:
        """Each part with its rows and seconds, as they are done. `jobs` are taken as workers come free.

        Raises ShotlessError naming the part and what happened to it.
        """
        left, again, attempts = iter(jobs), deque[tuple[Part, Sheet]](), dict[str, int]()
        while True:
            for actor in list(self.pids):
                while sum(sent.actor is actor for sent in self._waiting.values()) < IN_FLIGHT:
                    job = again.popleft() if again else next(left, None)
                    if job is None:
                        break
                    self._waiting[actor.score.remote(*job)] = _Sent(actor, job)
            if not again and not any(sent.job for sent in self._waiting.values()):
                if (job := next(left, None)) is None:
                    return
                again.append(job)  # no worker is ready: wait for one
            for sent, result in self._finished():
                if sent.job is None:
                    self._ready(sent.actor, result)
                elif isinstance(result, _Death):
                    stem = sent.job[0].stem
                    attempts[stem] = attempts.get(stem, 0) + 1
                    if attempts[stem] >= ATTEMPTS:
                        raise ShotlessError(f"{stem}: {ATTEMPTS} workers died with this part in hand, the last one: {result.why}")
                    again.append(sent.job)
                else:
                    yield result

    def distributions(self, sheet: Sheet, answers: Completions | None) -> torch.Tensor:
        """What one of the workers gives for `Scorer.distributions`. Raises ShotlessError."""
        asked: Any = None
        while True:
            actor = next(iter(self.pids), None)
            if asked is None and actor is not None:
                asked = _Sent(actor, None)
                self._waiting[actor.distributions.remote(sheet, answers)] = asked
            for sent, result in self._finished():
                if sent is not asked:
                    self._ready(sent.actor, result)
                elif not isinstance(result, _Death):
                    return result
                else:
                    asked = None

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
        self._waiting[actor.load.remote(self._setup)] = _Sent(actor, None)

    def _ready(self, actor: Any, report: "dict[str, Any] | _Death") -> None:
        """Note that a worker can be sent parts; where it died before, another one has been started."""
        if isinstance(report, _Death):
            return
        who = f"worker {report['pid']} on {report['host']}"
        self.report = self.report or report
        if different := [key for key in ALIKE if report[key] != self.report[key]]:
            found = ", ".join(f"{key} {report[key]!r}" for key in different)
            raise ShotlessError(
                f"{who} has {found}, and the first one {', '.join(repr(self.report[key]) for key in different)}: their rows would differ. "
                "Give the teacher machines of one kind, or set teachers.*.dtype and runtime.threads."
            )
        self._starting.discard(actor)
        self._who[actor], self.pids[actor], self._deaths_unready = who, report["pid"], 0

    def _finished(self) -> Iterator[tuple["_Sent", Any]]:
        """What has come back: results, and deaths, each with a replacement started. Waits a while where there is nothing.

        Raises ShotlessError for an error of the code, and where no worker is ready within `START_SECONDS`.
        """
        done, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=WAIT_SECONDS)
        self._seconds_idle = 0.0 if done or self.pids else self._seconds_idle + WAIT_SECONDS
        if self._seconds_idle >= START_SECONDS:
            raise ShotlessError(f"no worker of Ray's was ready after {START_SECONDS:.0f} s; `ray status` says what it waits for.")
        for reference in done:
            sent = self._waiting.pop(reference)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise self._failed(sent, error) from None
            except self._ray.exceptions.RayError as error:
                yield sent, self._bury(sent.actor, error)
            else:
                yield sent, result

    def _failed(self, sent: "_Sent", error: Any) -> ShotlessError:
        cause = getattr(error, "cause", None) or error
        kind = UsageError if isinstance(cause, UsageError) else ShotlessError
        what = f"{sent.job[0].stem} ({len(sent.job[0].keys)} rows)" if sent.job is not None else "no part was begun"
        return kind(f"{what}: {self._who.get(sent.actor, 'a worker of Ray')}: {type(cause).__name__}: {cause}")

    def _bury(self, actor: Any, error: Exception) -> "_Death":
        why = " ".join(str(error).split())
        if self.pids.pop(actor, None) is not None:
            who = self._who.pop(actor)
            print(f"{who} died; another one takes its place, and what it had is done again. Ray says: {why}", file=sys.stderr)
            self._start()
        elif actor in self._starting:
            self._starting.remove(actor)
            self._deaths_unready += 1
            if self._deaths_unready >= ATTEMPTS:
                raise ShotlessError(f"{ATTEMPTS} workers of Ray's died before they were ready, the last one: {why}")
            self._start()
        return _Death(why)


@dataclass(frozen=True)
class _Sent:
    actor: Any
    job: tuple[Part, Sheet] | None
    """None: it makes itself ready, or is asked for distributions."""


@dataclass(frozen=True)
class _Death:
    why: str
