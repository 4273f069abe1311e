"""Contexts: ordered lists of demonstrations, refused before a teacher starts if they do not fit its model.

Contexts of one list differ in the order of the same demonstrations, or in a balanced draw of them, and are all distinct. They follow from
the seed and their number alone: a larger `count` adds contexts and leaves the earlier ones as they were, and two lists with the same
settings share theirs, and the teacher's scores.
"""

import math
from collections.abc import Sequence
from itertools import count
from operator import attrgetter

from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import ContextParams
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.task import Task, TaskTokens

LONGEST = 16
"""Inputs that are put behind each context: those of most tokens, since the tokens at the border depend on the input."""


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
    contexts: dict[tuple[str, ...], Context] = {}
    for at in range(params.count):
        for attempt in count():
            key, own = f"{seed}\0{params.vary}\0{at}\0{attempt}", fixed
            if params.vary == "draw":
                own = [e for group, share in zip(by_label, shares, strict=True) for e in _shuffled(group, f"{key}\0draw")[:share]]
            own = _shuffled(own, key)
            ids = tuple(example.example_id for example in own)
            mark = ids if params.vary == "order" else tuple(sorted(ids))
            if mark not in contexts:
                shown = tuple((dict(e.fields), answer_of(e)) for e in own)
                contexts[mark] = Context(f"{name}/{at}", params.instruction, shown, params.format)
                break
    return list(contexts.values())


def check_fit(
    where: str, params: ContextParams, contexts: Sequence[Context], tokens: TaskTokens, limit: int | None, examples: Sequence[Example]
) -> list[int]:
    """Tokens that each context adds to a prompt. `limit` is the model's, in tokens; `examples` are all inputs that may follow.

    Raises UsageError if a context is longer than `max_tokens`, or a whole prompt with its answer is longer than the model takes.
    """
    answer = tokens.longest_answer
    alone = [len(prompt.ids) for prompt in tokens.prompts(NO_CONTEXT, examples)]
    longest = sorted(range(len(examples)), key=lambda at: -alone[at])[:LONGEST]
    added = []
    for context in contexts:
        whole = [len(prompt.ids) for prompt in tokens.prompts(context, [examples[at] for at in longest])]
        added.append(length := whole[0] - alone[longest[0]])
        if params.max_tokens is not None and length > params.max_tokens:
            raise UsageError(
                f"{where}: context {context.name} of {len(context.demonstrations)} demonstrations has {length} tokens, max_tokens "
                f"is {params.max_tokens}. Raise max_tokens, or lower `demonstrations` or data.demonstrations.max_words."
            )
        if limit is not None and max(whole) + answer > limit:
            raise UsageError(
                f"{where}: the longest prompt of context {context.name} has {max(whole):,} tokens, {length:,} of the context. "
                f"With {answer:,} of the longest answer it does not fit the {limit:,} that {tokens.tokenizer.name_or_path} takes. Lower "
                "`demonstrations`, task.max_chars or data.demonstrations.max_words, or choose a model with a longer limit."
            )
    return added


def _shuffled(examples: Sequence[Example], key: str) -> list[Example]:
    return sorted(examples, key=lambda example: sha256_text(f"{key}\0{example.example_id}"))
