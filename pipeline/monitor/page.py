"""The monitor's result as a table on the terminal, and as one page that works offline."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.files import write_text
from pipeline.monitor.verdict import sentence


def print_table(document: dict[str, Any]) -> None:
    """Print the tests and the verdict."""
    console = Console()
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for heading in ("", "reference", "now", "shift", "at least", "p (Holm)", ""):
        table.add_column(heading, justify="right" if heading in {"shift", "at least", "p (Holm)"} else "left", overflow="fold")
    for test in document["tests"]:
        cells = (test["name"], test["then"], test["now"], f"{test['effect']:.3f}", f"{test['smallest']:.3f}", f"{test['adjusted_p']:.4f}")
        state, style = ("alarm", "bold red") if test["alarm"] else ("ok", "")
        table.add_row(*(Text(cell) for cell in (*cells, state)), style=style)
    console.print(table)
    for line in _figures(document):
        console.print(Text(line))
    console.print(Text(sentence(document), style="bold red" if document["alarms"] else "bold green"))


def write_page(document: dict[str, Any], file: Path) -> None:
    """Write the page."""
    environment = Environment(
        loader=PackageLoader("pipeline.monitor"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("monitor.html.jinja")
    write_text(template.render(d=document, verdict=sentence(document), figures=_figures(document)), file)


def _figures(document: dict[str, Any]) -> list[str]:
    """Memory and unusable rows in words."""
    memory, inputs, bad = document["memory"], document["inputs"], document["bad_rows"]
    limit = "no limit set" if memory["limit_mb"] is None else f"limit {memory['limit_mb']:,} MB"
    peak = f"memory: {memory['peak_mb']:,.0f} MB at its peak while answering ({limit})"
    rows = f"rows with an error: {inputs['with_error']:,} of {inputs['rows']:,} (limit {bad['limit']:.0%})"
    return [line + ": alarm" * figure["alarm"] for line, figure in ((peak, memory), (rows, bad))]
