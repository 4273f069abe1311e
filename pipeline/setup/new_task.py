"""`shotless init`: params.yaml for a user's own files, with the present models, teachers, students and so on.

On a terminal `ask` completes the options first. Everything that a run would check is checked here on the files: labels, lengths, roles, and
that demonstrations fit the models. What does not fit is chosen smaller or left out, and a note says so.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import typer
from pydantic import ValidationError

from pipeline.data.contexts import build_contexts, different_contexts
from pipeline.data.examples import BadValueError, SourceExamples, check_limit, label_text, read_source, shorten
from pipeline.data.readers import MISSING, BadRow, MissingColumnError, Row, json_keys, source_rows
from pipeline.data.roles import assign, text_of
from pipeline.errors import UsageError, choices
from pipeline.params import DEMONSTRATIONS_FILE, ContextParams, Params, SourceParams, TaskParams, parse_params
from pipeline.params.data import DOWNLOADS, FORMATS, source_entry
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.setup.boundary import fitting_form, load_tokenizers
from pipeline.setup.estimate import cost
from pipeline.setup.format_choice import choose_formats
from pipeline.task import ChatTokens, Task, TaskTokens

ROWS_A_LABEL = 2
"""On average, at least; a column with fewer holds something else than labels."""
LABELS_SHOWN = 12
"""Labels that are listed, and asked for one by one on a terminal."""
WORDS = {
    ("0", "1"): ("no", "yes"),
    ("-1", "0", "1"): ("negative", "neutral", "positive"),
    ("1", "2", "3", "4", "5"): ("terrible", "bad", "okay", "good", "great"),
}
"""What a model might answer for labels that are numbers."""
KEPT = ("servers", "tuned", "teachers", "targets", "students", "baselines", "evaluation", "select", "runtime", "monitor")
"""Blocks of the present params that have nothing to do with its task."""
MANY_LABELS = 20
"""Of more, decoders are left out: each reads the labels behind every text, and of 77 intents these were 139 tokens behind 20 of a text."""
MANY_LABELS_STEPS = 400
"""Of their students, at least: of 77 intents and as many texts, 150 steps are right in 76.2 %, and 400 in 79.8."""
PER_LABEL = 32
"""Labelled examples of a label, at most: teachers answer those in folds too, for which each costs as much as an unlabelled text."""
DEMONSTRATIONS = 16
"""In a context, at most, if they fit: as many of each label, or of more labels than that one of each in several contexts."""
MOST_CONTEXTS = 8
"""In a list, to show every label; each costs the teacher as much as the first."""
PASSES = 3
"""Over the labelled examples, at least, by which a decoder is tuned: of 186, 10 steps are right in 58.4 % and 36 in 73.0."""
ROWS_SHOWN, ROWS_READ = 3, 500  # to show what a file holds, and to guess at its columns
SHOWN_CHARS = 1500
MOST_CUT = 20
"""Percent of a file's texts that may be cut for demonstrations to have half of the room."""
BYTES_A_TOKEN = 2
UNKNOWN_LIMIT = 8192
"""For a model that is not there yet: bytes that a token has at least, as a rule, and tokens that the model takes."""
ANSWER_TOKENS = 32
Tokens = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text."""


@dataclass(frozen=True)
class Answers:
    """What `init` was told."""

    labelled: Path
    unlabelled: Path
    test: Path
    template: str
    verbalisers: Mapping[str, str]
    fields: Mapping[str, str]  # template field → column, if they differ
    label_column: str
    per_label: int | None = None  # None: as many as there are, `PER_LABEL` at most
    all_teachers: bool = False  # of more than `MANY_LABELS` too
    delimiter: str | None = None  # of the text files; None: found by the reader
    encoding: str | None = None


def new_task(base: Mapping[str, Any], answers: Answers) -> tuple[dict[str, Any], list[str]]:
    """Raw params for the files of `answers`, and lines that say what was understood and what a run will cost.

    Raises UsageError if the files or the model cannot be used; the message names the option that helps.
    """
    taught = [name for name, student in parse_params(base).students.items() if student.learn_from.startswith("rounds/")]
    if taught:
        base = {**base, "students": {name: entry for name, entry in base["students"].items() if name not in taught}}
    many = list[str]()
    try:
        counts = label_counts(answers)
        if len(counts) > MANY_LABELS and not answers.all_teachers:
            base, many = _encoders_alone(base, len(counts))
        raw = _raw(base, answers, counts)
        tokenizers = load_tokenizers(parse_params(raw))
        form = fitting_form(parse_params(raw).task, tokenizers.values())
        raw["task"] |= {"template": form.template, "verbalisers": form.verbalisers}
        params = parse_params(raw)
        task = Task(params.task)
        read = {name: read_source(name, entry, Path(entry.path), task) for name, entry in params.data.sources.items()}
    except MissingColumnError as missing:
        option = "--label-column" if missing.column == answers.label_column else f"--field {missing.column}=COLUMN"
        raise UsageError(f"{missing.fault} Name the right one with {option}.") from None
    for source in read.values():
        check_limit(source, params.data.bad_rows_limit)
    tokens = partial(_token_counts, params=params, tokenizers=tokenizers)
    notes = [line for source in read.values() for line in _about(source)]
    notes += many
    notes += [f"students.{name}: left out, since it learns from a round of more texts, and here is no pool of them" for name in taught]
    labels = [f"{label} ({count:,} rows, {form.verbalisers[label]!r})" for label, count in islice(counts.items(), LABELS_SHOWN)]
    notes.append(f"labels: {', '.join(labels)}" + (f" and {len(counts) - len(labels):,} more" if len(counts) > len(labels) else ""))
    if form.template.endswith(" "):
        notes.append("task.template: it ends in a space, since tokenizers begin all answers with a space of its own")
    room = _context_room(read, task, tokens, _room(params, tokenizers), notes)
    try:
        if answers.per_label is None:
            notes += _set_numbers(raw, counts, assign(params.data, task.labels, read).drawn["demonstrations"])
        for name, entry in raw["contexts"].items():
            held = raw["data"]["demonstrations"]["per_label"] * len(form.verbalisers)
            entry["demonstrations"] = min(base["contexts"][name]["demonstrations"], held)
        demonstrations = _choose_demonstrations(raw, read, tokens, room, notes)
    except UsageError as error:
        raise UsageError(str(error).replace("data.demonstrations.per_label", "--per-label")) from None
    notes += _set_tuning_steps(raw, len(demonstrations))
    notes += choose_formats(raw, demonstrations, read["labelled"].examples, tokenizers)
    params, unlabelled = parse_params(raw), read["unlabelled"].examples
    notes += _prompt(params, demonstrations, unlabelled[0], tokenizers)
    return raw, [*notes, cost(params, len(demonstrations), unlabelled, len(read["test"].examples))]


def rows_of(answers: Answers, path: Path, asked: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of a file of `answers`, read as its source will be. Raises UsageError if it is absent or of no known format."""
    try:
        source = SourceParams.model_validate(_source(answers, path, None))
    except ValidationError:
        raise UsageError(f"{path}: a file's name ends with one of {choices(FORMATS)}; rename it.") from None
    if not Path(source.path).exists():
        raise UsageError(f"{path}: no such file.")
    return source_rows(Path(source.path), source, asked)


def columns_of(answers: Answers, path: Path) -> list[str]:
    """The names of a file's columns, or every key of its JSON objects. Raises UsageError if it cannot be read."""
    try:
        next(rows_of(answers, path, ["\0"]), None)  # no column is called so, and what refuses it has the names
    except MissingColumnError as missing:
        return missing.found
    return sorted(json_keys(path))


def label_counts(answers: Answers) -> dict[str, int]:
    """Label → rows of the labelled file, sorted. Raises UsageError if a row has several, or there are so many that it is another column."""
    path, column, counts = answers.labelled, answers.label_column, Counter[str]()
    for read in rows_of(answers, path, [column]):
        try:
            counts[label_text(column, read.values[0]) if isinstance(read, Row) else ""] += 1
        except BadValueError as bad:
            raise UsageError(f"{path}, line {read.line}: {column}: {bad.reason}, found {bad.value!r}.") from None
    if list(counts) == [""] and (keys := columns_of(answers, path)) and column not in keys:
        raise MissingColumnError(path, column, keys)
    del counts[""]
    if len(counts) < 2 or counts.total() < ROWS_A_LABEL * len(counts):
        raise UsageError(
            f"{path}: column {column!r} has {len(counts):,} different values in {counts.total():,} rows, and a task has 2 labels or more, "
            f"with {ROWS_A_LABEL} rows each on average; name the right column with --label-column."
        )
    return dict(sorted(counts.items()))


def _verbalisers(labels: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Label → verbaliser: what was given, else a guess, with a space in front."""
    chosen = {label_text("--verbaliser", label): word for label, word in given.items()}
    if unknown := sorted(set(chosen) - set(labels)):
        raise UsageError(f"--verbaliser {unknown[0]}=…: no such label in the file; there are: {choices(labels)}")
    guesses = word_guesses(labels)
    bare = [label for label in labels if label not in chosen and not any(character.isalpha() for character in label)]
    if bare:
        options = " ".join(f"--verbaliser {label}={guesses[label]}" for label in bare)
        raise UsageError(f"label {bare[0]!r} is not a word: say what a model should answer for each of them, for example: {options}")
    return {label: f" {chosen.get(label, guesses[label]).strip()}" for label in labels}


def word_guesses(labels: Iterable[str]) -> dict[str, str]:
    """Label → what a model might answer for it: the label itself, in small letters, or a word for a number."""
    words = WORDS.get(tuple(sorted(labels)), tuple(label.lower().replace("_", " ") for label in sorted(labels)))
    return dict(zip(sorted(labels), words, strict=True))


def _source(answers: Answers, path: Path, label: dict[str, str] | None) -> dict[str, Any]:
    """A file's raw entry in `data.sources`; `label` is its rule."""
    entry = {**source_entry(str(path), answers.delimiter, answers.encoding), "fields": dict(answers.fields), "label": label and dict(label)}
    return {key: value for key, value in entry.items() if value != {}}


def _raw(base: Mapping[str, Any], answers: Answers, counts: Mapping[str, int]) -> dict[str, Any]:
    """Raw params: the task and the data of `answers`, and what of `base` has nothing to do with its own task."""
    words = _verbalisers(list(counts), answers.verbalisers)
    rule = {} if answers.label_column == "label" else {"column": answers.label_column}
    models = base.get("models") or {}
    used = {model["path"].split("/")[1] for model in models.values() if model["path"].startswith(f"{DOWNLOADS}/")}
    numbers = {"per_label": answers.per_label} if answers.per_label else {"per_label": 1, "most_per_label": PER_LABEL}
    contexts: dict[str, Any] = {}
    for name, entry in (base.get("contexts") or {}).items():  # an instruction or a length is about the old task
        kept = {key: entry[key] for key in ("count", "vary") if key in entry and entry["demonstrations"]}
        contexts[name] = {"demonstrations": min(entry["demonstrations"], numbers["per_label"] * len(words)), **kept}
    return {
        "task": {"template": answers.template, "verbalisers": words},
        "downloads": {name: entry for name, entry in (base.get("downloads") or {}).items() if name in used},
        "models": models,
        "data": {
            "sources": {
                "labelled": _source(answers, answers.labelled, rule),
                "unlabelled": _source(answers, answers.unlabelled, None),
                "test": _source(answers, answers.test, rule),
            },
            "bad_rows_limit": 0.02,
            "demonstrations": {"source": "labelled", **numbers},
            "transfer": {"source": "unlabelled"},
            "evaluation": {"test": {"source": "test", "domain": "in"}},
        },
        "contexts": contexts,
        **{block: base[block] for block in KEPT if block in base},
    }


def _encoders_alone(base: Mapping[str, Any], labels: int) -> tuple[dict[str, Any], list[str]]:
    """`base` with the teachers and students of encoders that are tuned by contrasts, and what needs no others; and what was left out.

    Their contrastive tuning has no steps: at 8 texts of each of 77 intents, 40 steps cost 4 points of the head's accuracy. Students have
    `MANY_LABELS_STEPS`. All of `base` if no such student would be left.
    """
    params = parse_params(base)
    encoders = {params.base_model(tuned.base) for tuned in params.tuned.values() if tuned.tuning == "contrastive"}
    teachers = {name for name, teacher in params.teachers.items() if params.base_model(teacher.model) in encoders}
    targets = {name for name, target in params.targets.items() if teachers.intersection(target.teachers)}
    kept = {
        "models": encoders,
        "tuned": {name for name, tuned in params.tuned.items() if params.base_model(tuned.base) in encoders},
        "teachers": teachers,
        "targets": targets,
        "students": {
            name
            for name, student in params.students.items()
            if params.base_model(student.base) in encoders
            and student.learn_from in {DEMONSTRATIONS_FILE, *(f"targets/{target}" for target in targets)}
        },
        "baselines": {name for name, baseline in params.baselines.items() if baseline.target_set in targets},
        "contexts": {params.teachers[name].contexts for name in teachers},
    }
    if not kept["students"] or params.evaluation.reference not in kept["baselines"]:
        return dict(base), []
    left_out = [f"{block}.{name}" for block in ("teachers", "students") for name in base.get(block, {}) if name not in kept[block]]
    small = {**base, **{block: {name: entry for name, entry in base.get(block, {}).items() if name in kept[block]} for block in kept}}
    for name, target in small["targets"].items():
        own = {
            key: {one: target[key][one] for one in target[key] if one in teachers} for key in ("teachers", "calibrations") if key in target
        }
        small["targets"][name] = {
            key: value for key, value in target.items() if key != "auxiliary_caches"
        } | own  # encoders learn from none
    still = [name for name, tuned in params.tuned.items() if name in kept["tuned"] and tuned.tuning == "contrastive"]
    for name in still:
        small["tuned"][name] = small["tuned"][name] | {"steps": 0}
    quick = [name for name in small["students"] if params.students[name].steps < MANY_LABELS_STEPS and params.students[name].holds_back]
    for name in quick:
        small["students"][name] = small["students"][name] | {"steps": MANY_LABELS_STEPS}
    return small, [
        f"{', '.join(left_out)}: left out, since decoders read {labels} labels behind every text, which is slow; --all-teachers keeps them",
        f"{', '.join(f'tuned.{name}.steps' for name in still)}: 0, since contrastive tuning lowered accuracy on a task of 77 labels",
        *[f"students.{name}.steps: {MANY_LABELS_STEPS}, since many labels take longer to learn" for name in quick],
    ]


def _set_numbers(raw: dict[str, Any], counts: Mapping[str, int], demonstrations: Sequence[Example]) -> Iterator[str]:
    """Set how many `demonstrations` of each label are drawn, in place, and note it if they are not all that the file `counts`."""
    used = Counter(str(example.label) for example in demonstrations)
    least, most = min(used.values()), max(used.values())
    raw["data"]["demonstrations"] = {"source": "labelled", "per_label": least} | ({"most_per_label": most} if most > least else {})
    reasons = list[str]()
    if max(counts.values()) > PER_LABEL:
        reasons.append(f"those above {PER_LABEL} of a label, since judging them takes time (--per-label takes more)")
    if any(used[label] < min(PER_LABEL, count) for label, count in counts.items()):
        reasons.append("copies of each other or of the test's texts, and bad rows")
    if reasons:
        yield f"{sum(counts.values()) - used.total():,} labelled rows are not used: {'; '.join(reasons)}"


def _set_tuning_steps(raw: dict[str, Any], labelled: int) -> Iterator[str]:
    """Let decoders see each labelled example `PASSES` times, in place, and note it."""
    for name, tuned in parse_params(raw).tuned.items():
        if tuned.tuning != "contrastive" and tuned.steps < (enough := -(-PASSES * labelled // tuned.batch_size)):
            raw["tuned"] = raw["tuned"] | {name: raw["tuned"][name] | {"steps": enough}}
            yield f"tuned.{name}.steps: {enough}, so that it sees each labelled text {PASSES} times"


def _about(source: SourceExamples) -> Iterator[str]:
    yield f"{source.file}: {source.counts['rows']:,} rows, {len(source.examples):,} texts, {source.bad_rows:,} bad"
    for example in source.examples[:ROWS_SHOWN]:
        shown = ", ".join(f"{name} {shorten(text)!r}" for name, text in example.fields.items())
        yield f"  line {example.line}: {shown}" + (f", label {example.label!r}" if example.label else "")
    for row in source.quarantine[:ROWS_SHOWN]:
        yield f"  line {row.line}: left out, {row.field + ': ' if row.field else ''}{row.reason}"
    if len(source.quarantine) > ROWS_SHOWN:
        yield f"  and {len(source.quarantine) - ROWS_SHOWN:,} more are left out"


def _prompt(params: Params, demonstrations: Sequence[Example], query: Example, tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """The longest prompt that a teacher sees, with its length in tokens for each model that is there."""
    task, context = Task(params.task), NO_CONTEXT
    if params.contexts:
        name, entry = max(params.contexts.items(), key=lambda item: item[1].demonstrations)
        context = build_contexts(name, entry, task, demonstrations, params.data.seed)[0]
    task, text = replace(task, format=context.format), task.context_text(context) + task.query(query.fields)
    if context.format == "chat":
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in task.messages(context, task.query(query.fields)))
        tokenizers = {name: own for name, own in tokenizers.items() if own.chat_template}
    kind = ChatTokens if context.format == "chat" else TaskTokens
    lengths = {name: len(kind(task, own).prompts(context, [query])[0].ids) for name, own in tokenizers.items()}
    counted = "".join(f", {length:,} tokens for {name}" for name, length in lengths.items())
    yield f"A teacher's prompt, {len(context.demonstrations)} demonstrations{counted}:"
    cut = f"{text[: SHOWN_CHARS // 2]}\n[…]\n{text[-SHOWN_CHARS // 2 :]}" if len(text) > SHOWN_CHARS else text
    yield "\n".join(f"  | {line}" for line in cut.split("\n"))


def _room(params: Params, tokenizers: Collection[str]) -> int:
    """Tokens that every model takes before an answer; what a model that is shown demonstrations and is not there takes is assumed."""
    if not tokenizers:
        return UNKNOWN_LIMIT - ANSWER_TOKENS
    from pipeline.models.folders import context_limit  # brings torch

    limits = {name: context_limit(Path("artifacts") / "models" / name) for name in tokenizers}
    return min(limits.get(name) or UNKNOWN_LIMIT for name in _prompted(params).union(tokenizers)) - ANSWER_TOKENS


def _prompted(params: Params) -> set[str]:
    """The models that are shown demonstrations."""
    shown = [pairs for name, pairs in params.context_models().items() if name and params.contexts[name].demonstrations]
    return {model for pairs in shown for model, _ in pairs}


def _token_counts(texts: Sequence[str], params: Params, tokenizers: Mapping[str, Any]) -> list[int]:
    """The most tokens that a model makes of each text; what one that is shown demonstrations and is not there makes is estimated."""
    counts = [[len(ids) for ids in tokenizer(list(texts)).input_ids] for tokenizer in tokenizers.values() if texts]
    if not counts or _prompted(params).difference(tokenizers):
        counts.append([len(text.encode()) // BYTES_A_TOKEN for text in texts])
    return [max(of_one) for of_one in zip(*counts, strict=True)]


def _context_room(read: Mapping[str, SourceExamples], task: Task, tokens: Tokens, most: int, notes: list[str]) -> int:
    """Tokens for a context: half of the `most` that a model takes, or what nearly all inputs of each file leave, if that is less."""
    sizes = {source.file: np.array(tokens([task.query(e.fields) for e in source.examples])) for source in read.values() if source.examples}
    usual = max((int(np.percentile(own, 100 - MOST_CUT, method="higher")) for own in sizes.values()), default=0)
    room = max(0, min(most // 2, most - usual))
    for file, own in sizes.items():
        if count := int((own > most - room).sum()):
            notes.append(f"{file}: {count:,} texts do not fit behind a context, and are cut there (task.long_texts)")
    return room


def _choose_demonstrations(
    raw: dict[str, Any], read: Mapping[str, SourceExamples], tokens: Tokens, room: int, notes: list[str]
) -> list[Example]:
    """Set how many demonstrations contexts have, how long they may be, so that they fit in `room` tokens, and how many contexts show every
    label; the drawn ones.

    Roles are drawn as `prepare` will draw them, so a file with too few rows, or nothing but copies, is refused here. If no demonstration
    fits, contexts have none.
    """
    params, contexts = parse_params(raw), [entry for entry in raw["contexts"].values() if entry["demonstrations"]]
    task, data = Task(params.task), params.data
    labels = len(task.labels)
    words = [len(text_of(example).split()) for example in read["labelled"].examples]

    def balanced(count: int) -> int:
        return count // labels * labels or count

    wanted = balanced(min(DEMONSTRATIONS, max((entry["demonstrations"] for entry in contexts), default=0)))
    found = list[tuple[int, int | None, list[Example]]]()
    for words_allowed in (None, *map(int, np.quantile(words, (0.75, 0.5, 0.25), method="lower"))):
        demonstrations = data.demonstrations.model_copy(update={"max_words": words_allowed})
        try:
            drawn = assign(data.model_copy(update={"demonstrations": demonstrations}), task.labels, read).drawn["demonstrations"]
        except UsageError:
            if words_allowed is None:
                raise
            continue
        if found and len(drawn) < len(found[0][2]):  # what is too long to be shown may still be learnt
            continue
        one_each = [task.context_text(Context("", "", ((example.fields, example.label or ""),))) for example in drawn]
        found.append((min(wanted, balanced(room // max(tokens(one_each)))), words_allowed, drawn))
        if found[-1][0] == wanted:
            break
    fitting, most, chosen = max(found, key=itemgetter(0))  # the first of these: the longest texts
    if most is not None:
        raw["data"]["demonstrations"]["max_words"] = most
        notes.append(f"data.demonstrations.max_words: {most}, so that demonstrations fit")
    for entry in contexts:
        entry["demonstrations"] = min(fitting, balanced(entry["demonstrations"]))
        covering = min(MOST_CONTEXTS, -(-labels // max(1, entry["demonstrations"])))
        possible = different_contexts(ContextParams.model_validate(entry | {"count": 1}), labels, data.demonstrations.per_label)
        entry["count"] = min(max(entry.get("count", 1), covering), possible)
    why = ", as many as fit beside an input" if fitting < wanted else ""
    why += f", which show the {labels:,} labels between them" if 0 < fitting < labels <= MOST_CONTEXTS * fitting else ""
    if contexts:
        notes.append(f"contexts: at most {fitting} demonstrations{why}; {room:,} tokens are left for them")
    return chosen


# On a terminal


def ask(answers: Answers, *, template: bool, label_column: bool) -> Answers:
    """Complete `answers` on the terminal, each question with a guess; template and label column are asked for if set.

    Raises UsageError if the labelled file cannot be used.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, fields = read_columns(answers), dict(answers.fields)
    table = Table(*columns, title=Text(str(answers.labelled)))
    for values in islice(zip(*columns.values(), strict=True), ROWS_SHOWN):
        table.add_row(*(Text(shorten(value)) for value in values))  # Text: a text's brackets are no markup
    Console().print(table)
    if template:
        usual = answers.template.replace("\n", "\\n")
        answers = replace(answers, template=typer.prompt("Prompt ({text} is the input, \\n a new line)", usual).replace("\\n", "\n"))
    for name in TaskParams.model_construct(template=answers.template).fields:
        if name not in fields:
            fields[name] = name if name in columns else typer.prompt(f"Column of {{{name}}}", guess_text(columns))
    if label_column:
        answers = replace(answers, label_column=typer.prompt("Column of the labels", guess_label(columns, list(fields.values()))))
    counts, words = label_counts(answers), dict(answers.verbalisers)
    for label, guess in word_guesses(counts).items() if len(counts) <= LABELS_SHOWN else ():
        if label not in words:
            words[label] = typer.prompt(f"Label {label!r}, {counts[label]:,} rows: the model answers", guess)
    return replace(answers, verbalisers=words, fields={name: column for name, column in fields.items() if name != column})


def read_columns(answers: Answers) -> dict[str, list[str]]:
    """The columns of the labelled file's first rows, as texts. Raises UsageError if it cannot be read."""
    names = columns_of(answers, answers.labelled)
    read = [row.values for row in islice(rows_of(answers, answers.labelled, names), ROWS_READ) if isinstance(row, Row)]
    return {name: ["" if values[at] is MISSING else str(values[at]) for values in read] for at, name in enumerate(names)}


def guess_text(columns: Mapping[str, Sequence[str]]) -> str:
    """The column of the longest texts, unless one is called so."""
    return "text" if "text" in columns else max(columns, key=lambda name: sum(map(len, columns[name])))


def guess_label(columns: Mapping[str, Sequence[str]], texts: Sequence[str]) -> str:
    """Of the columns that are not `texts` the one with the fewest different values, unless one is called so."""
    different = {name: len(set(values)) for name, values in columns.items() if name not in texts}
    few = [name for name, count in different.items() if 2 <= count <= len(columns[name]) // ROWS_A_LABEL] or list(different)
    return "label" if "label" in columns else min(few, key=lambda name: different[name], default="label")
