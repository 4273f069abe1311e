"""`shotless monitor`: do a student's inputs and answers still look like what it was trained on? Exit code 3 where they do not."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.students import quiet_libraries, student_folder
from pipeline.errors import UsageError, choices
from pipeline.models.memory import peak_rss_bytes
from pipeline.params import MonitorParams, Params, load_params

LEAST_ROWS = 20
EVALUATION = Path("artifacts") / "data" / "evaluation"
TRANSFER = Path("artifacts") / "data" / "transfer.parquet"


def monitor(
    inputs: Annotated[str, typer.Option(help="New inputs: jsonl, csv, tsv, parquet, or a predictions log.")],
    student: Annotated[str, typer.Option(help="Name of a student, or its folder.")],
    labels: Annotated[str | None, typer.Option(help="Column with gold labels, where the inputs have one.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, for a column of another name.")] = None,
    reference: Annotated[str | None, typer.Option(help="A file of inputs to compare with; default: the transfer set.")] = None,
    json_file: Annotated[Path, typer.Option("--json")] = Path("report/monitor.json"),
    page: Annotated[Path, typer.Option("--html")] = Path("report/monitor.html"),
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
) -> None:
    """Test new inputs and the student's answers for drift, and hold accuracy and memory against thresholds. Ends with 3 on an alarm."""
    folder = student_folder(student)
    quiet_libraries()

    from rich.console import Console

    from pipeline.files import write_json
    from pipeline.monitor.page import print_table, write_page
    from pipeline.serving.predictor import Predictor

    params = load_params() if Path("params.yaml").is_file() else None
    predictor = Predictor(folder, threads)
    document = _check(predictor, inputs, labels, field or [], reference, params)
    print_table(document, Console())
    write_json(document, json_file)
    write_page(document, page)
    print(f"{json_file}, {page}")
    if document["alarms"]:
        raise typer.Exit(3)


def _check(
    predictor: Any, inputs: str, labels: str | None, mapped: list[str], reference: str | None, params: Params | None
) -> dict[str, Any]:
    from pipeline.monitor.drift import drift_tests, outcomes
    from pipeline.monitor.kpis import Memory, accuracy_bound, accuracy_test
    from pipeline.monitor.verdict import verdict

    settings = params.monitor if params else MonitorParams()
    new, gold, rows, bad = _new_sample(predictor, inputs, labels, mapped, settings)
    peak_mb = peak_rss_bytes() / 1e6
    origin, old = _reference_sample(predictor, reference, mapped, settings)
    unseen = _unseen(predictor, params, old, settings) if params and reference is None else None
    tests = drift_tests(old, new, predictor.labels, settings, unseen)
    if gold is not None:
        domains = {name: entry.domain for name, entry in params.data.evaluation.items()} if params else {}
        bound = accuracy_bound(settings, Path("metrics") / "eval" / f"{predictor.student.name}.json", domains)
        if bound is None:
            raise UsageError("--labels: nothing says how accurate is enough; set monitor.min_accuracy, or evaluate the student.")
        pairs = [(answer, label) for answer, label in zip(new.labels, gold, strict=True) if label is not None]
        if not pairs:
            raise UsageError(f"--labels {labels}: none of the rows that were drawn has a label.")
        tests.append(accuracy_test([answer for answer, _ in pairs], [label for _, label in pairs], bound))
    who = {"name": predictor.student.name, "weights_sha256": predictor.student.weights_sha256}
    found = outcomes(tests, settings.false_alarm_rate)
    limit = params.data.bad_rows_limit if params else 0.02
    memory = Memory(peak_mb, settings.max_memory_mb)
    return verdict(who, (origin, old), (inputs, new, rows, bad), found, memory, settings, limit)


def _new_sample(
    predictor: Any, inputs: str, labels: str | None, mapped: list[str], settings: MonitorParams
) -> tuple[Any, list[str | None] | None, int, int]:
    """The sample to be tested, gold labels of its rows, rows read, rows with an error."""
    items = _items(predictor, inputs, mapped, [labels] if labels else [])
    sample, kept, errors = _answer(predictor, items, settings, inputs)
    gold: list[str | None] | None = None
    if labels:
        gold = [None if item.kept[labels] in {None, ""} else str(item.kept[labels]) for item in kept]
        if unknown := sorted({label for label in gold if label is not None} - set(predictor.labels)):
            raise UsageError(f"--labels {labels}: {inputs} has the label {unknown[0]!r}; the student's are: {choices(predictor.labels)}")
    return sample, gold, len(items), errors


def _reference_sample(predictor: Any, reference: str | None, mapped: list[str], settings: MonitorParams) -> tuple[str, Any]:
    """Where the reference is from, and its sample: kept under the work folder from its first use on."""
    from pipeline.files import sha256_file
    from pipeline.monitor.sample import read_reference, reference_file, write_reference
    from pipeline.files import work_folder

    source = reference or str(TRANSFER)
    if not Path(source).is_file():
        hint = "; `dvc repro prepare` writes it, or name another with --reference" if reference is None else ""
        raise UsageError(f"{source}: no such file to compare with{hint}.")
    known = predictor.student
    file = reference_file(
        work_folder(), known.weights_sha256, known.tokenizer_sha256, sha256_file(Path(source)), settings.max_rows, settings.seed
    )
    if not file.is_file():
        columns = mapped if reference else []
        sample, _, _ = _answer(predictor, _items(predictor, source, columns, []), settings, source)
        write_reference(sample, file)
    return source, read_reference(file)


def _unseen(predictor: Any, params: Params, old: Any, settings: MonitorParams) -> Any:
    """Texts of the evaluation sets in domain, which the student did not learn from; None where there are too few."""
    from pyarrow import parquet

    from pipeline.monitor.sample import with_shares_of

    names = [name for name, entry in params.data.evaluation.items() if entry.domain == "in"]
    files = [EVALUATION / f"{name}.parquet" for name in names]
    enough = [file for file in files if file.is_file() and parquet.read_metadata(file).num_rows >= LEAST_ROWS]
    samples = [_reference_sample(predictor, str(file), [], settings)[1] for file in enough]
    unseen = with_shares_of(old, samples) if samples else None
    return unseen if unseen is not None and len(unseen) >= LEAST_ROWS else None


def sampled(predictor: Any, source: str, settings: MonitorParams) -> Any:
    """The sample that the monitor draws from a file of inputs, with the student's answers."""
    return _answer(predictor, _items(predictor, source, [], []), settings, source)[0]


def _items(predictor: Any, source: str, mapped: list[str], kept: list[str]) -> list[Any]:
    from pipeline.commands.inputs import columns_of, format_of, is_log, read_items, read_log

    form = format_of(source, None, "a suffix", "jsonl")
    if form == "jsonl" and is_log(source):
        return list(read_log(source, kept))
    fields = predictor.task.fields
    return list(read_items(source, form, fields, columns_of(fields, mapped), kept))


def _answer(predictor: Any, items: list[Any], settings: MonitorParams, source: str) -> tuple[Any, list[Any], int]:
    """A sample drawn from the items with its items, and how many of all items cannot be used.

    Items are checked for unusable fields as a whole; those too long for the model are found among the drawn ones only.
    """
    from pipeline.monitor.sample import draw
    from pipeline.progress import progress

    usable = [item for item in items if item.error is None and predictor.fault_of(item.fields) is None]
    texts = ["\n".join(item.fields[name].strip() for name in predictor.task.fields) for item in usable]
    chosen = draw(texts, settings.max_rows, settings.seed)
    with progress(f"answering {source}", len(chosen), "rows") as meter:
        parts = []
        for start in range(0, len(chosen), 128):
            window = [usable[row] for row in chosen[start : start + 128]]
            parts.append(predictor.answer([item.fields for item in window], with_states=True))
            meter.advance(len(window))
    return _sample([texts[row] for row in chosen], [usable[row] for row in chosen], parts, len(items) - len(usable), source)


def _sample(texts: list[str], items: list[Any], parts: list[Any], bad: int, source: str) -> tuple[Any, list[Any], int]:
    import numpy as np

    from pipeline.monitor.sample import Sample

    predictions = [prediction for part in parts for prediction in part.predictions]
    fine = [place for place, prediction in enumerate(predictions) if prediction.error is None]
    if len(fine) < LEAST_ROWS:
        raise UsageError(f"{source}: {len(fine)} usable inputs, and a comparison needs {LEAST_ROWS} at least.")
    ids = [row for part in parts for row in part.ids]
    sample = Sample(
        texts=[texts[place] for place in fine],
        ids=[ids[place] for place in fine],
        labels=[predictions[place].label for place in fine],
        confidence=np.array([predictions[place].confidence for place in fine]),
        states=np.concatenate([part.states for part in parts])[fine].astype(np.float64),
    )
    return sample, [items[place] for place in fine], bad + len(predictions) - len(fine)
