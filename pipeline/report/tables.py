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
from pipeline.report.collect import DOMAINS, Collected, Json, best, comparison, domains_of, ranked_students, sets_of
from pipeline.report.prose import DASH, about, most_answered, number, p_value, percent, plural, points, span

TERMINAL_WIDTH = 100
MOST_LABELS = 12
"""A confusion matrix of more labels is not shown."""
MOST_SLICES = 40
"""Slices shown of each dimension."""


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
    bodies: dict[str, list[Row]] = {titles[kind]: [] for kind in dict.fromkeys(method["kind"] for method in methods.values())}
    groups, columns = [("", 1)], ["Method"]
    for domain in domains:
        members = sets_of(document, domain)
        columns += [*members, "mean"] if len(members) > 1 else members
        groups.append((DOMAINS[domain], len(columns) - sum(width for _, width in groups)))
    for name, method in methods.items():
        row: Row = [Cell(f"`{name}`", about(found, name))]
        for domain in domains:
            members = sets_of(document, domain)
            parts = [{key: own["sets"][where] for key, own in methods.items()} for where in members]
            parts += [{key: own["means"][domain] for key, own in methods.items()}] if len(members) > 1 else []
            for part in parts:
                runs, note = part[name].get("contexts"), span(part[name]["ci95"])
                if runs is not None:
                    seeds = method["kind"] == "student"
                    note += f"; seeds ± {percent(runs['sd'])}" if seeds else f"; contexts {span([runs['worst'], runs['best']])}"
                row.append(Cell(percent(part[name]["accuracy"]), note, _mark(document, name, part)))
        row += ["itself" if name == document["reference"] else percent(method["means"][domain]["agreement"]) for domain in domains]
        bodies[titles[method["kind"]]].append(row)
    caption = "Accuracy in percent; below it the 95 % interval, and the range of a prompt’s contexts or the deviation of a student’s seeds."
    evaluation, drawn = found.params.data.evaluation, found.params.data.transfer.limits
    if seen := [name for name in sets_of(document, "out") if evaluation[name].source in drawn]:
        caption += f" The transfer set has unlabelled texts from the sources of {', '.join(seen)}."
    groups.append((f"Agrees with {document['reference']}", len(domains)))
    return Table("headline", caption, [*columns, *domains], bodies, groups)


def answers(document: Json) -> Table:
    """Free text: methods of each evaluation set, with shares well formed, right, and in agreement with the reference."""
    keys, bodies = ["text", *document["keys"]], dict[str, list[Row]]()
    for where, entry in document["sets"].items():
        for name, method in document["methods"].items():
            own = method["sets"][where]
            shares = [Cell(percent(own[key]), span(own[f"{key}_ci95"])) if key in own else DASH for key in ("well_formed", "accuracy")]
            same = [percent(own["agreement"][key]) if "agreement" in own else "itself" for key in keys]
            bodies.setdefault(f"{where}, {DOMAINS[entry['domain']].lower()}", []).append(
                [f"`{name}`", *shares, *same, number(own["tokens"], 1)]
            )
    caption = f"Agreement is the share that says what {document['reference']} says, word for word and by key, percent."
    columns = ["Method", "well formed, %", "right, %", *keys, "tokens"]
    return Table("answers-table", caption, columns, bodies, [("", 3), ("Agreement", len(keys)), ("", 1)])


def comparisons(document: Json) -> Table | None:
    """Paired differences of each student with the reference and of the best student with every method, with McNemar's exact test.

    Free text is compared by the share of well-formed answers, too.
    """
    bodies: dict[str, list[Row]] = {}
    shares = dict.fromkeys(row.get("what") for row in document["comparisons"])
    for domain, what in ((domain, what) for domain in reversed(domains_of(document)) for what in shares):
        pairs = [(name, document["reference"]) for name in ranked_students(document)]
        pairs += [(top, other) for top in best(document, domain, "student")[:1] for other in document["methods"]]
        title = f"{DOMAINS[domain]}, {plural(len(sets_of(document, domain)), 'set')}" + (f", {what.replace('_', ' ')}" if what else "")
        for one, other in dict.fromkeys(pairs):
            if (row := comparison(document, one, other, domain, what)) is not None:
                counts = [row["only_method_right"], row["only_other_right"]]
                alone = "" if None in counts else f"only {one} right {counts[0]:,}, only {other} {counts[1]:,}"
                interval, verdict = (
                    f"{points(row['ci95'][0])} to {points(row['ci95'][1])}",
                    "different" if row["clear"] else "not told apart",
                )
                cells: Row = [f"`{one} − {other}`", points(row["difference"]), interval, verdict, Cell(p_value(row["mcnemar_p"]), alone)]
                bodies.setdefault(title, []).append(cells)
    columns = ["Difference", "points", "95 % interval", "verdict", "McNemar’s p"]
    return Table("comparisons", "Differences of means over sets, paired by example.", columns, bodies) if bodies else None


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


def confusion(found: Collected, methods: Sequence[str]) -> Table | None:
    """Gold label by predicted label, for some methods side by side; the sets of a domain are pooled."""
    labels, details = found.params.task.labels, {name: detail for name in methods if (detail := found.of("detail", name))}
    bodies: dict[str, list[Row]] = {}
    for domain in domains_of(found.document) if details and len(labels) <= MOST_LABELS else ():
        for gold in labels:
            row: Row = [gold]
            for detail in details.values():
                matrices = [detail["sets"][where]["confusion"][gold] for where in sets_of(found.document, domain)]
                counts = [sum(matrix[label] for matrix in matrices) for label in labels]
                shares = [count / max(1, sum(counts)) for count in counts]
                row += [Cell(percent(share), f"{n:,}", heat=round(share, 2)) for share, n in zip(shares, counts, strict=True)]
            bodies.setdefault(DOMAINS[domain], []).append(row)
    caption = "Of the examples with a gold label (row), the percentage answered with each label (column), and their number."
    groups = [("", 1), *((name, len(labels)) for name in details)]
    return Table("confusion", caption, ["Gold label", *labels * len(details)], bodies, groups) if bodies else None


def slices(found: Collected, methods: Sequence[str]) -> Table | None:
    """Accuracy by slice, pooled over the sets of a domain, for some methods side by side."""
    own = {name: rows for name in methods if (rows := _by_slice(found.of("detail", name)))}
    keys = list(dict.fromkeys(key for rows in own.values() for key in rows))
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
    shown = {title: rows[:MOST_SLICES] for title, rows in bodies.items()}
    groups = [("", 1), *((DOMAINS[domain], 1 + len(own)) for domain in domains)]
    columns, caption = ["Slice", *["examples", *own] * len(domains)], "Accuracy in percent by slice, with its 95 % interval below."
    return Table("slices", caption, columns, shown, groups) if bodies else None


def weakest_slice(found: Collected, method: str) -> Json | None:
    """The slice of at least 20 examples in which a method is least often right."""
    rows = [row for row in _by_slice(found.of("detail", method)).values() if row["n"] >= 20]
    return min(rows, key=lambda row: row["accuracy"], default=None)


def _by_slice(detail: Json) -> dict[tuple[str, str, str], Json]:
    rows = [row for row in detail.get("slices", []) if row["set"] is None and row["dimension"] != "domain"]
    return {(row["dimension"], row["domain"], row["slice"]): row for row in rows}


def print_summary(project: Path = Path(), console: Console | None = None) -> None:
    """Print the headline table of the last report and the page's path, at most 100 columns wide. Single sets are left out if need be.

    Raises UsageError if there is no report, CorruptError if it is damaged.
    """
    folder = project / "report"
    try:
        document = read_json(folder / "metrics.json")
    except FileNotFoundError:
        raise UsageError(f"{folder / 'metrics.json'}: no such file. `dvc repro report` writes it.") from None
    terminal = Console()
    out = console or Console(width=min(TERMINAL_WIDTH, terminal.width) if terminal.is_terminal else TERMINAL_WIDTH, highlight=False)
    columns = _answer_columns(document) if document.get("answers") else _accuracy_columns(document)
    wide = max(map(len, document["methods"])) + sum(max(len(column), 5) + 3 for column in columns) > out.width
    lone = {f"mean {domain}" for domain in domains_of(document) if len(sets_of(document, domain)) == 1}
    columns = {column: values for column, values in columns.items() if column not in (document["sets"] if wide else lone)}
    table = TerminalTable(title="Percent, bold: best of a column", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("method", *columns):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    tops = {column: max(values.values(), default=None) for column, values in columns.items()}
    for name in document["methods"]:
        cells = [Text(percent(values.get(name)), "bold" if values.get(name) == tops[column] else "") for column, values in columns.items()]
        table.add_row(name, *cells)
    out.print(table)
    out.print(Text(f"Report: {folder / 'index.html'}"))


def _accuracy_columns(document: Json) -> dict[str, dict[str, float]]:
    """Column → method → share: accuracy on each set and mean of each domain, agreement with the reference."""
    methods, reference = document["methods"], document["reference"]
    sets = {where: {name: method["sets"][where]["accuracy"] for name, method in methods.items()} for where in document["sets"]}
    means = {
        f"mean {domain}": {name: method["means"][domain]["accuracy"] for name, method in methods.items()} for domain in domains_of(document)
    }
    agrees = {name: fmean(own["agreement"] for own in method["sets"].values()) for name, method in methods.items() if name != reference}
    return {**sets, **means, "agrees": agrees}


def _answer_columns(document: Json) -> dict[str, dict[str, float]]:
    """The same for free text: means of shares over evaluation sets, agreement with the reference."""
    methods = {name: list(method["sets"].values()) for name, method in document["methods"].items()}
    others = {name: [entry["agreement"] for entry in sets] for name, sets in methods.items() if name != document["reference"]}
    columns = {"well formed": ("well_formed", methods), "right": ("accuracy", methods)}
    columns |= {f"same {key}": (key, others) for key in ("text", *document["keys"])}
    return {
        title: {name: fmean(entry[key] for entry in entries) for name, entries in rows.items() if key in entries[0]}
        for title, (key, rows) in columns.items()
    }


def _mark(document: Json, name: str, entries: Mapping[str, Json]) -> str:
    """Best of all, else best of the students; ties are marked alike."""
    values = {key: entry["accuracy"] for key, entry in entries.items()}
    if values[name] == max(values.values()):
        return "best"
    students = [value for key, value in values.items() if document["methods"][key]["kind"] == "student"]
    return "best-student" if document["methods"][name]["kind"] == "student" and values[name] == max(students) else ""
