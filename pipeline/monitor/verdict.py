"""One document from samples and tests: what moved, what that means, and whether retraining is due; as JSON, as a table, as a page.

Retraining is due if a test raises an alarm. Memory over its limit, and too many rows that could not be answered, are alarms too, but not
for retraining to mend.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from pipeline.errors import UsageError
from pipeline.evaluation.metrics import rounded
from pipeline.files import read_json, write_text
from pipeline.models.held_back import HELD_BACK_FILE, Novelty, Threshold, held_back_answers
from pipeline.models.trained import Trained
from pipeline.monitor.drift import DriftTest
from pipeline.monitor.sample import Sample
from pipeline.params import MonitorParams
from pipeline.serving.predictor import Predictor

SHOWN = 8


def accuracy_bound(params: MonitorParams, evaluation: Path | None, domains: dict[str, str]) -> tuple[float, str] | None:
    """What accuracy is compared with, and where that comes from; None if nothing says it.

    It is `monitor.min_accuracy`, else the mean accuracy in the student's own `metrics/eval/NAME.json`, less the tolerated drop: over the
    sets that `domains` says are out of domain, or over all if none is.
    """
    if params.min_accuracy is not None:
        return params.min_accuracy, "monitor.min_accuracy"
    if evaluation is None or not evaluation.is_file():
        return None
    sets = {name: entry["accuracy"] for name, entry in read_json(evaluation)["sets"].items()}
    chosen = [name for name in sets if domains.get(name) == "out"] or list(sets)
    mean = sum(sets[name] for name in chosen) / len(chosen)
    return mean - params.accuracy_drop, f"{mean:.1%} on {', '.join(chosen)}, less {params.accuracy_drop:.0%}"


def accuracy_test(new: Sample, bound: float, origin: str) -> DriftTest:
    """Is accuracy under the bound? Exact binomial test, one-sided, corrected with the drift tests: a few labelled inputs are noisy.

    Raises UsageError if no input has a gold label.
    """
    right = [mine == gold for mine, gold in zip(new.labels, new.gold, strict=True) if gold is not None]
    if not right:
        raise UsageError(f"--labels: none of the rows that were drawn from {new.origin} has a label.")
    found = sum(right) / len(right)
    p_value = float(stats.binomtest(sum(right), len(right), min(1.0, max(0.0, bound)), alternative="less").pvalue)
    then, now = f"at least {bound:.1%} ({origin})", f"{found:.1%} of {len(right):,} labelled"
    return DriftTest("accuracy", "accuracy", "below the bound", 0.0, max(0.0, bound - found), p_value, then, now)


def answered_test(student: Trained, threshold: Threshold, new: Sample, smallest: float) -> DriftTest | None:
    """Does the student answer less of the new inputs than of its held-back texts? None if it has none.

    Fisher's exact test, one-sided. It is exact for a threshold at the confidence of one of the held-back texts too: the p-value is the
    chance that so few of the surest texts, of both together, are new ones.
    """
    if HELD_BACK_FILE not in student.manifest["files"]:
        return None
    confidence, _, distances = held_back_answers(student.folder, student.temperature)
    most = np.inf if threshold.novelty is None else threshold.novelty.most
    then, now = (confidence >= threshold.confidence) & (distances <= most), threshold.answers(new.confidence, new.states)
    table = [[int(own.sum()), int((~own).sum())] for own in (now, then)]
    before, after = (f"{own.mean():.1%} of {len(own):,}{kind}" for own, kind in ((then, " held-back texts"), (now, "")))
    fall, exact = max(0.0, float(then.mean() - now.mean())), cast("Any", stats.fisher_exact(table, alternative="less"))
    return DriftTest("answered", "answers", "fall of the answered share", smallest, fall, float(exact.pvalue), before, after)


def verdict(
    predictor: Predictor, old: Sample, new: Sample, tests: Sequence[DriftTest], peak_mb: float, params: MonitorParams, bad_limit: float
) -> dict[str, Any]:
    """The monitor's JSON, from corrected tests. `peak_mb` is the peak memory of the process that answered.

    `farthest` are the new inputs least like the reference: by the distance of their last hidden state to the nearest one of the reference.
    """
    share, limit_mb, rate = new.bad / new.rows, params.max_memory_mb, params.false_alarm_rate
    too_large, too_bad = limit_mb is not None and peak_mb > limit_mb, share > bad_limit
    drifted = [test.name for test in tests if test.alarm]
    alarms = [*drifted, *["memory"] * too_large, *["bad rows"] * too_bad]
    sentence = f"No alarm: nothing in {len(new):,} inputs says that retraining is due (false alarms: at most {rate:.1%} of such checks)."
    if alarms:
        due = "Retraining is due" if drifted else "Something is wrong, but not what retraining mends"
        sentence = f"{due}: {', '.join(alarms)} (of inputs like the reference, at most {rate:.1%} of such checks say so)."
    limit = "no limit set" if limit_mb is None else f"limit {limit_mb:,} MB"
    nearest = Novelty(old.states).distances(new.states)
    document = {
        "student": {"name": predictor.student.name, "weights_sha256": predictor.weights_sha256},
        "reference": {"from": old.origin, "rows": len(old)},
        "inputs": {"from": new.origin, "rows": new.rows, "with_error": new.bad, "tested": len(new)},
        "false_alarm_rate": rate,
        "tests": [asdict(test) for test in tests],
        "memory": {"peak_mb": peak_mb, "limit_mb": limit_mb, "alarm": too_large},
        "bad_rows": {"share": share, "limit": bad_limit, "alarm": too_bad},
        "alarms": alarms,
        "due": bool(drifted),
        "verdict": sentence,
        "figures": [
            f"memory: {peak_mb:,.0f} MB at its peak while answering ({limit})" + ": alarm" * too_large,
            f"rows with an error: {new.bad:,} of {new.rows:,} (limit {bad_limit:.0%})" + ": alarm" * too_bad,
        ],
        "farthest": [
            {"text": new.texts[i], "label": new.labels[i], "confidence": float(new.confidence[i]), "distance": float(nearest[i])}
            for i in np.argsort(-nearest, kind="stable")[:SHOWN]
        ],
    }
    return rounded(document)


def print_table(document: dict[str, Any]) -> None:
    """Print the tests and the verdict on the terminal."""
    console = Console()
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for heading in ("", "reference", "now", "shift", "at least", "p (Holm)", ""):
        table.add_column(heading, justify="right" if heading in {"shift", "at least", "p (Holm)"} else "left", overflow="fold")
    for test in document["tests"]:
        cells = (test["name"], test["then"], test["now"], f"{test['effect']:.3f}", f"{test['smallest']:.3f}", f"{test['adjusted_p']:.4f}")
        state, style = ("alarm", "bold red") if test["alarm"] else ("ok", "")
        table.add_row(*(Text(cell) for cell in (*cells, state)), style=style)
    console.print(table)
    for line in document["figures"]:
        console.print(Text(line))
    console.print(Text(document["verdict"], style="bold red" if document["alarms"] else "bold green"))


def write_page(document: dict[str, Any], file: Path) -> None:
    """Write the document as one page that works offline."""
    environment = Environment(loader=PackageLoader("pipeline.monitor"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    write_text(environment.get_template("monitor.html.jinja").render(d=document), file)
