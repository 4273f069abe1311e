"""`shotless review`: which texts to label next, and which labels to look at again."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.students import Student, Threads, open_predictor
from pipeline.errors import UsageError, choices


def review(
    student: Student,
    output: Annotated[Path, typer.Option("--output", "-o", help="csv, jsonl or parquet, to fill in the column `label`.")] = Path(
        "todo.csv"
    ),
    most: Annotated[int, typer.Option(min=1, help="Of the texts to label next, and of the suspects.")] = 20,
    threads: Threads = None,
) -> None:
    """Write the texts whose label would teach most, and the labelled ones that every teacher contradicts, as a source to fill in."""
    from pipeline.params import load_params
    from pipeline.serving.files import WRITTEN, format_of

    form, params = format_of(str(output), WRITTEN), load_params()
    if output.exists():
        raise UsageError(f"--output: {output} exists, and may hold labels. Give another name, or remove it.")
    own = ("label", "why", "suggested", "probability", "file", "line")
    predictor = open_predictor(student, threads, keep_states=True)
    if taken := set(own) & set(predictor.task.fields):
        raise UsageError(f"task.template: the field {min(taken)!r} is also a column that review writes; call it something else.")
    name = predictor.student.name
    kind, _, targets = params.students[name].learn_from.partition("/") if name in params.students else ("", "", "")
    if kind != "targets":
        fit = [known for known, entry in params.students.items() if entry.learn_from.startswith("targets/")]
        raise UsageError(f"--student {name}: review asks a student that learnt from a target set of params.yaml: {choices(fit)}.")

    import polars as pl

    from pipeline.data.examples import read_written_source
    from pipeline.files import Folders, replacing
    from pipeline.review import texts_to_review

    folders = Folders.here()
    found = texts_to_review(targets, predictor, most, folders)
    names = {one.example.source for one in found}
    sources = {source: read_written_source(source, params.data.sources[source], predictor.task, folders) for source in names}
    rows = []
    for one in found:
        file, line = sources[one.example.source].place(one.example.line)
        values = (one.example.label, one.why, one.suggested, round(one.probability, 3), file, line)
        rows.append(dict(one.example.fields) | dict(zip(own, values, strict=True)))
    frame = pl.DataFrame(rows, schema_overrides={"label": pl.String}, infer_schema_length=None)
    with replacing(output) as temporary:
        {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[form](temporary)
    doubted = sum(one.why == "suspect" for one in found)
    print(f"{output}: {len(found) - doubted} texts to label next, {doubted} labels to look at again; fill in `label`", file=sys.stderr)
