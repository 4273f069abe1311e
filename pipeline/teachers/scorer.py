"""Scores of (context, example) pairs through the store: what is there is read, what is missing is scored, nothing is scored twice.

The teacher's stage, the baselines and the students' evaluation all ask here. The model is loaded only if a row is missing.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.encodings import columns_of
from pipeline.cache.fingerprint import Fingerprint, fingerprint_of
from pipeline.cache.keys import Key, Request
from pipeline.cache.store import Part, Store
from pipeline.teachers.asked import Asked, Given, Query
from pipeline.teachers.batches import plan_batches, token_budget
from pipeline.teachers.choice import EngineChoice, choose_engine
from pipeline.teachers.generation import Generator
from pipeline.teachers.scores import Engine, Reading, Scores
from pipeline.errors import CorruptError, UsageError
from pipeline.files import read_sealed_json, write_sealed_json
from pipeline.files import context_id, sha256_ids
from pipeline.models.memory import give_back_memory
from pipeline.models.loading import context_limit, load_model, load_tokenizer
from pipeline.models.machine import DTYPES, default_device, fast_dtype, memory_bytes, use_machine
from pipeline.models.rows import Completions
from pipeline.params import CacheParams
from pipeline.progress import progress, rate
from pipeline.schema import SCORES
from pipeline.task import Task, TaskTokens

ROWS_PER_PART = 256
"""Rows between two writes: what a kill costs at most."""
Scored = tuple[Part, pa.Table, float]
"""A part, its rows (`schema.SCORES`), and the seconds that scoring took."""
PROBE_ROWS = 3


class Scorer:
    """Scores a task's inputs with one model folder, in the number format `dtype` (`models.machine.DTYPES`) or the fast one for `auto`."""

    def __init__(
        self, model_folder: Path, task: Task, cache: CacheParams, work: Path, threads: int | None = None, dtype: str = "float32"
    ) -> None:
        self.model_folder = model_folder
        self.tokenizer = load_tokenizer(model_folder)
        self.tokens = TaskTokens(task, self.tokenizer)
        self.reading = Reading(self.tokens.completions, cache, task.reads_texts)
        use_machine(threads)
        self.device = default_device()
        self.dtype = fast_dtype(self.device) if dtype == "auto" else dtype
        self.fingerprint: Fingerprint = fingerprint_of(model_folder, self.tokens, cache, self.dtype, work / "hashes")
        self.store = Store(work, self.fingerprint)
        self._choice: EngineChoice | None = None
        self._generator: Generator | None = None

    def score(self, contexts: Sequence[str], queries: Sequence[Query], title: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of `tables` as one: for label scores of as many rows as fit in memory."""
        return pa.concat_tables(list(self.tables(contexts, queries, title, columns)))

    def tables(
        self, contexts: Sequence[str], queries: Sequence[Query], title: str, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Rows for every context (rendered text) and query, contexts outermost, with the columns of `schema.SCORES` or some of them.

        What is missing is scored at the call; the rows are then read block by block, so that memory holds a block of them at most. No query
        may stand there twice. Raises UsageError where a prompt is longer than the model takes.
        """
        prefixes = {context_id(text): self.tokens.prefix_ids(text) for text in contexts}
        asked = Asked(self.tokens, prefixes, queries)
        self._check_lengths(asked)
        request = Request(list(prefixes), asked.examples)
        with self.store.lock():
            self._score_missing(request, asked, title)
        return self.store.read(request, columns)

    def _score_missing(self, request: Request, asked: Asked, title: str) -> None:
        missing = int(self.store.missing(request).sum())
        if not missing:
            if self._engine_fault():
                self._load(asked)  # the same probe, so the same report
            return
        scored = self._scored(request, asked)
        held = len(request) - missing
        cached = f", {held:,} of {len(request):,} rows ({held / len(request):.0%}) were in the store" if held else ""
        tokens, started = 0, time.monotonic()
        with progress(title, missing, "rows") as meter:
            for part, rows, seconds in scored:
                self.store.write(part, rows, seconds)
                give_back_memory()
                tokens += sum(asked.lengths_of([example for _, example in part.keys]))
                if not self.reading.texts:
                    tokens += len(rows["completion_ids"].combine_chunks().flatten())
                meter.advance(len(part.keys), f"{rate(tokens, time.monotonic() - started):,.0f} tokens/s{cached}")

    def _scored(self, request: Request, asked: Asked) -> Iterator[Scored]:
        """The parts that the store lacks, scored one after the other; the model is loaded at the call."""
        engine = self._load(asked).engine
        return (self._score(engine, part, asked) for part in self._parts(request, asked, engine.token_budget))

    def _parts(self, request: Request, asked: Asked, token_budget: int) -> Iterator[Part]:
        return self.store.parts(request, lambda keys: _divide(keys, asked, token_budget))

    def _score(self, engine: Engine, part: Part, asked: Given) -> Scored:
        began = time.perf_counter()
        rows = _score_part(engine, part, asked, self._generator)
        return part, rows, time.perf_counter() - began

    def seconds(self, contexts: Sequence[str], queries: Sequence[Query]) -> tuple[float, int]:
        """Seconds that scoring these rows took, in this run or an earlier one, and how many of the rows they cover.

        Model work alone: loading the model and choosing the engine are not counted. Rows of a store from before times were kept have none.
        """
        return self.store.seconds(Request([context_id(text) for text in contexts], (query.example_id for query in queries)))

    def distributions(self, context: str, queries: Sequence[Query], answers: Completions | None) -> torch.Tensor:
        """Log-probabilities of the whole vocabulary at every answer position, [P, V] float32: computed now, not read from the store.

        `answers` are token ids of each query's own answer; None where answers are labels, which have one position.
        """
        prefix = self.tokens.prefix_ids(context)
        asked = Asked(self.tokens, {context_id(context): prefix}, queries)
        return self._full(asked, prefix, asked.rows(asked.examples)[0], answers)

    def _full(self, probe: Given, prefix: Sequence[int], queries: list[list[int]], answers: Completions | None) -> torch.Tensor:
        engine = self._load(probe).engine
        kept, engine.reading = engine.reading, replace(engine.reading, cache=CacheParams(encoding="full", resolution_nats=None))
        try:
            return engine.score(prefix, queries, answers).encoded.full_logprobs.cpu()
        finally:
            engine.reading = kept

    @property
    def engine_report(self) -> dict[str, str]:
        """Which engine scored this store's rows, and why it was chosen."""
        return read_sealed_json(self.store.folder / "engine.json")

    def _engine_fault(self) -> bool:
        """Whether nothing, or nothing that can be relied on, says which engine scored this store's rows."""
        try:
            return not self.engine_report
        except FileNotFoundError:
            return True
        except CorruptError as error:
            print(f"{error} Nothing need be done: the engine is chosen again.", file=sys.stderr)
            return True

    def _check_lengths(self, asked: Asked) -> None:
        limit = context_limit(self.model_folder)
        branch = 0 if self.reading.texts else self.tokens.longest_answer - 1
        place = asked.longest()
        longest, tokens = asked.examples[place], int(asked.lengths[place])
        for context, prefix in asked.prefixes.items():
            needed = len(prefix) + tokens + branch
            if limit is not None and needed > limit:
                raise UsageError(
                    f"context {context[:12]} has {len(prefix)} tokens and example {longest[:12]} {tokens}: together with the "
                    f"answer {needed}, and {self.model_folder} takes {limit}. Use fewer or shorter demonstrations "
                    "(contexts.*.demonstrations, data.demonstrations.max_words), or lower task.max_chars."
                )

    def _load(self, asked: Given) -> EngineChoice:
        """The engine; the model is loaded and probed at the first call, under its longest context, with its longest query and answer.

        What depends on length (a sliding window) shows there, and not in the middle of the work.
        """
        if self._choice is None:
            model = load_model(self.model_folder, DTYPES[self.dtype], self.device)
            completion = self.tokens.task.params.completion
            budget = token_budget(model, memory_bytes(self.device))
            context = max(asked.prefixes.values(), key=lambda prefix: (len(prefix), prefix))
            queries, own = asked.rows(asked.spread(PROBE_ROWS))
            answers = None
            if completion is not None:
                if completion.source == "generated":
                    self._generator = Generator(model, self.tokenizer, completion)
                any_text = [list(islice(cycle(query), self.tokens.longest_answer)) for query in queries]  # does to compare
                answers = own if self.reading.texts else any_text
            self._choice = choose_engine(model, self.reading, budget, context, queries, answers)
            report = {"name": self._choice.engine.name, "why": self._choice.reason, "token_budget": budget, "device": str(model.device)}
            self._note_engine(report)
        return self._choice

    def _note_engine(self, report: dict[str, Any]) -> None:
        if self._engine_fault():
            write_sealed_json(report, self.store.folder / "engine.json")


def _score_part(engine: Engine, part: Part, asked: Given, generator: Generator | None) -> pa.Table:
    """The rows of a part, which lies in one context. Answers in free text are written first, unless they are there."""
    context = part.keys[0][0]
    examples = [example for _, example in part.keys]
    prefix, (queries, answers) = asked.prefixes[context], asked.rows(examples)
    if generator is not None:
        answers = generator.answers(prefix, queries)
    seen = queries
    if engine.reading.texts and answers is not None:
        seen = [[*query, *answer] for query, answer in zip(queries, answers, strict=True)]
    return _rows(context, examples, prefix, seen, answers, engine.score(prefix, queries, answers))


def _divide(missing: list[Key], asked: Asked, budget: int) -> list[list[Key]]:
    """Missing rows as parts: one context each, whole batches of rows of like length."""
    parts: list[list[Key]] = []
    for context in dict.fromkeys(context for context, _ in missing):
        examples = [example for other, example in missing if other == context]
        rows = sorted(zip(asked.lengths_of(examples), examples, strict=True))
        parts.append([])
        for batch in plan_batches([length for length, _ in rows], budget):
            if len(parts[-1]) >= ROWS_PER_PART:
                parts.append([])
            parts[-1] += [(context, rows[row][1]) for row in batch]
    return parts


def _rows(
    context: str, examples: list[str], prefix: Sequence[int], queries: list[list[int]], answers: Completions | None, scores: Scores
) -> pa.Table:
    """Scores as rows of `schema.SCORES`; `queries` are what the teacher saw behind the context."""
    ends = np.concatenate([[0], scores.positions.cumsum(0).numpy()])
    logprobs = scores.completion_logprobs.cpu().numpy()
    columns: dict[str, Any] = {
        "context_id": [context] * len(examples),
        "example_id": examples,
        "prompt_sha": [sha256_ids([*prefix, *query]) for query in queries],
        "prompt_tokens": [len(prefix) + len(query) for query in queries],
        "label_logprobs": list(scores.label_logprobs.cpu().numpy()),
        "completion_ids": [[]] * len(examples) if answers is None else list(map(list, answers)),
        "completion_logprobs": [logprobs[start:end] for start, end in pairwise(ends)],
    }
    columns |= columns_of(scores.encoded, scores.positions.numpy())
    arrays = {name: value if isinstance(value, pa.Array) else pa.array(value, SCORES.field(name).type) for name, value in columns.items()}
    return pa.table([arrays[name] for name in SCORES.names], schema=SCORES)
