"""The report's computed tables as plain data, which a template sets and tests can read; and the table a run ends with on the terminal.

Cells are formatted text, with names in backticks; a missing number is a dash. A table that only lists a file's entries is made by its
template.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.files import read_json
from pipeline.params import Params
from pipeline.report.collect import DOMAINS, PROMISES, Collected, Json, comparison, domains_of, ranked, sets_of, surest_first
from pipeline.report.prose import DASH, about, most_answered, number, p_value, percent, plural, points, span

MOST_LABELS, MOST_CONFUSIONS, MOST_SLICES, COMPARED = 12, 20, 40, 3
"""What is shown at most: labels of a confusion matrix, else confusions; slices of each dimension; students side by side (the best ones)."""
LABEL_SCORES = {"precision": "precision", "recall": "recall", "f1": "F1", "average_precision": "AP"}
UNEVEN = 0.4  # least share of either of two labels whose shares are alike
Counts = npt.NDArray[np.int64]


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
    """A table with a caption. `bodies`: heading → its rows, whose first cell is the row's header."""

    name: str
    caption: str
    columns: Sequence[str]
    bodies: Mapping[str, list[Row]]
    groups: Sequence[tuple[str, int]] = ()  # headings over several columns: (text, columns)


def headline(found: Collected) -> Table:
    """Methods × evaluation sets in percent right, with means over domains and agreement with the reference."""
    document, methods, domains = found.document, found.document["methods"], domains_of(found.document)
    titles = {"baseline": "Baselines", "student": "Students, no demonstrations in the prompt"}
    sets = {domain: sets_of(document, domain) for domain in domains}
    places = [[*(("sets", where) for where in own), *[("means", domain)][: len(own) - 1]] for domain, own in sets.items()]
    bodies: dict[str, list[Row]] = {}
    for name, method in methods.items():
        row: Row = [Cell(f"`{name}`", ("chosen; " if name == document["chosen"] else "") + about(found, name))]
        for kind, key in chain.from_iterable(places):
            entry, student = method[kind][key], method["kind"] == "student"
            note = span(entry["ci95"])
            if (runs := entry.get("contexts")) is not None:
                ends = f"seeds\u00a0±\u00a0{percent(runs['sd'])}" if student else f"contexts\u00a0{span([runs['worst'], runs['best']])}"
                note = f"{note}; {ends}"
            values = [(own[kind][key]["accuracy"], own["kind"] == "student") for own in methods.values()]
            marks = {max(value for value, of_student in values if of_student): "best-student"} if student else {}
            marks[max(values)[0]] = "best"  # ties are marked alike
            row.append(Cell(percent(entry["accuracy"]), note, marks.get(entry["accuracy"], "")))
        row += ["itself" if name == document["reference"] else percent(method["means"][domain]["agreement"]) for domain in domains]
        bodies.setdefault(titles[method["kind"]], []).append(row)
    caption = "Accuracy in percent; below it the 95 % interval, and the range of a prompt’s contexts or the deviation of a student’s seeds."
    data = found.params.data
    drawn = data.transfer.limits | (data.pool.limits if data.pool else {})
    if seen := [name for name in sets_of(document, "out") if data.evaluation[name].source in drawn]:
        pool = " and the pool have" if data.pool else " has"
        caption += f" The transfer set{pool} unlabelled texts from the sources of {', '.join(seen)}."
    columns = ["Method", *("mean" if kind == "means" else key for kind, key in chain.from_iterable(places)), *domains]
    groups = [("", 1), *((DOMAINS[domain], len(own)) for domain, own in zip(domains, places, strict=True))]
    return Table("headline", caption, columns, bodies, [*groups, (f"Agrees with {document['reference']}", len(domains))])


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
    columns, groups = ["Method", "well formed, %", "right, %", *keys, "tokens"], [("", 3), ("Agreement", len(keys)), ("", 1)]
    return Table("answers-table", caption, columns, bodies, groups)


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
                alone, other_alone = row["only_method_right"], row["only_other_right"]
                note = "" if alone is None else f"only\u00a0{one}\u00a0right\u00a0{alone:,}, only\u00a0{other}\u00a0{other_alone:,}"
                cells: Row = [f"`{one} − {other}`", points(row["difference"]), f"{points(row['ci95'][0])} to {points(row['ci95'][1])}"]
                cells += ["different" if row["clear"] else "not clear", Cell(p_value(row["mcnemar_p"]), note)]
                bodies.setdefault(title, []).append(cells)
    columns = ["Difference", "points", "95 % interval", "verdict", "McNemar’s p"]
    return Table("comparisons", "Differences of means over sets, paired by example.", columns, bodies) if bodies else None


def break_even(found: Collected) -> Table:
    """What each student cost: the answers of its teachers, tuning the models that are tuned, training; and after how many
    predictions it has saved that time against the reference. People's time, downloads and evaluation are not counted.
    """
    rows, reference = list[Row](), found.document["reference"]
    for name in found.params.students:
        entry, costs = f"students/{name}", [found.of("cost", method) for method in (reference, name)]
        before, training = math.fsum(_seconds(found, maker) for maker in makers(entry, found.params) - {entry}), _seconds(found, entry)
        row: Row = [f"`{name}`", number(before), number(training)]
        one_by_one = [cost["latency_ms"] / 1000 if cost else math.nan for cost in costs]
        batched = [1 / cost["throughput"]["examples_per_second"] if cost else math.nan for cost in costs]
        for theirs, ours in (one_by_one, batched):
            saved, spent = theirs - ours, before + training
            if math.isnan(saved + spent):
                row.append(DASH)
            else:
                row.append(Cell(f"{math.ceil(spent / saved):,}", f"saves {1000 * saved:,.0f} ms each") if saved > 0 else "never")
        rows.append(row)
    caption = f"Predictions after which a student has saved the time spent on it, compared with {reference}."
    columns = ["Student", "teachers and bases, s", "training, s", "predictions one by one", "predictions in batches"]
    return Table("break-even", caption, columns, {"": rows})


def makers(maker: str, params: Params) -> set[str]:
    """The teachers, tuned models, rounds and students, itself among them, that an entry such as `students/cd` is made with."""
    kind, _, name = maker.partition("/")
    parts: list[str] = []
    if kind == "students":
        own = params.students[name]
        parts = [own.learn_from, own.base, *(f"teachers/{teacher}" for teacher in own.auxiliary)]
    elif kind == "targets":
        parts = [f"teachers/{teacher}" for teacher in params.targets[name].teachers]
    elif kind == "rounds":
        parts = [f"students/{params.rounds[name].student}"]
    elif kind in {"teachers", "tuned"}:
        parts = [params.teachers[name].model if kind == "teachers" else params.tuned[name].base]
    return ({maker} if kind in {"students", "teachers", "tuned", "rounds"} else set()).union(*(makers(part, params) for part in parts))


def _seconds(found: Collected, maker: str) -> float:
    """What the stage of a teacher, tuned model, round or student took; NaN if not all of it was timed."""
    kind, _, name = maker.partition("/")
    own = found.of("runtime", f"{kind.removesuffix('s')}-{name}")
    whole = own and own.get("rows") == own.get("rows_timed") and not own.get("resumed_at_step")
    return own["seconds"] if whole else math.nan


def calibration(found: Collected) -> Table:
    """ECE, log loss, Brier score, macro-F1 and KL of each method, means over a domain's sets; and its most frequent answer."""
    document, domains, compare = found.document, domains_of(found.document), found.files["metrics/compare.json"]["to_reference"]
    keys = {"ECE, %": ("ece", 100, 1), "log loss, nats": ("log_loss", 1, 3), "Brier": ("brier", 1, 3), "macro-F1, %": ("macro_f1", 100, 1)}
    rows: list[Row] = []
    for name, method in document["methods"].items():
        row: Row = [f"`{name}`"]
        for members in (sets_of(document, domain) for domain in domains):
            for key, scale, digits in keys.values():
                now, raw = ([entry[key] for one in members if key in (entry := own(method["sets"][one]))] for own in (dict, _uncorrected))
                notes = [f"before {number(scale * fmean(raw), digits)}"] if raw else []
                notes += [f"by chance {percent(fmean(method['sets'][one]['ece_by_chance'] for one in members))}"] if key == "ece" else []
                row.append(Cell(number(scale * fmean(now), digits), ", ".join(notes)))
            row.append(number(fmean(compare[name][one]["kl_nats"] for one in members), 3) if name in compare else DASH)
        label, where, share = most_answered(method)
        rows.append([*row, Cell(f"{percent(share, 0)} %", f"{label}, {where}")])
    chance = "By chance: the ECE of a method with these confidences that is perfectly calibrated, on as many texts."
    caption = f"Means over the sets of a domain. {chance} KL is KL({document['reference']} ‖ method) of the label probabilities."
    groups = [("", 1), *((DOMAINS[domain], len(keys) + 1) for domain in domains), ("Balance", 1)]
    columns = ["Method", *[*keys, "KL, nats"] * len(domains), "most frequent answer"]
    return Table("calibration-table", caption, columns, {"": rows}, groups)


def _uncorrected(entry: Json) -> Json:
    return entry.get("uncorrected", {})


def answered(found: Collected) -> Table | None:
    """What students answer with `--agree`, by domain; None if none held texts back."""
    bodies, domains = dict[str, list[Row]](), domains_of(found.document)
    for name in (name for name in ranked(found.document, "student") if found.thresholds[name]):
        for promise in PROMISES:
            row: Row = [f"{promise:.0%}"]
            for domain in domains:
                surest, least = surest_first(found, name, domain), found.thresholds[name].get(promise, math.inf)
                kept = surest.filter(surest["confidence"] >= least)
                row.append(percent(len(kept) / len(surest)) if promise in found.thresholds[name] else DASH)
                row += [percent(float(kept[what].to_numpy().mean())) if len(kept) else DASH for what in ("agrees", "right")]
            bodies.setdefault(name, []).append(row)
    caption = (
        f"Thresholds are from held-back texts, agreement is with {found.document['reference']}. Strange texts count. {DASH}: no promise."
    )
    columns = ["Promised agreement", *["answered, %", "agrees, %", "right, %"] * len(domains)]
    return Table("answered", caption, columns, bodies, [("", 1), *((DOMAINS[one], 3) for one in domains)]) if bodies else None


def confusion(found: Collected) -> Table | None:
    """Gold label by predicted label, of the best student and the reference; the sets of a domain are pooled. None if labels are many."""
    labels, methods = found.params.task.labels, _judged(found)
    if len(labels) > MOST_LABELS:
        return None
    bodies: dict[str, list[Row]] = {}
    for domain in domains_of(found.document):
        matrices = [_matrix(found, name, domain) for name in methods]
        bodies[DOMAINS[domain]] = [
            [gold, *(_share(own, i, j) for own in matrices for j in range(len(labels)))] for i, gold in enumerate(labels)
        ]
    caption = "Of the examples with a gold label (row), the percentage answered with each label (column), and their number."
    groups = [("", 1), *((name, len(labels)) for name in methods)]
    return Table("confusion", caption, ["Gold label", *labels * len(methods)], bodies, groups)


def confusions(found: Collected) -> Table | None:
    """Of many labels, the most frequent confusions of the best student, beside the reference. None if labels are few."""
    labels, methods, bodies = found.params.task.labels, _judged(found), dict[str, list[Row]]()
    if len(labels) <= MOST_LABELS:
        return None
    for domain in domains_of(found.document):
        matrices = [_matrix(found, name, domain) for name in methods]
        wrong = np.where(np.eye(len(labels), dtype=bool), 0, matrices[0])
        pairs = [divmod(int(at), len(labels)) for at in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]]
        bodies[DOMAINS[domain]] = [[labels[i], labels[j], *(_share(own, i, j) for own in matrices)] for i, j in pairs if wrong[i, j]]
    caption = f"The most frequent confusions of {methods[0]}: the percentage of the gold label’s examples, and their number."
    return Table("confusions", caption, ["Gold label", "<answered", *methods], bodies)


def classes(found: Collected) -> Table | None:
    """Precision, recall, F1 and average precision of each label, of the best student and the reference, means over the sets of a domain;
    first the labels that most examples are missed of. None if there are two labels of like shares, of which the confusion says it all.
    """
    labels, methods, bodies = found.params.task.labels, _judged(found), dict[str, list[Row]]()
    document, are_even = found.document, len(labels) == 2
    for domain in domains_of(document):
        sets = [[document["methods"][name]["sets"][where]["per_label"] for where in sets_of(document, domain)] for name in methods]
        of = {label: [[own[label] for own in each if own[label]["n"]] for each in sets] for label in labels}  # by method, then by set
        counts = {label: sum(own["n"] for own in first) for label, (first, *_) in of.items()}
        missed = {label: math.fsum(own["n"] * (1 - own["recall"]) for own in first) for label, (first, *_) in of.items()}
        are_even = are_even and min(counts.values()) >= UNEVEN * sum(counts.values())
        bodies[DOMAINS[domain]] = [
            [label, number(counts[label]), *(_mean(own, key) for own in of[label] for key in LABEL_SCORES)]
            for label in sorted(labels, key=missed.__getitem__, reverse=True)
        ]
    if are_even:
        return None
    caption = (
        "Precision, recall, F1 and average precision (AP) of each label in percent, means over the sets that have it. First the label that "
        f"{methods[0]} missed most examples of."
    )
    columns = ["Label", "examples", *[*LABEL_SCORES.values()] * len(methods)]
    return Table("classes", caption, columns, bodies, [("", 2), *((name, len(LABEL_SCORES)) for name in methods)])


def _mean(entries: Sequence[Json], key: str) -> Cell | str:
    if not entries:
        return DASH
    score = fmean(entry[key] for entry in entries)
    return Cell(percent(score), heat=round(score, 2))


def _judged(found: Collected) -> list[str]:
    """The methods whose labels are looked at one by one: the best student and the reference."""
    return [*ranked(found.document, "student")[:1], found.document["reference"]]


def _matrix(found: Collected, method: str, domain: str) -> Counts:
    """Answers by gold label (row) and predicted label (column), over the sets of a domain and all runs: (labels, labels)."""
    matrices = [found.of("detail", method)["sets"][where]["confusion"] for where in sets_of(found.document, domain)]
    return np.array([[[row[label] for label in matrix] for row in matrix.values()] for matrix in matrices]).sum(axis=0)


def _share(counts: Counts, gold: int, predicted: int) -> Cell:
    count, share = int(counts[gold, predicted]), float(counts[gold, predicted] / max(1, counts[gold].sum()))
    return Cell(percent(share), f"{count:,}", heat=round(share, 2))


def slices(found: Collected) -> Table:
    """Accuracy by slice, pooled over the sets of a domain, of the best students and the reference."""
    methods = [*ranked(found.document, "student")[:COMPARED], found.document["reference"]]
    own, domains = {name: _by_slice(found, name) for name in methods}, domains_of(found.document)
    titles = {"label": "By gold label", "length": "By length, in thirds of each set"}
    bodies: dict[str, list[Row]] = {}
    few = len(found.params.task.labels) <= MOST_LABELS  # of many labels, `classes` has each
    for dimension, name in dict.fromkeys((kind, name) for rows in own.values() for kind, _, name in rows if few or kind != "label"):
        row: Row = [name]
        for domain in domains:
            entries = [rows.get((dimension, domain, name)) for rows in own.values()]
            row.append(number(next((entry["n"] for entry in entries if entry), None)))
            row += [DASH if entry is None else Cell(percent(entry["accuracy"]), span(entry["ci95"])) for entry in entries]
        bodies.setdefault(titles.get(dimension, f"By {dimension}"), []).append(row)
    groups = [("", 1), *((DOMAINS[domain], 1 + len(own)) for domain in domains)]
    columns, caption = ["Slice", *["examples", *own] * len(domains)], "Accuracy in percent by slice, with its 95 % interval below."
    return Table("slices", caption, columns, {title: rows[:MOST_SLICES] for title, rows in bodies.items()}, groups)


def weakest_slice(found: Collected, method: str) -> Json | None:
    """The slice of at least 20 examples in which a method is least often right."""
    rows = [row for row in _by_slice(found, method).values() if row["n"] >= 20]
    return min(rows, key=lambda row: row["accuracy"], default=None)


def _by_slice(found: Collected, method: str) -> dict[tuple[str, str, str], Json]:
    rows = [row for row in found.of("detail", method)["slices"] if row["set"] is None and row["dimension"] != "domain"]
    return {(row["dimension"], row["domain"], row["slice"]): row for row in rows}


def print_summary(project: Path = Path()) -> None:
    """Print the means over each domain of the last report, and the page's path.

    Raises UsageError if there is no report, CorruptError if it is damaged.
    """
    folder = project / "report"
    if not (folder / "metrics.json").is_file():
        raise UsageError(f"{folder / 'metrics.json'}: no such file. `dvc repro --force --single-item report` writes it.")
    document = read_json(folder / "metrics.json")
    titles = {"well_formed": "well formed", "accuracy": "right", "agreement": "agrees"}
    means = {name: method["means"] for name, method in document["methods"].items()}
    columns = [(key, domain) for key in titles for domain in domains_of(document) if key in means[document["reference"]][domain]]
    table = TerminalTable(title="Percent, bold: best of a column", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for key, domain in columns:
        table.add_column(f"{titles[key]},\n{DOMAINS[domain].lower()}", justify="right")
    best = {(key, domain): max(own[domain][key] for own in means.values()) for key, domain in columns}
    for name, own in means.items():
        table.add_row(
            name + (" (chosen)" if name == document["chosen"] else ""),
            *(Text(percent(own[of][key]), "bold" if own[of][key] == best[key, of] else "") for key, of in columns),
        )
    console = Console(highlight=False)
    console.print(table)
    if document["chosen"]:
        console.print("Chosen by texts that students held back, not by these sets.")
    console.print(Text(f"Report: {folder / 'index.html'}"))
