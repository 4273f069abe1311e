"""The tables of results: accuracy, calibration, spread between contexts, cost, differences, and the figures at the top of the page."""

from collections.abc import Sequence

from pipeline.report.cells import DOMAIN_TITLE, Cell, Mark, Rows, Table
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import about, layers
from pipeline.report.document import best, comparison_of, sets_of
from pipeline.report.formatting import DASH, percent, plural, points, scaled, span


def headline(document: Json, inputs: Inputs) -> Table:
    """Methods × evaluation sets in percent right, with means over domains and agreement with the reference."""
    domains = [domain for domain in ("in", "out") if sets_of(document, domain)]
    columns, groups = ["Method"], [("", 1)]
    for domain in domains:
        members = sets_of(document, domain)
        extra = ["mean"] if len(members) > 1 else []
        columns += members + extra
        groups.append((DOMAIN_TITLE[domain], len(members) + len(extra)))
    columns += domains
    groups.append((f"Agrees with {document['reference']}", len(domains)))
    bodies = []
    for kind, title in (("baseline", "Prompting, no training"), ("student", "Students, no demonstrations in the prompt")):
        rows = [_headline_row(document, inputs, name, domains) for name, m in document["methods"].items() if m["kind"] == kind]
        if rows:
            bodies.append(Rows(title, rows))
    caption = (
        "Accuracy in percent, with its 95 % interval below; of a student of several seeds the mean, and the seeds’ standard deviation."
    )
    if seen := [
        name for name in sets_of(document, "out") if inputs.params.data.evaluation[name].source in inputs.params.data.transfer.limits
    ]:
        caption += f" Unlabelled texts like those of {', '.join(seen)} are in the transfer set; labels are of the one domain alone."
    return Table("headline", caption, columns, bodies, groups)


def _headline_row(document: Json, inputs: Inputs, name: str, domains: Sequence[str]) -> list[Cell]:
    method = document["methods"][name]
    row = [Cell(name, about(inputs, name), code=True)]
    for domain in domains:
        members = sets_of(document, domain)
        for member in members:
            found = method["sets"][member]
            top = {k: m["sets"][member]["accuracy"] for k, m in document["methods"].items()}
            seeds = f"; seeds ± {percent(found['contexts']['sd'])}" if method["kind"] == "student" and "contexts" in found else ""
            row.append(Cell(percent(found["accuracy"]), span(found["ci95"]) + seeds, _mark(document, name, top)))
        if len(members) > 1:
            mean = method["means"][domain]
            top = {k: m["means"][domain]["accuracy"] for k, m in document["methods"].items()}
            row.append(Cell(percent(mean["accuracy"]), span(mean["ci95"]), _mark(document, name, top)))
    is_reference = name == document["reference"]
    return row + [Cell("itself" if is_reference else percent(method["means"][domain]["agreement"])) for domain in domains]


def _mark(document: Json, name: str, values: dict[str, float]) -> Mark:
    """Best of all, else best of the students; what ties is marked alike."""
    if values[name] == max(values.values()):
        return "best"
    students = [value for key, value in values.items() if document["methods"][key]["kind"] == "student"]
    return "best-student" if document["methods"][name]["kind"] == "student" and values[name] == max(students) else ""


def calibration(document: Json, compare: Json | None) -> Table:
    """ECE, log loss, Brier score and macro-F1 and KL of each method, means over a domain's sets, and the most answered label."""
    divergence = (compare or {}).get("to_reference") or {}
    domains = [domain for domain in ("in", "out") if sets_of(document, domain)]
    keys = (("ece", "ECE, %", 100, 1), ("log_loss", "log loss, nats", 1, 3), ("brier", "Brier", 1, 3), ("macro_f1", "macro-F1, %", 100, 1))
    kl = ["KL, nats"] if divergence else []
    columns = ["Method"] + [title for _ in domains for title in [*(title for _, title, _, _ in keys), *kl]] + ["most answered label"]
    rows = []
    for name, method in document["methods"].items():
        row = [Cell(name, code=True)]
        for domain in domains:
            members = [method["sets"][member] for member in sets_of(document, domain)]
            row += [Cell(f"{scale * sum(m[key] for m in members) / len(members):.{digits}f}") for key, _, scale, digits in keys]
            if divergence:
                values = [divergence[name][member]["kl_nats"] for member in sets_of(document, domain) if name in divergence]
                row.append(Cell(f"{sum(values) / len(values):.3f}" if values else DASH))
        shares = {(label, where): share for where, m in method["sets"].items() for label, share in m["predicted_shares"].items()}
        (label, where), share = max(shares.items(), key=lambda item: item[1])
        rows.append([*row, Cell(f"{percent(share, 0)} %", f"{label}, {where}")])
    groups = [("", 1), *((DOMAIN_TITLE[domain], len(keys) + len(kl)) for domain in domains), ("One-sidedness", 1)]
    caption = "Calibration and balance, means over the sets of a domain."
    caption += f" KL is of {document['reference']}’s answers from the method’s." if divergence else ""
    return Table("calibration-table", caption, columns, [Rows("", rows)], groups)


def spread(document: Json) -> Table | None:
    """Mean, deviation, worst and best of methods scored for each context, or each seed; None where there is none."""
    bodies = []
    for name, method in document["methods"].items():
        found = {where: m["contexts"] for where, m in method["sets"].items() if "contexts" in m}
        rows = [
            [
                Cell(where, code=True),
                *(Cell(percent(c[key])) for key in ("mean", "sd", "worst", "best")),
                Cell(percent(c["best"] - c["worst"])),
            ]
            for where, c in found.items()
        ]
        if rows:
            bodies.append(Rows(name, rows))
    columns = ["Evaluation set", "mean", "sd", "worst", "best", "range"]
    return Table("spread", "Accuracy by context, or by seed of a student, percent.", columns, bodies) if bodies else None


def comparisons(document: Json, compare: Json | None) -> Table | None:
    """Paired differences in accuracy, with their intervals; None where there are no students.

    `compare` (`metrics/compare.json`) adds McNemar's exact test, which counts only the examples that one of the two got right.
    """
    exact = {(c["method"], c["other"], c["domain"]): c for c in (compare or {}).get("comparisons", []) if c["set"] is None}
    bodies = []
    for domain in ("out", "in"):
        rows = [
            [
                Cell(f"{c['method']} − {c['other']}", code=True),
                Cell(points(c["difference"])),
                Cell(f"{points(c['ci95'][0])} to {points(c['ci95'][1])}"),
                Cell("different" if c["clear"] else "not told apart"),
                *([_mcnemar(exact, c)] if exact else []),
            ]
            for c in document["comparisons"]
            if c["domain"] == domain
        ]
        if rows:
            bodies.append(Rows(f"{DOMAIN_TITLE[domain]}, {plural(len(sets_of(document, domain)), 'set')}", rows))
    columns = ["Difference", "points", "95 % interval", "verdict", *(["McNemar’s p"] if exact else [])]
    caption = "Differences in mean accuracy, paired by example."
    return Table("comparisons", caption, columns, bodies, text_columns=(0, 3)) if bodies else None


def _mcnemar(exact: dict[tuple[str, str, str], Json], comparison: Json) -> Cell:
    method, other, domain = (comparison[key] for key in ("method", "other", "domain"))
    found, swapped = exact.get((method, other, domain)), exact.get((other, method, domain))
    entry = found or swapped or {}
    p = entry.get("mcnemar_p")
    if p is None:
        return Cell(DASH)
    ours, theirs = entry["only_method_right"], entry["only_other_right"]
    if found is None:
        ours, theirs = theirs, ours
    return Cell("under 0.001" if p < 0.001 else f"{p:.3f}", f"alone right {ours:,} and {theirs:,} times")


def key_figures(document: Json, inputs: Inputs) -> list[tuple[str, str, str]]:
    """At most four (figure, what it is, note) about the best student, from the numbers there are."""
    domain = "out" if sets_of(document, "out") else "in"
    names, reference = best(document, domain, "student"), document["reference"]
    if not names:
        return []
    top = document["methods"][names[0]]
    mean, theirs = top["means"][domain], document["methods"][reference]["means"][domain]
    words = DOMAIN_TITLE[domain].lower()
    note = f"best student, {names[0]}; 95 % interval {span(mean['ci95'])}"
    figures = [(f"{percent(mean['accuracy'])} %", f"right {words}", note)]
    gap = points(mean["accuracy"] - theirs["accuracy"])
    paired = comparison_of(document, names[0], reference, domain)
    unclear = "" if paired is None or paired["clear"] else "; a difference within chance"
    figures.append((gap, f"points against {reference}", f"which has {percent(theirs['accuracy'])} %{unclear}"))
    ours, his = top["cost"] or {}, document["methods"][reference]["cost"] or {}
    if "prompt_tokens" in ours and "prompt_tokens" in his:
        figures.append((f"{ours['prompt_tokens']:,.0f}", "prompt tokens an example", f"instead of {his['prompt_tokens']:,.0f}"))
    if "latency_ms" in ours and "latency_ms" in his:
        figures.append((f"{ours['latency_ms']:,.0f} ms", "an example, median", f"instead of {his['latency_ms']:,.0f} ms"))
    elif (parameters := inputs.training.get(names[0], {}).get("parameters")) is not None:
        figures.append((scaled(parameters), "parameters", layers(inputs, names[0])))
    return figures
