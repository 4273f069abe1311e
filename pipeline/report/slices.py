"""Accuracy by slice: by label, by length, and by what the data themselves name, for the best students beside the reference."""

from collections.abc import Sequence

from pipeline.report.cells import DOMAIN_TITLE, Cell, Rows, Table
from pipeline.report.collect import Json
from pipeline.report.formatting import DASH, percent, quantity, span

MOST_ROWS = 40
DIMENSIONS = {"label": "By gold label", "length": "By length, in thirds of each set"}


def slices(details: dict[str, Json], methods: Sequence[str]) -> Table | None:
    """One row for each slice, for each domain its examples and a column for each of `methods`; None where no method has slices.

    Rows are the ones pooled over a domain's sets; whole domains are left out, since the headline table has them.
    """
    found = {method: _by_slice(details[method]) for method in methods if method in details}
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    domains = [domain for domain in ("in", "out") if any(key[1] == domain for key in keys)]
    bodies: dict[str, list[list[Cell]]] = {}
    for dimension, name in dict.fromkeys((dimension, name) for dimension, _, name in keys):
        row = [Cell(name)]
        for domain in domains:
            entries = [rows.get((dimension, domain, name)) for rows in found.values()]
            n = next((entry["n"] for entry in entries if entry), None)
            row.append(Cell(quantity(n)))
            row += [Cell(DASH) if entry is None else Cell(percent(entry["accuracy"]), span(entry["ci95"])) for entry in entries]
        bodies.setdefault(dimension, []).append(row)
    tables = [Rows(DIMENSIONS.get(dimension, f"By {dimension}"), rows[:MOST_ROWS]) for dimension, rows in bodies.items()]
    columns = ["Slice", *(title for _ in domains for title in ("examples", *found))]
    groups = [("", 1), *((DOMAIN_TITLE[domain], 1 + len(found)) for domain in domains)]
    caption = "Accuracy in percent by slice, with its 95 % interval below."
    return Table("slices", caption, columns, tables, groups) if tables else None


def weakest(details: dict[str, Json], method: str) -> Json | None:
    """The slice in which a method is least often right, of those with at least 20 examples; None where there is none."""
    rows = [row for row in _by_slice(details[method]).values() if row["n"] >= 20] if method in details else []
    return min(rows, key=lambda row: row["accuracy"]) if rows else None


def _by_slice(detail: Json) -> dict[tuple[str, str, str], Json]:
    return {
        (row["dimension"], row["domain"], row["slice"]): row
        for row in detail.get("slices", [])
        if row["set"] is None and row["dimension"] != "domain"
    }
