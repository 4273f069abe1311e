"""One forward pass over many rows, laid end to end without padding, behind a context that is held once.

Every matrix product works on real tokens only. Attention has two parts, merged by their log-sum-exp as in cascade attention: a row's own
tokens, in a small padded batch; and the context, whose one copy of keys and values all rows' queries meet. Key heads are never repeated in
memory: grouped query heads are folded into the query length or broadcast with stride 0.

It plugs into transformers' public `AttentionInterface`, so every architecture that uses it and takes `position_ids` fits. What it cannot do
(sliding windows shorter than the prompt, attention sinks, soft-capped scores) raises `UnsupportedModelError`. Nothing is assumed from an
architecture's name: `models.forward.packed_if_exact` compares the pass with the plain forward before use.

The last layer runs on answer positions alone: its keys and values are recorded on all tokens, by leaving the layer as soon as its attention
is reached, and the layer is then run on the tokens that are asked for.

Letters of shapes: B rows, L places of the longest row, T packed tokens, H query heads, D head size, N outputs, O of the row with most.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.models.folders import UnsupportedModelError, decoder_layers

Completions = Sequence[Sequence[int]]
"""Token ids of each label's verbaliser, or of each row's own answer."""


@dataclass(frozen=True)
class Tree:
    """What is read of completions behind a query, all but the last token of each: what several begin with is one node."""

    tokens: Sequence[int] = ()  # of each node
    parents: Sequence[int] = ()  # the earlier node that each continues; -1: the query's last token
    steps: Sequence[Sequence[tuple[int, int]]] = ()  # of each completion: its tokens, each with the node (or -1) whose logits hold it

    @cached_property
    def depths(self) -> list[int]:
        """Nodes before each."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    @cached_property
    def is_chain(self) -> bool:
        """Whether each node continues the one before it, so that nothing has to be hidden from it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def seen(self) -> Tensor:
        """Which nodes each node sees, those that it continues and itself: [nodes, nodes] bool."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    @cached_property
    def paths(self) -> list[list[int]]:
        """The nodes from the query to each node that none continues; one empty path if there is no node."""
        found: list[list[int]] = []
        for leaf in sorted({-1, *range(len(self.tokens))}.difference(self.parents) or {-1}):
            path, node = list[int](), leaf
            while node >= 0:
                path.append(node)
                node = self.parents[node]
            found.append(path[::-1])
        return found

    def label_scores(self, logits: Tensor, log_z: Tensor) -> Tensor:
        """Σ (logit − log Z) over each completion's tokens: logits [B, 1 + nodes, V] and log Z [B, 1 + nodes] → [B, L]."""
        longest = max(map(len, self.steps))
        padded = [[*own, *[(-2, 0)] * (longest - len(own))] for own in self.steps]
        nodes, tokens = torch.tensor(padded, device=logits.device).unbind(-1)  # [L, tokens] each
        found = logits[:, nodes + 1, tokens] - log_z[:, nodes + 1]
        return found.where(nodes >= -1, 0.0).sum(-1)


def tree_of(completions: Completions) -> Tree:
    """The tree of some completions: every distinct beginning after which one goes on is a node."""
    numbers: dict[tuple[int, int], int] = {}  # of (parent, token)
    steps: list[list[tuple[int, int]]] = []
    for ids in completions:
        node, own = -1, list[tuple[int, int]]()
        for token in ids:
            if own:
                node = numbers.setdefault(own[-1], len(numbers))
            own.append((node, token))
        steps.append(own)
    return Tree([token for _, token in numbers], [parent for parent, _ in numbers], steps)


@dataclass(frozen=True)
class Row:
    """One row of a pass: a query, and what continues it."""

    query: Sequence[int]
    tree: Tree = field(default_factory=Tree)

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.query) + len(self.tree.tokens)

    @property
    def outputs(self) -> int:
        """Tokens of the row whose logits are asked for: the query's last, then every node."""
        return 1 + len(self.tree.tokens)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: T tokens in all, B rows of at most L tokens; N outputs, at most O of a row."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    gather: Tensor  # [B, L] token of each row's place; padding repeats the row's first token
    scatter: Tensor  # [T] place in B·L of each token
    outputs: Tensor  # [N] tokens whose logits are asked for, row by row
    output_gather: Tensor  # [B, O] output of each row's place among its outputs; padding repeats the row's first output
    output_scatter: Tensor  # [N] place in B·O of each output
    output_mask: Tensor  # [B, 1, O, L] added to an output's scores of its row's places: 0 if it sees one, else -inf
    mask: Tensor | None  # [B, 1, L, L] the same of every place, if rows branch; None: causal


def pack(rows: Sequence[Row], start: int, device: torch.device | str = "cpu") -> Packed:
    """Lay rows end to end; `start` is the number of context tokens before each."""
    ids: list[int] = []
    positions: list[int] = []
    outputs: list[int] = []
    gather, scatter = _padding([row.length for row in rows])
    output_gather, output_scatter = _padding([row.outputs for row in rows])
    width = gather.shape[1]
    seen = torch.ones(len(rows), width, width, dtype=torch.bool).tril()  # which places of its row each place sees
    for number, row in enumerate(rows):
        query = len(row.query)
        outputs += range(len(ids) + query - 1, len(ids) + row.length)
        ids += [*row.query, *row.tree.tokens]
        positions += [*range(start, start + query), *(start + query + depth for depth in row.tree.depths)]
        if not row.tree.is_chain:
            seen[number, query : row.length, query : row.length] = row.tree.seen

    def added_to_scores(seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None].to(device)

    return Packed(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        gather=gather.to(device),
        scatter=scatter.to(device),
        outputs=torch.tensor(outputs, device=device),
        output_gather=output_gather.to(device),
        output_scatter=output_scatter.to(device),
        output_mask=added_to_scores(seen.flatten(0, 1)[scatter[outputs]][output_gather]),
        mask=None if all(row.tree.is_chain for row in rows) else added_to_scores(seen),
    )


def _padding(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Parts laid end to end: the element at each place of each part, padded with its first [B, L], and each element's place in B·L."""
    own = torch.tensor(lengths)[:, None]
    places = torch.arange(max(lengths))
    real = places < own
    return own.cumsum(0) - own + places * real, real.flatten().nonzero().flatten()


ATTENTION = "shotless_packed"
CHUNK = 1024
"""Tokens of a context that are read in one pass, so that a long one needs little more memory than its keys and values."""
LONGEST_SMALL = 256
"""Rows of at most this many tokens have all their attention scores held at once: 4 bytes × heads × tokens × this, a pass."""
LayerKeyValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [1, key heads, tokens, head size]."""


class PackedModel:
    """A causal language model that scores packed rows behind a shared context.

    `answers_only` runs the last layer on answer positions alone; architectures that reshape by the sequence length do not take it. The
    model's attention implementation is set to `ATTENTION` until `detach`.
    """

    def __init__(self, model: PreTrainedModel, *, answers_only: bool = True) -> None:
        self.model, self.answers_only = model, answers_only
        layers = decoder_layers(model)
        self._depth = len(layers)
        self._plain_attention = model.config._attn_implementation or "eager"
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError as error:
            raise UnsupportedModelError(f"{type(model).__name__} does not take an attention function: {error}") from error
        self._hook = layers[-1].register_forward_pre_hook(self._keep_answers, with_kwargs=True) if answers_only else None

    def detach(self) -> None:
        """Give the model back as it was."""
        if self._hook is not None:
            self._hook.remove()
        self.model.set_attn_implementation(self._plain_attention)

    def read_context(self, ids: Sequence[int]) -> list[LayerKeyValues]:
        """Keys and values of a context, for each layer; an empty list for an empty context."""
        keys: dict[int, LayerKeyValues] = {}
        for start in range(0, len(ids), CHUNK):
            chunk = torch.tensor([ids[start : start + CHUNK]], device=self.model.device)
            end = start + chunk.shape[1]
            positions = torch.arange(start, end, device=self.model.device)[None]
            with self._pass(_Pass(keys, end, leave_at=self._depth - 1)), suppress(_KeysRecorded):
                self.model(input_ids=chunk, position_ids=positions, use_cache=False)
        return [keys[layer] for layer in sorted(keys)]

    def logits(self, packed: Packed, prefix: Sequence[LayerKeyValues]) -> Tensor:
        """Logits at the outputs of packed rows, [N, vocabulary], with a gradient if one is enabled."""
        keep = 0 if self.answers_only else packed.outputs
        with self._pass(_Pass(dict(enumerate(prefix)), int(packed.position_ids.max()) + 1, packed)):
            out = self.model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, logits_to_keep=keep)
        logits = out.logits[0]
        if logits.shape[0] != packed.outputs.shape[0]:
            raise UnsupportedModelError(f"{logits.shape[0]} rows of logits for {packed.outputs.shape[0]} answer positions")
        return logits

    @contextmanager
    def _pass(self, current: "_Pass") -> Iterator[None]:
        """Let the attention function see `current` while the block runs; every layer must have called it then."""
        token = _PASS.set(current)
        try:
            yield
        finally:
            _PASS.reset(token)
        if (found := len(current.reached)) != self._depth:
            if current.packed is None and current.recorded is not None:
                raise UnsupportedModelError(f"{found} of {self._depth} layers have keys and values")
            raise UnsupportedModelError("the model's attention was not reached through transformers' attention interface")

    def _keep_answers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Before the last layer: record its keys and values on all tokens, then cut every per-token input to the answer positions."""
        current = _PASS.get(None)
        if current is None or current.packed is None:
            return None
        current.leave_at = self._depth - 1
        with suppress(_KeysRecorded):
            layer.forward(*args, **kwargs)
            raise UnsupportedModelError("the last layer was left without reaching its attention")
        current.leave_at = None
        tokens, outputs = current.packed.input_ids.shape[1], current.packed.outputs

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[:, outputs] if value.dim() >= 2 and value.shape[1] == tokens else value
            return type(value)(map(cut, value)) if isinstance(value, (tuple, list)) else value

        return cut(args), {name: cut(value) for name, value in kwargs.items()}


@dataclass
class _Pass:
    """What the attention function needs to know of the pass that it is called from."""

    prefix: dict[int, LayerKeyValues]  # of the context, by layer; grows while the context itself is read
    longest: int  # tokens of the longest prompt
    packed: Packed | None = None  # None: a chunk of the context is read
    leave_at: int | None = None  # layer at whose attention `_KeysRecorded` is raised
    recorded: LayerKeyValues | None = None  # of the last layer, which then runs on answer positions alone
    reached: set[int] = field(default_factory=set)  # layers whose attention came here


class _KeysRecorded(Exception):  # noqa: N818  leaving a layer early is not an error
    """Leaves a layer as soon as its keys and values are known."""


_PASS: ContextVar[_Pass] = ContextVar("shotless_pass")


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """The attention function behind `ATTENTION`; query [1, H, T, D] → [1, T, H, D]."""
    current = _PASS.get()
    _refuse(query, key, mask, settings, current.longest)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scaling = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    current.reached.add(layer)
    shared = current.prefix.get(layer)
    if current.packed is None:
        held = shared or (key[:, :, :0], value[:, :, :0])
        current.prefix[layer] = (torch.cat([held[0], key], 2), torch.cat([held[1], value], 2))
    if current.leave_at == layer:
        current.recorded = (key, value)
        raise _KeysRecorded
    if current.packed is None:
        own = _tokens_first(*attention_with_lse(query, key, value, causal=True, scale=scale))
    elif current.recorded is not None:
        own = answer_part(query, *current.recorded, current.packed, scale)
    else:
        own = own_part(query, key, value, current.packed, scale)
    out = own[0] if shared is None else merge(own, shared_part(query, shared, scale))
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _packed_attention)  # type: ignore[arg-type]


def _refuse(query: Tensor, key: Tensor, mask: Tensor | None, settings: dict[str, Any], longest: int) -> None:
    """Raise UnsupportedModelError on what would change the result and is not reproduced here."""
    window = settings.get("sliding_window")
    reasons = {
        "attention dropout": settings.get("dropout", 0.0) > 0,
        "an attention mask of its own": mask is not None,
        "a batch of more than one sequence": query.shape[0] != 1,
        f"a sliding window of {window} tokens, shorter than the prompt of {longest}": window is not None and window < longest,
        "soft-capped attention scores": settings.get("softcap") is not None,
        "attention sinks": settings.get("s_aux") is not None,
        "a position bias": settings.get("position_bias") is not None,
        "query heads that are not a multiple of the key heads": query.shape[1] % key.shape[1] != 0,
    }
    for reason, present in reasons.items():
        if present:
            raise UnsupportedModelError(f"the model uses {reason}")


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    query [B, H, Q, D], key and value [B, key heads, K, D], mask added to the scores [B, 1, Q, K] → [B, H, Q, D], [B, H, Q]. On the CPU by
    torch's flash kernel; elsewhere from the definition. Keys are broadcast over the query heads of their group with stride 0.
    """
    shape, key_heads = query.shape, key.shape[1]
    groups = shape[1] // key_heads
    query = query.reshape(-1, groups, *shape[2:])
    key, value = (x.reshape(-1, 1, *x.shape[2:]).expand(-1, groups, -1, -1) for x in (key, value))
    mask = None if mask is None else mask.repeat_interleave(key_heads, 0).to(query.dtype)
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        scores = scores if mask is None else scores + mask
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value
    return out.reshape(*shape[:3], -1), lse.reshape(shape[:3])


def small_attention_with_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same for many short rows; mask [B or 1, 1, Q, K].

    All scores are held at once, so that a batched product does the work: on rows of 48 tokens the flash kernel, which works on one row
    and head at a time, takes 2 to 9 times as long. Query heads of one key head are folded into the query length.
    """
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch * key.shape[1], groups * queries, size)
    keys, values = key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:])
    seen = mask.to(query.dtype)[:, 0].repeat(1, groups, 1)  # [B or 1, groups · Q, K]
    if len(seen) > 1:
        seen = seen.repeat_interleave(key.shape[1], 0)
    scores = torch.baddbmm(seen, folded, keys.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1)
    # the log-sum-exp off the largest score and its weight, which is never 0: one pass less than from the scores
    lse = scores.amax(-1).float() - weights.amax(-1).float().log()
    return (weights @ values).reshape(query.shape), lse.reshape(batch, heads, queries)


def merge(own: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions over disjoint keys, [T, H, D] with log-sum-exp [T, H], as one over all keys."""
    weight = torch.sigmoid(own[1] - shared[1]).unsqueeze(-1).to(own[0].dtype)
    return torch.lerp(shared[0], own[0], weight)


def _tokens_first(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[1, H, T, D], [1, H, T] → [T, H, D], [T, H]."""
    return out[0].transpose(0, 1), lse[0].t()


def shared_part(query: Tensor, prefix: LayerKeyValues, scale: float) -> tuple[Tensor, Tensor]:
    """All queries [1, H, T, D] against the context → [T, H, D], [T, H]. Grouped heads are folded into the query length."""
    folded = query.reshape(1, prefix[0].shape[1], -1, query.shape[3])
    out, lse = attention_with_lse(folded, *prefix, scale=scale)
    return _tokens_first(out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3]))


def own_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Each token against its own row's tokens before it → [T, H, D], [T, H]."""
    width = packed.gather.shape[1]
    padded = [x[0].transpose(0, 1)[packed.gather].transpose(1, 2) for x in (query, key, value)]  # [B, heads, L, D]
    if width <= LONGEST_SMALL:
        causal = torch.full((1, 1, width, width), -torch.inf, device=query.device).triu(1)
        out, lse = small_attention_with_lse(*padded, mask=causal if packed.mask is None else packed.mask, scale=scale)
    else:
        out, lse = attention_with_lse(*padded, scale=scale, causal=packed.mask is None, mask=packed.mask)
    return out.transpose(1, 2).flatten(0, 1)[packed.scatter], lse.transpose(1, 2).flatten(0, 1)[packed.scatter]


def answer_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Answer positions alone, query [1, H, N, D], against their rows' recorded keys → [N, H, D], [N, H]."""
    places = (packed.output_gather, packed.gather, packed.gather)
    padded = [x[0].transpose(0, 1)[own].transpose(1, 2) for x, own in zip((query, key, value), places, strict=True)]
    out, lse = attention_with_lse(*padded, scale=scale, mask=packed.output_mask)
    return tuple(x.transpose(1, 2).flatten(0, 1)[packed.output_scatter] for x in (out, lse))  # type: ignore[return-value]
