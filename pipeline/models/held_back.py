"""What a student said of texts that it did not learn from, and what may be promised from it.

A student's folder has two files beside its weights. `held_back.parquet` (`HELD_BACK`) has its answers to texts that were held back from
training, with the targets that it would have learnt; `learnt.parquet` (`LEARNT`) names what it learnt from, with hidden states of some.
From these come the temperature of its probabilities, the least confidence at which a promise holds, and how strange a text is to it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from scipy.stats import binom

from pipeline.errors import UsageError
from pipeline.models.trained import Trained
from pipeline.schema import FLOATS, read_table

Floats = npt.NDArray[np.float64]
HELD_BACK_FILE, LEARNT_FILE = "held_back.parquet", "learnt.parquet"
HELD_BACK = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("label_logprobs", FLOATS, nullable=False),  # the student's own, of the sorted labels, in nats, before its temperature
        pa.field("probabilities", FLOATS, nullable=False),  # of the target
        pa.field("distance", pa.float32(), nullable=False),  # to the nearest learnt text, see `Novelty`
    ]
)
LEARNT = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("state", pa.list_(pa.float16()), nullable=False),  # last layer at the answer position; empty beyond `STATES` texts
    ]
)
STATES = 128
STRANGEST = 0.99
"""Quantile of the held-back texts' distances beyond which a text is too strange to be answered."""
LARGEST_TEMPERATURE = 20.0
DOUBT = 0.05
"""Chance that a promise does not hold."""
TRIED = 20
"""Shares of the texts that a threshold may answer: 1/20, 2/20, … 1."""


def fit_temperature(label_logprobs: Floats, targets: Floats) -> float:
    """The T with the least mean cross-entropy of softmax(`label_logprobs` / T) to `targets`, both [N, L], between 1/20 and 20."""

    def loss(log_temperature: float) -> float:
        return float(-(targets * log_softmax(label_logprobs / np.exp(log_temperature), axis=-1)).sum(-1).mean())

    most = np.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-most, most), method="bounded", options={"xatol": 1e-6})
    return float(f"{np.exp(found.x):.6g}")


def spread(states: Floats) -> Floats:
    """Standard deviation of each dimension of states [N, H], 1 if it does not vary."""
    found = states.std(axis=0)
    return np.where(found > 0, found, 1.0)


class Novelty:
    """How far a text is from what a student learnt: the distance of its hidden state to the nearest one of a learnt text.

    Each dimension counts in standard deviations of the learnt states [N, H], and the distance is divided by √H. Beyond `most` a text is
    too strange.
    """

    def __init__(self, learnt: npt.NDArray[np.floating], most: float = np.inf) -> None:
        states, self.most = np.asarray(learnt, dtype=np.float64), most
        self._scale = spread(states) * np.sqrt(states.shape[1])
        self._learnt = states / self._scale

    def distances(self, states: npt.NDArray[np.floating]) -> Floats:
        """Of states [N, H], [N]."""
        return cdist(np.asarray(states, dtype=np.float64) / self._scale, self._learnt).min(axis=1)


@dataclass(frozen=True)
class Threshold:
    """A text is answered if its confidence is at least this and it is not too strange."""

    confidence: float
    share: float  # of the texts that it was found on that are answered
    novelty: Novelty | None = None  # None: no text is too strange

    def answers(self, confidence: Floats, states: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Which of N texts are answered, [N], by their confidence [N] and states [N, H]."""
        known = True if self.novelty is None else self.novelty.distances(states) <= self.novelty.most
        return (confidence >= self.confidence) & known


def agreeing(student: Trained, promise: float) -> Threshold:
    """The threshold at which a student agrees with its teacher in a share `promise` of what it answers, with 95 % confidence.

    Raises UsageError if the student has no held-back texts, or they do not show that much.
    """
    where = f"--agree {promise:g}: {student.folder}"
    if HELD_BACK_FILE not in student.manifest["files"]:
        raise UsageError(
            f"{where} has no {HELD_BACK_FILE}, so how often it agrees with its teacher is not known. A student has that file which learnt "
            "from a target set or a round, with `held_back` above 0 and by this version. Train it so with `dvc repro`, or use --right."
        )
    confidence, agrees, distances = held_back_answers(student.folder, student.temperature)
    try:
        return threshold(confidence, agrees, promise, novelty_of(student), distances)
    except UsageError as error:
        more = f"Ask for less, or raise the limits of data.transfer or students.{student.name}.held_back and run `dvc repro`."
        raise UsageError(f"{where} was compared with its teacher on texts held back from training. {error} {more}") from None


def held_back_answers(folder: Path, temperature: float) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    """Of each of a student's N held-back texts: its confidence, whether it agrees with its teacher, how strange the text is."""
    rows = read_table(folder / HELD_BACK_FILE, HELD_BACK)
    scores, targets = (np.array(rows[name].to_pylist(), dtype=np.float64) for name in ("label_logprobs", "probabilities"))
    return softmax(scores / temperature, axis=-1).max(-1), scores.argmax(-1) == targets.argmax(-1), rows["distance"].to_numpy()


def learnt_ids(student: Trained) -> set[str]:
    """The ids of the examples that a student learnt from; none if its folder does not say."""
    return (
        set(read_table(student.folder / LEARNT_FILE, LEARNT)["example_id"].to_pylist())
        if LEARNT_FILE in student.manifest["files"]
        else set()
    )


def novelty_of(student: Trained) -> Novelty | None:
    """How strange texts are to a student; None for an exported one, which keeps no hidden states, and one that held nothing back."""
    if not {LEARNT_FILE, HELD_BACK_FILE} <= student.manifest["files"].keys():
        return None
    states = read_table(student.folder / LEARNT_FILE, LEARNT)["state"].to_pylist()
    distances = read_table(student.folder / HELD_BACK_FILE, HELD_BACK)["distance"].to_numpy()
    return Novelty(np.array([state for state in states if state]), float(np.quantile(distances, STRANGEST)))


def threshold(
    confidence: Floats, right: npt.NDArray[np.bool_], promise: float, novelty: Novelty | None = None, distances: Floats | None = None
) -> Threshold:
    """The threshold that answers most among those of which it is sure, to 95 %, that a share `promise` of the answers is right.

    `confidence`, `right` and `distances` are of N texts, drawn as those that will be asked; one that `novelty` finds strange is not
    answered. Tried are the surest 5 %, 10 %, … 100 % of the others, each by `allowed_misses`. Raises UsageError that says what could be
    promised if no part is enough.
    """
    count = len(confidence)
    if novelty is not None and distances is not None:
        known = distances <= novelty.most
        confidence, right = confidence[known], right[known]
    order = np.argsort(-confidence, kind="stable")
    lasts = confidence[order[np.ceil(np.arange(1, TRIED + 1) / TRIED * len(order)).astype(int) - 1]]
    sizes = np.unique(np.searchsorted(-confidence[order], -lasts, side="right"))  # with all that tie with the last
    misses = (~right[order]).cumsum()[sizes - 1]
    enough = np.flatnonzero(misses <= allowed_misses(tuple(sizes.tolist()), promise))
    if not len(enough):
        raise UsageError(_refusal(sizes, misses, promise))
    most = sizes[enough[-1]]
    return Threshold(float(confidence[order[most - 1]]), float(most / count), novelty)


@lru_cache(256)
def allowed_misses(sizes: tuple[int, ...], promise: float) -> npt.NDArray[np.int_]:
    """The most misses among the surest `sizes` texts with which it is sure that a share `promise` is right; -1: no number is.

    k answers with m misses are enough by the Clopper-Pearson bound if P(Binomial(k, 1 - promise) ≤ m) ≤ α. The parts lie in each other, so
    α is not 5 % divided by their number, as Bonferroni's would be: it is the largest at which misses at a rate of 1 - promise pass any of
    the tests with a chance of 5 %, up to rounding. That holds for all of them at once if surer answers are right no less often. A fixed
    sequence of tests (2110.01052) would need no correction, but a chance miss among the surest ends it.
    """
    parts = np.array(sizes)

    def at(alpha: float) -> npt.NDArray[np.int_]:
        most = binom.ppf(alpha, parts, 1 - promise)
        return (most - (binom.cdf(most, parts, 1 - promise) > alpha)).astype(int)

    def chance(allowed: npt.NDArray[np.int_]) -> float:
        few, passed, misses = np.arange(allowed.max() + 2), 0.0, np.ones(1)  # misses: of each number, if no test was passed
        for most, added in zip(allowed, binom.pmf(few, np.diff(parts, prepend=0)[:, None], 1 - promise), strict=True):
            misses = np.convolve(misses, added)[: len(few)]
            passed += float(misses[: most + 1].sum())
            misses[: most + 1] = 0.0
        return passed

    low, high = DOUBT / len(sizes), DOUBT
    if chance(at(high)) <= DOUBT:
        return at(high)
    for _ in range(15):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(at(middle)) <= DOUBT else (low, middle)
    return at(low)


def _refusal(sizes: npt.NDArray[np.int_], misses: npt.NDArray[np.int_], promise: float) -> str:
    """Why a promise cannot be given, the best that can, and how many texts it would take if these shares of misses stay."""
    parts, lower = tuple(sizes.tolist()), range(1, int(np.ceil(promise * 200)))  # in half percent
    best = bisect_left(lower, True, key=lambda half: bool((misses > allowed_misses(parts, half / 200)).all())) / 200
    enough = (
        scale for scale in 1.1 ** np.arange(100) if (binom.cdf(misses * scale, sizes * scale // 1, 1 - promise) <= DOUBT / TRIED).any()
    )
    more = f"more texts would not help, of the surest {sizes[0]:,} it misses {misses[0]:,}"
    if scale := next(enough, None):
        more = f"it takes about {sizes[-1] * scale:,.0f} texts that are answered alike"
    can = f"{best:.1%} can" if best else "nothing can"
    least = f"never fewer than {np.ceil(np.log(DOUBT) / np.log(promise)):,.0f}"
    return f"{promise:.1%} cannot be promised from {sizes[-1]:,} texts, {can}; {more}, and {least}."
