"""Contexts: ordered lists of demonstrations, rendered, counted in tokens, and refused before the teacher starts where they do not fit.

Contexts of one list differ in the order of the same demonstrations, or in a balanced draw of them, and are all distinct. They follow
from the seed and their number alone: a larger `count` adds contexts and leaves the earlier ones what they were, and two lists with the same
settings share theirs (and the teacher's scores). The trade-off: an order is drawn until it is a new one, which is slow only for lists
that use up nearly all the orders there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pyarrow as pa

from pipeline.data.examples import Example
from pipeline.errors import UsageError
from pipeline.files import context_id, sha256_text
from pipeline.params import ContextParams
from pipeline.schema import CONTEXTS
from pipeline.task import Task, TaskTokens

BYTES_PER_TOKEN_AT_LEAST = 0.5
"""A token stands for a byte or more; half allows for a tokenizer whose normaliser makes texts longer."""


@dataclass(frozen=True)
class Measure:
    """What counts a context's tokens and bounds its length: one model folder's tokenizer, and its limit where it has one."""

    folder: Path
    tokens: TaskTokens
    max_positions: int | None


def measure(task: Task, folder: Path) -> Measure:
    """Load a model folder's tokenizer and limit. Raises UsageError where the folder is not there or the verbalisers do not suit it."""
    from pipeline.models.loading import check_folder, context_limit, load_tokenizer  # brings torch

    check_folder(folder)
    return Measure(folder, TaskTokens(task, load_tokenizer(folder)), context_limit(folder))


def build_contexts(
    name: str, params: ContextParams, task: Task, demonstrations: Sequence[Example], measured: Measure, queries: Sequence[str], seed: int
) -> pa.Table:
    """One list of contexts as a table of `schema.CONTEXTS`.

    `demonstrations` are in rank order; `queries` are all rendered queries that may follow. Raises UsageError where there are fewer distinct
    contexts than asked for, or one is too long for `max_tokens` or, with the longest query, for the model.
    """
    chosen = _distinct(name, params, task, demonstrations, seed)
    rows = []
    for at, own in enumerate(chosen):
        text = _render(task, own, params.instruction)
        tokens = len(measured.tokens.prefix_ids(text))
        if tokens > params.max_tokens:
            raise UsageError(
                f"contexts.{name}: context {name}/{at} of {len(own)} demonstrations has {tokens} tokens, "
                f"max_tokens is {params.max_tokens}. Raise max_tokens, or lower `demonstrations` or data.demonstrations.max_words."
            )
        rows.append(
            {
                "context_id": context_id(text),
                "name": f"{name}/{at}",
                "text": text,
                "example_ids": [example.example_id for example in own],
                "tokens": tokens,
            }
        )
    _check_room(name, max(row["tokens"] for row in rows), measured, queries)
    return pa.Table.from_pylist(rows, schema=CONTEXTS)


def _render(task: Task, demonstrations: Sequence[Example], instruction: str) -> str:
    pairs: list[tuple[Mapping[str, str], str]] = []
    for example in demonstrations:
        answer = example.label if task.params.completion is None else example.completion
        assert answer is not None, "a demonstration has an answer"  # params say so of its source
        pairs.append((dict(zip(task.fields, example.values, strict=True)), answer))
    return task.context(pairs, instruction)


def _distinct(name: str, params: ContextParams, task: Task, demonstrations: Sequence[Example], seed: int) -> list[list[Example]]:
    """The demonstrations of each context, in their order, all contexts distinct."""
    by_label = [[example for example in demonstrations if example.label == label] for label in task.labels or [None]]
    # Where labels cannot be equal in number, the first labels have one more.
    shares = [params.demonstrations // len(by_label) + (i < params.demonstrations % len(by_label)) for i in range(len(by_label))]
    fixed = [example for own, share in zip(by_label, shares, strict=True) for example in own[:share]]
    if params.vary == "order":
        possible, remedy = math.factorial(len(fixed)), "raise `demonstrations`"
    else:
        possible = math.prod(math.comb(len(own), share) for own, share in zip(by_label, shares, strict=True))
        remedy = "raise data.demonstrations.per_label above what one context takes"
    if params.count > possible:
        raise UsageError(
            f"contexts.{name}: count is {params.count}, but with {params.demonstrations} demonstrations and `vary: {params.vary}` there "
            f"are only {possible} different contexts; lower `count`, or {remedy}."
        )
    chosen: list[list[Example]] = []
    seen: set[tuple[str, ...]] = set()
    for at in range(params.count):
        for attempt in count():
            key = f"{seed}\0{params.vary}\0{at}\0{attempt}"
            own = fixed
            if params.vary == "draw":
                own = [e for group, share in zip(by_label, shares, strict=True) for e in _shuffled(group, f"{key}\0draw")[:share]]
            own = _shuffled(own, key)
            ids = [example.example_id for example in own]
            mark = tuple(ids) if params.vary == "order" else tuple(sorted(ids))
            if mark not in seen:
                seen.add(mark)
                chosen.append(own)
                break
    return chosen


def _shuffled(examples: Sequence[Example], key: str) -> list[Example]:
    return sorted(examples, key=lambda example: sha256_text(f"{key}\0{example.example_id}"))


def _check_room(name: str, context_tokens: int, measured: Measure, queries: Sequence[str]) -> None:
    """Raise UsageError where the longest context, query and answer together are longer than the model takes."""
    if measured.max_positions is None:
        return
    answer = measured.tokens.longest_answer
    room = measured.max_positions - context_tokens - answer
    # Only queries that may be too long are tokenised: of a million, none as a rule.
    long = [query for query in queries if len(query.encode()) * (1 / BYTES_PER_TOKEN_AT_LEAST) > room]
    longest = max((len(ids) for ids in measured.tokens.query_ids(long)), default=0)
    if room < 0 or longest > room:
        raise UsageError(
            f"contexts.{name}: {context_tokens} tokens of context, {longest} of the longest query and {answer} of the longest answer "
            f"do not fit the {measured.max_positions} that {measured.folder} takes. Lower `demonstrations`, task.max_chars or "
            "data.demonstrations.max_words, or choose a model with a longer limit."
        )
