"""What a student learns over the labels, and which rows each step takes.

The order of an epoch sorts the rows by sha256(seed, epoch, id). It does not depend on the order in a file, on a generator's state or on the
process. So a resumed run takes the same batches, and one more example does not shuffle the others. Batches run across the ends of epochs:
every step has the same size.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pipeline.cache.labelled import compared_texts
from pipeline.errors import MismatchError, UsageError, choices
from pipeline.files import read_json, sha256_json
from pipeline.schema import NO_CONTEXT, TARGETS, Example, read_examples, read_table
from pipeline.task import TaskTokens

MOST_WEIGHT = 10.0
"""Of a text whose label is rare: with a few texts of a label, a larger one would let each of them move the student alone."""


@dataclass(frozen=True)
class StudentRow:
    """A student's prompt; what is to be learnt at its answer positions is in the subclasses."""

    example_id: str
    ids: tuple[int, ...]

    @property
    def example(self) -> str:
        """The id of its example alone: a cache's row is CONTEXT_ID:EXAMPLE_ID."""
        return self.example_id.rpartition(":")[2]

    @property
    def positions(self) -> int:
        """Distributions that are learnt."""
        return 1

    @property
    def tokens(self) -> int:
        """What the student reads, except for verbalisers: a free answer's last token is not read."""
        return len(self.ids) + self.positions - 1


@dataclass(frozen=True)
class TargetRow(StudentRow):
    """A prompt and the probabilities of the sorted labels behind it. A gold label has all probability."""

    target: tuple[float, ...]
    weight: float = 1.0  # of its loss

    @property
    def label(self) -> int:
        """Number of the most probable label."""
        return max(range(len(self.target)), key=self.target.__getitem__)


AnyRow = TypeVar("AnyRow", bound=StudentRow)


@dataclass(frozen=True)
class LabelTerm:
    """A summand of the objective over the labels: each step takes `batch_size` rows and adds `weight` × their mean loss."""

    loss: Literal["kl", "reverse_kl", "jensen_shannon", "cross_entropy"]  # the last: of the target's most probable label
    weight: float
    batch_size: int
    rows: Sequence[TargetRow]
    label_weight: float = 0.0  # of the cross-entropy of the most probable label, beside a divergence on the same rows


class Batches(Generic[AnyRow]):
    """The rows of each step: a function of the seed, the step and the rows' ids."""

    def __init__(self, rows: Sequence[AnyRow], size: int, seed: int) -> None:
        self._count, self._size = len(rows), size
        self._epoch: Callable[[int], list[AnyRow]] = lru_cache(2)(
            lambda epoch: sorted(rows, key=lambda row: sha256_json([seed, epoch, row.example_id]))
        )

    def at(self, step: int) -> list[AnyRow]:
        """The rows of a step, counted from 0."""
        epochs = (divmod(place, self._count) for place in range(step * self._size, (step + 1) * self._size))
        return [self._epoch(epoch)[place] for epoch, place in epochs]


def micro_batches(batches: Sequence[Sequence[AnyRow]], size: int | None) -> Iterator[list[list[AnyRow]]]:
    """A step's batches, one for each term, in pieces of at most `size` rows. Each piece has a batch, maybe empty, for each term."""
    numbered = [(number, row) for number, batch in enumerate(batches) for row in batch]
    size = size or max(1, len(numbered))
    for start in range(0, len(numbered), size):
        yield [[row for n, row in numbered[start : start + size] if n == number] for number in range(len(batches))]


def shortest_and_longest(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """A few rows to compare two forward passes on: the shortest, a middle one, the longest."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def split(
    rows: Sequence[AnyRow], key: Literal["held_back", "validation_fraction"], fraction: float, learnt_whole: Collection[str] = ()
) -> tuple[list[AnyRow], list[AnyRow]]:
    """The rows that the param `key` keeps from being learnt, and the others, among them all of the examples `learnt_whole`.

    Another row is kept from it if the hash of key and example is in the first `fraction` of all hashes. So the part is the same for every
    student and seed, a transfer set that grows moves no example to the other side, and all contexts of an example are on one side. The
    fraction is met on average. Raises UsageError if either side is empty.
    """
    held: list[AnyRow] = []
    learnt: list[AnyRow] = []
    for row in rows:
        is_held = row.example not in learnt_whole and int(sha256_json([key, row.example])[:13], 16) / 16**13 < fraction
        (held if is_held else learnt).append(row)
    if not held or not learnt:
        lacking = "for it" if learnt else "to learn from"
        raise UsageError(f"{key}: {fraction} of {len(rows)} examples leaves none {lacking}. Choose another fraction, or 0.")
    return held, learnt


def demonstrations(file: Path, tokens: TaskTokens) -> list[TargetRow]:
    """The demonstrations with their gold labels. Raises MismatchError if one has another label."""
    examples, labels = read_examples(file, tokens.task.fields), tokens.task.labels
    if other := [example for example in examples if example.label not in labels]:
        found = f"example {other[0].example_id} has the label {other[0].label!r}"
        raise MismatchError(f"{file}: {found}, and the task has {choices(labels)}. Run `dvc repro prepare`.")
    return _rows(file, examples, [tuple(float(label == example.label) for label in labels) for example in examples], tokens)


def compared_rows(file: Path, tokens: TaskTokens) -> list[TargetRow]:
    """The unlabelled texts by which leans are compared (`pipeline/cache/labelled.py`). Their targets are all 0: they are only answered."""
    texts = compared_texts(read_examples(file, tokens.task.fields))
    return _rows(file, texts, [(0.0,) * len(tokens.task.labels)] * len(texts), tokens)


def balanced(rows: Sequence[TargetRow]) -> list[TargetRow]:
    """The rows with the weight 1 / (L · share of rows with their most probable label), at most `MOST_WEIGHT`."""
    counts = Counter(row.label for row in rows)
    return [replace(row, weight=min(MOST_WEIGHT, len(rows) / (len(row.target) * counts[row.label]))) for row in rows]


def target_set(folder: Path, texts: Sequence[Example], tokens: TaskTokens) -> list[TargetRow]:
    """The rows of a target set or a round, in its order.

    Raises MismatchError if it was made for another task, or has an example that `texts` lack.
    """
    stage = "round" if folder.parent.name == "rounds" else "targets"
    again, made_with = f"Run `dvc repro {stage}@{folder.name}`.", read_json(folder / "calibration.json")
    task = tokens.task.params
    for key, value in {"template": task.template, "verbalisers": dict(task.verbalisers), "labels": list(task.labels)}.items():
        if made_with.get(key) != value:
            raise MismatchError(f"{folder / 'calibration.json'}: made with {key} {made_with.get(key)!r}, this task has {value!r}. {again}")
    by_id = {example.example_id: example for example in texts}
    targets = read_table(folder / "targets.parquet", TARGETS)
    ids = targets["example_id"].to_pylist()
    if unknown := [one for one in ids if one not in by_id]:
        raise MismatchError(f"{folder / 'targets.parquet'}: example {unknown[0]} is not among its texts. {again}")
    return _rows(folder, [by_id[one] for one in ids], map(tuple, targets["probabilities"].to_pylist()), tokens)


def _rows(source: Path, examples: Sequence[Example], targets: Iterable[tuple[float, ...]], tokens: TaskTokens) -> list[TargetRow]:
    if not examples:
        raise MismatchError(f"{source}: no rows. A student needs at least one example to learn from.")
    triples = zip(examples, tokens.prompts(NO_CONTEXT, examples), targets, strict=True)
    return [TargetRow(example.example_id, prompt.ids, target) for example, prompt, target in triples]
