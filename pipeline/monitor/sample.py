"""Inputs with a student's answers, as the drift tests see them: drawn from files of any size, with gold labels if there are some."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.data.examples import BadValueError, label_reader
from pipeline.errors import UsageError, choices
from pipeline.files import sha256_text
from pipeline.params import LabelRule, MonitorParams, Params
from pipeline.progress import progress
from pipeline.serving.files import Item
from pipeline.serving.predictor import Predictor

Floats = npt.NDArray[np.float64]
GOLD = "gold"
"""The entry of `Item.kept` that has an input's gold label, or None."""
LEAST_ROWS = 20
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Sample:
    """N inputs that were answered."""

    texts: list[str]
    ids: list[Sequence[int]]
    """Token ids of each prompt."""
    labels: list[str]
    """The student's answers."""
    confidence: Floats  # [N]
    states: Floats  # [N, H]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Floats:
        """Tokens of each prompt, [N]."""
        return np.array([len(ids) for ids in self.ids], dtype=np.float64)

    def take(self, rows: Sequence[int]) -> "Sample":
        """Some rows, in the order given."""
        index = list(rows)
        texts, ids, labels = [self.texts[i] for i in index], [self.ids[i] for i in index], [self.labels[i] for i in index]
        return Sample(texts, ids, labels, self.confidence[index], self.states[index])


@dataclass(frozen=True)
class Inputs:
    """A sample drawn from a file: `rows` are all that the file has, `bad` those among them that cannot be answered."""

    origin: str
    sample: Sample
    gold: list[str | None]
    """Gold labels of the sample's rows."""
    rows: int
    bad: int


def answer(predictor: Predictor, items: Iterable[Item], origin: str, params: MonitorParams) -> Inputs:
    """Draw `params.max_rows` of the usable items, in one reading that keeps no more than these, and answer them.

    All items are checked for fields that cannot be used; a text too long for the model is found among the drawn ones only. Raises
    UsageError if fewer than `LEAST_ROWS` can be answered.
    """
    rows = bad = 0

    def usable() -> Iterator[tuple[str, Item]]:
        nonlocal rows, bad
        for item in items:
            rows += 1
            try:
                example = predictor.example(item.fields) if item.error is None else None
            except BadValueError:
                example = None
            if example is None:
                bad += 1
            else:
                yield "\n".join(example.fields.values()), item

    drawn = draw(usable(), params.max_rows, params.seed)
    answered = []
    with progress(f"answering {origin}", len(drawn), "rows") as meter:
        for start in range(0, len(drawn), ROWS_AT_ONCE):
            window = drawn[start : start + ROWS_AT_ONCE]
            found = predictor.answer([item.fields for _, item in window])
            for (text, item), prediction, ids, state in zip(window, found.predictions, found.ids, found.states, strict=True):
                if prediction.error is None:
                    answered.append((text, ids, prediction.label, prediction.confidence, state, item.kept.get(GOLD)))
            meter.advance(len(window))
    if len(answered) < LEAST_ROWS:
        raise UsageError(f"{origin}: {len(answered)} inputs can be used, and a comparison needs {LEAST_ROWS}. Give a file with more.")
    texts, prompts, labels, confidence, states, gold = map(list, zip(*answered, strict=True))
    sample = Sample(texts, prompts, labels, np.array(confidence), np.array(states, dtype=np.float64))
    return Inputs(origin, sample, gold, rows, bad + len(drawn) - len(answered))


def draw(rows: Iterable[tuple[str, Item]], count: int, seed: int) -> list[tuple[str, Item]]:
    """At most `count` rows in the order of their lines. The hash of a text decides, so the same texts in any order give the same draw."""
    drawn = heapq.nsmallest(count, rows, key=lambda row: sha256_text(f"{seed}\0{row[0]}"))
    return sorted(drawn, key=lambda row: row[1].line)


def with_shares_of(reference: Sample, samples: Sequence[Sample]) -> Sample:
    """As many rows of `samples` as possible with the reference's shares of answers, since an evaluation set may be drawn per label.

    Each label's rows are taken in their order.
    """
    whole = Sample(
        [text for sample in samples for text in sample.texts],
        [ids for sample in samples for ids in sample.ids],
        [label for sample in samples for label in sample.labels],
        np.concatenate([sample.confidence for sample in samples]),
        np.concatenate([sample.states for sample in samples]),
    )
    shares = {label: reference.labels.count(label) / len(reference) for label in set(reference.labels)}
    total = min(whole.labels.count(label) / share for label, share in shares.items())
    left = {label: round(total * share) for label, share in shares.items()}
    rows = []
    for row, label in enumerate(whole.labels):
        if left.get(label, 0) > 0:
            left[label] -= 1
            rows.append(row)
    return whole.take(rows)


def label_rule(params: Params | None, column: str) -> LabelRule:
    """How a source reads this column, an evaluation set's source if one has it; else labels are taken as they are written.

    Raises UsageError if sources read it differently.
    """
    sources = params.data.sources if params else {}
    evaluated = [entry.source for entry in params.data.evaluation.values()] if params else []
    for names in (evaluated, sources):
        rules = [rule for name in names if (rule := sources[name].label) is not None and rule.column == column]
        if any(rule != rules[0] for rule in rules):
            raise UsageError(f"--labels {column}: sources in params.yaml have different label rules for this column. Give it another name.")
        if rules:
            return rules[0]
    return LabelRule(column=column)


def with_gold(items: Iterable[Item], rule: LabelRule, predictor: Predictor, origin: str) -> Iterator[Item]:
    """Items whose `GOLD` is read by `rule`, None for a row without a label. Raises UsageError naming the first that is not one."""
    label_of = label_reader(rule, predictor.task)
    for item in items:
        value = item.kept.get(GOLD)
        try:
            label = None if value is None else label_of(value)
            fault = "" if label is None or label in predictor.labels else f"{label!r}; the student's are: {choices(predictor.labels)}"
        except BadValueError as bad:
            label, fault = None, f"{bad.reason}: {bad.value}"
        if fault:
            raise UsageError(f"--labels {rule.column}: {origin}, line {item.line}: {fault}.")
        yield replace(item, kept={GOLD: label})
