"""The report's computed tables as plain data, which a template sets and tests can read; and the table a run ends with on the terminal.

Each function gives one table, or None if there is nothing to show. Cells are formatted text, with names in backticks. A missing number is a
dash, never a guess. A table that only lists a file's entries is made by its template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.files import read_json
from pipeline.report.collect import DOMAINS, Collected, Json, comparison, domains_of, ranked, sets_of
from pipeline.report.prose import DASH, about, most_answered, number, p_value, percent, plural, points, span

MOST_LABELS, MOST_SLICES, COMPARED = 12, 40, 3
"""What is shown at most: labels of a confusion matrix, slices of each dimension, students side by side (the best ones)."""


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller line under it, its mark ("best" of its column or "best-student"), and its shade from 0 to 1."""

    text: str
    note: str = ""
    mark: str = ""
    heat: float | None = None


Row = list[Cell | str]


@dataclass(frozen=True)
class Table:
    """A table with a caption. `bodies`: heading → its rows, whose first cell is the row's header. `groups` are headings over several
    columns: (text, columns).
    """

    name: str
    caption: str
    columns: Sequence[str]
    bodies: Mapping[str, list[Row]]
    groups: Sequence[tuple[str, int]] = ()


def headline(found: Collected) -> Table:
    """Methods × evaluation sets in percent right, with means over domains and agreement with the reference."""
    document, methods, domains = found.document, found.document["methods"], domains_of(found.document)
    titles = {"baseline": "Prompting, no training", "student": "Students, no demonstrations in the prompt"}
    sets = {domain: sets_of(document, domain) for domain in domains}
    places = [[*(("sets", where) for where in own), *[("means", domain)][: len(own) - 1]] for domain, own in sets.items()]
    bodies: dict[str, list[Row]] = {}
    for name, method in methods.items():
        row: Row = [Cell(f"`{name}`", about(found, name))]
        for kind, key in (place for own in places for place in own):
            entry = method[kind][key]
            note, runs = span(entry["ci95"]), entry.get("contexts")
            if runs is not None:
                seeds = method["kind"] == "student"
                note += f"; seeds\u00a0±\u00a0{percent(runs['sd'])}" if seeds else f"; contexts\u00a0{span([runs['worst'], runs['best']])}"
            row.append(Cell(percent(entry["accuracy"]), note, _mark(name, methods, kind, key)))
        row += ["itself" if name == document["reference"] else percent(method["means"][domain]["agreement"]) for domain in domains]
        bodies.setdefault(titles[method["kind"]], []).append(row)
    caption = "Accuracy in percent; below it the 95 % interval, and the range of a prompt’s contexts or the deviation of a student’s seeds."
    evaluation, drawn = found.params.data.evaluation, found.params.data.transfer.limits
    if seen := [name for name in sets_of(document, "out") if evaluation[name].source in drawn]:
        caption += f" The transfer set has unlabelled texts from the sources of {', '.join(seen)}."
    columns = ["Method", *("mean" if kind == "means" else key for own in places for kind, key in own), *domains]
    groups = [("", 1), *((DOMAINS[domain], len(own)) for domain, own in zip(domains, places, strict=True))]
    return Table("headline", caption, columns, bodies, [*groups, (f"Agrees with {document['reference']}", len(domains))])


def _mark(name: str, methods: Mapping[str, Json], kind: str, key: str) -> str:
    """Best of all, else best of the students; ties are marked alike."""
    values = {method: entry[kind][key]["accuracy"] for method, entry in methods.items()}
    if values[name] == max(values.values()):
        return "best"
    students = [value for method, value in values.items() if methods[method]["kind"] == "student"]
    return "best-student" if methods[name]["kind"] == "student" and values[name] == max(students) else ""


def answers(document: Json) -> Table:
    """Free text: methods of each evaluation set, with shares well formed, right, and in agreement with the reference."""
    keys, bodies = ["text", *document["keys"]], dict[str, list[Row]]()
    for where, entry in document["sets"].items():
        rows = bodies[f"{where}, {DOMAINS[entry['domain']].lower()}"] = []
        for name, method in document["methods"].items():
            own = method["sets"][where]
            shares = [Cell(percent(own[key]), span(own[f"{key}_ci95"])) if key in own else DASH for key in ("well_formed", "accuracy")]
            same = [percent(own["agreement"][key]) if "agreement" in own else "itself" for key in keys]
            rows.append([f"`{name}`", *shares, *same, number(own["tokens"], 1)])
    caption = f"Agreement is the percentage of answers that say what {document['reference']} says, word for word and key by key."
    columns = ["Method", "well formed, %", "right, %", *keys, "tokens"]
    return Table("answers-table", caption, columns, bodies, [("", 3), ("Agreement", len(keys)), ("", 1)])


def comparisons(document: Json) -> Table | None:
    """Paired differences of each student with the reference, and of the best with every method; for free text of each share."""
    bodies: dict[str, list[Row]] = {}
    shares = dict.fromkeys(row.get("what") for row in document["comparisons"])
    for domain, what in ((domain, what) for domain in reversed(domains_of(document)) for what in shares):
        pairs = [(name, document["reference"]) for name in ranked(document, "student")]
        pairs += [(top, other) for top in ranked(document, "student", domain)[:1] for other in document["methods"]]
        title = f"{DOMAINS[domain]}, {plural(len(sets_of(document, domain)), 'set')}" + (f", {what.replace('_', ' ')}" if what else "")
        for one, other in dict.fromkeys(pairs):
            if (row := comparison(document, one, other, domain, what)) is not None:
                counts = [row["only_method_right"], row["only_other_right"]]
                alone = "" if None in counts else f"only\u00a0{one}\u00a0right\u00a0{counts[0]:,}, only\u00a0{other}\u00a0{counts[1]:,}"
                interval = f"{points(row['ci95'][0])} to {points(row['ci95'][1])}"
                verdict = "different" if row["clear"] else "not clear"
                cells: Row = [f"`{one} − {other}`", points(row["difference"]), interval, verdict, Cell(p_value(row["mcnemar_p"]), alone)]
                bodies.setdefault(title, []).append(cells)
    columns = ["Difference", "points", "95 % interval", "verdict", "McNemar’s p"]
    return Table("comparisons", "Differences of means over sets, paired by example.", columns, bodies) if bodies else None


def break_even(found: Collected) -> Table | None:
    """Each student's seconds, and after how many predictions they are saved."""
    rows: list[Row] = []
    for name, entry in found.of("runtime", "break-even").get("students", {}).items():
        parts = [part for key in ("capture_seconds", "tuning_seconds", "base_training_seconds") for part in entry.get(key, {}).values()]
        row: Row = [f"`{name}`", number(None if None in parts else sum(parts)), number(entry["training_seconds"])]
        for key in ("one_by_one", "batched"):
            count, saved = entry[key]["predictions"], entry[key]["saved_seconds"] or 0.0
            missed = "never" if saved < 0 else DASH
            row.append(missed if count is None else Cell(f"{count:,}", f"saves {1000 * saved:,.0f} ms each"))
        rows.append(row)
    caption = f"Predictions after which a student has saved the time spent on it, compared with prompting {found.document['reference']}."
    columns = ["Student", "teachers and bases, s", "training, s", "predictions one by one", "predictions in batches"]
    return Table("break-even", caption, columns, {"": rows}) if rows else None


def calibration(found: Collected) -> Table:
    """ECE, log loss, Brier score, macro-F1 and KL of each method, means over a domain's sets; and its most frequent answer."""
    document, domains, compare = found.document, domains_of(found.document), found.files["metrics/compare.json"]["to_reference"]
    keys = {"ECE, %": ("ece", 100, 1), "log loss, nats": ("log_loss", 1, 3), "Brier": ("brier", 1, 3), "macro-F1, %": ("macro_f1", 100, 1)}
    rows: list[Row] = []
    for name, method in document["methods"].items():
        row: Row = [f"`{name}`"]
        for domain in domains:
            members = sets_of(document, domain)
            row += [number(scale * fmean(method["sets"][one][key] for one in members), digits) for key, scale, digits in keys.values()]
            row.append(number(fmean(compare[name][one]["kl_nats"] for one in members), 3) if name in compare else DASH)
        label, where, share = most_answered(method)
        rows.append([*row, Cell(f"{percent(share, 0)} %", f"{label}, {where}")])
    columns = ["Method", *[*keys, "KL, nats"] * len(domains), "most frequent answer"]
    groups = [("", 1), *((DOMAINS[domain], len(keys) + 1) for domain in domains), ("Balance", 1)]
    caption = f"Means over the sets of a domain. KL is KL({document['reference']} ‖ method) of the label probabilities."
    return Table("calibration-table", caption, columns, {"": rows}, groups)


def confusion(found: Collected) -> Table | None:
    """Gold label by predicted label, of the best student and the reference; the sets of a domain are pooled."""
    methods = [*ranked(found.document, "student")[:1], found.document["reference"]]
    labels, details = found.params.task.labels, {name: detail for name in methods if (detail := found.of("detail", name))}
    bodies: dict[str, list[Row]] = {}
    for domain in domains_of(found.document) if details and len(labels) <= MOST_LABELS else ():
        rows = bodies[DOMAINS[domain]] = []
        for gold in labels:
            row: Row = [gold]
            for detail in details.values():
                matrices = [detail["sets"][where]["confusion"][gold] for where in sets_of(found.document, domain)]
                counts = [sum(matrix[label] for matrix in matrices) for label in labels]
                shares = [count / max(1, sum(counts)) for count in counts]
                row += [Cell(percent(share), f"{n:,}", heat=round(share, 2)) for share, n in zip(shares, counts, strict=True)]
            rows.append(row)
    caption = "Of the examples with a gold label (row), the percentage answered with each label (column), and their number."
    groups = [("", 1), *((name, len(labels)) for name in details)]
    return Table("confusion", caption, ["Gold label", *labels * len(details)], bodies, groups) if bodies else None


def slices(found: Collected) -> Table | None:
    """Accuracy by slice, pooled over the sets of a domain, of the best students and the reference."""
    methods = [*ranked(found.document, "student")[:COMPARED], found.document["reference"]]
    own = {name: rows for name in methods if (rows := _by_slice(found, name))}
    keys = dict.fromkeys(key for rows in own.values() for key in rows)
    domains = [domain for domain in DOMAINS if any(key[1] == domain for key in keys)]
    titles = {"label": "By gold label", "length": "By length, in thirds of each set"}
    bodies: dict[str, list[Row]] = {}
    for dimension, name in dict.fromkeys((dimension, name) for dimension, _, name in keys):
        row: Row = [name]
        for domain in domains:
            entries = [rows.get((dimension, domain, name)) for rows in own.values()]
            row.append(number(next((entry["n"] for entry in entries if entry), None)))
            row += [DASH if entry is None else Cell(percent(entry["accuracy"]), span(entry["ci95"])) for entry in entries]
        bodies.setdefault(titles.get(dimension, f"By {dimension}"), []).append(row)
    groups = [("", 1), *((DOMAINS[domain], 1 + len(own)) for domain in domains)]
    columns, caption = ["Slice", *["examples", *own] * len(domains)], "Accuracy in percent by slice, with its 95 % interval below."
    return Table("slices", caption, columns, {title: rows[:MOST_SLICES] for title, rows in bodies.items()}, groups) if bodies else None


def weakest_slice(found: Collected, method: str) -> Json | None:
    """The slice of at least 20 examples in which a method is least often right."""
    rows = [row for row in _by_slice(found, method).values() if row["n"] >= 20]
    return min(rows, key=lambda row: row["accuracy"], default=None)


def _by_slice(found: Collected, method: str) -> dict[tuple[str, str, str], Json]:
    rows = [row for row in found.of("detail", method).get("slices", []) if row["set"] is None and row["dimension"] != "domain"]
    return {(row["dimension"], row["domain"], row["slice"]): row for row in rows}


def print_summary(project: Path = Path(), console: Console | None = None) -> None:
    """Print the means over each domain of the last report, and the page's path.

    Raises UsageError if there is no report, CorruptError if it is damaged.
    """
    folder = project / "report"
    try:
        document = read_json(folder / "metrics.json")
    except FileNotFoundError:
        raise UsageError(f"{folder / 'metrics.json'}: no such file. `dvc repro report` writes it.") from None
    means = {name: method["means"] for name, method in document["methods"].items()}
    titles = {"well_formed": "well formed", "accuracy": "right", "agreement": "agrees"}
    table = TerminalTable(title="Percent, bold: best of a column", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("method", no_wrap=True)
    columns = [(key, domain) for key in titles for domain in domains_of(document) if key in means[document["reference"]][domain]]
    for key, domain in columns:
        table.add_column(f"{titles[key]},\n{DOMAINS[domain].lower()}", justify="right")
    for name, own in means.items():
        tops = [max(other[domain][key] for other in means.values()) for key, domain in columns]
        cells = [(own[domain][key], own[domain][key] == top) for (key, domain), top in zip(columns, tops, strict=True)]
        table.add_row(name, *(Text(percent(value), "bold" if best else "") for value, best in cells))
    out = console or Console(highlight=False)
    out.print(table)
    out.print(Text(f"Report: {folder / 'index.html'}"))
