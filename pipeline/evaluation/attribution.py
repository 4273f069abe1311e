"""Which words speak for a student's answer: each is left out in turn, and what the answer loses is the word's weight.

Leave-one-out (Li et al. 2016, 1612.08220) asks the student itself, whatever its architecture, and needs no gradient. Its trade-off: words
that say the same twice hide each other, since either may go without a loss. It is done for a few of the examples on which student and
reference disagree, an equal number of each set.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.flips import Answered, Ask, Fields

ATTRIBUTED = 8
MOST_WORDS = 60
SMALLEST_PROBABILITY = 1e-9
_WORD = re.compile(r"\S+")


def disagreements(
    answered: Sequence[Answered], reference: Sequence[Answered], count: int = ATTRIBUTED
) -> tuple[list[tuple[int, int]], int]:
    """Places of up to `count` examples with different answers, as (place, place in `reference`), and how many were too long.

    Sets take turns, and within a set the smallest example ids come first: a draw that does not depend on what the models said. Examples of
    more than `MOST_WORDS` words are passed over.
    """
    other = {(theirs.set, theirs.example_id): place for place, theirs in enumerate(reference)}
    by_set: dict[str, list[tuple[str, int, int]]] = {}
    long = 0
    for place, mine in enumerate(answered):
        at = other[mine.set, mine.example_id]
        if mine.probabilities.argmax() == reference[at].probabilities.argmax():
            continue
        if sum(len(_WORD.findall(text)) for text in mine.fields.values()) > MOST_WORDS:
            long += 1
        else:
            by_set.setdefault(mine.set, []).append((mine.example_id, place, at))
    queues = [sorted(own) for own in by_set.values()]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return [(place, at) for _, place, at in turns[:count]], long


def leave_one_out(fields: Fields) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Each word of an input (`field`, `word`, `start` and `end` in characters), and the input without it."""
    found = []
    for name, text in fields.items():
        for word in _WORD.finditer(text):
            rest = f"{text[: word.start()].rstrip()} {text[word.end() :].lstrip()}".strip()
            found.append(({"field": name, "word": word.group(), "start": word.start(), "end": word.end()}, {**fields, name: rest}))
    return found


def attribute(inputs: Sequence[Fields], answers: Sequence[int], ask: Ask) -> list[list[dict[str, Any]]]:
    """For each input, its words with a `weight`: the log-odds (nats) of the answer `answers[i]` lost when the word goes.

    A positive weight speaks for the answer, a negative one against it.
    """
    parts = [leave_one_out(fields) for fields in inputs]
    probabilities = ask([*inputs, *(without for part in parts for _, without in part)]) if inputs else np.empty((0, 0))
    whole, rest = probabilities[: len(inputs)], iter(probabilities[len(inputs) :])
    return [
        [{**word, "weight": log_odds(whole[at], answer) - log_odds(next(rest), answer)} for word, _ in part]
        for at, (part, answer) in enumerate(zip(parts, answers, strict=True))
    ]


def log_odds(probabilities: npt.NDArray[np.float64], answer: int) -> float:
    """Log-odds (nats) of one answer against all others."""
    others = float(probabilities.sum() - probabilities[answer])
    return float(np.log(max(float(probabilities[answer]), SMALLEST_PROBABILITY)) - np.log(max(others, SMALLEST_PROBABILITY)))
