"""`shotless predict`, `serve`, `monitor` and `export`: a student in use."""

import math
import shutil
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.errors import UsageError, choices, need

if TYPE_CHECKING:
    from pipeline.models.held_back import Threshold
    from pipeline.models.trained import Trained
    from pipeline.serving import Predictor
    from pipeline.serving.fallback import Fallback

STUDENTS = Path("artifacts/students")
BEST = Path("artifacts/best.json")


def best_student() -> str:
    """The name of the chosen student (stage `select`), also printed on standard error. Raises UsageError if none was chosen."""
    from pipeline.files import read_json

    known = f"there are: {choices(trained_students())}"
    if not BEST.is_file():
        raise UsageError(f"{BEST}: no such file, so no student is chosen. Run `shotless run`, or give --student; {known}.")
    best = read_json(BEST)
    if best["student"] is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in best["no_candidates"].items())
        raise UsageError(f"{BEST}: no student is chosen ({why}). Give --student; {known}.")
    print(f"{best['student']} is taken, the student that {BEST} names", file=sys.stderr)
    return best["student"]


def trained_students() -> list[str]:
    """The names of this project's students that are trained."""
    return [folder.parent.name for folder in STUDENTS.glob("*/manifest.json")]


Student = Annotated[
    str, typer.Option(default_factory=best_student, show_default=f"that of {BEST}", help="Name of a student, or its folder.")
]
Fields = Annotated[list[str] | None, typer.Option("--field", help="FIELD=COLUMN, for a column of another name.")]
Log = Annotated[Path | None, typer.Option(help="Append to this predictions log, for `shotless monitor`.")]
Agree = Annotated[
    float | None,
    typer.Option(min=0.01, max=0.999, help="Do not answer what would not agree with its teacher in this share of cases."),
]
Right = Annotated[
    float | None,
    typer.Option(min=0.01, max=0.999, help="The same, to be right in this share of cases, as far as --labelled shows it."),
]
Labelled = Annotated[Path | None, typer.Option(help="For --right: a file of labelled texts that the student did not learn from.")]
LabelColumn = Annotated[str, typer.Option("--label", help="Of --labelled; a source's label rule for this column holds.")]
FallbackName = Annotated[
    str | None, typer.Option("--fallback", help="Target set of params.yaml whose teachers answer what the student does not.")
]
MostHandedBack = Annotated[int | None, typer.Option(min=0, help="For --fallback: texts at most; default: no limit.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: one for each core.")]


def student_folder(student: str) -> Path:
    """The folder of a student of this project if it is a name, or of any if it is a path. Raises UsageError naming those there are."""
    if "/" in student:
        return Path(student)
    if student not in (known := trained_students()):
        raise UsageError(f"--student: no student {student!r}; there are: {choices(known)}. `dvc repro` makes them.")
    return STUDENTS / student


def open_student(student: str) -> "Trained":
    """A checked student. Raises MismatchError if it is named, and was trained for another task than that of params.yaml."""
    from pipeline.serving import predictor

    folder = student_folder(student)
    if not predictor.is_exported(folder):
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # transformers' advice is about its own use
    trained = predictor.open_folder(folder)
    if "/" not in student and Path("params.yaml").is_file():
        from pipeline.params import load_params

        trained.check_task(load_params().task)
    return trained


def open_predictor(student: str, threads: int | None, **settings: Any) -> "Predictor":
    """A student that answers; an exported one without torch."""
    from pipeline.serving.predictor import Predictor, is_exported

    if is_exported(student_folder(student)):
        return Predictor(open_student(student), threads, **settings)
    from pipeline.commands.start import quick_start

    with quick_start():
        return Predictor(open_student(student), threads, **settings)


def open_promising(
    student: str,
    threads: int | None,
    agree: float | None,
    right: float | None,
    labelled: Path | None,
    label: str,
    field: Sequence[str] = (),
    **settings: Any,
) -> "Predictor":
    """The same with the threshold that --agree or --right ask for, of which a line on standard error speaks.

    Raises UsageError if options do not go together, or texts do not show as much as is asked for.
    """
    from pipeline.serving.predictor import is_exported

    if (right is None) != (labelled is None) or (right is not None and agree is not None):
        raise UsageError(
            "--right and --labelled go together: how often answers are right takes labelled texts to say. --agree needs neither."
        )
    exported = is_exported(student_folder(student))
    predictor = open_predictor(student, threads, agree=agree, keep_states=right is not None and not exported, **settings)
    if right is not None:
        predictor.threshold = _right_threshold(predictor, right, str(labelled), label, field)
    if (found := predictor.threshold) is not None:
        strange = (
            "no text that is too unlike what it learnt" if found.novelty else "strange texts too: it has no hidden states to tell them by"
        )
        sure = f"what it is at least {found.confidence:.1%} sure of, {found.share:.0%} of the texts that show it"
        print(f"{predictor.student.name} answers {sure}; {strange}", file=sys.stderr)
    return predictor


def open_fallback(name: str | None, most: int | None, predictor: "Predictor", threads: int | None) -> "Fallback | None":
    """The target set that --fallback names. Raises UsageError without a threshold, and as `Fallback` does."""
    if name is None:
        if most is not None:
            raise UsageError("--most-handed-back: nothing is handed back. Name a target set with --fallback.")
        return None
    if predictor.threshold is None:
        raise UsageError("--fallback: without a threshold the student answers all. Set one with --agree or --right.")
    from pipeline.files import Folders
    from pipeline.params import load_params
    from pipeline.serving.fallback import Fallback

    params = load_params()
    runtime = params.runtime.model_copy(update={"threads": threads or params.runtime.threads})
    limit = {} if most is None else {"most": most}
    return Fallback(name, predictor, params.model_copy(update={"runtime": runtime}), Folders.here(), **limit)


def _right_threshold(predictor: "Predictor", right: float, file: str, column: str, field: Sequence[str]) -> "Threshold":
    import numpy as np

    from pipeline.models.held_back import learnt_ids, novelty_of, threshold
    from pipeline.monitor.sample import GOLD, label_rule, with_gold
    from pipeline.params import load_params
    from pipeline.serving.files import columns_of, predict_items, read_items

    params = load_params() if Path("params.yaml").is_file() else None
    items = read_items(file, columns_of(predictor.task.fields, field), {GOLD: column})
    items = (item for item in with_gold(items, label_rule(params, column), predictor, file) if item.kept.get(GOLD) is not None)
    answered = [pair for window in predict_items(predictor, items, 1024) for pair in window if pair[1].error is None]
    learnt, novelty = learnt_ids(predictor.student), novelty_of(predictor.student)
    unseen = [pair for pair in answered if predictor.example(pair[0].fields).example_id not in learnt]
    if not unseen:
        raise UsageError(f"--labelled {file}: no text has a label in {column!r} and was not learnt from. Give other texts.")
    confidence = np.array([found.confidence for _, found in unseen])
    correct = np.array([found.label == item.kept[GOLD] for item, found in unseen])
    distances = None if novelty is None else novelty.distances(np.array([found.state for _, found in unseen]))
    try:
        return threshold(confidence, correct, right, novelty, distances)
    except UsageError as error:
        left = f" (and {len(answered) - len(unseen):,} that it learnt from, which say nothing)" if len(unseen) < len(answered) else ""
        raise UsageError(
            f"--right {right:g}: {file} has {len(unseen):,} labelled texts{left}. {error} Ask for less, or label more."
        ) from None


def predict(
    student: Student,
    source: Annotated[str, typer.Option("--input", "-i", help="A file of examples (docs/data.md); - is standard input.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="jsonl, csv or parquet; - is standard output.")] = "-",
    input_format: Annotated[
        Literal["jsonl", "json", "csv", "tsv", "parquet", "xlsx"] | None, typer.Option(help="If its name does not say it.")
    ] = None,
    output_format: Annotated[Literal["jsonl", "csv", "parquet"] | None, typer.Option(help="If its name does not say it.")] = None,
    field: Fields = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to pass through; NAME=COLUMN gives it another name.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Rows answered together; 1 answers line by line.")] = 1024,
    agree: Agree = None,
    right: Right = None,
    labelled: Labelled = None,
    label: LabelColumn = "label",
    fallback: FallbackName = None,
    most_handed_back: MostHandedBack = None,
    log: Log = None,
    threads: Threads = None,
) -> None:
    """Answer every row: label, confidence, probabilities. A row that cannot be used gets an error. Ends with 1 if no row has an answer."""
    from pipeline.serving import files

    kept, form = files.kept_columns(keep or []), output_format or files.format_of(output, files.WRITTEN)
    predictor = open_promising(student, threads, agree, right, labelled, label, field or [])
    teachers = open_fallback(fallback, most_handed_back, predictor, threads)
    items = files.read_items(source, files.columns_of(predictor.task.fields, field or []), kept, input_format)
    journal = files.PredictionLog(log, predictor.weights_sha256, predictor.threshold) if log else None
    rows, bad, kept_back, first = 0, 0, 0, ""
    more = [*["answered"] * (predictor.threshold is not None), *(files.HANDED_BACK if teachers is not None else ())]
    with files.writing(output, form, predictor.labels, kept, more) as write:
        for answered in files.predict_items(predictor, items, window):
            if teachers is not None:
                given = teachers.answer([(item.fields, prediction) for item, prediction in answered])
                answered = [(item, prediction) for (item, _), prediction in zip(answered, given, strict=True)]
            write(answered)
            if journal is not None:
                journal.append((item.fields, prediction.as_json()) for item, prediction in answered)
            rows, kept_back = rows + len(answered), kept_back + sum(not prediction.answered for _, prediction in answered)
            errors = [(item.line, prediction.error) for item, prediction in answered if prediction.error is not None]
            bad, first = bad + len(errors), first or "".join(f" (line {line}: {error})" for line, error in errors[:1])
    lost = f"; {journal.lost:,} of them are not in {log}" if journal is not None and journal.lost else ""
    print(f"{predictor.student.name}: {rows:,} rows, {bad:,} with an error{first}{lost}", file=sys.stderr)
    if predictor.threshold is not None:
        reached = rows - bad - kept_back
        print(
            f"answered: {reached:,} of {rows:,}, {reached / max(1, rows):.1%}; the others ask for somebody else's answer", file=sys.stderr
        )
    if teachers is not None:
        ends = ", ".join(f"{count:,} {end}" for end, count in teachers.counts.items())
        print(f"handed back to {teachers.name}: {ends}", file=sys.stderr)
    if rows and bad == rows:
        print("No row has an answer. If a field has another column, name it: --field FIELD=COLUMN.", file=sys.stderr)
        raise typer.Exit(1)


def serve(
    student: Student,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 1_000_000,
    max_rows: Annotated[int, typer.Option(min=1, help="Inputs of a request.")] = 256,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a field.")] = 10_000,
    body_seconds: Annotated[float, typer.Option(min=0.001, help="What a client may take to send a request's body.")] = 30.0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of concurrent requests that share a pass.")] = 64,
    waiting_rows: Annotated[int, typer.Option(min=1, help="Rows that may wait before requests are refused with 503.")] = 1024,
    agree: Agree = None,
    right: Right = None,
    labelled: Labelled = None,
    label: LabelColumn = "label",
    fallback: FallbackName = None,
    most_handed_back: MostHandedBack = None,
    log: Log = None,
    threads: Threads = None,
) -> None:
    """Answer over HTTP: POST /predict, GET /health, GET /metrics (Prometheus)."""
    need("serve", "fastapi", "prometheus_client", "starlette", "uvicorn")
    import uvicorn

    if host not in {"127.0.0.1", "::1", "localhost"}:
        print(f"listening on {host}: anyone who reaches it can ask; there is no authentication and no encryption", file=sys.stderr)
    from pipeline.serving.files import PredictionLog
    from pipeline.serving.server import Limits, make_app

    predictor = open_promising(student, threads, agree, right, labelled, label, max_chars=max_chars)
    teachers = open_fallback(fallback, most_handed_back, predictor, threads)
    journal = PredictionLog(log, predictor.weights_sha256, predictor.threshold) if log else None
    limits = Limits(max_body_bytes, max_rows, body_seconds, batch_rows, waiting_rows)
    print(f"{predictor.student.name}: {', '.join(predictor.labels)}; engine {predictor.engine.name}", file=sys.stderr, flush=True)
    uvicorn.run(make_app(predictor, limits, journal, teachers), host=host, port=port, log_level="info", access_log=False, http="h11")


def monitor(
    inputs: Annotated[str, typer.Option(help="New inputs: jsonl, csv, tsv, parquet, or a predictions log.")],
    student: Student,
    labels: Annotated[str | None, typer.Option(help="Column of gold labels; a source's label rule for this column holds.")] = None,
    agree: Annotated[
        float | None, typer.Option(min=0.01, max=0.999, help="Test the answered share too, as with predict --agree; a log has its own.")
    ] = None,
    field: Fields = None,
    reference: Annotated[Path | None, typer.Option(help="A file of inputs to compare with; default: the transfer set.")] = None,
    json_file: Annotated[Path, typer.Option("--json")] = Path("report/monitor.json"),
    page: Annotated[Path, typer.Option("--html")] = Path("report/monitor.html"),
    threads: Threads = None,
) -> None:
    """Test new inputs and the student's answers for drift; hold accuracy and memory against thresholds. Ends with 3 on an alarm."""
    from pipeline.files import Folders, write_json
    from pipeline.models.held_back import Threshold, agreeing, novelty_of
    from pipeline.models.process import peak_rss_bytes
    from pipeline.monitor.drift import corrected, drift_tests
    from pipeline.monitor.sample import GOLD, LEAST_ROWS, answer, label_rule, with_gold, with_shares_of
    from pipeline.monitor.verdict import accuracy_bound, accuracy_test, answered_test, print_table, verdict, write_page
    from pipeline.params import MonitorParams, load_params
    from pipeline.serving.files import columns_of, logged_threshold, read_items
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
    threshold = None if agree is None else agreeing(trained, agree)
    if agree is None and (least := logged_threshold(inputs, predictor.weights_sha256)) is not None:
        threshold = Threshold(least, math.nan, novelty_of(trained))
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
    if threshold is not None and (test := answered_test(trained, threshold, new, settings.smallest_shift)) is not None:
        tests.append(test)
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
    student: Student,
    form: Annotated[Literal["transformers", "onnx"], typer.Option("--format", help="A copy, or a graph.")] = "transformers",
    int8: Annotated[bool, typer.Option("--int8", help="For ONNX: 8-bit integers.")] = False,
    most_changed: Annotated[float, typer.Option(min=0, max=1, help="For ONNX: share of labels that may change.")] = 0.01,
    check: Annotated[Path | None, typer.Option(help="For ONNX: a file of texts to compare on; default: the transfer set.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Write a checked copy of a student that plain `transformers` loads, or an ONNX graph of it and how its answers compare."""
    if form != "onnx" and (int8 or check):
        raise UsageError(f"{'--int8' if int8 else '--check'} is for --format onnx.")
    folder = student_folder(student)
    if output.exists() and (not force or not output.is_dir() or output.resolve() == folder.resolve()):
        raise UsageError(f"{output} exists; name another folder, or replace it with --force.")
    from pipeline.serving.export import copy_student, export_onnx
    from pipeline.serving.predictor import is_exported

    if is_exported(folder):
        raise UsageError(f"{folder}: was exported itself. Give the student's own folder.")
    trained = open_student(student)
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        said = export_onnx(trained, building, int8, most_changed, check) if form == "onnx" else copy_student(trained, building)
        shutil.rmtree(output, ignore_errors=True)
        building.rename(output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    sizes = [file.stat().st_size for file in output.rglob("*") if file.is_file()]
    print(f"{output}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB; {said}")
