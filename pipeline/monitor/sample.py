"""Inputs with a student's answers, as the drift tests see them: drawn from files of any size, with gold labels if there are some."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import nsmallest

import numpy as np

from pipeline.data.examples import BadValueError, label_reader
from pipeline.errors import UsageError, choices
from pipeline.evaluation.metrics import Floats
from pipeline.files import sha256_text
from pipeline.params import LabelRule, MonitorParams, Params
from pipeline.progress import progress
from pipeline.serving.files import Answered, Item, predict_items
from pipeline.serving.predictor import Predictor

GOLD = "gold"  # the entry of `Item.kept` that has an input's gold label, or None
LEAST_ROWS = 20
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Sample:
    """N inputs that a student answered, drawn from `rows`; `bad` are those among them that it cannot answer."""

    texts: list[str]
    ids: list[Sequence[int]]  # token ids of each prompt
    labels: list[str]  # the student's answers
    confidence: Floats  # [N]
    states: Floats  # [N, H]
    gold: list[str | None]
    origin: str = ""
    rows: int = 0
    bad: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def answer(predictor: Predictor, items: Iterable[Item], origin: str, params: MonitorParams, least: int = LEAST_ROWS) -> Sample:
    """Draw `params.max_rows` of the usable items, in one reading that keeps no more than these, and answer them.

    All items are checked for fields that cannot be used; a text that `task.long_texts: refuse` refuses is found among the drawn ones only.
    Raises UsageError if fewer than `least` can be answered.
    """
    rows = Counter[str]()

    def usable() -> Iterator[tuple[str, Item]]:
        for item in items:
            rows["all"] += 1
            with suppress(BadValueError):
                if item.error is None:
                    text = "\n".join(predictor.example(item.fields).fields.values())
                    rows["usable"] += 1
                    yield text, item

    drawn, answers = draw(usable(), params.max_rows, params.seed), list[Answered]()
    with progress(f"answering {origin}", len(drawn), "rows") as meter:
        for window in predict_items(predictor, (item for _, item in drawn), ROWS_AT_ONCE):
            answers += window
            meter.advance(len(window))
    answered = [(text, *answer) for (text, _), answer in zip(drawn, answers, strict=True) if answer[1].error is None]
    if len(answered) < least:
        raise UsageError(f"{origin}: {len(answered)} inputs can be used, and a comparison needs {least}. Give a file with more.")
    return Sample(
        texts=[text for text, _, _ in answered],
        ids=[found.ids for _, _, found in answered],
        labels=[str(found.label) for _, _, found in answered],
        confidence=np.array([found.confidence for _, _, found in answered], dtype=np.float64),
        states=np.array([found.state for _, _, found in answered], dtype=np.float64),
        gold=[item.kept.get(GOLD) for _, item, _ in answered],
        origin=origin,
        rows=rows["all"],
        bad=rows["all"] - rows["usable"] + len(drawn) - len(answered),
    )


def draw(rows: Iterable[tuple[str, Item]], count: int, seed: int) -> list[tuple[str, Item]]:
    """At most `count` rows in the order of their lines. The hash of a text decides, so the same texts in any order give the same draw."""
    drawn = nsmallest(count, rows, key=lambda row: sha256_text(f"{seed}\0{row[0]}"))
    return sorted(drawn, key=lambda row: row[1].line)


def with_shares_of(reference: Sample, sample: Sample) -> Sample:
    """As many rows of `sample` as possible with the reference's shares of answers, since an evaluation set may be drawn per label.

    Each label's rows are taken in their order.
    """
    places = {label: [row for row, own in enumerate(sample.labels) if own == label] for label in set(reference.labels)}
    scale = min(len(own) / reference.labels.count(label) for label, own in places.items())
    rows = sorted(row for label, own in places.items() for row in own[: round(scale * reference.labels.count(label))])
    texts, ids, labels, gold = ([values[row] for row in rows] for values in (sample.texts, sample.ids, sample.labels, sample.gold))
    return replace(sample, texts=texts, ids=ids, labels=labels, gold=gold, confidence=sample.confidence[rows], states=sample.states[rows])


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
        except BadValueError as bad:
            raise UsageError(f"--labels {rule.column}: {origin}, line {item.line}: {bad.reason}: {bad.value}.") from None
        if label is not None and label not in predictor.labels:
            where = f"--labels {rule.column}: {origin}, line {item.line}"
            raise UsageError(f"{where}: {label!r} is not a label of the student; its labels are: {choices(predictor.labels)}.")
        yield replace(item, kept={GOLD: label})
