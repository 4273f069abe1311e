"""`shotless doctor`: what this machine has, which dtype and engine will be used, and what is missing."""

from pathlib import Path

import typer

from pipeline.errors import UsageError
from pipeline.params import load_params


def doctor() -> None:
    """Say what this machine has, which dtype and engine will be used, and what is missing. Ends with 1 where something is missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.setup.machine import machine_findings, package_findings

    findings = [*machine_findings(Path.cwd()), *package_findings(Path.cwd())]
    try:
        params = load_params()
    except UsageError as error:
        params = str(error)
    if not any(finding.name == "packages" and finding.state == "missing" for finding in findings):
        from pipeline.commands.students import quiet_libraries
        from pipeline.setup.engines import model_findings, params_finding, torch_findings

        quiet_libraries()
        findings += [*torch_findings(None if isinstance(params, str) else params.runtime.threads), params_finding(params)]
        findings += [] if isinstance(params, str) else model_findings(params, Path("artifacts"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        style = {"ok": "", "note": "yellow", "missing": "bold red"}[finding.state]
        text = f"{finding.value} → {finding.hint}" if finding.hint else finding.value
        table.add_row(Text(finding.state, style=style), Text(finding.name), Text(text))
    Console().print(table)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        print(f"missing: {', '.join(missing)}")
        raise typer.Exit(1)
    print("Nothing is missing.")
