"""A source file as checked examples: fields and labels that the task can use, and for every other row the reason.

Field values are stripped of outer white space and otherwise kept as they stand (HTML entities too). Of exact repeats the first is kept. A
text that stands under two labels is kept under neither: it is no fair test and no clear demonstration. The trade-off: rows that the label
rule leaves out are left out for every role, the transfer set's too.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.quarantine import Quarantined, shorten
from pipeline.data.readers import BadRow, BlankLine, MissingColumnError, json_keys, read_rows
from pipeline.errors import UsageError, choices
from pipeline.data.fields import MISSING, BadValueError, field_text
from pipeline.files import example_id
from pipeline.params import LabelRule, SourceParams
from pipeline.task import Task

BAD_ROWS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One usable row. `values` are the task's fields in its order; `label` is None in a source without labels.

    `completion` is its answer in free text, where the source has them.
    `slices` are the values of the source's slice columns in the params' order, None where the row does not say.
    """

    example_id: str
    label: str | None
    source: str
    line: int
    values: tuple[str, ...]
    completion: str | None = None
    slices: tuple[str | None, ...] = ()


@dataclass
class SourceExamples:
    """A source as read: its examples in file order, and what became of the other rows."""

    name: str
    file: str
    rows: int = 0
    blank_lines: int = 0
    left_out: int = 0
    repeats: int = 0
    conflicting: int = 0
    examples: list[Example] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    conflicts: list[Quarantined] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """For metrics/prepare.json: rows in, rows out, and each way between; shares of the labels."""
        labels = Counter(example.label for example in self.examples if example.label is not None)
        return {
            "rows": self.rows,
            "blank_lines": self.blank_lines,
            "quarantined": dict(sorted(Counter(entry.reason for entry in self.bad).items())),
            "left_out_by_label_rule": self.left_out,
            "exact_repeats_removed": self.repeats,
            "conflicting_labels_removed": self.conflicting,
            "examples": len(self.examples),
            "label_shares": {label: round(n / labels.total(), 4) for label, n in sorted(labels.items())},
        }


def read_source(name: str, params: SourceParams, path: Path, task: Task) -> SourceExamples:
    """Read and check one source file.

    Raises UsageError where the file lacks a column or has no row. Bad rows are in the result; `check_limit` weighs them.
    """
    columns = [(params.fields or {}).get(field_name, field_name) for field_name in task.fields]
    sliced = list(params.slices.values())
    asked = [
        *columns,
        *sliced,
        *([] if params.label is None else [params.label.column]),
        *([] if params.completion is None else [params.completion]),
    ]
    label_of = None if params.label is None else label_reader(params.label, task)
    result = SourceExamples(name, path.name)
    unseen = set(asked)
    checked: list[Example] = []
    for read in read_rows(path, params.format, asked, params.columns):
        if isinstance(read, BlankLine):
            result.blank_lines += 1
            continue
        result.rows += 1
        if isinstance(read, BadRow):
            result.bad.append(Quarantined(name, path.name, read.line, read.field, read.reason, shorten(read.value)))
            continue
        if unseen:
            unseen -= {column for column, value in zip(asked, read.values, strict=True) if value is not MISSING}
        try:
            values = tuple(
                field_text(column, value, task.params.max_chars) for column, value in zip(columns, read.values[: len(columns)], strict=True)
            )
            past_slices = len(columns) + len(sliced)
            slices = tuple(_slice(column, value) for column, value in zip(sliced, read.values[len(columns) : past_slices], strict=True))
            label = None if label_of is None else label_of(read.values[past_slices])
            answer = None if params.completion is None else field_text(params.completion, read.values[-1], task.params.max_chars)
        except BadValueError as bad:
            result.bad.append(Quarantined(name, path.name, read.line, bad.field_name, bad.reason, shorten(str(bad.value))))
            continue
        if label_of is not None and label is None:
            result.left_out += 1
            continue
        # Answers that are given are part of the input: another answer to the same text is another thing to learn.
        given = {} if answer is None or not task.answers_are_given else {"completion": answer}
        key = example_id(dict(zip(task.fields, values, strict=True)) | given)
        checked.append(Example(key, label, name, read.line, values, answer, slices))
    if result.rows == 0:
        raise UsageError(f"{path}: no row in this file; data.sources.{name} needs at least one.")
    if params.format == "jsonl" and unseen and len(result.bad) == result.rows and (keys := json_keys(path)):
        raise MissingColumnError(path, min(unseen), keys)
    if never := unseen.intersection(sliced):
        raise MissingColumnError(path, min(never), json_keys(path))
    _remove_repeats(checked, result)
    return result


def check_limit(source: SourceExamples, limit: float, quarantine: Path) -> None:
    """Raise UsageError where more than a share `limit` of a source's rows are bad."""
    if len(source.bad) <= limit * source.rows:
        return
    first = "".join(f"\n  {entry.describe()}" for entry in source.bad[:BAD_ROWS_SHOWN])
    raise UsageError(
        f"data.sources.{source.name}: {len(source.bad):,} of {source.rows:,} rows of {source.file} cannot be used "
        f"({len(source.bad) / source.rows:.1%}), more than data.bad_rows_limit allows ({limit:.1%}). The first:{first}\n"
        f"All are in {quarantine}. Correct the file, its `format` or its columns, or raise data.bad_rows_limit."
    )


def label_reader(rule: LabelRule, task: Task) -> Callable[[Any], str | None]:
    """A function from a value in the label's column to a label, or to None where the rule leaves the row out; raises BadValueError."""
    column = rule.column
    if rule.threshold is not None:
        threshold = rule.threshold

        def by_sign(value: Any) -> str | None:
            rating = _number(column, value)
            if rating is None or abs(rating) <= threshold:
                return None
            return rule.positive if rating > 0 else rule.negative

        return by_sign
    values = {label: label for label in task.labels} if rule.values is None else rule.values

    def by_value(value: Any) -> str | None:
        if value is MISSING:
            raise BadValueError(column, "missing", "")
        text = _label_text(column, value)
        if not text and text not in values:
            return None
        if text not in values:
            raise BadValueError(column, "unknown label", f"{text} (there are: {choices(values)})")
        return values[text] or None

    return by_value


def _number(column: str, value: Any) -> float | None:
    if value is None:
        return None
    if value is MISSING:
        raise BadValueError(column, "missing", "")
    try:
        # Python reads "1_0" as ten and True as one; a file that has them means something else.
        number = math.nan if isinstance(value, bool) or (isinstance(value, str) and "_" in value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadValueError(column, "not a number", value)
    return number


def _slice(column: str, value: Any) -> str | None:
    """The name of a row's slice, written as a label's value is; None for a null, an empty text or a key that is not there."""
    return None if value is MISSING else _label_text(column, value, "not a slice's name") or None


def _label_text(column: str, value: Any, reason: str = "not a label") -> str:
    """A label's value as params.yaml writes it: `true`, `1` and `positive` alike; empty for a null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value).strip()
    raise BadValueError(column, reason, value)


def _remove_repeats(checked: list[Example], result: SourceExamples) -> None:
    """Keep the first of each text in `result.examples`; none where its rows disagree on the label."""
    first: dict[str, Example] = {}
    torn: dict[str, Example] = {}
    for example in checked:
        kept = first.setdefault(example.example_id, example)
        if kept.label != example.label:
            torn.setdefault(example.example_id, example)
    for example in checked:
        if example.example_id in torn:
            kept, other = first[example.example_id], torn[example.example_id]
            against = other if example.label == kept.label else kept
            note = f"{example.label} here, {against.label} on line {against.line}: {' | '.join(example.values)}"
            result.conflicts.append(Quarantined(result.name, result.file, example.line, "", "conflicting labels", note))
        elif first[example.example_id] is example:
            result.examples.append(example)
        else:
            result.repeats += 1
    result.conflicting = len(result.conflicts)
