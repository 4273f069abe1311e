"""What this machine has, and what is missing for a run: packages, disk, memory.

Packages are compared with what the project declares and pins; nothing is installed or changed.
"""

import os
import platform
import re
import shutil
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil

DISK_NEEDED_GB = 6.0
MEMORY_NEEDED_GB = 4.0
State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One fact about the machine; `hint` says what to do where it is missing."""

    name: str
    value: str
    state: State = "ok"
    hint: str = ""


def machine_findings(folder: Path) -> list[Finding]:
    """Python, cores, memory, and the disk that `folder` lies on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, memory.available / 1e9
    disk = shutil.disk_usage(folder).free / 1e9
    return [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cores", f"{usable} usable, {psutil.cpu_count(logical=False) or usable} physical"),
        _enough("memory", f"{free:.1f} of {total:.1f} GB free", free, MEMORY_NEEDED_GB, "close what is not needed, or use a smaller model"),
        _enough("disk", f"{disk:.1f} GB free", disk, DISK_NEEDED_GB, "free some; models, data and scores of the default run take so much"),
    ]


def package_findings(project: Path) -> list[Finding]:
    """Packages that the project declares and this environment lacks, or has in another version than is pinned."""
    declared = _declared(project)
    pins = _pins(project / "constraints.txt")
    absent, other = [], []
    for name in declared:
        try:
            found = version(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        pinned = pins.get(_canonical(name))
        if pinned is not None and found.partition("+")[0] != pinned:  # "+cpu" names a build, not another version
            other.append(f"{name} {found} (pinned: {pinned})")
    install = "run `make setup`, or `pip install --constraint constraints.txt --editable .`"
    findings = [Finding("packages", f"{len(declared) - len(absent)} of {len(declared)} installed")]
    if absent:
        findings = [Finding("packages", f"not installed: {', '.join(absent)}", "missing", install)]
    if other:
        findings.append(Finding("versions", ", ".join(other), "note", "results were tested with the pinned ones; " + install))
    for tool, use in {"dvc": "runs the pipeline", "git": "`dvc metrics diff` and `dvc exp` compare commits"}.items():
        place = shutil.which(tool)
        if place is None:
            findings.append(Finding(tool, "not on the PATH", "note", f"it {use}; make finds the one in .venv" if tool == "dvc" else use))
    return findings


def _enough(name: str, value: str, found: float, needed: float, hint: str) -> Finding:
    if found >= needed:
        return Finding(name, value)
    return Finding(name, f"{value}, {needed:.0f} GB wanted", "missing", hint)


def _declared(project: Path) -> list[str]:
    """Names of the dependencies, from pyproject.toml, or from the installed package where there is none."""
    file = project / "pyproject.toml"
    if file.is_file():
        entries = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}).get("dependencies", [])
    else:
        try:
            entries = [entry for entry in requires("shotless") or [] if "extra ==" not in entry]
        except PackageNotFoundError:
            entries = []
    return [re.split(r"[\s<>=!~;\[]", entry, maxsplit=1)[0] for entry in entries]


def _pins(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {_canonical(name): pinned for name, _, pinned in (line.partition("==") for line in lines) if pinned}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
