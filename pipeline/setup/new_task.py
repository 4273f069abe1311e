"""params.yaml for a user's own files: the present models, teachers, students and so on, with another task and other data.

Everything that a run would check is checked here on the files: labels, lengths, roles, and that demonstrations fit the models. What does
not fit is chosen smaller, and a note says so. What cannot be used is refused, and nothing is written.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.examples import BadValueError, SourceExamples, check_limit, label_text, read_source
from pipeline.data.readers import MissingColumnError, Row, read_rows
from pipeline.data.roles import assign
from pipeline.errors import UsageError, choices
from pipeline.params import Params, SourceParams, TaskParams, parse_params
from pipeline.params.data import DOWNLOADS, FORMATS
from pipeline.schema import Context, Example
from pipeline.task import Task, TaskTokens

MOST_LABELS = 20
DEMONSTRATIONS = 16
"""In a context, if they fit: as many of each label as this allows, and one at least."""
BAD_SHOWN = 3
LONG_SHARE, OUTLIER = 0.01, 4
"""A text is left out if it is this many times as long as all but this share of its file."""
MOST_LEFT_OUT = 20
"""Percent of a file that may be left out."""
BYTES_A_TOKEN = 2
UNKNOWN_LIMIT = 8192
"""For a model that is not there yet: bytes that a token has at least, as a rule, and tokens that the model takes."""
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Answers:
    """What `init` was told."""

    labelled: Path
    unlabelled: Path
    test: Path
    template: str
    verbalisers: Mapping[str, str]
    fields: Mapping[str, str]
    """Template field → column, if they differ."""
    label_column: str
    per_label: int


@dataclass(frozen=True)
class NewTask:
    """Raw params, the same as a run reads them, the usable examples of each source, and lines that say what was found."""

    raw: dict[str, Any]
    params: Params
    sources: dict[str, list[Example]]
    notes: list[str]


def new_task(base: Mapping[str, Any], answers: Answers) -> NewTask:
    """The params for the files of `answers`. Raises UsageError if they cannot be used; the message names the option that helps."""
    parse_params(base)
    try:
        labels = _labels(answers)
        raw = _raw(base, answers, _verbalisers(labels, answers.verbalisers))
        params = parse_params(raw)
        measure = _measure(params)
        read = _read(params)  # without a limit to the length of texts
    except MissingColumnError as missing:
        option = "--label-column" if missing.column == answers.label_column else f"--field {missing.column}=COLUMN"
        raise UsageError(f"{missing.fault} Name the right one with {option}.") from None
    notes = [line for source in read.values() for line in _about(source)]
    notes += _choose_length(raw, Task(params.task), read, measure)
    try:
        notes += _choose_demonstrations(raw, read, measure)
    except UsageError as error:
        raise UsageError(str(error).replace("data.demonstrations.per_label", "--per-label")) from None
    return NewTask(raw, parse_params(raw), {name: source.examples for name, source in read.items()}, notes)


def _labels(answers: Answers) -> list[str]:
    """The labels of the labelled file, sorted. Raises UsageError if a row has several, or there are so many that it is another column."""
    path, column, counts = answers.labelled, answers.label_column, Counter[str]()
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a file's name ends with one of {choices(FORMATS)}; rename it.")
    for read in read_rows(path, SourceParams(path=str(path)).form, [column]):
        try:
            counts[label_text(column, read.values[0]) if isinstance(read, Row) else ""] += 1
        except BadValueError as bad:
            raise UsageError(f"{path}, line {read.line}: {column}: {bad.reason}, found {bad.value!r}.") from None
    del counts[""]
    if not 2 <= len(counts) <= MOST_LABELS:
        raise UsageError(
            f"{path}: column {column!r} has {len(counts)} different values, and a task has 2 to {MOST_LABELS} labels; "
            "name the right column with --label-column."
        )
    return sorted(counts)


def _verbalisers(labels: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Label → verbaliser: what was given, else the label itself in small letters, with a space in front."""
    chosen = {label_text("--verbaliser", label): word for label, word in given.items()}
    if unknown := sorted(set(chosen) - set(labels)):
        raise UsageError(f"--verbaliser {unknown[0]}=…: no such label in the file; there are: {choices(labels)}")
    bare = [label for label in labels if label not in chosen and not any(character.isalpha() for character in label)]
    if bare:
        options = " ".join(f"--verbaliser {label}=WORD" for label in bare)
        raise UsageError(f"label {bare[0]!r} is not a word: say what a model should answer for each of them: {options}")
    words = {label: f" {chosen.get(label, label.lower().replace('_', ' ')).strip()}" for label in labels}
    first: dict[str, str] = {}
    for label, word in words.items():
        if (other := first.setdefault(word.split()[0], label)) != label:
            raise UsageError(
                f"labels {other!r} and {label!r}: their answers begin with the same word, {word.split()[0]!r}, so a model's first token "
                f"cannot tell them apart. Choose others with --verbaliser {label}=WORD."
            )
    return words


def _raw(base: Mapping[str, Any], answers: Answers, words: Mapping[str, str]) -> dict[str, Any]:
    """Raw params: the task and the data of `answers`, and what of `base` has nothing to do with its own task."""

    def source(path: Path, label: dict[str, str] | None) -> dict[str, Any]:
        entry = {"path": str(path), "fields": dict(answers.fields), "label": label}
        return {key: value for key, value in entry.items() if value != {}}

    rule = {} if answers.label_column == "label" else {"column": answers.label_column}
    models = base.get("models") or {}
    used = {model["path"].split("/")[1] for model in models.values() if model["path"].startswith(f"{DOWNLOADS}/")}
    held = answers.per_label * len(words)
    raw: dict[str, Any] = {
        "task": {"template": answers.template.rstrip(" "), "verbalisers": dict(words)},
        "downloads": {name: entry for name, entry in (base.get("downloads") or {}).items() if name in used},
        "models": models,
        "data": {
            "sources": {
                "labelled": source(answers.labelled, rule),
                "unlabelled": source(answers.unlabelled, None),
                "test": source(answers.test, rule),
            },
            "bad_rows_limit": 0.02,
            "demonstrations": {"source": "labelled", "per_label": answers.per_label},
            "transfer": {"source": "unlabelled"},
            "evaluation": {"test": {"source": "test", "domain": "in"}},
        },
        "contexts": {},
    }
    for name, entry in (base.get("contexts") or {}).items():  # an instruction or a length is about the old task
        kept = {key: entry[key] for key in ("count", "vary") if key in entry and entry["demonstrations"]}
        raw["contexts"][name] = {"demonstrations": min(entry["demonstrations"], held), **kept}
    for block in ("tuned", "teachers", "targets", "students", "baselines", "evaluation", "runtime", "monitor"):
        if block in base:
            raw[block] = base[block]
    return raw


def _read(params: Params) -> dict[str, SourceExamples]:
    """Every source as its stage reads it, but for the length of texts. Raises UsageError if too many rows are bad."""
    task = Task(params.task.model_copy(update={"max_chars": 10**12}))
    read = {name: read_source(name, entry, Path(entry.path), task) for name, entry in params.data.sources.items()}
    for source in read.values():
        check_limit(source, params.data.bad_rows_limit)
    return read


def _about(source: SourceExamples) -> Iterator[str]:
    yield f"{source.file}: {source.counts['rows']:,} rows, {len(source.examples):,} texts, {source.bad_rows:,} bad"
    for row in source.quarantine[:BAD_SHOWN]:
        yield f"  line {row.line}: {row.field + ': ' if row.field else ''}{row.reason}"
    if len(source.quarantine) > BAD_SHOWN:
        yield f"  and {len(source.quarantine) - BAD_SHOWN:,} more"


@dataclass(frozen=True)
class Measure:
    """The most tokens that a model of this run makes of each text, and the room that the smallest gives a context, or an input."""

    tokens: Callable[[Sequence[str]], list[int]]
    room: int


def _measure(params: Params) -> Measure:
    """By the tokenizers of the models that are there; others are estimated. Raises UsageError if verbalisers do not suit a tokenizer."""
    folders = [Path("artifacts") / "models" / name for name in params.models]
    there = [folder for folder in folders if folder.is_dir()]
    tokenizers, limits = list[Any](), [UNKNOWN_LIMIT] if len(there) < len(folders) else []
    for folder in there:
        from pipeline.models.folders import context_limit, load_tokenizer  # brings torch

        tokenizers.append(load_tokenizer(folder))
        limits.append(context_limit(folder) or UNKNOWN_LIMIT)
        TaskTokens(Task(params.task), tokenizers[-1])

    def tokens(texts: Sequence[str]) -> list[int]:
        counts = [[len(ids) for ids in tokenizer(list(texts)).input_ids] for tokenizer in tokenizers if texts]
        if len(there) < len(folders):
            counts.append([len(text.encode()) // BYTES_A_TOKEN for text in texts])
        return [max(of_one) for of_one in zip(*counts, strict=True)]

    return Measure(tokens, (min(limits) - ANSWER_TOKENS) // 2)


def _choose_length(raw: dict[str, Any], task: Task, read: Mapping[str, SourceExamples], measure: Measure) -> Iterator[str]:
    """Set `task.max_chars` so that few texts are left out, and all others leave room for a context; take the longer ones out of `read`."""
    texts = {name: {e.example_id: max(map(len, e.fields.values())) for e in source.examples} for name, source in read.items()}
    usual: int = TaskParams.model_fields["max_chars"].default
    ranked = [sorted(own.values()) for own in texts.values() if own]
    longest = max([usual, *(min(own[-1], OUTLIER * own[-1 - int(LONG_SHARE * len(own))]) for own in ranked)])
    for name, source in read.items():
        tokens = measure.tokens([task.query(example.fields) for example in source.examples])
        too_long = [texts[name][e.example_id] - 1 for e, count in zip(source.examples, tokens, strict=True) if count > measure.room]
        longest = min([longest, *too_long])
    if longest != usual:
        raw["task"]["max_chars"] = longest
        yield f"task.max_chars: {longest:,}"
    for name, source in read.items():
        left_out = sum(own > longest for own in texts[name].values())
        if not left_out:
            continue
        source.examples = [example for example in source.examples if texts[name][example.example_id] <= longest]
        yield f"{source.file}: {left_out:,} texts are longer than {longest:,} characters and are left out"
        percent = -(-100 * (source.bad_rows + left_out) // source.counts["rows"])
        if percent > MOST_LEFT_OUT:
            raise UsageError(
                f"{source.file}: {left_out:,} of {source.counts['rows']:,} rows are longer than {longest:,} characters: an input may have "
                f"{measure.room:,} tokens, half of what a model here takes. Shorten the texts, or take a model that takes more."
            )
        raw["data"]["bad_rows_limit"] = max(raw["data"]["bad_rows_limit"], percent / 100)


def _choose_demonstrations(raw: dict[str, Any], read: Mapping[str, SourceExamples], measure: Measure) -> Iterator[str]:
    """Set how many demonstrations contexts have, and how long they may be, so that they fit. Raises UsageError if none do.

    Roles are drawn as `prepare` will draw them, so a file with too few rows, or nothing but copies, is refused here.
    """
    params, contexts = parse_params(raw), [entry for entry in raw["contexts"].values() if entry["demonstrations"]]
    task, data = Task(params.task), params.data
    labels = len(task.labels)
    words = sorted(len(" ".join(example.fields.values()).split()) for example in read["labelled"].examples)
    wanted = max(1, min(DEMONSTRATIONS, max((entry["demonstrations"] for entry in contexts), default=0)) // labels)  # of each label
    share, most = 0, None
    for words_allowed in (None, *(words[len(words) * quarter // 4] for quarter in (3, 2, 1))):
        demonstrations = data.demonstrations.model_copy(update={"max_words": words_allowed})
        try:
            drawn = assign(data.model_copy(update={"demonstrations": demonstrations}), task.labels, read).drawn["demonstrations"]
        except UsageError:
            if words_allowed is None:
                raise
            continue
        one_each = [task.context_text(Context("", "", ((example.fields, example.label or ""),))) for example in drawn]
        fitting = min(wanted, measure.room // (max(measure.tokens(one_each)) * labels)) if contexts else wanted
        if fitting > share:
            share, most = fitting, words_allowed
        if share == wanted:
            break
    if not share:
        raise UsageError(
            f"{read['labelled'].file}: one demonstration of each label has more than {measure.room:,} tokens, half of what a model here "
            "takes. Add shorter labelled texts, or take a model that takes more."
        )
    if most is not None:
        raw["data"]["demonstrations"]["max_words"] = most
        yield f"data.demonstrations.max_words: {most}, so that demonstrations fit"
    for entry in contexts:
        entry["demonstrations"] = min(share, max(1, entry["demonstrations"] // labels)) * labels
        orders, draws = math.factorial(entry["demonstrations"]), math.comb(data.demonstrations.per_label, share) ** labels
        entry["count"] = min(entry.get("count", 1), draws if entry.get("vary") == "draw" else orders)
    yield f"contexts: at most {share * labels} demonstrations"
