"""Five tests of new inputs against a reference, corrected so that inputs like the reference raise an alarm at a stated rate.

Inputs: length (two-sample Kolmogorov-Smirnov), vocabulary and embedding (maximum mean discrepancy by permutation). Answers: label shares
(chi-square by permutation, exact for few rows too), confidence (Kolmogorov-Smirnov). Holm's correction (1979) keeps the chance of any
false alarm under the rate, however the tests depend on each other. An alarm also needs a smallest shift: with thousands of inputs a test
finds differences that do not matter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from sklearn.preprocessing import MultiLabelBinarizer, normalize

from pipeline.evaluation.metrics import Floats
from pipeline.models.held_back import spread
from pipeline.monitor.sample import Sample
from pipeline.params import MonitorParams


@dataclass(frozen=True)
class DriftTest:
    """One test. Its corrected p-value and its alarm are those of `corrected`."""

    name: str
    of: str  # "inputs", "answers" or "accuracy"
    effect_name: str
    smallest: float  # a smaller effect raises no alarm
    effect: float  # between 0 and 1
    p_value: float
    then: str  # the reference, in words
    now: str
    adjusted_p: float = 1.0
    alarm: bool = False


def drift_tests(
    reference: Sample, new: Sample, labels: Sequence[str], params: MonitorParams, unseen: Sample | None = None
) -> list[DriftTest]:
    """All tests of `new` against `reference`; both have at least two rows. The same samples give the same p-values.

    A student is surer of texts that it has learnt from than of others like them. So if `reference` is what it learnt from, confidence is
    compared with `unseen`: texts of the same kind that it did not learn from.
    """
    rng, half, usual = np.random.default_rng(params.seed), len(reference) // 2, unseen or reference
    kernels = bag_kernel([*reference.ids, *new.ids]), gaussian_kernel(np.concatenate([reference.states, new.states]))
    words, states = (discrepancy(kernel, len(reference), params.permutations, rng) for kernel in kernels)
    moved = label_shift(reference.labels, new.labels, labels, params.permutations, rng)
    lengths = [np.array([len(ids) for ids in sample.ids]) for sample in (reference, new)]
    known = set(chain.from_iterable(reference.ids[:half]))  # what the second half has of them is what to expect of new inputs
    steps = (new.states.mean(axis=0) - reference.states.mean(axis=0)) / spread(reference.states)

    def gap(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        found: Any = stats.ks_2samp(one, other, method="asymp")  # ties make it only more careful
        return float(found.statistic), float(found.pvalue)

    # The reference and the new inputs, in words.
    spans = ["median {1:.0f} tokens (80 % within {0:.0f}–{2:.0f})".format(*np.quantile(own, [0.1, 0.5, 0.9])) for own in lengths]
    shown = [np.mean([token in known for ids in prompts for token in ids]) for prompts in (reference.ids[half:], new.ids)]
    seen = [f"{share:.1%} known tokens" for share in shown]
    away = f"mean moved by {np.sqrt((steps**2).mean()):.2f} standard deviations"
    shares = [", ".join(f"{label} {own.labels.count(label) / len(own):.1%}" for label in labels) for own in (reference, new)]
    sure, now_sure = (f"median {np.median(own.confidence):.1%}" for own in (usual, new))
    sure += f" of {len(usual):,} texts not learnt from" if unseen else ""
    gaps, between = "largest gap of the distribution functions", "share of the variance between the samples"
    shift = params.smallest_shift
    return [
        DriftTest("length", "inputs", gaps, shift, *gap(*lengths), spans[0], spans[1]),
        DriftTest("vocabulary", "inputs", between, params.smallest_vocabulary_share, *words, seen[0], seen[1]),
        DriftTest("embedding", "inputs", between, params.smallest_embedding_share, *states, "–", away),
        DriftTest("labels", "answers", "total variation", shift, *moved, shares[0], shares[1]),
        DriftTest("confidence", "answers", gaps, shift, *gap(usual.confidence, new.confidence), sure, now_sure),
    ]


def corrected(tests: Sequence[DriftTest], rate: float) -> list[DriftTest]:
    """The tests with Holm's step-down correction over all of them; one whose adjusted p-value is at most `rate` raises an alarm."""
    p_values = np.array([test.p_value for test in tests])
    order = p_values.argsort(kind="stable")
    adjusted = np.empty(len(tests))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(tests), 0, -1)).clip(max=1)
    return [
        replace(test, adjusted_p=float(p), alarm=bool(p <= rate and test.effect >= test.smallest))
        for test, p in zip(tests, adjusted, strict=True)
    ]


def discrepancy(kernel: Floats, first: int, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """Maximum mean discrepancy (Gretton et al. 2012, JMLR 13, eq. 2) of rows `:first` and the others of a kernel matrix [N + M, N + M].

    Returns the unbiased MMD² of two samples of equal size as a share of the variance in the kernel's space, at least 0, and the p-value,
    (1 + shuffles at least as far apart) / (1 + shuffles): exact for exchangeable rows, however few. The kernel's diagonal is constant.
    """
    second = len(kernel) - first
    weights = np.concatenate([np.full(first, 1 / first), np.full(second, -1 / second)])
    shuffled = rng.permuted(np.tile(weights, (permutations, 1)), axis=1)
    distances = np.einsum("ij,ij->i", shuffled @ kernel, shuffled)
    at_least = int((distances >= weights @ kernel @ weights * (1 - 1e-12)).sum())
    diagonal = float(kernel[0, 0])
    mean_own = (kernel[:first, :first].sum() - first * diagonal) / (first * (first - 1))
    mean_other = (kernel[first:, first:].sum() - second * diagonal) / (second * (second - 1))
    squared = mean_own + mean_other - 2 * kernel[:first, first:].mean()
    variance = diagonal - (mean_own + mean_other) / 2 + squared / 4
    share = float(max(0.0, squared / 4 / variance)) if variance > 0 else 0.0
    return share, (1 + at_least) / (1 + permutations)


def bag_kernel(documents: Sequence[Sequence[int]]) -> Floats:
    """Cosine similarity of the documents' sets of token ids, each id weighted by its rarity, log(documents / documents with it)."""
    sets = MultiLabelBinarizer(sparse_output=True).fit_transform(documents)
    bags: Any = normalize(sets.multiply(np.log(len(documents) / sets.sum(axis=0))).tocsr())
    kernel = (bags @ bags.T).toarray()
    np.fill_diagonal(kernel, 1.0)  # a document of ubiquitous ids alone says nothing: similarity 0 to all others
    return kernel


def gaussian_kernel(vectors: Floats) -> Floats:
    """Gaussian kernel of vectors [N, H], each dimension scaled to unit variance; its width is the median distance."""
    distances = pdist(vectors / spread(vectors), "sqeuclidean")
    positive = distances[distances > 0]
    kernel = np.exp(-squareform(distances) / (np.median(positive) if len(positive) else 1.0))
    np.fill_diagonal(kernel, 1.0)
    return kernel


def label_shift(
    one: Sequence[str], other: Sequence[str], labels: Sequence[str], permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Total variation distance of the label shares, and the p-value of Pearson's chi-square among shuffles of the same answers."""
    counts = np.array([[sample[label] for label in labels] for sample in (Counter(one), Counter(other))])
    first, second = counts / counts.sum(axis=1, keepdims=True)
    shuffles = stats.MonteCarloMethod(n_resamples=permutations, rng=rng)
    found: Any = stats.chi2_contingency(counts[:, counts.any(axis=0)], correction=False, method=shuffles)
    return float(np.abs(first - second).sum() / 2), float(found.pvalue)
