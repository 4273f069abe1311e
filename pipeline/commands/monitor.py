"""`shotless monitor`: do a student's inputs and answers still look like what it was trained on? Ends with 3 if they do not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.students import STUDENTS, Fields, Student, Threads, open_student
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.monitor.sample import Sample


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
    from pyarrow.parquet import read_metadata

    from pipeline.files import Folders, write_json
    from pipeline.models.machine import peak_rss_bytes
    from pipeline.monitor.drift import drift_tests, outcomes
    from pipeline.monitor.page import print_table, write_page
    from pipeline.monitor.sample import GOLD, LEAST_ROWS, answer, label_rule, with_gold, with_shares_of
    from pipeline.monitor.verdict import accuracy_bound, accuracy_test, verdict
    from pipeline.params import MonitorParams, load_params
    from pipeline.serving.files import columns_of, format_of, read_items
    from pipeline.serving.predictor import Predictor

    params = load_params() if Path("params.yaml").is_file() else None
    settings, folders = params.monitor if params else MonitorParams(), Folders.here()
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()} if params else {}
    source = reference or folders.artifacts / "data" / "transfer.parquet"
    if not source.is_file():
        hint = "" if reference else " `dvc repro prepare` writes it, or name another with --reference."
        raise UsageError(f"{source}: no such file to compare with.{hint}")
    trained = open_student(student)
    is_own = trained.folder.resolve().parent == STUDENTS.resolve()  # a student from elsewhere may have the same name
    bound = accuracy_bound(settings, folders.metrics / "eval" / f"{trained.folder.name}.json" if is_own else None, domains)
    if labels and bound is None:
        raise UsageError("--labels: nothing says how accurate is enough; set monitor.min_accuracy, or evaluate the student.")

    predictor = Predictor(trained, threads, keep_states=True)
    fields, mapped = predictor.task.fields, columns_of(predictor.task.fields, field or [])
    items = read_items(inputs, format_of(inputs, None, "another name"), mapped, {GOLD: labels} if labels else {})
    new = answer(predictor, with_gold(items, label_rule(params, labels), predictor, inputs) if labels else items, inputs, settings)
    peak_mb = peak_rss_bytes() / 1e6

    def own(file: Path) -> "Sample":
        """The sample of one of this project's files, or of the reference that the user named."""
        columns = mapped if reference else columns_of(fields, [])
        return answer(predictor, read_items(str(file), format_of(str(file), None, "another name"), columns, {}), str(file), settings).sample

    old, unseen = own(source), None
    if reference is None:  # the student learnt from the transfer set, and not from the evaluation sets in domain
        files = [folders.artifacts / "data" / "evaluation" / f"{name}.parquet" for name, domain in domains.items() if domain == "in"]
        samples = [own(file) for file in files if file.is_file() and read_metadata(file).num_rows >= LEAST_ROWS]
        unseen = with_shares_of(old, samples) if samples else None
    tests = drift_tests(old, new.sample, predictor.labels, settings, unseen if unseen and len(unseen) >= LEAST_ROWS else None)
    if labels and bound:
        pairs = [(mine, gold) for mine, gold in zip(new.sample.labels, new.gold, strict=True) if gold is not None]
        if not pairs:
            raise UsageError(f"--labels {labels}: none of the rows that were drawn from {inputs} has a label.")
        tests.append(accuracy_test([mine for mine, _ in pairs], [gold for _, gold in pairs], *bound))
    who = {"name": trained.name, "weights_sha256": predictor.weights_sha256}
    limit = params.data.bad_rows_limit if params else 0.02
    document = verdict(who, (str(source), old), new, outcomes(tests, settings.false_alarm_rate), peak_mb, settings, limit)
    print_table(document)
    write_json(document, json_file)
    write_page(document, page)
    print(f"{json_file}, {page}")
    if document["alarms"]:
        raise typer.Exit(3)
