"""The same scores as `Scorer`'s, worked out by Ray's workers; the store, and what a row's bytes are, know nothing of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipeline.cache.keys import Request
from pipeline.cache.store import Part
from pipeline.teachers.asked import Asked, Query
from pipeline.teachers.ray_workers import Setup, Workers
from pipeline.teachers.scorer import PROBE_ROWS, Scored, Scorer
from pipeline.teachers.sheets import Sheet
from pipeline.files import context_id
from pipeline.models.rows import Completions
from pipeline.params import CacheParams
from pipeline.task import Task


class RayScorer(Scorer):
    """A scorer whose model is loaded by workers alone: this process may run where there is no room for it."""

    def __init__(
        self, model_folder: Path, task: Task, cache: CacheParams, work: Path, threads: int | None, dtype: str, count: int | None
    ) -> None:
        """`count` workers of `threads` each; None: as many as `ray_cluster.shape_of` finds room for."""
        super().__init__(model_folder, task, cache, work, threads, dtype)
        self._count, self._threads = count, threads
        self.workers: Workers | None = None

    def close(self) -> None:
        """End the workers, where there are any."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def _scored(self, request: Request, asked: Asked) -> Iterator[Scored]:
        """The parts that the store lacks, in the order in which workers finish them."""
        workers = self._started(asked)
        assert workers.report is not None
        self._note_engine({key: workers.report[key] for key in ("name", "why", "token_budget", "device")})
        return workers.score(self._jobs(request, asked, workers.report["token_budget"]))

    def _jobs(self, request: Request, asked: Asked, token_budget: int) -> Iterator[tuple[Part, Sheet]]:
        """Parts with what a worker needs of them. A damaged part that is under way is not missing: the store plans it twice."""
        sent = set()
        for part in self._parts(request, asked, token_budget):
            if part.stem not in sent:
                sent.add(part.stem)
                yield part, Sheet.of(asked, part.keys[0][0], [example for _, example in part.keys])

    def distributions(self, context: str, queries: Sequence[Query], answers: Completions | None) -> torch.Tensor:
        """Those that a worker gives, see `Scorer.distributions`."""
        name = context_id(context)
        asked = Asked(self.tokens, {name: self.tokens.prefix_ids(context)}, queries)
        return self._started(asked).distributions(Sheet.of(asked, name, asked.examples), answers)

    def _started(self, asked: Asked) -> Workers:
        if self.workers is None:
            folder, task, cache = self.model_folder.resolve(), self.tokens.task, self.reading.cache
            self.workers = Workers(Setup(folder, task, cache, self.fingerprint, Sheet.probe(asked, PROBE_ROWS)), self._count, self._threads)
        return self.workers
