"""The tables of where results come from: students, target sets, score caches, calibration, sources and their rows."""

from pipeline.report.cells import DOMAIN_TITLE, Cell, Rows, Table, as_float
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import beside, calibrated, gold_weight, layers
from pipeline.report.formatting import DASH, compact, percent, quantity, scaled


def students(inputs: Inputs) -> Table:
    """How each student was made."""
    columns = [
        "Student",
        "base",
        "learns from",
        "layers",
        "parameters",
        "steps × batch",
        "learning rate",
        "weight of gold labels",
        "final loss",
    ]
    rows = []
    for name, student in inputs.params.students.items():
        found = inputs.training.get(name, {})
        from_labels = student.learn_from.startswith("data/")
        rows.append(
            [
                Cell(name, code=True),
                Cell(student.base),
                Cell("demonstrations’ labels" if from_labels else " + ".join([student.learn_from, *beside(student)])),
                Cell(layers(inputs, name)),
                Cell(scaled(found.get("parameters"))),
                Cell(f"{student.steps:,} × {student.batch_size}"),
                Cell(compact(student.learning_rate)),
                Cell("labels alone" if from_labels else f"{gold_weight(student):g}"),
                Cell(quantity(as_float(found.get("final_loss")), digits=3)),
            ]
        )
    return Table("students", "How the students were made.", columns, [Rows("", rows)], text_columns=(0, 1, 2, 3))


def target_sets(inputs: Inputs) -> Table:
    """What each target set is made of, and how far its contexts agree."""
    columns = ["Targets", "teachers × weight", "calibration", "average", "temperature", "rows", "agreement"]
    rows = []
    for name, target in inputs.params.targets.items():
        found = inputs.targets.get(name, {})
        rows.append(
            [
                Cell(name, code=True),
                Cell(" + ".join(f"{teacher} × {weight:g}" for teacher, weight in target.teachers.items())),
                Cell(calibrated(target)),
                Cell(target.average.replace("_", " ")),
                Cell(f"{target.temperature:g}"),
                Cell(quantity(found.get("rows"))),
                Cell(percent(found.get("agreement"))),
            ]
        )
    caption = "What students can learn from. Agreement is the share of the contexts’ weight that answers as the target does, percent."
    return Table("targets", caption, columns, [Rows("", rows)], text_columns=(0, 1, 2, 3))


def caches(inputs: Inputs) -> Table | None:
    """What each teacher's score cache holds of it, by rows that were scored again; None where no teacher has such figures."""
    rows = []
    for teacher, entry in inputs.fidelity.items():
        settings = inputs.params.teachers[teacher].cache
        time = inputs.capture.get(teacher, {})
        seconds, tokens = as_float(time.get("seconds")), as_float(time.get("prompt_tokens"))
        rate = tokens / seconds if tokens and seconds and time.get("rows_timed") == time.get("rows") else None
        rows.append(
            [
                Cell(teacher, code=True),
                Cell(settings.encoding.replace("_", " ")),
                Cell(quantity(entry.get("rows"))),
                Cell(quantity(as_float(entry.get("bytes_per_row")))),
                Cell(percent(entry.get("retained_mass"), 1)),
                Cell(_few_nats(entry.get("truncation_nats"))),
                Cell(_few_nats(entry.get("quantisation_nats"))),
                Cell(_few_nats(entry.get("kl_to_live_nats"))),
                Cell(percent(entry.get("gradient_cosine"), 1)),
                Cell(quantity(rate)),
            ]
        )
    columns = [
        "Teacher", "encoding", "rows", "bytes a row", "mass kept, %", "cut off, nats", "rounded off, nats", "KL to the live teacher, nats",
        "gradient’s cosine, %", "prompt tokens/s",
    ]  # fmt: skip
    again = {entry.get("scored_again") for entry in inputs.fidelity.values()}
    caption = (
        "Score caches: one row for each example and context, written once. "
        f"Fidelity is that of {' or '.join(map(str, sorted(map(int, filter(None, again)))))} rows that were scored again, whole, after the "
        "capture; prompt tokens a second count each context as if it were read anew for each row."
    )
    return Table("caches", caption, columns, [Rows("", rows)], text_columns=(0, 1)) if rows else None


def shift(inputs: Inputs) -> Table | None:
    """What calibration changed on the transfer set: the share of each label answered in each context, raw and calibrated."""
    labels = list(inputs.params.task.verbalisers)
    bodies = []
    for name, found in inputs.targets.items():
        rows = []
        for teacher, entry in found.get("teachers", {}).items():
            for context, change in entry.get("contexts", {}).items():
                raw, calibrated, offset = (change.get(key) or {} for key in ("shares_raw", "shares_calibrated", "offset_nats"))
                row = [Cell(context if context.startswith(teacher) else f"{teacher} · {context}", code=True)]
                for label in labels:
                    row += [Cell(percent(raw.get(label))), Cell(percent(calibrated.get(label))), Cell(_nats(offset.get(label)))]
                rows.append(row)
        if rows:
            bodies.append(Rows(name, rows))
    columns = ["Context", *(title for _ in labels for title in ("raw, %", "calibrated, %", "offset, nats"))]
    groups = [("", 1), *((f"Answers {label}", 3) for label in labels)]
    caption = "How often each label is answered on the transfer set, before and after calibration."
    return Table("shift", caption, columns, bodies, groups) if bodies else None


def sources(inputs: Inputs) -> Table | None:
    """What became of the rows of each source; None where nothing was counted."""
    keys = ("left_out_by_label_rule", "exact_repeats_removed", "conflicting_labels_removed", "examples")
    rows = []
    for name, found in (inputs.prepare or {}).get("sources", {}).items():
        reasons = found.get("quarantined") or {}
        why = ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
        rows.append(
            [
                Cell(name, code=True),
                Cell(quantity(found.get("rows"))),
                Cell(quantity(sum(reasons.values())), why),
                *(Cell(quantity(found.get(key))) for key in keys),
                Cell(inputs.params.data.sources[name].origin.licence if name in inputs.params.data.sources else DASH),
            ]
        )
    columns = ["Source", "rows", "quarantined", "no label by the rule", "exact repeats", "conflicting labels", "usable", "licence"]
    return Table("sources", "What became of each source’s rows.", columns, [Rows("", rows)], text_columns=(0, 7)) if rows else None


def quarantined(inputs: Inputs) -> Table | None:
    """The first rows that were set aside, with file, line, field and reason; None where there is none."""
    rows = [
        [Cell(f"{row['file']}:{row['line']}", code=True), Cell(row["field"] or "the row"), Cell(row["reason"]), Cell(row["value"])]
        for row in inputs.quarantined
    ]
    columns = ["Row", "field", "reason", "value"]
    caption = "All of them are in artifacts/data/quarantine.jsonl."
    return Table("quarantined", caption, columns, [Rows("", rows)], text_columns=(0, 1, 2, 3)) if rows else None


def roles(document: Json, inputs: Inputs) -> Table:
    """Which source plays which part, with sizes and the copies of evaluation examples kept out of it."""
    data, counted = inputs.params.data, (inputs.prepare or {}).get("roles", {})
    rows = []
    for part, key, source in (
        ("demonstrations", "demonstrations", data.demonstrations.source),
        ("transfer set", "transfer", ", ".join(data.transfer.limits)),
    ):
        found = counted.get(key, {})
        copies = found.get("copies_of_evaluation_removed")
        rows.append(
            [Cell(part), Cell(source), Cell(quantity(found.get("drawn"))), Cell(DASH if copies is None else f"{sum(copies.values()):,}")]
        )
    for name, entry in document["sets"].items():
        where = f"evaluation, {DOMAIN_TITLE[entry['domain']].lower()}: {name}"
        rows.append([Cell(where), Cell(data.evaluation[name].source), Cell(quantity(entry["n"])), Cell("")])
    columns = ["Part", "source", "examples", "copies kept out"]
    caption = "Who gets which examples; exact and near copies of evaluation examples are kept out of what is learnt from."
    return Table("roles", caption, columns, [Rows("", rows)], text_columns=(0, 1))


def _few_nats(value: float | None) -> str:
    return DASH if value is None else f"{value:.2g}".replace("-", "−")


def _nats(value: float | None) -> str:
    return DASH if value is None else f"{value:+.2f}".replace("-", "−")
