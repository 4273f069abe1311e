"""Which tokens training sees: the small vocabulary where that is exact, else all."""

from collections.abc import Sequence

from torch import Tensor, allclose
from transformers import PreTrainedModel

from pipeline.models.rows import Completions
from pipeline.students.forward import plain_log_probabilities, probe_rows
from pipeline.students.vocabulary import SmallVocabulary


class Vocabulary:
    """The tokens that training sees: all of them, or the small vocabulary."""

    def __init__(self, completions: Completions, small: SmallVocabulary | None) -> None:
        self._small = small
        self.completions = completions if small is None else [small.ids(ids) for ids in completions]

    def ids(self, tokens: Sequence[int]) -> Sequence[int]:
        """Token ids as the model takes them now."""
        return tokens if self._small is None else self._small.ids(tokens)

    def restore(self) -> None:
        """Give the model its full vocabulary back."""
        if self._small is not None:
            self._small.restore()


def cut_vocabulary(model: PreTrainedModel, completions: Completions, rows: Sequence[Sequence[int]], expected: Tensor) -> Vocabulary:
    """The small vocabulary where it is exact: single-token labels, and a model that gives the same numbers with it."""
    whole = Vocabulary(completions, None)
    if any(len(ids) > 1 for ids in completions):
        return whole
    small = SmallVocabulary.cut(model, [token for ids in (*rows, *completions) for token in ids])
    cut = Vocabulary(completions, small)
    found = plain_log_probabilities(model, cut.completions, [cut.ids(row) for row in probe_rows(rows)])
    if allclose(found, expected, rtol=0, atol=1e-4):
        return cut
    small.restore()
    return whole
