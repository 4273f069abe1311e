"""Five tests of new inputs against a reference, corrected so that inputs like the reference raise an alarm at a stated rate.

Inputs: length (two-sample Kolmogorov-Smirnov), vocabulary and embedding (maximum mean discrepancy by permutation). Answers: label shares
(chi-square by permutation, exact for few rows too), confidence (Kolmogorov-Smirnov). Holm's correction (1979) keeps the chance of any
false alarm under the rate, however the tests depend on each other. An alarm also needs a smallest shift: with thousands of inputs a test
finds differences that do not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats
from scipy.spatial.distance import pdist, squareform

from pipeline.monitor.sample import Sample
from pipeline.params import MonitorParams

Floats = npt.NDArray[np.float64]
PERMUTATIONS_AT_ONCE = 250


@dataclass(frozen=True)
class DriftTest:
    """One test before correction. `effect` is between 0 and 1."""

    name: str
    of: str
    """`inputs`, `answers` or `accuracy`."""
    effect_name: str
    effect: float
    smallest: float
    """A smaller effect raises no alarm."""
    p_value: float
    then: str
    """The reference, in words."""
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

    A student is surer of texts that it has learnt from than of others like them. So if `reference` is what it learnt from, confidence is
    compared with `unseen`: texts of the same kind that it did not learn from.
    """
    rng = np.random.default_rng(params.seed)
    shift, gap, between = params.smallest_shift, "largest gap of the distribution functions", "share of the variance between the samples"
    lengths = stats.ks_2samp(reference.lengths, new.lengths, method="asymp")  # ties make it only more careful
    kernels = bag_kernel([*reference.ids, *new.ids]), gaussian_kernel(np.concatenate([reference.states, new.states]))
    words, states = (discrepancy(kernel, len(reference), params.permutations, rng) for kernel in kernels)
    usual = reference if unseen is None else unseen
    confidence = stats.ks_2samp(usual.confidence, new.confidence, method="asymp")
    unlearnt = "" if unseen is None else f" of {len(unseen):,} texts not learnt from"
    moved = label_shift(reference.labels, new.labels, labels, params.permutations, rng)

    def test(name: str, of: str, effect_name: str, found: tuple[float, float] | Any, smallest: float, then: str, now: str) -> DriftTest:
        return DriftTest(name, of, effect_name, float(found[0]), smallest, float(found[1]), then, now)

    return [
        test("length", "inputs", gap, lengths, shift, _tokens(reference), _tokens(new)),
        test("vocabulary", "inputs", between, words, params.smallest_vocabulary_share, *_known_tokens(reference, new)),
        test("embedding", "inputs", between, states, params.smallest_embedding_share, "–", _moved(reference.states, new.states)),
        test("labels", "answers", "total variation", moved, shift, *(_shares(sample.labels, labels) for sample in (reference, new))),
        test("confidence", "answers", gap, confidence, shift, _median(usual) + unlearnt, _median(new)),
    ]


def outcomes(tests: Sequence[DriftTest], rate: float) -> list[Outcome]:
    """Holm's step-down correction over all tests, in their order; a test whose adjusted p-value is at most `rate` raises an alarm."""
    order = sorted(range(len(tests)), key=lambda place: tests[place].p_value)
    adjusted = [0.0] * len(tests)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(tests) - rank) * tests[place].p_value))
        adjusted[place] = highest
    return [Outcome(test, p, p <= rate and test.effect >= test.smallest) for test, p in zip(tests, adjusted, strict=True)]


def discrepancy(kernel: Floats, first: int, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """Maximum mean discrepancy (Gretton et al. 2012, JMLR 13, eq. 2) of rows `:first` and the others of a kernel matrix [N + M, N + M].

    Returns the unbiased MMD² of two samples of equal size as a share of the variance in the kernel's space, at least 0, and the p-value,
    (1 + shuffles at least as far apart) / (1 + shuffles): exact for exchangeable rows, however few. The kernel's diagonal is constant.
    """
    rows = kernel.shape[0]
    second = rows - first
    weights = np.concatenate([np.full(first, 1 / first), np.full(second, -1 / second)])
    observed = float(weights @ kernel @ weights)
    at_least = 0
    for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
        count = min(PERMUTATIONS_AT_ONCE, permutations - start)
        shuffled = rng.permuted(np.tile(weights, (count, 1)), axis=1)
        found = np.einsum("ij,ij->i", shuffled @ kernel, shuffled)
        at_least += int((found >= observed * (1 - 1e-12)).sum())
    diagonal = float(kernel[0, 0])
    mean_own = (kernel[:first, :first].sum() - first * diagonal) / (first * (first - 1))
    mean_other = (kernel[first:, first:].sum() - second * diagonal) / (second * (second - 1))
    squared = mean_own + mean_other - 2 * kernel[:first, first:].mean()
    variance = diagonal - (mean_own + mean_other) / 2 + squared / 4
    share = float(max(0.0, squared / 4 / variance)) if variance > 0 else 0.0
    return share, (1 + at_least) / (1 + permutations)


def bag_kernel(documents: Sequence[Sequence[int]]) -> Floats:
    """Cosine similarity of the documents' sets of token ids, each id weighted by its rarity, log(documents / documents with it)."""
    vocabulary = {token: column for column, token in enumerate(sorted({token for document in documents for token in document}))}
    sets = [sorted({vocabulary[token] for token in document}) for document in documents]
    places = np.repeat(np.arange(len(sets)), [len(tokens) for tokens in sets])
    columns = np.array([column for tokens in sets for column in tokens], dtype=np.int64)
    values = np.log(len(sets) / np.bincount(columns, minlength=len(vocabulary)))[columns]
    bags = sparse.csr_array((values, (places, columns)), shape=(len(sets), len(vocabulary)))
    norms = np.sqrt(np.asarray(bags.multiply(bags).sum(axis=1)).ravel())
    # A document of ubiquitous ids alone says nothing: similarity 0 to all others, 1 to itself.
    bags = sparse.csr_array(sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ bags)
    kernel = np.array(sparse.csr_array(bags @ bags.T).toarray(), dtype=np.float64)
    np.fill_diagonal(kernel, 1.0)
    return kernel


def gaussian_kernel(vectors: Floats) -> Floats:
    """Gaussian kernel of vectors [N, H], each dimension scaled to unit variance; its width is the median distance."""
    spread = vectors.std(axis=0)
    distances = pdist(vectors[:, spread > 0] / spread[spread > 0], "sqeuclidean")
    positive = distances[distances > 0]
    width = float(np.median(positive)) if len(positive) else 1.0
    kernel = np.exp(-squareform(distances) / width)
    np.fill_diagonal(kernel, 1.0)
    return kernel


def label_shift(
    one: Sequence[str], other: Sequence[str], labels: Sequence[str], permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Total variation distance of the label shares, and the p-value of Pearson's chi-square among shuffles of the same answers.

    Counts of shuffled answers follow the multivariate hypergeometric distribution, so they are drawn from it.
    """
    counts = np.array([[list(sample).count(label) for label in labels] for sample in (one, other)])
    total, sizes = counts.sum(axis=0), counts.sum(axis=1)
    used = total > 0
    expected = total * sizes[0] / sizes.sum()
    shuffled = rng.multivariate_hypergeometric(total, int(sizes[0]), size=permutations)

    def distance(first: np.ndarray) -> np.ndarray:
        """Pearson's chi-square but for a factor that all tables with these margins share."""
        return ((first - expected)[..., used] ** 2 / total[used]).sum(axis=-1)

    at_least = int((distance(shuffled) >= distance(counts[0]) * (1 - 1e-12)).sum())
    return float(np.abs(counts[0] / sizes[0] - counts[1] / sizes[1]).sum() / 2), (1 + at_least) / (1 + permutations)


def _known_tokens(reference: Sample, new: Sample) -> tuple[str, str]:
    """The shares of the reference's second half, and of `new`, in tokens that the reference's first half has."""
    middle = len(reference) // 2
    known = {token for ids in reference.ids[:middle] for token in ids}

    def share(prompts: Sequence[Sequence[int]]) -> str:
        tokens = [token for ids in prompts for token in ids]
        return f"{sum(token in known for token in tokens) / max(1, len(tokens)):.1%} known tokens"

    return share(reference.ids[middle:]), share(new.ids)


def _moved(reference: Floats, new: Floats) -> str:
    """How far the mean state moved."""
    spread = reference.std(axis=0)
    used = spread > 0
    away = (new.mean(axis=0) - reference.mean(axis=0))[used] / spread[used]
    return f"mean moved by {np.sqrt((away**2).mean()):.2f} standard deviations" if used.any() else "–"


def _tokens(sample: Sample) -> str:
    low, middle, high = np.quantile(sample.lengths, [0.1, 0.5, 0.9])
    return f"median {middle:.0f} tokens (80 % within {low:.0f}–{high:.0f})"


def _median(sample: Sample) -> str:
    return f"median {np.median(sample.confidence):.1%}"


def _shares(answers: Sequence[str], labels: Sequence[str]) -> str:
    return ", ".join(f"{label} {list(answers).count(label) / len(answers):.1%}" for label in labels)
