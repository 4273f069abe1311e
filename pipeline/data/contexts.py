"""Contexts: ordered lists of demonstrations, refused before a teacher starts if they do not fit its model.

Contexts of one list differ in the order of the same demonstrations, or in a balanced draw of them, and are all distinct. They follow from
the seed and their number alone: a larger `count` adds contexts and leaves the earlier ones as they were, and two lists with the same
settings share theirs, and the teacher's scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import ContextParams
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.task import Task, TaskTokens

TOKENS_PER_BYTE = 2
"""A token is a byte or more; twice that allows for a tokenizer whose normaliser makes texts longer."""
LONGEST = 16
"""Inputs that are put behind each context: those of most tokens, since the tokens at the border depend on the input."""


@dataclass(frozen=True)
class ContextModel:
    """The model that a teacher reads contexts with: its folder, the task in its tokens, and its limit in tokens, if its config has one."""

    folder: Path
    tokens: TaskTokens
    limit: int | None


def open_context_model(task: Task, folder: Path) -> ContextModel:
    """Load a model folder's tokenizer and limit. Raises UsageError if it cannot be loaded or the verbalisers do not suit it."""
    from pipeline.models.folders import check_folder, context_limit, load_tokenizer  # brings torch

    check_folder(folder)
    return ContextModel(folder, TaskTokens(task, load_tokenizer(folder)), context_limit(folder))


def build_contexts(name: str, params: ContextParams, task: Task, demonstrations: Sequence[Example], seed: int) -> list[Context]:
    """One list of contexts; `demonstrations` are in rank order. Raises UsageError if there are fewer distinct ones than asked for."""
    by_label = [[example for example in demonstrations if example.label == label] for label in task.labels] or [list(demonstrations)]
    # If labels cannot be equal in number, the first labels have one more.
    shares = [params.demonstrations // len(by_label) + (i < params.demonstrations % len(by_label)) for i in range(len(by_label))]
    fixed = [example for own, share in zip(by_label, shares, strict=True) for example in own[:share]]
    if params.vary == "order":
        possible, remedy = math.factorial(len(fixed)), "raise `demonstrations`"
    else:
        possible = math.prod(math.comb(len(own), share) for own, share in zip(by_label, shares, strict=True))
        remedy = "raise data.demonstrations.per_label above what one context takes"
    if params.count > possible:
        raise UsageError(
            f"contexts.{name}.count: {params.count}, and {params.demonstrations} demonstrations with `vary: {params.vary}` make only "
            f"{possible} different contexts. Lower `count`, or {remedy}."
        )
    answer_of = attrgetter("label" if task.params.completion is None else "completion")  # params see to it that there is one
    contexts: list[Context] = []
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
                contexts.append(Context(f"{name}/{at}", params.instruction, tuple((dict(e.fields), answer_of(e)) for e in own)))
                break
    return contexts


def check_fit(name: str, params: ContextParams, contexts: Sequence[Context], model: ContextModel, examples: Sequence[Example]) -> list[int]:
    """Tokens that each context adds to a prompt. `examples` are all inputs that may follow, at least one.

    Raises UsageError if a context is longer than `max_tokens`, or a whole prompt with its answer is longer than the model takes.
    """
    tokens = model.tokens
    bare = len(tokens.prompts(NO_CONTEXT, examples[:1])[0].ids)
    added = [len(tokens.prompts(context, examples[:1])[0].ids) - bare for context in contexts]
    for context, length in zip(contexts, added, strict=True):
        if params.max_tokens is not None and length > params.max_tokens:
            raise UsageError(
                f"contexts.{name}: context {context.name} of {len(context.demonstrations)} demonstrations has {length} tokens, max_tokens "
                f"is {params.max_tokens}. Raise max_tokens, or lower `demonstrations` or data.demonstrations.max_words."
            )
    if model.limit is None:
        return added
    # Only inputs that may be too long are tokenised: as a rule few or none.
    room = model.limit - max(added) - tokens.longest_answer
    long = [e for e in examples if TOKENS_PER_BYTE * len(tokens.task.query(e.fields).encode()) > room] or examples[:1]
    lengths = [len(prompt.ids) for prompt in tokens.prompts(NO_CONTEXT, long)]
    longest = [long[at] for at in sorted(range(len(long)), key=lambda at: -lengths[at])[:LONGEST]]
    for context, length in zip(contexts, added, strict=True):
        whole = max(len(prompt.ids) for prompt in tokens.prompts(context, longest))
        if whole + tokens.longest_answer > model.limit:
            raise UsageError(
                f"contexts.{name}: the longest prompt of context {context.name} has {whole:,} tokens, {length:,} of them the context's. "
                f"With {tokens.longest_answer:,} of the longest answer it does not fit the {model.limit:,} that {model.folder} takes. "
                "Lower `demonstrations`, task.max_chars or data.demonstrations.max_words, or choose a model with a longer limit."
            )
    return added


def _shuffled(examples: Sequence[Example], key: str) -> list[Example]:
    return sorted(examples, key=lambda example: sha256_text(f"{key}\0{example.example_id}"))
