"""Do two samples of texts or vectors come from one distribution? Maximum mean discrepancy with a permutation test.

MMD (Gretton et al. 2012, JMLR 13, eq. 2) is the distance between the samples' means in the space of a kernel; its p-value is exact for
exchangeable rows, however few they are, because "reference" and "new" are shuffled over the same rows. Trade-off: the kernel matrix holds
(N + M)² numbers, so samples are drawn down before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.spatial.distance import pdist, squareform

Floats = npt.NDArray[np.float64]
PERMUTATIONS_A_BATCH = 250


@dataclass(frozen=True)
class Discrepancy:
    """Outcome of a test."""

    share: float
    """Share of the kernel's variance that lies between two samples of equal size, unbiased, at least 0."""
    p_value: float


def discrepancy(kernel: Floats, first: int, permutations: int, rng: np.random.Generator) -> Discrepancy:
    """Test rows `:first` of a kernel matrix [N + M, N + M] with a constant diagonal against the others.

    The p-value is (1 + shuffles at least as far apart) / (1 + shuffles), and so never 0.
    """
    rows = kernel.shape[0]
    second = rows - first
    weights = np.concatenate([np.full(first, 1 / first), np.full(second, -1 / second)])
    observed = float(weights @ kernel @ weights)
    at_least = 0
    for start in range(0, permutations, PERMUTATIONS_A_BATCH):
        count = min(PERMUTATIONS_A_BATCH, permutations - start)
        shuffled = rng.permuted(np.tile(weights, (count, 1)), axis=1)
        found = np.einsum("ij,ij->i", shuffled @ kernel, shuffled)
        at_least += int((found >= observed * (1 - 1e-12)).sum())
    return Discrepancy(_share(kernel, first, second), (1 + at_least) / (1 + permutations))


def _share(kernel: Floats, first: int, second: int) -> float:
    """The unbiased MMD² as a share of the variance in the kernel's space."""
    own, other, across = kernel[:first, :first], kernel[first:, first:], kernel[:first, first:]
    diagonal = float(kernel[0, 0])
    mean_own = (own.sum() - first * diagonal) / (first * (first - 1))
    mean_other = (other.sum() - second * diagonal) / (second * (second - 1))
    squared = mean_own + mean_other - 2 * across.mean()
    variance = diagonal - (mean_own + mean_other) / 2 + squared / 4
    return float(max(0.0, squared / 4 / variance)) if variance > 0 else 0.0


def bag_kernel(documents: Sequence[Sequence[int]]) -> Floats:
    """Cosine similarity of the documents' sets of token ids, each id weighted by its rarity, log(documents / documents with it)."""
    vocabulary = {token: column for column, token in enumerate(sorted({token for document in documents for token in document}))}
    sets = [sorted({vocabulary[token] for token in document}) for document in documents]
    places = np.repeat(np.arange(len(sets)), [len(tokens) for tokens in sets])
    columns = np.array([column for tokens in sets for column in tokens], dtype=np.int64)
    held = np.bincount(columns, minlength=len(vocabulary))
    values = np.log(len(sets) / held)[columns]
    bags = sparse.csr_array((values, (places, columns)), shape=(len(sets), len(vocabulary)))
    norms = np.sqrt(np.asarray(bags.multiply(bags).sum(axis=1)).ravel())
    # A document of nothing but ubiquitous ids is no document: similarity 0 to all others, 1 to itself.
    bags = sparse.csr_array(sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ bags)
    kernel = np.array(sparse.csr_array(bags @ bags.T).toarray(), dtype=np.float64)
    np.fill_diagonal(kernel, 1.0)
    return kernel


def gaussian_kernel(vectors: Floats) -> Floats:
    """Gaussian kernel of vectors [N, H], each dimension scaled to unit variance, its width the median distance."""
    spread = vectors.std(axis=0)
    distances = pdist(vectors[:, spread > 0] / spread[spread > 0], "sqeuclidean")
    positive = distances[distances > 0]
    width = float(np.median(positive)) if len(positive) else 1.0
    kernel = np.exp(-squareform(distances) / width)
    np.fill_diagonal(kernel, 1.0)
    return kernel
