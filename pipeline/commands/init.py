"""`shotless init`: params.yaml for the user's own files, checked on them, with what a full run will cost."""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from pipeline.errors import UsageError
from pipeline.files import replacing
from pipeline.params import Params

ROWS_TRIED = 20
BAD_SHOWN = 3
HEADER = "# Written by `shotless init`; every key is explained in pipeline/params.py, and `shotless check` names what is wrong.\n\n"


def init(
    labelled: Annotated[Path | None, typer.Option(help="A file with texts and labels: demonstrations are drawn from it.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="A file with texts: students learn from the teacher's answers to them.")] = None,
    test: Annotated[Path | None, typer.Option(help="A file with texts and labels that nothing learns from.")] = None,
    template: Annotated[str | None, typer.Option(help=r"The prompt; {text} is the input, \n a new line.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, for a column of another name.")] = None,
    label_column: Annotated[str, typer.Option(help="The column with the labels.")] = "label",
    verbaliser: Annotated[list[str] | None, typer.Option(help="LABEL=WORD: what the model answers for a label.")] = None,
    per_label: Annotated[int, typer.Option(min=1, help="Demonstrations of each label.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file; the old one is kept as params.yaml.old.")] = False,
) -> None:
    """Write params.yaml for your own files, check it on them, and say what a run will cost. A terminal is asked for what is missing."""
    if output.exists() and not force:
        raise UsageError(f"{output} is there, and is not replaced without --force (which keeps the old one as {output}.old).")

    from pipeline.data.readers import MissingColumnError
    from pipeline.setup.newtask import Answers, checked, format_of, labels_in, new_params, verbalisers_for

    labelled = _asked(labelled, "--labelled", "File with labelled texts")
    unlabelled = _asked(unlabelled, "--unlabelled", "File with unlabelled texts")
    test = _asked(test, "--test", "File with labelled texts for the test")
    usual = "Text: {text}\\nLabel:"
    text: str = template or (typer.prompt("Prompt", usual) if sys.stdin.isatty() else usual)
    words_given, fields = _pairs(verbaliser or [], "--verbaliser"), _pairs(field or [], "--field")
    try:
        labels = labels_in(_column(labelled, format_of(labelled), label_column), labelled, label_column)
        words = verbalisers_for(labels, words_given)
        base = _base()
        raw = new_params(base, Answers(labelled, unlabelled, test, text.replace("\\n", "\n"), words, fields, label_column, per_label))
        params = checked(raw)
        counts = _check_files(params)
    except MissingColumnError as missing:
        option = "--label-column" if missing.column == label_column else f"--field {missing.column}=COLUMN"
        raise UsageError(f"{missing.fault} Name the right one with {option}.") from None
    _write(raw, output)
    print(f"{output}: labels {', '.join(f'{label} ({word.strip()})' for label, word in words.items())}")
    _print_cost(params, counts)


def _write(raw: dict[str, Any], output: Path) -> None:
    """Write params, and keep what stood there; where the same stands there, as after asking twice, nothing is touched."""
    yaml = YAML()
    yaml.width = 140
    text = io.StringIO()
    text.write(HEADER)
    yaml.dump(raw, text)
    if output.exists():
        if output.read_text(encoding="utf-8") == text.getvalue():
            return
        output.replace(output.with_name(f"{output.name}.old"))
    with replacing(output) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _asked(given: Path | None, option: str, question: str) -> Path:
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError(f"{option}: missing, and there is no terminal to ask on.")
    return Path(typer.prompt(question))


def _pairs(entries: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{option} {entry}: write it as NAME=VALUE.")
        pairs[key] = value
    return pairs


def _column(path: Path, form: Any, column: str) -> list[Any]:
    from pipeline.data.readers import Row, read_rows
    from pipeline.data.fields import MISSING

    values = [read.values[0] for read in read_rows(path, form, [column]) if isinstance(read, Row)]
    return [None if value is MISSING else value for value in values]


def _base() -> dict[str, Any]:
    """The present params.yaml, whose models, teachers and students stay."""
    file = Path("params.yaml")
    if not file.is_file():
        raise UsageError(
            f"{file}: no such file; run from the project's folder, whose params.yaml says which models and students there are."
        )
    return YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))


def _check_files(params: Params) -> dict[str, list[Any]]:
    """Examples of each source, read as `prepare` will. Raises UsageError where too many rows are bad; prints what was found."""
    from pipeline.data.examples import check_limit, read_source
    from pipeline.task import Task

    found = {}
    for name, source in params.data.sources.items():
        path = Path(source.origin.path)  # type: ignore[union-attr]  init writes local origins alone
        read = read_source(name, source, path, Task(params.task))
        check_limit(read, params.data.bad_rows_limit, Path("artifacts/data/quarantine.jsonl"))
        print(f"{path}: {read.rows:,} rows, {len(read.examples):,} usable, {len(read.bad):,} bad")
        for bad in read.bad[:BAD_SHOWN]:
            print(f"  line {bad.line}: {f'{bad.field}: ' if bad.field else ''}{bad.reason}")
        if len(read.bad) > BAD_SHOWN:
            print(f"  and {len(read.bad) - BAD_SHOWN:,} more")
        found[name] = read.examples
    for label in params.task.verbalisers:
        held = sum(example.label == label for example in found["labelled"])
        if held < params.data.demonstrations.per_label:
            raise UsageError(
                f"--per-label {params.data.demonstrations.per_label}: label {label!r} has {held} usable rows; lower it or add rows."
            )
    return found


def _print_cost(params: Params, found: dict[str, list[Any]]) -> None:
    """Try the teachers' model on a few rows where it is there, and print what a run will cost."""
    name = next(iter(params.models))
    folder = Path("artifacts") / "models" / name
    if not folder.is_dir():
        print(f"Time and memory: {folder} is not fetched yet; `dvc repro fetch`, then the same `shotless init --force` again says it.")
        return

    from pipeline.commands.students import quiet_libraries
    from pipeline.setup.estimate import peak_bytes, stage_count, token_work, total_seconds, try_rows
    from pipeline.task import Task

    quiet_libraries()
    task = Task(params.task)
    rows = [dict(zip(task.fields, example.values, strict=True)) for example in found["unlabelled"][:ROWS_TRIED]]
    trial = try_rows(folder, task, rows, params.runtime.threads)
    work = token_work(params, trial, len(found["unlabelled"]), len(found["test"]))
    rate, length = trial.tokens_per_second, trial.query_tokens
    print(f"{name} on {len(rows)} rows: {rate:,.0f} tokens/s, {length:.0f} tokens a text, engine {trial.engine}")
    for part, tokens in work.items():
        print(f"  {part}: {tokens:,.0f} tokens, about {tokens / trial.tokens_per_second / 60:,.1f} min")
    stages = stage_count(params)
    print(
        f"A full run takes about {total_seconds(work, trial, stages) / 60:,.0f} minutes ({stages} stages) and up to "
        f"{peak_bytes(params, trial) / 1e9:.1f} GB of memory; after it, one more student costs only its own training."
    )
