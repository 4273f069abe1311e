"""Scores of (context, example) pairs through the store: what is there is read, what is missing is scored, nothing is scored twice.

The teacher's stage asks here, and so do baselines and the evaluation of students, these without a store. The model is loaded only if a row
is missing. Contexts are taken one after the other, so that memory has one context's prompts; a request is looked at whole before that.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import pyarrow as pa
import torch
import transformers
from scipy.special import log_softmax, logsumexp

from pipeline.cache.encodings import columns_of
from pipeline.cache.store import Store
from pipeline.errors import UsageError
from pipeline.files import sha256_file
from pipeline.models.folders import load_model, server_of, tokenizer_sha256, weights_sha256
from pipeline.models.machine import DTYPES, default_device, fast_dtype, give_back_memory, use_machine
from pipeline.models.trained import load_tokens
from pipeline.params import CacheParams
from pipeline.progress import progress, rate
from pipeline.schema import NO_CONTEXT, SCHEMA_VERSION, SCORES, STORED, Context, Example, Prompt
from pipeline.task import Task, TaskTokens, origin_of
from pipeline.teachers.engines import LABELS_ONLY, Engine, Scores, open_engine, plan_batches, shared_prefix
from pipeline.teachers.generation import Generator

if TYPE_CHECKING:
    from pipeline.teachers.ray import RayBackend
    from pipeline.teachers.server_rows import ServerBackend

ENGINE_VERSION = 3  # raised when the engines' numbers change by more than rounding: old rows are then scored again
ROWS_PER_PART = 256  # rows between two writes: what a kill costs at most
PROBE_ROWS = 3


@dataclass(frozen=True)
class Job:
    """Prompts of one context that are scored together."""

    prompts: list[Prompt]
    shared: tuple[int, ...]  # what all of the context's prompts begin with


class LocalBackend:
    """The model in this process."""

    note = ""  # behind the figures of the progress line

    def __init__(self, folder: Path, tokens: TaskTokens, cache: CacheParams, dtype: str) -> None:
        self._folder, self._tokens, self._cache, self._dtype = folder, tokens, cache, dtype
        self._engine: Engine | None = None
        self._generator: Generator | None = None
        self._longest = 0

    def open(self, probe: Sequence[Prompt]) -> dict[str, Any]:
        """Be ready for work like `probe`: the engine's name, reason, token_budget, device. Longer prompts may get another engine."""
        longest = max(len(prompt.ids) + len(prompt.answer or ()) for prompt in probe)
        if self._engine is None or longest > self._longest:
            if self._engine is not None:
                self._engine.close()
            model = self._engine.model if self._engine else load_model(self._folder, DTYPES[self._dtype], default_device())
            self._engine, self._longest = open_engine(model, self._tokens, self._cache, probe), longest
            completion = self._tokens.task.params.completion
            if completion is not None and completion.source == "generated":
                self._generator = Generator(model, self._tokens.tokenizer, completion, self._tokens.end_ids)
        engine = self._engine
        return {"name": engine.name, "reason": engine.reason, "token_budget": engine.token_budget, "device": str(engine.model.device)}

    def score(self, jobs: Iterable[Job]) -> Iterator[tuple[pa.Table, float]]:
        """Each job's rows (`schema.STORED`), one job after the other, and the seconds that they took."""
        for job in jobs:
            began = time.perf_counter()
            rows = self._rows(job)
            yield rows, time.perf_counter() - began
            give_back_memory()

    def distributions(self, prompt: Prompt, shared: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities of the whole vocabulary at every answer position of a prompt, [P, V] float32."""
        assert self._engine is not None
        return self._engine.distributions([prompt], shared)

    def close(self) -> None:
        """Nothing was started."""

    def _rows(self, job: Job) -> pa.Table:
        assert self._engine is not None
        asked = job.prompts
        if self._generator is not None:
            answers = self._generator.answers(job.prompts, job.shared)
            asked = [Prompt(prompt.ids, tuple(answer)) for prompt, answer in zip(job.prompts, answers, strict=True)]
        return stored_rows(job.prompts, asked, self._engine.score(asked, job.shared))


@dataclass(frozen=True)
class _Asked:
    context: Context
    keys: list[str]
    probe: list[Prompt]  # a few of its prompts, the longest one last


class Scorer:
    """Scores a task's examples with one model folder, in the number format `dtype` (`models.machine.DTYPES`) or the fast one for `auto`.

    Rows are kept in the store under `work` and not scored again; with `work=None` there is no store. With `on_ray`, `workers` of Ray load
    and run the model (by default one for each GPU or machine), to the same bytes.
    """

    def __init__(
        self,
        model_folder: Path,
        task: Task,
        cache: CacheParams = LABELS_ONLY,
        *,
        work: Path | None,
        threads: int | None = None,
        dtype: str = "float32",
        on_ray: bool = False,
        workers: int | None = None,
    ) -> None:
        self.model_folder = model_folder
        self.tokens = load_tokens(task, model_folder)
        self.cache = cache
        use_machine(threads)
        self.server = server_of(model_folder)
        """What the stage `server` found of a server (`teachers.servers`); None for a model in a folder."""
        self.dtype = "server" if self.server else fast_dtype(default_device()) if dtype == "auto" else dtype
        self.identity = identity_of(model_folder, self.tokens, cache, self.dtype)
        self.store = None if work is None else Store(work, self.identity)
        self.engine_report: dict[str, Any] | None = None
        """The engine of this process' last work: name, reason, token_budget, device; None if nothing had to be scored."""
        self.keys: list[str] = []  # the `prompt_sha` of each row of the last request, contexts outermost
        self.backend: LocalBackend | RayBackend | ServerBackend
        if self.server is not None:
            from pipeline.teachers import server_rows

            self.backend = server_rows.ServerBackend(model_folder, self.tokens, cache)
        elif on_ray:
            from pipeline.teachers import ray

            settings = {"model_folder": model_folder.resolve(), "task": task, "cache": cache, "dtype": self.dtype}
            self.backend = ray.RayBackend(settings, self.identity, workers, threads)
        else:
            self.backend = LocalBackend(model_folder, self.tokens, cache, self.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()

    def score(self, contexts: Sequence[Context], examples: Sequence[Example], title: str) -> pa.Table:
        """The rows of `tables` as one table."""
        return pa.concat_tables(self.tables(contexts, examples, title))

    def label_scores(self, contexts: Sequence[Context], examples: Sequence[Example], title: str) -> np.ndarray:
        """Log-probabilities of the sorted labels, [C, N, L] float64 nats: not normalised over the labels.

        Of an example that is read in windows they are normalised, the logarithm of the windows' mean probabilities.
        """
        windows = [self.tokens.windows(context, examples) for context in contexts]
        if all(own == [example] for of_context in windows for own, example in zip(of_context, examples, strict=True)):
            return self._label_logprobs(contexts, examples, title)
        means = []
        for context, of_context in zip(contexts, windows, strict=True):
            found = self._label_logprobs([context], [window for own in of_context for window in own], title)[0]  # [windows, L]
            each = np.split(found, np.cumsum([len(own) for own in of_context])[:-1])
            means.append([own[0] if len(own) == 1 else logsumexp(log_softmax(own, axis=-1), axis=0) - np.log(len(own)) for own in each])
        return np.array(means)

    def _label_logprobs(self, contexts: Sequence[Context], examples: Sequence[Example], title: str) -> np.ndarray:
        rows = self.score(contexts, examples, title)
        return np.array(rows["label_logprobs"].to_pylist(), dtype=np.float64).reshape(len(contexts), len(examples), -1)

    def tables(self, contexts: Sequence[Context], examples: Sequence[Example], title: str) -> Iterator[pa.Table]:
        """Rows of `schema.SCORES` of every example behind every context: a table for each context.

        What is missing is scored at the call. Raises UsageError if a text cannot be made to fit, or an example cannot be told from the
        template's control tokens.
        """
        asked = self._asked(contexts, examples)
        keys = self.keys = [key for own in asked for key in own.keys]
        if self.store is not None:
            with self.store.request(keys):
                for rows, seconds in self._score(asked, examples, self.store.missing(keys), title):
                    self.store.write(rows, seconds, self.engine_report or {})
            read = self.store.read
        else:
            scored = pa.concat_tables([STORED.empty_table(), *(rows for rows, _ in self._score(asked, examples, keys, title))])
            place = {key: number for number, key in enumerate(scored["prompt_sha"].to_pylist())}

            def read(keys: Sequence[str]) -> pa.Table:
                return scored.take([place[key] for key in keys])

        ids = pa.array([example.example_id for example in examples], pa.string())
        return (pa.table([pa.repeat(own.context.context_id, len(ids)), ids, *read(own.keys).columns], schema=SCORES) for own in asked)

    def distributions(
        self, context: Context, examples: Sequence[Example], answers: Sequence[Sequence[int]] | None = None
    ) -> Iterator[torch.Tensor]:
        """For each example, log-probabilities of the whole vocabulary at every answer position, [P, V] float32: computed, not read.

        `answers` are token ids of each example's answer; None if answers are labels, which have one position.
        """
        prompts = self.tokens.prompts(context, examples)
        if answers is not None:
            prompts = [Prompt(prompt.ids, tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        self.backend.open(self._spread(prompts))
        # without a context nothing is shared, so that a context that is held stays so
        shared = shared_prefix(prompts) if context.context_id != NO_CONTEXT.context_id else ()
        backend = cast("LocalBackend | RayBackend", self.backend)  # a server has none
        return (backend.distributions(prompt, shared) for prompt in prompts)

    def asked_again(self, contexts: Sequence[Context], examples: Sequence[Example]) -> pa.Table:
        """Rows (`schema.STORED`) as a server answers them now, whatever the store has: contexts outermost, then windows."""
        windows = [(context, own) for context in contexts for own in self.tokens.windows(context, examples)]
        prompts = [prompt for context, own in windows for prompt in self.tokens.prompts(context, own)]
        self.backend.open(prompts)
        rows = pa.concat_tables([rows for rows, _ in self.backend.score([Job(prompts, ())])])
        place = {key: number for number, key in enumerate(rows["prompt_sha"].to_pylist())}
        return rows.take([place[prompt.prompt_sha] for prompt in prompts])

    def _asked(self, contexts: Sequence[Context], examples: Sequence[Example]) -> list[_Asked]:
        """A request, after everything that may be wrong with its prompts was looked at."""
        for example in examples:
            if fault := self.tokens.fault_of(example):
                raise UsageError(f"{origin_of(example)} {fault}. Leave it out, or write the template without them.")
        asked = []
        for context in contexts:
            prompts = self.tokens.prompts(context, examples)
            asked.append(_Asked(context, [prompt.prompt_sha for prompt in prompts], self._spread(prompts)))
        return asked

    def _score(
        self, asked: Sequence[_Asked], examples: Sequence[Example], keys: Sequence[str], title: str
    ) -> Iterator[tuple[pa.Table, float]]:
        missing, count = set(keys), sum(len(own.keys) for own in asked)
        if not missing:
            return
        self.engine_report = self.backend.open(max((own.probe for own in asked), key=lambda probe: self.tokens.tokens_of(probe[-1])))
        if self.server is not None:
            cast("ServerBackend", self.backend).announce(self._lengths(asked, examples, missing), is_said=bool(title))
        cached = f", {count - len(missing):,} of {count:,} rows were in the store" if count > len(missing) else ""
        tokens, started = 0, time.monotonic()
        with progress(title, len(missing), "rows") as meter:
            for rows, seconds in self.backend.score(self._jobs(asked, examples, missing, self.engine_report["token_budget"])):
                yield rows, seconds
                tokens += sum(rows["prompt_tokens"].to_pylist())
                meter.advance(len(rows), f"{rate(tokens, time.monotonic() - started):,.0f} prompt tokens/s{cached}{self.backend.note}")

    def _lengths(self, asked: Sequence[_Asked], examples: Sequence[Example], missing: set[str]) -> list[int]:
        """Tokens of each missing prompt."""
        prompts = (prompt for own in asked for prompt in self.tokens.prompts(own.context, examples))
        return list({prompt.prompt_sha: prompt.length for prompt in prompts if prompt.prompt_sha in missing}.values())

    def _jobs(self, asked: Sequence[_Asked], examples: Sequence[Example], missing: set[str], token_budget: int) -> Iterator[Job]:
        """The missing prompts of each part. Parts follow from the whole request, so that a killed run goes on in the same batches."""
        seen: set[str] = set()
        for own in asked:
            new = set(own.keys) - seen
            seen |= new
            if missing.isdisjoint(new):
                continue
            prompts = self.tokens.prompts(own.context, examples)
            shared = shared_prefix(prompts)
            by_key = {prompt.prompt_sha: prompt for prompt in prompts if prompt.prompt_sha in new}
            ordered = sorted(by_key.values(), key=lambda prompt: (self.tokens.tokens_of(prompt), prompt.prompt_sha))
            part: list[Prompt] = []
            batches = plan_batches([self.tokens.tokens_of(prompt) - len(shared) for prompt in ordered], token_budget)
            for number, batch in enumerate(batches, 1):
                part += [ordered[row] for row in batch]
                if len(part) >= ROWS_PER_PART or number == len(batches):
                    if lacking := [prompt for prompt in part if prompt.prompt_sha in missing]:
                        yield Job(lacking, shared)
                    part = []

    def _spread(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """A few prompts, from the shortest to the longest, whatever their order; none of none."""
        order = sorted(prompts, key=lambda prompt: (self.tokens.tokens_of(prompt), prompt.prompt_sha))
        return [order[round(number * (len(order) - 1) / (PROBE_ROWS - 1))] for number in range(PROBE_ROWS) if order]


def identity_of(folder: Path, tokens: TaskTokens, cache: CacheParams, dtype: str) -> dict[str, Any]:
    """All that decides a row's numbers except its prompt, as JSON."""
    server = server_of(folder)
    identity = {
        **(
            {"weights": weights_sha256(folder)} if server is None else {"server": {"model": server["settings"]["model"], **server["found"]}}
        ),
        "dtype": dtype,
        "cache": cache.model_dump(mode="json"),
        "completions": tokens.completions or tokens.task.verbalisers,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "engine_version": ENGINE_VERSION,
        "schema_version": SCHEMA_VERSION,
    }
    completion, settings = tokens.task.params.completion, folder / "generation_config.json"
    if completion is not None and completion.source == "generated":  # what ends an answer, and how it is read as text
        identity |= {"completion": tokens.task.params.answering} | ({"end_ids": tokens.end_ids} if tokens.end_ids else {})
        if server is None:
            generation = sha256_file(settings) if settings.is_file() else None
            identity |= {"generation_config": generation, "tokenizer": tokenizer_sha256(folder)}
    return identity


def stored_rows(prompts: Sequence[Prompt], asked: Sequence[Prompt], scores: Scores) -> pa.Table:
    """Scores as rows of `schema.STORED`; `asked` are the prompts with the answers that were scored, their own or written ones."""
    ends = np.concatenate([[0], scores.positions.cumsum(0).numpy()])
    logprobs = scores.completion_logprobs.cpu().numpy()
    bounds = np.zeros((len(prompts), 0)) if scores.label_bounds is None else scores.label_bounds.cpu().numpy()
    columns: dict[str, Any] = {
        "prompt_sha": [prompt.prompt_sha for prompt in prompts],
        "prompt_tokens": [len(prompt.ids) + len(prompt.answer or ()) for prompt in prompts],
        "label_logprobs": list(scores.label_logprobs.cpu().numpy()),
        "label_bounds": [[] if np.isnan(own).all() else own for own in bounds],
        "completion_ids": [list(prompt.answer or ()) for prompt in asked],
        "completion_logprobs": [logprobs[start:end] for start, end in pairwise(ends)],
    }
    columns |= columns_of(scores.encoded, scores.positions.numpy())
    arrays = {name: value if isinstance(value, pa.Array) else pa.array(value, STORED.field(name).type) for name, value in columns.items()}
    return pa.table([arrays[name] for name in STORED.names], schema=STORED)
