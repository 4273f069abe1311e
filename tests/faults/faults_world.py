"""What all tests of faults share: how many are tried, how each may end, and the count of both."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import PROJECT

from pipeline.errors import ShotlessError

LARGER = int(os.environ.get("SHOTLESS_FAULTS", "1"))
"""How many times the usual number of faults: `make test-faults` sets it."""
SEED = int(os.environ.get("SHOTLESS_FAULTS_SEED", "0"))
IS_QUICK = LARGER == 1
"""Whether this is the part that belongs to the ordinary suite: of what takes seconds, one case of each kind."""
WORKED, REFUSED = "it worked", "a message"
COUNTS: Counter[tuple[str, str]] = Counter()
"""(kind of fault, ending) → times, over the whole run."""


def count(kind: str, ending: str) -> None:
    """One more fault, and how it ended."""
    COUNTS[kind, ending] += 1


def met(kind: str, action: Callable[[], Any], named: str | None = None) -> str | None:
    """Do something that may be refused, and count it: None where it worked, else the message.

    A ShotlessError is the one way to refuse; anything else fails the test. `named` has to be refused, and the message has to hold it.
    """
    refusal = None
    try:
        action()
    except ShotlessError as error:
        refusal = error
    if refusal is not None:
        said = str(refusal)
        assert refusal.exit_code in {1, 2}
        assert named is None or named in said, said
        assert len(said) < 20_000, "a message is for reading"
        count(kind, REFUSED)
        return said
    assert named is None, f"was not refused; {named!r} was to be named"
    count(kind, WORKED)
    return None


def table() -> list[str]:
    """Everything counted, as lines of Markdown."""
    lines = ["| fault | times | it worked | a message |", "|---|---|---|---|"]
    kinds = sorted({kind for kind, _ in COUNTS})
    rows = [(kind, COUNTS[kind, WORKED], COUNTS[kind, REFUSED]) for kind in kinds]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return lines + [f"| {kind} | {worked + refused:,} | {worked:,} | {refused:,} |" for kind, worked, refused in rows]


def dice(name: str) -> random.Random:
    """Random numbers of one test, the same each time with one seed."""
    return random.Random(f"{SEED}/{name}")


def project_copy(folder: Path) -> Path:
    """A copy of what `make_workspace` needs of this project, in `folder`."""
    project = folder / "project"
    for item in ("dvc.yaml", ".dvcignore", "params.yaml"):
        project.mkdir(exist_ok=True)
        shutil.copyfile(PROJECT / item, project / item)
    for item in ("presets", "pipeline", "stages"):
        shutil.copytree(PROJECT / item, project / item, ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    analytics = false\n", "utf-8")
    return project
