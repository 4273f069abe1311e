"""Training without the rows of the vocabulary that it cannot change.

With losses over single-token labels, the gradient of an embedding row is zero unless its token occurs in a row that is learnt from or is a
label. Adam leaves such rows as they are: their moments stay zero, and embeddings get no weight decay here. So they are set aside, training
sees a small vocabulary of the tokens that occur, and the full matrices get the trained rows back at the end. On SmolLM2-135M this takes a
fifth of the parameters, their gradient and both their moments out of memory and out of every step.

The trade-off: losses over the whole vocabulary, which verbalisers of several tokens have too, need all rows and do not use this.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class SmallVocabulary:
    """A model whose embeddings are cut down to the tokens in use, until `restore`. Token ids must be mapped by `ids` meanwhile."""

    model: PreTrainedModel
    kept: Tensor
    """[R] token ids that are kept, rising."""
    _numbers: dict[int, int]
    _full: list[tuple[nn.Module, str, nn.Parameter]]
    _padding_idx: int | None

    @classmethod
    def cut(cls, model: PreTrainedModel, token_ids: Iterable[int]) -> "SmallVocabulary":
        """Keep only `token_ids`, in place. Tied matrices stay tied, frozen ones frozen."""
        tokens = sorted(set(token_ids))
        embedding = model.get_input_embeddings()
        small = cls(model, torch.tensor(tokens), {token: n for n, token in enumerate(tokens)}, [], getattr(embedding, "padding_idx", None))
        replaced: dict[int, nn.Parameter] = {}
        for module in filter(None, dict.fromkeys([embedding, model.get_output_embeddings()])):
            for name in ("weight", "bias"):
                full = getattr(module, name, None)
                if isinstance(full, nn.Parameter):
                    rows = replaced.setdefault(id(full), nn.Parameter(full.detach()[small.kept].clone(), full.requires_grad))
                    setattr(module, name, rows)
                    small._full.append((module, name, full))
        if small._padding_idx is not None:  # its gradient is masked; a padding token that does not occur needs no mask
            embedding.padding_idx = small._numbers.get(small._padding_idx)  # type: ignore[assignment]
        return small

    def ids(self, tokens: Sequence[int]) -> list[int]:
        """Token ids as numbers of kept rows."""
        return [self._numbers[token] for token in tokens]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the trained rows into the full matrices and those back into the model."""
        for module, name, full in self._full:
            full.data[self.kept] = getattr(module, name).detach()
            setattr(module, name, full)
        if self._padding_idx is not None:
            self.model.get_input_embeddings().padding_idx = self._padding_idx  # type: ignore[assignment]
