"""The headline table on a terminal, from `report/metrics.json`: what a run ends with."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import CorruptError, UsageError
from pipeline.report.answers import mean_agreement, mean_over_sets
from pipeline.report.collect import Json
from pipeline.report.document import best, sets_of
from pipeline.report.formatting import percent

WIDTH = 100
GAP = 3
"""Between columns: a rule and a space on each side."""
DOMAIN_COLUMN = {"in": "mean in", "out": "mean out"}


def print_summary(folder: Path = Path("report"), console: Console | None = None) -> None:
    """Print methods × evaluation sets and the page's path; at most 100 columns wide. `folder` is the report's.

    Where the sets do not fit, means over domains stand in. Raises UsageError where there is no report, CorruptError where it is broken.
    """
    document = _read(folder / "metrics.json")
    terminal = Console()
    out = console or Console(width=min(WIDTH, terminal.width) if terminal.is_terminal else WIDTH, highlight=False)
    if document.get("answers"):
        out.print(_answers_table(document))
        out.print(
            Text("Percent, means over evaluation sets; keys: same as the teacher's. ", style="dim").append(
                f"Report: {folder / 'index.html'}"
            )
        )
        return
    out.print(_table(document, min(WIDTH, out.width)))
    out.print(Text("Accuracy in percent; ", style="dim").append("bold: best of a column").append(f". Report: {folder / 'index.html'}"))


def _table(document: Json, width: int) -> Table:
    sets = list(document["sets"])
    with_means = [domain for domain in ("in", "out") if len(sets_of(document, domain)) > 1]
    columns = [*sets, *(DOMAIN_COLUMN[domain] for domain in with_means), "agrees "]
    fits = max(map(len, document["methods"]), default=0) + sum(max(len(name), 5) + GAP for name in columns) <= width
    shown = sets if fits else []
    domains = with_means if fits else [domain for domain in ("in", "out") if sets_of(document, domain)]
    table = Table(title="Accuracy, %", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in [*shown, *(DOMAIN_COLUMN[domain] for domain in domains), "agrees"]:
        table.add_column(name, justify="right", no_wrap=True)
    kind = ""
    for name, method in document["methods"].items():
        if kind and kind != method["kind"]:
            table.add_section()
        kind = method["kind"]
        cells = [Text(name)]
        for set_name in shown:
            top = max(m["sets"][set_name]["accuracy"] for m in document["methods"].values())
            value = method["sets"][set_name]["accuracy"]
            cells.append(Text(percent(value), style="bold" if value == top else ""))
        for domain in domains:
            value = method["means"][domain]["accuracy"]
            cells.append(Text(percent(value), style="bold" if name in best(document, domain) else ""))
        shares = [entry["agreement"] for entry in method["sets"].values()]
        cells.append(Text("teacher" if name == document["reference"] else percent(sum(shares) / len(shares))))
        table.add_row(*cells)
    return table


def _answers_table(document: Json) -> Table:
    """The same where answers are free text: means over sets."""
    table = Table(title="Answers, %", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("well formed", "right", *document["keys"], "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, method in document["methods"].items():
        is_teacher = name == document["reference"]
        shares = [percent(mean_over_sets(method, what)) for what in ("well_formed", "accuracy")]
        same = ["teacher" if is_teacher else percent(mean_agreement(method, key)) for key in document["keys"]]
        table.add_row(name, *shares, *same, f"{mean_over_sets(method, 'tokens') or 0.0:.1f}")
    return table


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; `make run` or `dvc repro report` writes it.") from None
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error}); run `dvc repro report` again.") from None
