"""The report's tables as plain data, so that a template sets them and tests can read them; and the table a run ends with on the terminal.

Each function gives one table, or None if there is nothing to show. Cells are formatted text, with names in backticks. A missing number is a
dash, never a guess.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.files import read_json
from pipeline.report.collect import DOMAINS, Collected, Json, best, comparison, domains_of, licence_of, ranked_students, sets_of
from pipeline.report.prose import (
    DASH, about, calibrated, compact, layers, learnt, most_answered, number, p_value, percent, plural, points, scaled, signed, span,
)  # fmt: skip

TERMINAL_WIDTH = 100
MOST_LABELS = 12
"""A confusion matrix of more labels is not shown."""
MOST_SLICES = 40
"""Slices shown of each dimension."""
SPEED_COLUMNS = ("latency, ms", "examples a second, in batches", "peak memory")


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller line under it, its mark ("best" of its column or "best-student"), and its shade from 0 to 1."""

    text: str
    note: str = ""
    mark: str = ""
    heat: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption. `bodies`: heading → its rows, whose first cell is the row's header. `groups` are headings over several columns
    (text, columns), `text_columns` the columns that are set flush left.
    """

    name: str
    caption: str
    columns: list[str]
    bodies: dict[str, list[list[Cell]]]
    groups: Sequence[tuple[str, int]]
    text_columns: Sequence[int]


def headline(found: Collected) -> Table | None:
    """Methods × evaluation sets in percent right, with means over domains and agreement with the reference."""
    document, domains = found.document, domains_of(found.document)
    methods = document["methods"]
    columns, groups = ["Method"], [("", 1)]
    for domain in domains:
        members = sets_of(document, domain)
        columns += [*members, "mean"] if len(members) > 1 else members
        groups.append((DOMAINS[domain], len(columns) - sum(width for _, width in groups)))
    titles = {"baseline": "Prompting, no training", "student": "Students, no demonstrations in the prompt"}
    bodies: dict[str, Any] = {title: [] for title in titles.values()}
    for name, method in methods.items():
        row = [Cell(f"`{name}`", about(found, name))]
        for domain in domains:
            members = sets_of(document, domain)
            parts = [{key: own["sets"][where] for key, own in methods.items()} for where in members]
            parts += [{key: own["means"][domain] for key, own in methods.items()}] if len(members) > 1 else []
            for part in parts:
                mark = _mark(document, name, {key: entry["accuracy"] for key, entry in part.items()})
                runs = part[name].get("contexts")
                range_ = "" if runs is None else f"; {'seeds' if method['kind'] == 'student' else 'contexts'} {span([runs['worst'], runs['best']])}"
                row.append(Cell(percent(part[name]["accuracy"]), span(part[name]["ci95"]) + range_, mark))
        row += [Cell("itself" if name == document["reference"] else percent(method["means"][domain]["agreement"])) for domain in domains]
        bodies[titles[method["kind"]]].append(row)
    caption = "Accuracy in percent, with its 95 % interval below; then the worst and best of a method’s contexts or seeds, whose mean is shown."
    evaluation, drawn = found.params.data.evaluation, found.params.data.transfer.limits
    if seen := [name for name in sets_of(document, "out") if evaluation[name].source in drawn]:
        caption += f" The transfer set has unlabelled texts from the sources of {', '.join(seen)}."
    groups.append((f"Agrees with {document['reference']}", len(domains)))
    return _table("headline", caption, [*columns, *domains], bodies, groups)


def answers(document: Json) -> Table | None:
    """Free text: methods of each evaluation set, with shares well formed, right, and in agreement with the reference."""
    keys = ["text", *document["keys"]]
    bodies: dict[str, Any] = {}
    for where, entry in document["sets"].items():
        for name, method in document["methods"].items():
            own = method["sets"][where]
            shares = [Cell(percent(own[key]), span(own[f"{key}_ci95"])) if key in own else DASH for key in ("well_formed", "accuracy")]
            row = [f"`{name}`", *shares, *(percent(own.get("agreement", {}).get(key)) for key in keys), number(own["tokens"], 1)]
            bodies.setdefault(f"{where}, {DOMAINS[entry['domain']].lower()}", []).append(row)
    caption = f"Answers of each method. Agreement is the share that says what {document['reference']} says, word for word and by key, percent."
    columns = ["Method", "well formed, %", "right, %", *keys, "tokens"]
    return _table("answers-table", caption, columns, bodies, [("", 3), ("Agreement", len(keys)), ("", 1)])


def comparisons(document: Json) -> Table | None:
    """Paired differences of each student with the reference and of the best student with every method, with McNemar's exact test."""
    bodies: dict[str, Any] = {}
    for domain in reversed(domains_of(document)):
        pairs = [(name, document["reference"]) for name in ranked_students(document)]
        pairs += [(top, other) for top in best(document, domain, "student")[:1] for other in document["methods"]]
        for one, other in dict.fromkeys(pairs):
            if (row := comparison(document, one, other, domain)) is not None:
                alone = f"only {one} right {row['only_method_right']:,}, only {other} {row['only_other_right']:,}" if row.get("mcnemar_p") else ""
                told = [f"{points(row['ci95'][0])} to {points(row['ci95'][1])}", "different" if row["clear"] else "not told apart"]
                cells = [f"`{one} − {other}`", points(row["difference"]), *told, Cell(p_value(row.get("mcnemar_p")), alone)]
                bodies.setdefault(f"{DOMAINS[domain]}, {plural(len(sets_of(document, domain)), 'set')}", []).append(cells)
    columns = ["Difference", "points", "95 % interval", "verdict", "McNemar’s p"]
    return _table("comparisons", "Differences in mean accuracy, paired by example.", columns, bodies, text_columns=(0, 3))


def calibration(found: Collected) -> Table | None:
    """ECE, log loss, Brier score, macro-F1 and KL of each method, means over a domain's sets; and its most frequent answer."""
    document, divergence, domains = found.document, found.compare["to_reference"], domains_of(found.document)
    keys = {"ECE, %": ("ece", 100, 1), "log loss, nats": ("log_loss", 1, 3), "Brier": ("brier", 1, 3), "macro-F1, %": ("macro_f1", 100, 1)}
    rows = []
    for name, method in document["methods"].items():
        row: list[Any] = [f"`{name}`"]
        for domain in domains:
            members = sets_of(document, domain)
            row += [number(scale * fmean(method["sets"][one][key] for one in members), digits) for key, scale, digits in keys.values()]
            row.append(number(fmean(divergence[name][one]["kl_nats"] for one in members), 3) if name in divergence else DASH)
        label, where, share = most_answered(method)
        rows.append([*row, Cell(f"{percent(share, 0)} %", f"{label}, {where}")])
    columns = ["Method", *[*keys, "KL, nats"] * len(domains), "most frequent answer"]
    groups = [("", 1), *((DOMAINS[domain], len(keys) + 1) for domain in domains), ("Balance", 1)]
    caption = f"Calibration and balance, means over the sets of a domain. KL is KL({document['reference']} ‖ method) of the label probabilities."
    return _table("calibration-table", caption, columns, {"": rows}, groups)


def cost(found: Collected) -> Table | None:
    """What one answer costs with each method."""
    rows: list[Any] = []
    for name in found.document["methods"]:
        entry = found.cost.get(name, {})
        why = "" if entry else "measured with another model" if name in found.stale_cost else "not measured"
        numbers = [number(entry.get("prompt_tokens")), number(entry.get("forward_passes"))]
        sizes = [scaled(entry.get("parameters")), scaled(entry.get("disk_bytes", entry.get("weights_bytes")), "B")]
        rows.append([Cell(f"`{name}`", why), *numbers, *_speed(entry), *sizes])
    columns = ["Method", "prompt tokens", "passes an example", *SPEED_COLUMNS, "parameters", "size on disk"]
    return _table("cost-table", "Cost of one answer; latency is the median.", columns, {"": rows})


def by_demonstrations(found: Collected) -> Table | None:
    """What a prompt costs by its number of demonstrations, for each model that the reference prompts."""
    rows: list[Any] = []
    for entry in found.cost.get(found.document["reference"], {}).get("by_demonstrations") or []:
        note = "demonstrations are repeated to fill it" if entry.get("repeated") else ""
        note = f"too long: the model takes {entry['too_long_for']:,} tokens" if "too_long_for" in entry else note
        rows.append([Cell(str(entry["demonstrations"]), note), entry["model"], number(entry.get("prompt_tokens")), *_speed(entry)])
    columns = ["Demonstrations", "model", "prompt tokens", *SPEED_COLUMNS]
    return _table("by-demonstrations", "Cost of one model by the length of its prompt.", columns, {"": rows}, text_columns=(0, 1))


def _speed(entry: Json) -> list[Any]:
    p95, rate = entry.get("latency_p95_ms"), (entry.get("throughput") or {}).get("examples_per_second")
    latency = Cell(number(entry.get("latency_ms")), "" if p95 is None else f"p95 {p95:,.0f}")
    return [latency, number(rate, 0 if rate is None or rate >= 10 else 1), scaled(entry.get("peak_rss_bytes"), "B")]


def break_even(found: Collected) -> Table | None:
    """Seconds spent on each student, and after how many predictions they are saved."""

    def won(part: Json) -> Cell:
        saved = part.get("saved_seconds")
        if part.get("predictions") is None:
            return Cell("never" if saved is not None and saved <= 0 else DASH)
        return Cell(f"{part['predictions']:,}", f"saves {1000 * saved:,.0f} ms each")

    rows: list[Any] = []
    for name, entry in (found.break_even.get("students") or {}).items():
        parts = [seconds for key in ("capture_seconds", "tuning_seconds") for seconds in (entry.get(key) or {}).values()]
        spent = [number(None if None in parts else sum(parts)), number(entry.get("training_seconds"))]
        rows.append([f"`{name}`", *spent, *(won(entry.get(key) or {}) for key in ("one_by_one", "batched"))])
    columns = ["Student", "teachers’ tuning and scoring, s", "training, s", "predictions one by one", "predictions in batches"]
    caption = f"After how many predictions a student has saved the time spent on it, compared with prompting {found.document['reference']}."
    return _table("break-even", caption, columns, {"": rows})


def confusion(found: Collected, methods: Sequence[str]) -> Table | None:
    """Gold label by predicted label, for some methods side by side; the sets of a domain are pooled."""
    labels, methods = found.params.task.labels, [name for name in methods if name in found.detail]
    bodies: dict[str, Any] = {}
    for domain in domains_of(found.document) if methods and len(labels) <= MOST_LABELS else ():
        for gold in labels:
            row: list[Any] = [gold]
            for name in methods:
                matrices = [found.detail[name]["sets"][where]["confusion"].get(gold, {}) for where in sets_of(found.document, domain)]
                counts = [sum(matrix.get(label, 0) for matrix in matrices) for label in labels]
                shares = [count / max(1, sum(counts)) for count in counts]
                row += [Cell(percent(share), f"{n:,}", heat=round(share, 2)) for share, n in zip(shares, counts, strict=True)]
            bodies.setdefault(DOMAINS[domain], []).append(row)
    caption = "Of the examples with a gold label (row), the percentage answered with each label (column), and their number."
    groups = [("", 1), *((name, len(labels)) for name in methods)]
    return _table("confusion", caption, ["Gold label", *labels * len(methods)], bodies, groups)


def slices(found: Collected, methods: Sequence[str]) -> Table | None:
    """Accuracy by slice, pooled over the sets of a domain, for some methods side by side."""
    own = {name: _by_slice(found.detail[name]) for name in methods if name in found.detail}
    keys = list(dict.fromkeys(key for rows in own.values() for key in rows))
    domains = [domain for domain in DOMAINS if any(key[1] == domain for key in keys)]
    titles = {"label": "By gold label", "length": "By length, in thirds of each set"}
    bodies: dict[str, Any] = {}
    for dimension, name in dict.fromkeys((dimension, name) for dimension, _, name in keys):
        row: list[Any] = [name]
        for domain in domains:
            entries = [rows.get((dimension, domain, name)) for rows in own.values()]
            row.append(number(next((entry["n"] for entry in entries if entry), None)))
            row += [DASH if entry is None else Cell(percent(entry["accuracy"]), span(entry["ci95"])) for entry in entries]
        bodies.setdefault(titles.get(dimension, f"By {dimension}"), []).append(row)
    groups = [("", 1), *((DOMAINS[domain], 1 + len(own)) for domain in domains)]
    caption, shown = "Accuracy in percent by slice, with its 95 % interval below.", {title: rows[:MOST_SLICES] for title, rows in bodies.items()}
    return _table("slices", caption, ["Slice", *["examples", *own] * len(domains)], shown, groups)


def weakest_slice(found: Collected, method: str) -> Json | None:
    """The slice of at least 20 examples in which a method is least often right."""
    rows = [row for row in _by_slice(found.detail.get(method, {})).values() if row["n"] >= 20]
    return min(rows, key=lambda row: row["accuracy"], default=None)


def _by_slice(detail: Json) -> dict[tuple[str, str, str], Json]:
    rows = [row for row in detail.get("slices", []) if row["set"] is None and row["dimension"] != "domain"]
    return {(row["dimension"], row["domain"], row["slice"]): row for row in rows}


def swaps(found: Collected, students: Sequence[str]) -> Table | None:
    """How often an answer flips if something is swapped that should not matter."""
    bodies: dict[str, Any] = {student: [] for student in students}
    for student, rows in bodies.items():
        for entry in found.risks[student]["swaps"]:
            counts = [Cell(number(entry["with_swap"]), f"of {entry['texts']:,}"), number(entry["asked"]), number(entry["flips"])]
            rate = Cell(percent(entry.get("flip_rate")), span(entry["ci95"]) if entry.get("ci95") else "")
            shifts = [percent(entry.get("mean_shift")), percent(entry.get("largest_shift"))]
            rows.append([Cell(entry["name"].replace("_", " "), entry["what"]), *counts, rate, *shifts])
    columns = ["Swap", "texts with one", "asked again", "answers flipped", "flipped, %", "mean shift, points", "largest shift, points"]
    caption = "A shift is the change in the probability of the answer before the swap. The interval of the share flipped is exact."
    return _table("swaps", caption, columns, bodies)


def gaps(found: Collected, students: Sequence[str]) -> Table | None:
    """The widest gap in accuracy between the slices of each dimension, a student's beside the reference's."""

    def gap(side: Json) -> Cell:
        ends = [f"{end['slice']} {percent(end['accuracy'])}" for end in (side["lowest"], side["highest"])]
        return Cell(points(side["gap"]).lstrip("+"), ", ".join(ends))

    bodies: dict[str, Any] = {student: [] for student in students}
    for student, rows in bodies.items():
        for entry in (entry for entry in found.risks[student]["gaps"] if entry["set"] is None):
            sides = [gap(entry["student"]), gap(entry["reference"])]
            rows.append([entry["dimension"], DOMAINS.get(entry["domain"], "both").lower(), *sides, p_value(entry["p_value"])])
    columns = ["Slices by", "domain", "student’s gap, points", f"{found.document['reference']}’s gap, points", "p of no difference"]
    caption = "Gap in accuracy between the best and the worst slice. p is of a chi-square test that the student is right equally often in all."
    return _table("gaps", caption, columns, bodies, text_columns=(0, 1))


def disagreement(found: Collected, student: str) -> Table | None:
    """How often a student disagrees with the reference, by the student's confidence, and who is right then."""
    bodies: dict[str, Any] = {}
    for part in found.risks[student]["disagreement"]:
        for entry in part["by_student_confidence"]:
            shares = [percent(entry[key]) for key in ("disagreement", "student_accuracy", "reference_accuracy")]
            title = f"{DOMAINS[part['domain']]}: {percent(part['share'])} % of {plural(part['n'], 'example')}"
            bodies.setdefault(title, []).append([f"{percent(entry['low'], 0)}–{percent(entry['high'], 0)} %", number(entry["n"]), *shares])
    reference = found.document["reference"]
    columns = ["Student’s confidence", "examples", "disagrees, %", "student right, %", f"{reference} right, %"]
    return _table("disagreement", f"Disagreement of {student} with {reference} by the student’s confidence.", columns, bodies)


def target_sets(found: Collected) -> Table | None:
    """What each target set is made of, and how far its contexts agree."""
    rows: list[Any] = []
    for name, target in found.params.targets.items():
        teachers = " + ".join(f"{teacher} × {weight:g}" for teacher, weight in target.teachers.items())
        made = [teachers, calibrated(target), target.average.replace("_", " "), f"{target.temperature:g}"]
        entry = found.targets.get(name, {})
        rows.append([f"`{name}`", *made, number(entry.get("rows")), percent(entry.get("agreement"))])
    columns = ["Target set", "teachers × weight", "calibration", "average", "temperature", "rows", "agreement"]
    caption = "What students can learn from. Agreement is the share of the contexts’ weight whose answer is the target’s, percent."
    return _table("targets", caption, columns, {"": rows}, text_columns=(0, 1, 2, 3))


def calibration_shift(found: Collected) -> Table | None:
    """The share of each label answered in each context on the transfer set, raw and calibrated."""
    labels = found.params.task.labels
    bodies: dict[str, Any] = {}
    for name, entry in found.targets.items():
        for teacher, own in entry["teachers"].items():
            for context, change in own["contexts"].items():
                parts = [(change["shares_raw"][label], change["shares_calibrated"][label], change["offset_nats"][label]) for label in labels]
                cells = [text for raw, calibrated, offset in parts for text in (percent(raw), percent(calibrated), signed(offset))]
                bodies.setdefault(name, []).append([f"`{teacher}` · {context}", *cells])
    columns = ["Context", *["raw, %", "calibrated, %", "offset, nats"] * len(labels)]
    groups = [("", 1), *((f"Answers {label}", 3) for label in labels)]
    return _table("shift", "How often each label is answered on the transfer set, before and after calibration.", columns, bodies, groups)


def caches(found: Collected) -> Table | None:
    """What each teacher's score cache keeps, measured on rows that were scored again."""
    rows: list[Any] = []
    for teacher, entry in found.fidelity.items():
        time = found.capture.get(teacher, {})
        timed = time.get("seconds") and time.get("prompt_tokens") and time["rows_timed"] == time["rows"]
        sizes = [found.params.teachers[teacher].cache.encoding.replace("_", " "), number(entry.get("rows")), number(entry.get("bytes_per_row"))]
        nats = [entry.get(key) for key in ("truncation_nats", "quantisation_nats", "kl_to_live_nats")]
        kept = [percent(entry.get("retained_mass")), *(DASH if value is None else f"{value:.2g}".replace("-", "−") for value in nats)]
        speed = number(time["prompt_tokens"] / time["seconds"]) if timed else DASH
        rows.append([f"`{teacher}`", *sizes, *kept, percent(entry.get("gradient_cosine")), number(entry.get("scored_again")), speed])
    lost = ["mass kept, %", "lost to truncation, nats", "lost to rounding, nats", "KL to the live teacher, nats", "cosine of gradients, %"]
    columns = ["Teacher", "encoding", "rows", "bytes a row", *lost, "measured on rows", "prompt tokens/s"]
    caption = "Score caches: one row for each example and context. Prompt tokens a second count a context once for each row."
    return _table("caches", caption, columns, {"": rows}, text_columns=(0, 1))


def students(found: Collected) -> Table | None:
    """How each student was made."""
    rows: list[Any] = []
    for name, student in found.params.students.items():
        entry = found.training.get(name, {})
        made = [student.base, learnt(student), layers(found, name), scaled(entry.get("parameters"))]
        steps = [f"{student.steps:,} × {student.batch_size}", compact(student.learning_rate), number(entry.get("final_loss"), 3)]
        rows.append([f"`{name}`", *made, *steps])
    columns = ["Student", "base", "learns from", "layers", "parameters", "steps × batch", "learning rate", "final loss"]
    return _table("students", "How the students were made.", columns, {"": rows}, text_columns=(0, 1, 2, 3))


def roles(found: Collected) -> Table | None:
    """Which source plays which part, with sizes and the copies of evaluation examples that were kept out."""
    data, rows = found.params.data, list[Any]()
    parts = {"demonstrations": ("demonstrations", data.demonstrations.source), "transfer": ("transfer set", ", ".join(data.transfer.limits))}
    for key, named in parts.items():
        entry = found.prepare.get("roles", {}).get(key, {})
        copies = entry.get("copies_of_evaluation_removed")
        rows.append([*named, number(entry.get("drawn")), number(None if copies is None else sum(copies.values()))])
    for name, entry in found.document["sets"].items():
        rows.append([f"evaluation, {DOMAINS[entry['domain']].lower()}: {name}", data.evaluation[name].source, number(entry["n"]), ""])
    caption = "Which examples go where. Exact and near copies of evaluation examples are kept out of what is learnt from."
    return _table("roles", caption, ["Part", "source", "examples", "copies kept out"], {"": rows}, text_columns=(0, 1))


def sources(found: Collected) -> Table | None:
    """What became of the rows of each source, and its licence."""
    keys = ("left_out_by_label_rule", "exact_repeats_removed", "conflicting_labels_removed", "examples")
    rows: list[Any] = []
    for name, entry in found.prepare.get("sources", {}).items():
        reasons = entry.get("quarantined") or {}
        bad = Cell(number(sum(reasons.values())), ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()))
        licence = licence_of(found.params, found.params.data.sources[name].path)
        rows.append([f"`{name}`", number(entry.get("rows")), bad, *(number(entry.get(key)) for key in keys), licence])
    columns = ["Source", "rows", "quarantined", "no label by the rule", "exact repeats", "conflicting labels", "usable", "licence"]
    return _table("sources", "What became of each source’s rows.", columns, {"": rows}, text_columns=(0, 7))


def quarantined(found: Collected) -> Table | None:
    """The first rows that were set aside, with file, line, field and reason."""
    rows = [[f"`{row['file']}:{row['line']}`", row["field"] or "the row", row["reason"], row["value"]] for row in found.quarantined]
    columns, caption = ["Row", "field", "reason", "value"], "All of them are in artifacts/data/quarantine.jsonl."
    return _table("quarantined", caption, columns, {"": rows}, text_columns=(0, 1, 2, 3))


def print_summary(project: Path = Path(), console: Console | None = None) -> None:
    """Print the headline table of the last report and the page's path, at most 100 columns wide; without the single sets if they do not fit.

    Raises UsageError if there is no report, CorruptError if it is damaged.
    """
    folder = project / "report"
    try:
        document = read_json(folder / "metrics.json")
    except FileNotFoundError:
        raise UsageError(f"{folder / 'metrics.json'}: no such file. `dvc repro report` writes it.") from None
    terminal = Console()
    out = console or Console(width=min(TERMINAL_WIDTH, terminal.width) if terminal.is_terminal else TERMINAL_WIDTH, highlight=False)
    columns = _summary_columns(document)
    if max(map(len, document["methods"])) + sum(max(len(column), 5) + 3 for column in columns) > out.width:
        columns = {column: value for column, value in columns.items() if column not in document["sets"]}
    table = TerminalTable(title="Percent, bold: best of a column", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    values = {name: [value(method) for value in columns.values()] for name, method in document["methods"].items()}
    tops = [max((value for value in column if value is not None), default=None) for column in zip(*values.values(), strict=True)]
    for name, row in values.items():
        bold = ["bold" if value == top else "" for value, top in zip(row, tops, strict=True)]
        table.add_row(Text(name), *(Text(percent(value), style) for value, style in zip(row, bold, strict=True)))
    out.print(table)
    out.print(Text(f"Report: {folder / 'index.html'}"))


def _summary_columns(document: Json) -> dict[str, Callable[[Json], float | None]]:
    """Column → the share it shows of a method; the reference's agreement with itself is left out."""
    reference = document["methods"][document["reference"]]

    def over_sets(key: str, part: str | None = None) -> Callable[[Json], float | None]:
        def value(method: Json) -> float | None:
            found = [entry[key] if part is None else entry[key][part] for entry in method["sets"].values() if key in entry]
            return fmean(found) if found and not (key == "agreement" and method is reference) else None

        return value

    if document.get("answers"):
        shares = {"well formed": over_sets("well_formed"), "right": over_sets("accuracy"), "same text": over_sets("agreement", "text")}
        return shares | {f"same {key}": over_sets("agreement", key) for key in document["keys"]}
    sets = {where: lambda method, where=where: method["sets"][where]["accuracy"] for where in document["sets"]}
    means = {f"mean {domain}": lambda method, domain=domain: method["means"][domain]["accuracy"] for domain in domains_of(document)}
    return sets | means | {"agrees": over_sets("agreement")}


def _table(
    name: str, caption: str, columns: list[str], bodies: Mapping[str, Any], groups: Sequence[tuple[str, int]] = (), text_columns: Sequence[int] = (0,)
) -> Table | None:
    """A table of the bodies that have rows, whose cells may be plain text; None if there is no row."""
    kept = {title: [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows] for title, rows in bodies.items() if rows}
    return Table(name, caption, columns, kept, groups, text_columns) if kept else None


def _mark(document: Json, name: str, values: Mapping[str, float]) -> str:
    """Best of all, else best of the students; ties are marked alike."""
    if values[name] == max(values.values()):
        return "best"
    students = [value for key, value in values.items() if document["methods"][key]["kind"] == "student"]
    return "best-student" if document["methods"][name]["kind"] == "student" and values[name] == max(students) else ""
