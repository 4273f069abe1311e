"""`shotless predict`, `serve`, `monitor` and `export`: a student in use."""

import shutil
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.start import quick_start
from pipeline.errors import CorruptError, UsageError, choices

if TYPE_CHECKING:
    from pipeline.models.trained import Trained

STUDENTS = Path("artifacts/students")
Student = Annotated[str | None, typer.Option(help="Name of a student, or its folder; by default the only student there is.")]
Fields = Annotated[list[str] | None, typer.Option("--field", help="FIELD=COLUMN, for a column of another name.")]
Log = Annotated[Path | None, typer.Option(help="Append to this predictions log, for `shotless monitor`.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: one for each core.")]


def open_student(student: str | None) -> "Trained":
    """A checked student: of this project and for the task of its params.yaml if it is a name, as it is if it is a path.

    Raises UsageError naming the students there are, MismatchError if one was trained for another task.
    """
    from transformers.utils import logging

    from pipeline.models.trained import open_trained
    from pipeline.params import load_params

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers' advice is about its own use
    if student is not None and "/" in student:
        return open_trained(Path(student))
    known = sorted(folder.parent.name for folder in STUDENTS.glob("*/manifest.json"))
    name = student or (known[0] if len(known) == 1 else "")
    if name not in known:
        fault = f"no student {name!r}" if name else "name one"
        raise UsageError(f"--student: {fault}; there are: {choices(known)}. `dvc repro` makes them.")
    trained = open_trained(STUDENTS / name)
    if Path("params.yaml").is_file():
        trained.check_task(load_params().task)
    return trained


def predict(
    student: Student = None,
    source: Annotated[str, typer.Option("--input", "-i", help="A file of examples (docs/data.md); - is standard input.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="jsonl, csv or parquet; - is standard output.")] = "-",
    input_format: Annotated[
        Literal["jsonl", "json", "csv", "tsv", "xlsx", "parquet"] | None, typer.Option(help="If its name does not say it.")
    ] = None,
    output_format: Annotated[Literal["jsonl", "csv", "parquet"] | None, typer.Option(help="If its name does not say it.")] = None,
    field: Fields = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to pass through; NAME=COLUMN gives it another name.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Rows answered together; 1 answers line by line.")] = 1024,
    log: Log = None,
    threads: Threads = None,
) -> None:
    """Answer every row: label, confidence, probabilities. A row that cannot be used gets an error. Ends with 1 if no row has an answer."""
    with quick_start():
        from pipeline.serving import files
        from pipeline.serving.predictor import Predictor

        kept, form = files.kept_columns(keep or []), output_format or files.format_of(output, files.WRITTEN)
        predictor = Predictor(open_student(student), threads)
    items = files.read_items(source, files.columns_of(predictor.task.fields, field or []), kept, input_format)
    journal = files.PredictionLog(log, predictor.weights_sha256) if log else None
    rows = bad = 0
    with files.writing(output, form, predictor.labels, kept) as write:
        for answered in files.predict_items(predictor, items, window):
            write(answered)
            if journal is not None:
                journal.append((item.fields, prediction.as_json()) for item, prediction in answered)
            rows += len(answered)
            bad += sum(prediction.error is not None for _, prediction in answered)
    lost = f"; {journal.lost:,} of them are not in {log}" if journal is not None and journal.lost else ""
    print(f"{predictor.student.name}: {rows:,} rows, {bad:,} with an error{lost}", file=sys.stderr)
    if rows and bad == rows:
        raise typer.Exit(1)


def serve(
    student: Student = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 1_000_000,
    max_rows: Annotated[int, typer.Option(min=1, help="Inputs of a request.")] = 256,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a field.")] = 10_000,
    body_seconds: Annotated[float, typer.Option(min=0.001, help="What a client may take to send a request's body.")] = 30.0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of concurrent requests that share a pass.")] = 64,
    waiting_rows: Annotated[int, typer.Option(min=1, help="Rows that may wait before requests are refused with 503.")] = 1024,
    log: Log = None,
    threads: Threads = None,
) -> None:
    """Answer over HTTP: POST /predict, GET /health, GET /metrics (Prometheus)."""
    import uvicorn

    if host not in {"127.0.0.1", "::1", "localhost"}:
        print(f"listening on {host}: anyone who reaches it can ask; there is no authentication and no encryption", file=sys.stderr)
    with quick_start():
        from pipeline.serving.files import PredictionLog
        from pipeline.serving.predictor import Predictor
        from pipeline.serving.server import Limits, make_app

        predictor = Predictor(open_student(student), threads, max_chars=max_chars)
    journal = PredictionLog(log, predictor.weights_sha256) if log else None
    limits = Limits(max_body_bytes, max_rows, body_seconds, batch_rows, waiting_rows)
    print(f"{predictor.student.name}: {', '.join(predictor.labels)}; engine {predictor.engine.name}", file=sys.stderr, flush=True)
    uvicorn.run(make_app(predictor, limits, journal), host=host, port=port, log_level="info", access_log=False, http="h11")


def monitor(
    inputs: Annotated[str, typer.Option(help="New inputs: jsonl, csv, tsv, parquet, or a predictions log.")],
    student: Student = None,
    labels: Annotated[str | None, typer.Option(help="Column of gold labels; a source's label rule for this column holds.")] = None,
    field: Fields = None,
    reference: Annotated[Path | None, typer.Option(help="A file of inputs to compare with; default: the transfer set.")] = None,
    json_file: Annotated[Path, typer.Option("--json")] = Path("report/monitor.json"),
    page: Annotated[Path, typer.Option("--html")] = Path("report/monitor.html"),
    threads: Threads = None,
) -> None:
    """Test new inputs and the student's answers for drift; hold accuracy and memory against thresholds. Ends with 3 on an alarm."""
    from pipeline.files import Folders, write_json
    from pipeline.models.machine import peak_rss_bytes
    from pipeline.monitor.drift import corrected, drift_tests
    from pipeline.monitor.sample import GOLD, LEAST_ROWS, answer, label_rule, with_gold, with_shares_of
    from pipeline.monitor.verdict import accuracy_bound, accuracy_test, print_table, verdict, write_page
    from pipeline.params import MonitorParams, load_params
    from pipeline.serving.files import columns_of, read_items
    from pipeline.serving.predictor import Predictor

    params = load_params() if Path("params.yaml").is_file() else None
    settings, folders = params.monitor if params else MonitorParams(), Folders.here()
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()} if params else {}
    usual = reference or folders.artifacts / "data" / "transfer.parquet"
    if not usual.is_file():
        raise UsageError(f"{usual}: no such file to compare with. `dvc repro prepare` writes the transfer set; --reference names another.")
    trained = open_student(student)
    is_own = trained.folder.resolve().parent == STUDENTS.resolve()  # a student from elsewhere may have the same name
    bound = accuracy_bound(settings, folders.metrics / "eval" / f"{trained.folder.name}.json" if is_own else None, domains)
    if labels and bound is None:
        raise UsageError("--labels: nothing says how accurate is enough; set monitor.min_accuracy, or evaluate the student.")

    predictor = Predictor(trained, threads, keep_states=True)
    fields, mapped = columns_of(predictor.task.fields, []), columns_of(predictor.task.fields, field or [])
    items = read_items(inputs, mapped, {GOLD: labels} if labels else {})
    if labels:
        items = with_gold(items, label_rule(params, labels), predictor, inputs)
    new = answer(predictor, items, inputs, settings)
    peak_mb = peak_rss_bytes() / 1e6
    old = answer(predictor, read_items(str(usual), mapped if reference else fields, {}), str(usual), settings)
    unseen = None
    if reference is None:  # the student learnt from the transfer set, and not from the evaluation sets in domain
        files = [folders.artifacts / "data" / "evaluation" / f"{name}.parquet" for name, domain in domains.items() if domain == "in"]
        rows = chain.from_iterable(read_items(str(file), fields, {}) for file in files if file.is_file())
        unseen = with_shares_of(old, answer(predictor, rows, "evaluation sets in domain", settings, least=0))
    tests = drift_tests(old, new, predictor.labels, settings, unseen if unseen and len(unseen) >= LEAST_ROWS else None)
    if labels and bound:
        tests.append(accuracy_test(new, *bound))
    tests = corrected(tests, settings.false_alarm_rate)
    document = verdict(predictor, old, new, tests, peak_mb, settings, params.data.bad_rows_limit if params else 0.02)
    print_table(document)
    write_json(document, json_file)
    write_page(document, page)
    print(f"{json_file}, {page}")
    if document["alarms"]:
        raise typer.Exit(3)


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    student: Student = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Write a checked copy of a student that plain `transformers` loads, with no weight that is not finite."""
    import torch
    from safetensors.torch import load_file

    from pipeline.files import MANIFEST, check_manifest

    trained = open_student(student)
    source = trained.folder
    if output.exists() and (not force or not output.is_dir() or output.resolve() == source.resolve()):
        raise UsageError(f"{output} exists; name another folder, or replace it with --force.")
    dtypes = Counter[str]()
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise CorruptError(f"{file}: {name} has numbers that are not finite; train the student again.")
            dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    names = [name for name in (*trained.manifest["files"], MANIFEST, "README.md") if (source / name).is_file()]
    for name in names:
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, building / name)  # not the mode: weights are saved for their owner alone
    check_manifest(building)
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    megabytes = sum((output / name).stat().st_size for name in names) / 1e6
    tensors = f"{dtypes.total()} tensors ({', '.join(sorted(dtypes))})"
    print(f"{output}: {tensors}, {len(names)} files, {megabytes:,.1f} MB; all weights are finite")
