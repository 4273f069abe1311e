"""Five tests of new inputs against a reference, and their correction: how often inputs like the reference raise an alarm is a stated rate.

Inputs: length (two-sample Kolmogorov-Smirnov), vocabulary and embedding (maximum mean discrepancy by permutation). Answers: label shares
(chi-square by permutation, exact for few rows too), confidence (Kolmogorov-Smirnov). Holm's correction (1979) keeps the chance of any
false alarm under the rate, whatever the tests have to do with each other. An alarm also asks for a smallest shift: with thousands of
inputs a test finds differences that matter to no one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipeline.monitor.mmd import bag_kernel, discrepancy, gaussian_kernel
from pipeline.monitor.sample import Sample
from pipeline.params import MonitorParams


@dataclass(frozen=True)
class DriftTest:
    """One test before correction. `effect` is between 0 and 1."""

    name: str
    of: str
    """`inputs`, `answers` or `accuracy`."""
    effect_name: str
    effect: float
    smallest: float
    """Effects under this raise no alarm."""
    p_value: float
    then: str
    """What the reference has, in words."""
    now: str


@dataclass(frozen=True)
class Outcome:
    """A test with its corrected p-value and whether it raises an alarm."""

    test: DriftTest
    adjusted_p: float
    alarm: bool


def drift_tests(
    reference: Sample, new: Sample, labels: Sequence[str], params: MonitorParams, unseen: Sample | None = None
) -> list[DriftTest]:
    """All tests of `new` against `reference`; both have at least two rows. The same samples give the same p-values.

    A student is surer of texts that it has learnt from than of others like them. Where `reference` is what it learnt from, `unseen` has
    texts of the same kind that it did not: confidence is held against theirs.
    """
    rng = np.random.default_rng(params.seed)
    shift = params.smallest_shift
    rare, near = params.smallest_vocabulary_share, params.smallest_embedding_share
    gap = "largest gap of the distribution functions"
    between = "share of the variance between the samples"
    first = len(reference)
    length = _gap(reference.lengths, new.lengths)
    words = discrepancy(bag_kernel([*reference.ids, *new.ids]), first, params.permutations, rng)
    states = discrepancy(gaussian_kernel(np.concatenate([reference.states, new.states])), first, params.permutations, rng)
    usual = reference if unseen is None else unseen
    confidence = _gap(usual.confidence, new.confidence)
    where = "" if unseen is None else f" of {len(unseen):,} texts not learnt from"
    moved, p_labels = _label_shift(reference.labels, new.labels, labels, params.permutations, rng)
    alike, own, other = _nearness(reference, new)
    return [
        DriftTest("length", "inputs", gap, length[0], shift, length[1], _tokens(reference), _tokens(new)),
        DriftTest(
            "vocabulary", "inputs", between, words.share, rare, words.p_value, f"{own:.1%} known tokens", f"{other:.1%} known tokens"
        ),
        DriftTest("embedding", "inputs", between, states.share, near, states.p_value, "–", alike),
        DriftTest("labels", "answers", "total variation", moved, shift, p_labels, *(_shares(s.labels, labels) for s in (reference, new))),
        DriftTest("confidence", "answers", gap, confidence[0], shift, confidence[1], _median(usual) + where, _median(new)),
    ]


def outcomes(tests: Sequence[DriftTest], rate: float) -> list[Outcome]:
    """Holm's step-down correction over all tests: adjusted p-values in the order of the tests, an alarm where one is at most `rate`."""
    order = sorted(range(len(tests)), key=lambda place: tests[place].p_value)
    adjusted = [0.0] * len(tests)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(tests) - rank) * tests[place].p_value))
        adjusted[place] = highest
    return [Outcome(test, p, p <= rate and test.effect >= test.smallest) for test, p in zip(tests, adjusted, strict=True)]


def _gap(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Kolmogorov-Smirnov statistic and p-value; ties, as among lengths, only make it more careful."""
    found: Any = stats.ks_2samp(one, other, method="asymp")
    return float(found.statistic), float(found.pvalue)


def _label_shift(
    one: Sequence[str], other: Sequence[str], labels: Sequence[str], permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Total variation distance of the label shares, and the p-value of Pearson's chi-square among shuffles of the same answers.

    Counts of shuffled answers follow the multivariate hypergeometric distribution, so they are drawn from it.
    """
    counts = np.array([[list(sample).count(label) for label in labels] for sample in (one, other)])
    total = counts.sum(axis=0)
    sizes = counts.sum(axis=1)
    moved = float(np.abs(counts[0] / sizes[0] - counts[1] / sizes[1]).sum() / 2)
    used = total > 0
    expected = total * sizes[0] / sizes.sum()
    shuffled = rng.multivariate_hypergeometric(total, int(sizes[0]), size=permutations)

    def distance(first: np.ndarray) -> np.ndarray:
        """Pearson's chi-square but for a factor that all tables with these margins share."""
        return ((first - expected)[..., used] ** 2 / total[used]).sum(axis=-1)

    at_least = int((distance(shuffled) >= distance(counts[0]) * (1 - 1e-12)).sum())
    return moved, (1 + at_least) / (1 + permutations)


def _nearness(reference: Sample, new: Sample) -> tuple[str, float, float]:
    """How far the mean state moved, in words; the shares of the reference's second half and of `new` in tokens that its first half has."""
    middle = len(reference) // 2
    known = {token for ids in reference.ids[:middle] for token in ids}

    def share(prompts: Sequence[Sequence[int]]) -> float:
        tokens = [token for ids in prompts for token in ids]
        return sum(token in known for token in tokens) / max(1, len(tokens))

    centre, spread = reference.states.mean(axis=0), reference.states.std(axis=0)
    used = spread > 0
    away = np.abs((new.states.mean(axis=0) - centre)[used] / spread[used])
    words = f"mean moved by {np.sqrt((away**2).mean()):.2f} standard deviations" if used.any() else "–"
    return words, share(reference.ids[middle:]), share(new.ids)


def _tokens(sample: Sample) -> str:
    low, middle, high = np.quantile(sample.lengths, [0.1, 0.5, 0.9])
    return f"median {middle:.0f} tokens (80 % within {low:.0f}–{high:.0f})"


def _median(sample: Sample) -> str:
    return f"median {np.median(sample.confidence):.1%}"


def _shares(answers: Sequence[str], labels: Sequence[str]) -> str:
    return ", ".join(f"{label} {list(answers).count(label) / len(answers):.1%}" for label in labels)
