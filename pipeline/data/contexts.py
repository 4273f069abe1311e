"""Contexts: ordered lists of demonstrations, refused before a teacher starts if they do not fit its model.

Contexts of one list differ in the order of the same demonstrations, or in a balanced draw of them, and are all distinct. A draw takes
what was shown least so far, so contexts cover labels and examples between them. They follow from the seed and their number alone: a
larger `count` adds contexts and leaves the earlier ones as they were, and two lists with the same settings share theirs, and the teacher's
scores.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from operator import attrgetter

from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import LEAST_TOKENS, ContextParams
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.task import Task, TaskTokens, TooLongError

BORDER = 8
"""Tokens by which a prompt may differ from the sum of context and query: those at the border depend on both."""


def variation(params: ContextParams, held: int) -> str:
    """`params.vary`, or what it is by default with `held` labelled examples."""
    return params.vary or ("draw" if 0 < params.demonstrations < held else "order")


def different_contexts(params: ContextParams, labels: int, per_label: int) -> int:
    """How many different contexts there can be of `per_label` examples of each label, or more (free text: of one label)."""
    if variation(params, labels * per_label) == "order":
        return math.factorial(params.demonstrations)
    share, more = divmod(params.demonstrations, labels)
    return math.comb(labels, more) * math.comb(per_label, share + 1) ** more * math.comb(per_label, share) ** (labels - more)


def build_contexts(name: str, params: ContextParams, task: Task, demonstrations: Sequence[Example], seed: int) -> list[Context]:
    """One list of contexts. `demonstrations` are in rank order; a context shows as many of each label, or of some one more: in each draw of
    others.

    Raises UsageError if there are fewer distinct ones than asked for.
    """
    by_label = {label: [example for example in demonstrations if example.label == label] for label in task.labels}
    by_label = by_label or {"": list(demonstrations)}
    vary, possible = variation(params, len(demonstrations)), different_contexts(params, len(by_label), min(map(len, by_label.values())))
    if params.count > possible:
        remedy = {"order": "raise `demonstrations`", "draw": "raise data.demonstrations.per_label above what one context takes"}[vary]
        raise UsageError(
            f"contexts.{name}.count: {params.count}, and {params.demonstrations} demonstrations with `vary: {vary}` make only "
            f"{possible} different contexts. Lower `count`, or {remedy}."
        )
    answer_of = attrgetter("label" if task.params.completion is None else "completion")  # params see to it that there is one
    share, more = divmod(params.demonstrations, len(by_label))
    fixed = [example for i, group in enumerate(by_label.values()) for example in group[: share + (i < more)]]

    def draw(key: str, seen: Counter[str]) -> list[Example]:
        """Of what was `seen` least: `share` examples of each label, one more of some."""
        longer = sorted(by_label, key=lambda label: (seen[label], sha256_text(f"{key}\0label\0{label}")))[:more]
        groups = {label: sorted(_shuffled(group, f"{key}\0draw"), key=lambda e: seen[e.example_id]) for label, group in by_label.items()}
        return [example for label, group in groups.items() for example in group[: share + (label in longer)]]

    contexts, shown = dict[tuple[str, ...], Context](), Counter[str]()  # `shown`: labels and examples in earlier contexts
    for at in range(params.count):
        for attempt in count():
            key = f"{seed}\0{vary}\0{at}\0{attempt}"
            # What was shown least may make up an earlier context as a whole; then any will do.
            own = fixed if vary == "order" else draw(key, Counter() if attempt else shown)
            own = _shuffled(own, key)
            ids = tuple(example.example_id for example in own)
            mark = ids if vary == "order" else tuple(sorted(ids))
            if mark not in contexts:
                shown.update([*ids, *(str(example.label) for example in own)])
                pairs = tuple((dict(e.fields), answer_of(e)) for e in own)
                contexts[mark] = Context(f"{name}/{at}", params.instruction, pairs, params.format)
                break
    return list(contexts.values())


def not_shown(contexts: Iterable[Context], labels: Sequence[str]) -> list[str]:
    """The labels that no context shows an example of; none if contexts have no demonstrations."""
    shown = {answer for context in contexts for _, answer in context.demonstrations}
    return [label for label in labels if shown and label not in shown]


def check_fit(
    where: str, params: ContextParams, contexts: Sequence[Context], tokens: TaskTokens, examples: Sequence[Example]
) -> tuple[list[int], set[str]]:
    """Tokens that each context adds to a prompt, and the ids of those `examples` that do not fit behind the longest.

    `examples` are all inputs that may follow. Raises UsageError if a context is longer than `max_tokens`, or does not fit the model with an
    answer and a little of an input, TooLongError if `task.long_texts` refuses an input.
    """
    added = list[int]()
    for context in contexts:
        try:
            added.append(length := tokens.added_by(context))
        except TooLongError:
            raise UsageError(
                f"{where}: context {context.name} does not fit {tokens.tokenizer.name_or_path}, which takes {tokens.limit:,} tokens, with "
                f"an answer and {LEAST_TOKENS} tokens of an input. Lower `demonstrations` or data.demonstrations.max_words, or choose a "
                "model with a longer limit."
            ) from None
        if params.max_tokens is not None and length > params.max_tokens:
            raise UsageError(
                f"{where}: context {context.name} of {len(context.demonstrations)} demonstrations has {length} tokens, max_tokens "
                f"is {params.max_tokens}. Raise max_tokens, or lower `demonstrations` or data.demonstrations.max_words."
            )
    room = math.inf if tokens.limit is None else tokens.limit + 1 - max(added) - BORDER
    asked = zip(examples, tokens.prompts(NO_CONTEXT, examples), strict=True)
    near = [example for example, prompt in asked if prompt.cut or tokens.tokens_of(prompt) > room]
    behind_longest = tokens.prompts(contexts[added.index(max(added))], near)
    return added, {example.example_id for example, prompt in zip(near, behind_longest, strict=True) if prompt.cut}


def _shuffled(examples: Sequence[Example], key: str) -> list[Example]:
    return sorted(examples, key=lambda example: sha256_text(f"{key}\0{example.example_id}"))
