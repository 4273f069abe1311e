"""params.yaml for a task of one's own: the present one with its task and data replaced, so that models, teachers and students stay.

Contexts are cut to what the labels allow. The result is parsed before anything is written: it is never a file that a run would refuse.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.params import Params, TaskParams, parse_params

MOST_LABELS = 20
SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
DEMONSTRATIONS_AT_MOST = 16


@dataclass(frozen=True)
class Answers:
    """What `init` was told."""

    labelled: Path
    unlabelled: Path
    test: Path
    template: str
    verbalisers: Mapping[str, str]
    fields: Mapping[str, str]
    """Template field → column, where they differ."""
    label_column: str
    per_label: int


def format_of(path: Path) -> str:
    """A file's format by its suffix. Raises UsageError where there is no such file or its suffix says none."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: the suffix names no format; use one of {', '.join(SUFFIXES)}.")
    return SUFFIXES[path.suffix.lower()]


def labels_in(values: list[Any], path: Path, column: str) -> list[str]:
    """The labels of a column, most frequent first. Raises UsageError where there is one, or so many that it cannot be the label's."""
    counts = Counter(str(value).strip() for value in values if value not in {None, ""})
    if not 2 <= len(counts) <= MOST_LABELS:
        raise UsageError(
            f"{path}: column {column!r} has {len(counts)} different values, and labels are 2 to {MOST_LABELS}; "
            "name the right one with --label-column."
        )
    return [label for label, _ in counts.most_common()]


def verbalisers_for(labels: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Label → verbaliser: what was given, else the label itself in small letters behind a space.

    Raises UsageError where a label is a bare number, which says nothing to a language model, or a given one is not among the labels.
    """
    if unknown := sorted(set(given) - set(labels)):
        raise UsageError(f"--verbaliser {unknown[0]}=…: no such label in the file; there are: {', '.join(labels)}")
    bare = [label for label in labels if label not in given and not any(character.isalpha() for character in label)]
    if bare:
        options = " ".join(f"--verbaliser {label}=WORD" for label in bare)
        raise UsageError(f"label {bare[0]!r} is no word: say what a model should answer for each of them: {options}")
    return {label: f" {given.get(label, label.lower().replace('_', ' ')).strip()}" for label in labels}


def new_params(base: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """Raw params for the new task. Raises UsageError where they do not hold."""
    raw: dict[str, Any] = copy.deepcopy(dict(base))
    # Stages track `completion` and `content_free`, so they have to stand there; what suits another task says nothing about this one.
    content_free = list(TaskParams.model_fields["content_free"].default)
    raw["task"] = {"template": answers.template, "verbalisers": dict(answers.verbalisers), "completion": None, "content_free": content_free}

    def source(path: Path, labelled: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"origin": {"source": "local", "path": str(path)}, "format": format_of(path)}
        if answers.fields:
            entry["fields"] = dict(answers.fields)
        if not labelled:
            entry["label"] = None
        elif answers.label_column != "label":
            entry["label"] = {"column": answers.label_column}
        return entry

    raw["data"] = {
        "seed": 0,
        "sources": {
            "labelled": source(answers.labelled, True),
            "unlabelled": source(answers.unlabelled, False),
            "test": source(answers.test, True),
        },
        "demonstrations": {"source": "labelled", "per_label": answers.per_label},
        "transfer": {"source": "unlabelled"},
        "evaluation": {"test": {"source": "test", "domain": "in"}},
    }
    held = answers.per_label * len(answers.verbalisers)
    for entry in raw["contexts"].values():
        if entry["demonstrations"]:
            balanced = max(1, DEMONSTRATIONS_AT_MOST // len(answers.verbalisers)) * len(answers.verbalisers)
            entry["demonstrations"] = min(held, balanced)
            entry["max_tokens"] = max(1024, entry.get("max_tokens", 0))
    parse_params(raw)
    return raw


def checked(raw: Mapping[str, Any]) -> Params:
    """The params as stages will read them."""
    return parse_params(dict(raw))
