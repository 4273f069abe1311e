"""The figures that a small model was made for, held against thresholds: accuracy where labels are given, and memory.

Accuracy on a few labelled inputs is a noisy figure, so it is tested (exact binomial, one-sided) along with the drift tests, under the
same rate of false alarms. The bound is a fixed one, or what the student itself reached out of domain when it was evaluated, less a
tolerated drop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from pipeline.files import read_json
from pipeline.monitor.drift import DriftTest
from pipeline.params import MonitorParams


@dataclass(frozen=True)
class Memory:
    """Peak memory of the process that answered."""

    peak_mb: float
    limit_mb: int | None

    @property
    def alarm(self) -> bool:
        """Over the limit, where there is one."""
        return self.limit_mb is not None and self.peak_mb > self.limit_mb


@dataclass(frozen=True)
class AccuracyBound:
    """What accuracy is held against, and where that comes from."""

    value: float
    origin: str


def accuracy_bound(params: MonitorParams, evaluation: Path, domains: dict[str, str]) -> AccuracyBound | None:
    """The bound from params, or from a student's `metrics/eval/NAME.json`, where `domains` says which sets are out of domain.

    The mean over the sets out of domain, or over all where there is none of them; None where neither params nor file have one.
    """
    if params.min_accuracy is not None:
        return AccuracyBound(params.min_accuracy, "monitor.min_accuracy")
    if not evaluation.is_file():
        return None
    sets = {name: entry["accuracy"] for name, entry in read_json(evaluation)["sets"].items()}
    chosen = [name for name in sets if domains.get(name) == "out"] or list(sets)
    mean = sum(sets[name] for name in chosen) / len(chosen)
    return AccuracyBound(mean - params.accuracy_drop, f"{mean:.1%} on {', '.join(chosen)}, less {params.accuracy_drop:.0%}")


def accuracy_test(predicted: Sequence[str], gold: Sequence[str], bound: AccuracyBound) -> DriftTest:
    """Is accuracy under the bound? p-value of so few right answers where the true accuracy is the bound."""
    right = sum(one == other for one, other in zip(predicted, gold, strict=True))
    p_value = float(stats.binomtest(right, len(gold), min(1.0, max(0.0, bound.value)), alternative="less").pvalue)
    found = right / len(gold)
    effect = max(0.0, bound.value - found)
    then = f"at least {bound.value:.1%} ({bound.origin})"
    return DriftTest("accuracy", "accuracy", "below the bound", effect, 0.0, p_value, then, f"{found:.1%} of {len(gold):,} labelled")
