"""A source as checked examples: fields and labels that the task can use, and for every other row the reason.

A text is kept once, as it first appears (with its first answer, if answers are given), without outer white space and otherwise as it is.
Labels decide only which labelled roles a text may play: a row that the label rule leaves out, one with a label that cannot be read, and a
text that appears with two labels all stay as texts without a label. So gold labels never choose what is drawn as unlabelled.
"""

import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Any

from pipeline.data.readers import MISSING, BadRow, MissingColumnError, Row, json_keys, source_rows
from pipeline.errors import UsageError, choices
from pipeline.files import Folders, read_json, write_json, write_text
from pipeline.params import LabelRule, Params, SourceParams, pick
from pipeline.schema import Example, read_examples, write_examples
from pipeline.task import Task

SHOWN_CHARS = 80
BAD_ROWS_SHOWN = 5
NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that a text has only by mistake; tabs, line ends and form feeds are white space."""
INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
"""Unicode categories of a text that shows nothing: white space and zero-width characters."""
WHOLE_FLOAT = re.compile(r"\+?(-?\d+)(\.0+|,00?)?")
"""A whole number, with the decimal point or comma of a table that holds such numbers as floats."""
LISTED = re.compile(r"\[.*['\",].*\]|\{.*['\",].*\}", re.DOTALL)
"""A list or an object written as text."""


@dataclass(eq=False)  # an exception has a hash
class BadValueError(Exception):
    """A value that cannot be used."""

    field_name: str
    reason: str
    value: object


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was set aside, or whose label was; `field` is empty if the row as a whole is meant. The value is shortened."""

    source: str
    file: str
    line: int
    field: str
    reason: str
    value: str
    copy_of: dict[str, Any] | None = None
    """For a near copy: role, source and line of the example it is like, and how similar the two are."""

    def json_line(self) -> str:
        """One line of quarantine.jsonl."""
        record = {key: value for key, value in asdict(self).items() if key != "copy_of" or value is not None}
        # A lone surrogate from a JSON escape has no UTF-8; it is shown escaped.
        return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


@dataclass
class SourceExamples:
    """A source as read: its examples in file order, what was set aside, and counts of rows for metrics/prepare.json.

    `quarantined` in the counts has the reasons of bad rows: fields that cannot be used, and labels that cannot be read. The lines of a
    folder's files are counted on from one to the next; `files` in the counts has the number before the first line of each.
    """

    name: str
    file: str
    examples: list[Example]
    quarantine: list[Quarantined]
    counts: dict[str, Any]

    @property
    def bad_rows(self) -> int:
        """Rows that are wrong in the file."""
        return sum(self.counts["quarantined"].values())

    def place(self, line: int) -> tuple[str, int]:
        """The file that an example's line is in, and the line there."""
        starts = reversed(self.counts.get("files", {}).items())
        file, start = next(((file, start) for file, start in starts if start < line), (self.file, 0))
        return file, line - start


def read_source(name: str, params: SourceParams, path: Path, task: Task) -> SourceExamples:
    """Read and check one source file.

    Raises UsageError if the file is absent, lacks a column or has no row. Bad rows are in the result; `check_limit` weighs them.
    """
    if not path.exists():
        raise UsageError(f"data.sources.{name}.path: {str(path)!r} is not a file or folder. Correct it, or run the download it comes from.")
    columns = {field: (params.fields or {}).get(field, field) for field in task.fields}
    rule, answers = params.label, params.completion
    label_of = None if rule is None else label_reader(rule, task)
    needed = [*params.where, *params.slices.values()]
    asked = [*columns.values(), *needed, *(column for column in (rule and rule.column, answers) if column)]
    rows = unread = left_out = last = 0
    quarantine: list[Quarantined] = []
    checked: list[Example] = []
    starts: dict[str, int] = {}

    def set_aside(row: Row | BadRow, column: str, reason: str, value: object) -> None:
        quarantine.append(Quarantined(name, row.file or path.name, row.line, column, reason, shorten(str(value))))

    for rows, read in enumerate(source_rows(path, params, asked), start=1):  # noqa: B007  their number
        last = starts.setdefault(read.file, last) + read.line
        if isinstance(read, BadRow):
            set_aside(read, read.field, read.reason, read.value)
            continue
        values, label = dict(zip(asked, read.values, strict=True)), None
        try:
            if any(label_text(column, values[column], "value") != wanted for column, wanted in params.where.items()):
                unread += 1
                continue
            fields = {field: field_text(column, values[column]) for field, column in columns.items()}
            slices = {known: label_text(column, values[column], "slice") or None for known, column in params.slices.items()}
            answer = None if answers is None else field_text(answers, values[answers])
        except BadValueError as bad:
            set_aside(read, bad.field_name, bad.reason, bad.value)
            continue
        if rule is not None and label_of is not None:
            try:
                label = label_of(values[rule.column])
                left_out += label is None
            except BadValueError as bad:
                set_aside(read, bad.field_name, bad.reason, bad.value)
        checked.append(Example(fields, label, answer, name, last, slices))

    if not rows:
        raise UsageError(f"{path}: no row in this file; data.sources.{name} needs at least one.")
    needed = asked if len(quarantine) == rows else needed
    if needed and (keys := json_keys(path, params.form, params.files, params.encoding)) and (absent := set(needed) - keys):
        raise MissingColumnError(path, min(absent), keys)

    files = {"files": starts} if set(starts) != {""} else {}
    source = SourceExamples(name, path.name, checked, quarantine, files)
    reasons, conflicts = Counter(entry.reason for entry in quarantine), _keep_one_of_each(source)
    quarantine += conflicts
    labels = Counter(example.label for example in source.examples if example.label is not None)
    source.counts = {
        "rows": rows,
        "quarantined": dict(sorted(reasons.items())),
        "left_out_by_label_rule": left_out,
        **({"left_out_by_where": unread} if params.where else {}),
        "exact_repeats_removed": len(checked) - len(source.examples),
        "conflicting_labels_removed": len(conflicts),
        "examples": len(source.examples),
        "labelled": labels.total(),
        "label_shares": {label: round(n / labels.total(), 4) for label, n in sorted(labels.items())},
    } | files
    return source


def _keep_one_of_each(source: SourceExamples) -> list[Quarantined]:
    """Keep each text once, with the label on which its rows agree; an entry for each row of a text whose rows do not agree."""
    by_text: dict[str, list[Example]] = {}
    for example in source.examples:
        by_text.setdefault(example.example_id, []).append(example)
    source.examples = []
    conflicts: list[Quarantined] = []
    for rows in by_text.values():
        labelled = [row for row in rows if row.label is not None]
        labels = {row.label for row in labelled}
        if len(labels) > 1:
            value = shorten(", ".join(f"{row.label} on line {row.line}" for row in labelled) + f": {' | '.join(rows[0].fields.values())}")
            conflicts += [Quarantined(source.name, *source.place(row.line), "", "conflicting labels", value) for row in labelled]
        source.examples.append(replace(rows[0], label=labels.pop() if len(labels) == 1 else None))
    return sorted(conflicts, key=lambda entry: entry.line)


def check_limit(source: SourceExamples, limit: float, quarantine: Path | None = None) -> None:
    """Raise UsageError if more than a share `limit` of a source's rows are bad; `quarantine` is the file that lists them."""
    rows = source.counts["rows"]
    if source.bad_rows <= limit * rows:
        return
    shown = source.quarantine[:BAD_ROWS_SHOWN]
    first = "".join(f"\n  {e.file}:{e.line}: {e.field + ': ' if e.field else ''}{e.reason}: {e.value!r}" for e in shown)
    raise UsageError(
        f"data.sources.{source.name}: {source.bad_rows:,} of {rows:,} rows of {source.file} cannot be used ({source.bad_rows / rows:.1%}), "
        f"more than data.bad_rows_limit allows ({limit:.1%}). The first:{first}\n"
        f"{f'All are in {quarantine}. ' if quarantine else ''}Correct the file, its `format` or its columns, or raise data.bad_rows_limit."
    )


def write_source(name: str, params: Params, folders: Folders) -> None:
    """The stage source@NAME: write artifacts/sources/NAME/{examples.parquet, quarantine.jsonl, counts.json}.

    Raises UsageError if too many rows are bad, after quarantine.jsonl was written.
    """
    entry, task = pick("data.sources", params.data.sources, name), Task(params.task)
    source, folder = read_source(name, entry, Path(entry.path), task), folders.artifacts / "sources" / name
    shutil.rmtree(folder, ignore_errors=True)
    write_text("".join(row.json_line() for row in source.quarantine), folder / "quarantine.jsonl")
    check_limit(source, params.data.bad_rows_limit, folder / "quarantine.jsonl")
    write_examples(source.examples, task.fields, folder / "examples.parquet", tuple(entry.slices))
    write_json(source.counts, folder / "counts.json")
    counts = source.counts
    unread = f"{counts['left_out_by_where']:,} left out by `where`, " if entry.where else ""
    print(
        f"{name}: {counts['rows']:,} rows, {counts['examples']:,} texts, {counts['labelled']:,} with a label; {source.bad_rows:,} bad, "
        f"{unread}{counts['left_out_by_label_rule']:,} left out by the label rule, {counts['exact_repeats_removed']:,} exact repeats, "
        f"{counts['conflicting_labels_removed']:,} with conflicting labels"
    )


def read_written_source(name: str, params: SourceParams, task: Task, folders: Folders) -> SourceExamples:
    """What `write_source` wrote, without its quarantine."""
    folder = folders.artifacts / "sources" / name
    examples = read_examples(folder / "examples.parquet", task.fields, tuple(params.slices))
    return SourceExamples(name, Path(params.path).name, examples, [], read_json(folder / "counts.json"))


def shorten(text: str) -> str:
    """The beginning of a value, for messages and quarantine.jsonl."""
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def field_text(column: str, value: Any) -> str:
    """A field's value as the models see it: without outer white space, otherwise as it is. One rule for training and for serving.

    Raises BadValueError if it is missing, not a text, empty, or has a character that no text has.
    """
    if value is MISSING or value is None:
        raise BadValueError(column, "missing", "")
    if not isinstance(value, str):
        raise BadValueError(column, "not a text", value)
    text = value.strip()
    if found := NOT_TEXT.search(text):
        reason = "lone surrogate" if found[0] >= "\ud800" else "control character"
        raise BadValueError(column, reason, f"U+{ord(found[0]):04X} in {text!r}")
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise BadValueError(column, "empty", value)
    return text


def label_reader(rule: LabelRule, task: Task) -> Callable[[Any], str | None]:
    """A function from a value in the label's column to a label, or to None if the rule leaves the row out; it raises BadValueError.

    With a threshold the value is a number. Otherwise `label_text` spells it, so that `1`, `1.0` and `"1"` are one label, as are `true` and
    `"True"`; a label that params.yaml spells exactly as the file does comes first.
    """
    exact = {label: label for label in task.labels} if rule.values is None else rule.values
    respelt = {_spelling(key): label for key, label in exact.items()}

    def read(value: Any) -> str | None:
        if value is MISSING:
            raise BadValueError(rule.column, "missing", "")
        if rule.threshold is not None:
            with suppress(ValueError):
                rating = 0.0 if value is None else float(str(value).replace("_", "?"))  # Python reads "1_0" as ten
                if math.isfinite(rating):
                    return None if abs(rating) <= rule.threshold else rule.positive if rating > 0 else rule.negative
            raise BadValueError(rule.column, "not a number", value)
        if isinstance(value, str) and value.strip() in exact:
            return exact[value.strip()] or None
        text = label_text(rule.column, value)
        if text and text not in respelt:
            raise BadValueError(rule.column, "unknown label", f"{text} (the labels are: {choices(exact)})")
        return respelt.get(text) or None

    return read


def label_text(column: str, value: Any, what: str = "label") -> str:
    """A label's one spelling: `true`, `1`, `positive`; empty for a null, a NaN, an empty text or a missing key.

    Slices are spelt alike. Raises BadValueError for a list or an object: one row has one label.
    """
    text = "" if value is None or value is MISSING else str(value).strip()
    if isinstance(value, (list, dict)) or (isinstance(value, str) and LISTED.fullmatch(text)):
        raise BadValueError(column, f"several {what}s in a row are not supported", value)
    if not isinstance(value, (str, int, float, Decimal, NoneType)) and value is not MISSING:
        raise BadValueError(column, f"not a {what}", value)
    return _spelling(text)


def _spelling(text: str) -> str:
    text = unicodedata.normalize("NFC", text).strip()
    if text.lower() in {"true", "false"}:
        return text.lower()
    if text.lower() in {"nan", "<na>"}:  # as Python and pandas write a missing one
        return ""
    whole = WHOLE_FLOAT.fullmatch(text)
    return text if whole is None else "0" if whole[1] == "-0" else whole[1]
