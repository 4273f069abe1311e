"""`shotless predict`: a student's answers to the rows of a file or of standard input."""

import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from pipeline.commands.students import quiet_libraries, student_folder
from pipeline.errors import UsageError


def predict(
    student: Annotated[str, typer.Option(help="Name of a student, or its folder.")],
    source: Annotated[str, typer.Option("--input", "-i", help="jsonl, csv, tsv or parquet; - is standard input.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="jsonl, csv or parquet; - is standard output.")] = "-",
    input_format: Annotated[str | None, typer.Option(help="Where the suffix does not say it.")] = None,
    output_format: Annotated[str | None, typer.Option(help="Where the suffix does not say it.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, for a column of another name.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to pass through to the output; may be given several times.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Rows answered together; 1 answers line by line.")] = 1024,
    log: Annotated[Path | None, typer.Option(help="Append to this predictions log, for `shotless monitor`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
) -> None:
    """Answer every row: label, confidence, probabilities. A row that cannot be used comes back with an error, and the others go on."""
    folder = student_folder(student)
    quiet_libraries()

    from pipeline.commands.inputs import columns_of, format_of, read_items
    from pipeline.serving.log import PredictionLog
    from pipeline.serving.outputs import OutputFormat, answer_json, check_kept, writing
    from pipeline.serving.predictor import Predictor
    from pipeline.serving.stream import predict_stream

    read_as = format_of(source, input_format, "--input-format")
    write_as = format_of(output, output_format, "--output-format")
    if write_as == "tsv":
        raise UsageError("--output-format: tsv is read, not written; choose one of: csv, jsonl, parquet")
    kept = keep or []
    check_kept(kept)
    predictor = Predictor(folder, threads)
    fields = predictor.task.fields
    items = read_items(source, read_as, fields, columns_of(fields, field or []), kept)
    journal = PredictionLog(log, predictor.student.weights_sha256) if log else None
    rows = bad = 0
    with writing(None if output == "-" else Path(output), cast("OutputFormat", write_as), predictor.labels, kept) as write:
        for answered in predict_stream(predictor, items, window):
            write(answered)
            if journal is not None:
                journal.append((item.fields, answer_json(prediction)) for item, prediction in answered)
            rows += len(answered)
            bad += sum(prediction.error is not None for _, prediction in answered)
    print(f"{rows:,} rows answered by {predictor.student.name}, {bad:,} of them with an error", file=sys.stderr)
