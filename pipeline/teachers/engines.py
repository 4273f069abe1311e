"""How a model scores prompts: the fast engine if it gives the plain forward's numbers on a probe, else the generic one.

The fast engine reads what all prompts begin with (a context, a template's head) once, and all prompts attend to that one copy. For a shared
prefix of P tokens and N prompts of Q further tokens that is P + N·Q tokens of model work instead of N·(P + Q). See `models.packed`. The
generic engine runs full prompts, as plain transformers does, whatever the architecture. The fast one is compared with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.encodings import DRAWN, Encoded, concatenate, encode
from pipeline.models.folders import is_encoder
from pipeline.models.forward import in_float32, packed_if_exact, packed_logits, plain_logits
from pipeline.models.machine import memory_bytes
from pipeline.models.packed import Completions, LayerKeyValues, PackedModel, Row, Tree, tree_of
from pipeline.params import CacheParams
from pipeline.schema import Prompt
from pipeline.task import TaskTokens, common_length

LABELS_ONLY = CacheParams(encoding="top_k", top_k=1)
"""The least that is kept: for callers who want the labels' log-probabilities and no more."""


@dataclass(frozen=True)
class Scores:
    """Scores of N prompts: L labels at one answer position each, or an own answer with a position for each token; P positions in all."""

    label_logprobs: Tensor  # [N, L] float32 nats, summed over a verbaliser's tokens; L is 0 for free answers
    positions: Tensor  # [N] int64, answer positions of each prompt
    completion_logprobs: Tensor  # [P] float32 nats, of free answers' tokens; empty for labels
    encoded: Encoded  # of all positions, one prompt's after the other's
    label_bounds: Tensor | None = None  # [N, L] float32 nats: see `schema.STORED`; None if all labels of all prompts are known

    @classmethod
    def join(cls, parts: Sequence[Self], order: Tensor) -> Self:
        """The rows of several scores, in `order` [N]."""
        positions = torch.cat([part.positions for part in parts])
        spans = torch.arange(int(positions.sum())).split(positions.tolist())
        places = torch.cat([spans[row] for row in order])
        logprobs = torch.cat([part.completion_logprobs for part in parts])
        encoded = concatenate([part.encoded for part in parts])
        bounds = [torch.full_like(part.label_logprobs, torch.nan) if part.label_bounds is None else part.label_bounds for part in parts]
        return cls(
            label_logprobs=torch.cat([part.label_logprobs for part in parts])[order],
            positions=positions[order],
            completion_logprobs=logprobs[places] if len(logprobs) else logprobs,
            encoded={name: values[places.to(values.device)] for name, values in encoded.items()},
            label_bounds=torch.cat(bounds)[order] if any(part.label_bounds is not None for part in parts) else None,
        )


def read_scores(
    logits: Tensor, trees: Sequence[Tree], cache: CacheParams, prompts: Sequence[Prompt], hidden: Tensor | None = None
) -> Scores:
    """Scores from the logits at the outputs of the prompts' rows, [Σ(1 + nodes), V]; `hidden` [the same, D] are the kept layers' outputs.

    `trees` are the rows' own: of the prompt's answer, whose positions are all kept, or of the labels' verbalisers, and the answer position
    alone is kept. Either all prompts have an answer, or none has.
    """
    logits = logits.float()
    uniforms = torch.from_numpy(np.concatenate([_uniforms(prompt, cache) for prompt in prompts]))
    if not (answers := [prompt.answer for prompt in prompts if prompt.answer is not None]):
        return _label_scores(logits, trees, cache, uniforms, hidden)
    encoded = encode(logits, cache, uniforms, hidden)
    tokens = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    return Scores(
        label_logprobs=logits.new_zeros(len(answers), 0),
        positions=torch.tensor([len(answer) for answer in answers]),
        completion_logprobs=logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - encoded["log_z"],
        encoded=encoded,
    )


def _uniforms(prompt: Prompt, cache: CacheParams) -> np.ndarray:
    """The random numbers of a prompt's positions, from its hash; zeros if nothing is drawn."""
    count = 1 if prompt.answer is None else len(prompt.answer)
    return np.random.default_rng(int(prompt.prompt_sha[:16], 16)).random(count) if cache.encoding in DRAWN else np.zeros(count)


def _label_scores(logits: Tensor, trees: Sequence[Tree], cache: CacheParams, uniforms: Tensor, hidden: Tensor | None) -> Scores:
    sizes = [1 + len(tree.tokens) for tree in trees]
    log_z = logits.logsumexp(-1)
    if all(tree is trees[0] for tree in trees):
        found = trees[0].label_scores(logits.reshape(len(trees), sizes[0], -1), log_z.reshape(len(trees), -1))
    else:
        own = zip(trees, logits.split(sizes), log_z.split(sizes), strict=True)
        found = torch.cat([tree.label_scores(of_row[None], log_z_of_row[None]) for tree, of_row, log_z_of_row in own])
    at_answers = torch.tensor([0, *accumulate(sizes)][:-1], device=logits.device)
    return Scores(
        label_logprobs=found,
        positions=torch.ones(len(trees), dtype=torch.long),
        completion_logprobs=logits.new_zeros(0),
        encoded=encode(logits[at_answers], cache, uniforms, None if hidden is None else hidden[at_answers]),
    )


WORTH_SHARING = 8  # tokens from which a prefix is shared: attending to one costs every layer a few passes over memory
LARGEST_BUDGET, LARGEST_GPU_BUDGET = 1024, 4096
"""Tokens a pass: enough for products to run at full rate. With more, results leave a CPU's caches (measured on SmolLM2-135M)."""
ACTIVATIONS, GPU_ACTIVATIONS = 512 << 20, 4 << 30  # bytes that a pass may take for what it computes, at most
MOST_NODES = 128
"""Of a tree that is read at once. Of a larger one, what can matter is found first. Queries are then read twice: not worth it for less."""
MOST_LEFT = 1e-3
"""Probability of labels that are not followed, over that of those that are: no label's share of both is wrong by more."""
LABELS_SHARE = 0.1
"""What labels have of the probability of their first tokens, as is assumed before they are read; if they have less, more are followed."""
PROBED_LABELS = 8
"""Labels of a probe, of every length there is: each costs the plain pass a whole prompt, and one more shows nothing new."""


class Engine:
    """Scores prompts in passes of at most `token_budget` tokens, or one prompt: by the packed pass, or with `packed=None` by the plain one.

    The keys and values of the last shared prefix are kept. `reason` says in a sentence why this engine runs.
    """

    def __init__(
        self, model: PreTrainedModel, packed: PackedModel | None, labels: Completions, cache: CacheParams, token_budget: int
    ) -> None:
        """`labels` are token ids of the verbalisers, none the beginning of another; none if each prompt has an answer of its own."""
        self.model, self.token_budget = model, token_budget
        self.name, self.reason = "generic" if packed is None else "shared_prefix", ""
        self.packed, self._labels, self._tree, self._cache = packed, labels, tree_of(labels), cache
        self._held: tuple[tuple[int, ...], list[LayerKeyValues]] = ((), [])

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], shared: Sequence[int] | None = None, *, follow_all: bool = False) -> Scores:
        """Scores of the prompts, in order; either all have an answer of their own, or none has.

        `shared` are ids that all begin with, so that several calls share them; None: what these prompts have in common. Raises ValueError
        if a prompt does not begin with them or has nothing after them. Of more than `MOST_NODES` beginnings of labels, those that can
        matter are read, unless `follow_all`.
        """
        start = self._share(prompts, shared)
        if len(self._tree.tokens) > MOST_NODES and not follow_all and prompts[0].answer is None:
            return self._followed(prompts, start)
        return self._read(prompts, start, [self._tree if prompt.answer is None else tree_of([prompt.answer]) for prompt in prompts])

    def _followed(self, prompts: Sequence[Prompt], start: int) -> Scores:
        """Scores that follow whole the labels that can matter; of the others the first token's probability is a bound."""
        first = [ids[0] for ids in self._labels]
        begins = {token: [ids for ids in self._labels if ids[0] == token] for token in first}  # F distinct first tokens
        number = torch.tensor([list(begins).index(token) for token in first])  # [L]
        nodes = torch.tensor([len(tree_of(ids).tokens) for ids in begins.values()])  # [F]

        def followed(found: Tensor) -> Tensor:
            """Which first tokens are followed [N, F]: all but those that have next to nothing together, beside `found` [N, 1]."""
            ascending, order = at_first.sort(-1)
            own = (ascending.cumsum(-1) > MOST_LEFT * found).gather(-1, order.argsort(-1))
            return own | (2 * (own * nodes).sum(-1, keepdim=True) > nodes.sum()) | (nodes == 0)  # half of the tree: all of it

        def read(rows: Sequence[int], far: Tensor) -> Scores:
            kinds = [tuple(own) for own in far[:, number].tolist()]
            trees = {kind: tree_of([ids if own else ids[:1] for ids, own in zip(self._labels, kind, strict=True)]) for kind in set(kinds)}
            scores = self._read([prompts[row] for row in rows], start, [trees[kind] for kind in kinds])
            cut, logprobs = ~far[:, number].to(self.model.device), scores.label_logprobs
            sharing = number.bincount()[number].log().to(self.model.device)  # labels share the probability of a token equally
            return replace(scores, label_logprobs=logprobs - cut * sharing, label_bounds=logprobs.masked_fill(~cut, torch.nan))

        rows = range(len(prompts))
        at_first = self._read(prompts, start, [tree_of([[token] for token in begins])] * len(rows)).label_logprobs.exp().cpu()  # [N, F]
        far = followed(LABELS_SHARE * at_first.sum(-1, keepdim=True))
        scores = read(rows, far)
        found = scores.label_logprobs.exp().cpu().where(far[:, number], 0).sum(-1, keepdim=True)
        if again := (followed(found) & ~far).any(-1).nonzero().flatten().tolist():
            order = torch.arange(len(rows))
            order[again] = len(rows) + torch.arange(len(again))
            scores = Scores.join([scores, read(again, (followed(found) | far)[again])], order)
        return scores

    def _read(self, prompts: Sequence[Prompt], start: int, trees: Sequence[Tree]) -> Scores:
        """Scores of prompts with the trees that continue them."""
        rows = [Row(prompt.ids[start:], tree) for prompt, tree in zip(prompts, trees, strict=True)]
        batches, parts = plan_batches([row.length for row in rows], self.token_budget), []
        for batch in batches:
            own = [rows[number] for number in batch]
            logits, hidden = self._logits(own, start)
            parts.append(read_scores(logits, [row.tree for row in own], self._cache, [prompts[number] for number in batch], hidden))
        order = torch.tensor([number for batch in batches for number in batch])
        return Scores.join(parts, order.argsort())

    def distributions(self, prompts: Sequence[Prompt], shared: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities of the whole vocabulary at every answer position, [P, V] float32."""
        cache, self._cache = self._cache, CacheParams(encoding="full", resolution_nats=None)
        try:
            return self.score(prompts, shared).encoded["full_logprobs"].cpu()
        finally:
            self._cache = cache

    def close(self) -> None:
        """Give the model back as it was."""
        self._held = ((), [])
        if self.packed is not None:
            self.packed.detach()

    def _share(self, prompts: Sequence[Prompt], shared: Sequence[int] | None) -> int:
        """Make what prompts share ready; returns how many tokens that is."""
        if self.packed is None:
            return 0
        if shared is None:
            shared = shared_prefix(prompts) if len(prompts) > 1 else ()
        prefix = tuple(shared) if len(shared) >= WORTH_SHARING else ()
        if any(len(prompt.ids) <= len(prefix) or prompt.ids[: len(prefix)] != prefix for prompt in prompts):
            raise ValueError(f"a prompt does not begin with the {len(prefix)} shared tokens, or has nothing after them")
        if prefix and self._held[0] != prefix:
            self._held = ((), [])  # frees the old one before the new one is made
            self._held = (prefix, self.packed.read_context(prefix))
        return len(prefix)

    def _logits(self, rows: Sequence[Row], start: int) -> tuple[Tensor, Tensor | None]:
        layers = self._cache.hidden_layers
        if self.packed is None:
            return plain_logits(self.model, rows, layers)
        return packed_logits(self.packed, rows, self._held[1] if start else (), start, layers)


def open_engine(model: PreTrainedModel, tokens: TaskTokens, cache: CacheParams, probe: Sequence[Prompt]) -> Engine:
    """The engine for a model. `probe` are a few prompts of the work ahead, the longest among them, so that what depends on length shows.

    Nothing is assumed from an architecture's name: a model that the fast engine does not reproduce differs on the probe, or refuses, and
    gets the generic one. The two are compared in float32, whatever the model's format (`models.forward.in_float32`).
    """
    labels, free = tokens.completions, tokens.task.params.completion is not None
    nodes = tokens.longest_answer - 1 if free else len(tree_of(labels).tokens)
    budget = token_budget(model, memory_bytes(model.device), nodes)
    if free:  # any text will do to compare
        texts = [prompt.answer or tuple(islice(cycle(prompt.ids), tokens.longest_answer)) for prompt in probe]
        probe = [Prompt(prompt.ids, text) for prompt, text in zip(probe, texts, strict=True)]
    if is_encoder(model.config):
        engine = Engine(model, None, labels, cache, budget)
        engine.reason = "an encoder, padded to the longest input of a pass"
        return engine
    # What is compared depends on no threshold: it is neither rounded, in steps that may be larger than the tolerance, nor kept or drawn as
    # a probability falls on one side of a number or the other.
    exact = cache.model_copy(update={"encoding": "top_k_tail", "resolution_nats": None})
    longest = max(probe, key=lambda prompt: len(prompt.ids))
    few = labels if len(labels) <= PROBED_LABELS else sorted(labels, key=len)[-1 :: -(len(labels) // PROBED_LABELS)]

    def probed(engine: Engine) -> list[Scores]:  # the second call has a prefix even if these prompts share nothing
        return [engine.score(probe, follow_all=True), engine.score([longest], longest.ids[:-1], follow_all=True)]

    def difference(packed: PackedModel) -> float:
        return max(map(largest_difference, expected, probed(Engine(model, packed, few, exact, budget))))

    with in_float32(model) as tolerance:
        expected = probed(Engine(model, None, few, exact, budget))
        packed, reason = packed_if_exact(model, difference, tolerance)
    engine = Engine(model, packed, labels, cache, budget)
    engine.reason = reason
    return engine


def largest_difference(one: Scores, other: Scores) -> float:
    """Largest absolute difference of the log-probabilities of labels, answers and most probable tokens, and of log Z, in nats."""
    pairs = [(one.label_logprobs, other.label_logprobs), (one.completion_logprobs, other.completion_logprobs)]
    pairs += [(one.encoded[name], other.encoded[name]) for name in ("topk_logprobs", "log_z")]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def shared_prefix(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The ids that all prompts begin with; each keeps one of its own, for its answer position."""
    ids = [prompt.ids for prompt in prompts]
    first = min(ids)  # what the first and the last in order share, all share
    return first[: min(common_length(first, max(ids)), min(map(len, ids)) - 1)]


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Row numbers of each batch: rows in rising order of length, as many as fit `token_budget` tokens and at least one.

    Rows of like length are together, so that the small padded part of the attention has next to no padding. The last two batches share
    their rows evenly: a last one of a few tokens would read all weights for little. The plan follows from the lengths alone.
    """
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if not batches or tokens + lengths[row] > token_budget:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += lengths[row]
    if len(batches) < 2:
        return batches
    rows = batches[-2] + batches[-1]
    ends = list(accumulate(lengths[row] for row in rows))
    cut = min(range(1, len(rows)), key=lambda place: max(ends[place - 1], ends[-1] - ends[place - 1]))
    return [*batches[:-2], rows[:cut], rows[cut:]]


def token_budget(model: PreTrainedModel, memory_bytes: int, nodes: int = 0) -> int:
    """Tokens that a pass may have for its activations to stay within an eighth of `memory_bytes`, half of what the weights leave, and
    `ACTIVATIONS`.

    It follows from the device, the model and the `nodes` of a row's tree alone, since batches, and so a row's last bits, follow from it.
    Counted for each token: ten vectors of the hidden size, four of the inner size, and its part of the row's logits, twice. A row has one
    answer position in 16 tokens, and its nodes.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden)
    per_token = (10 * hidden + 4 * inner) * model.dtype.itemsize + 2 * 4 * int(config.vocab_size) * (1 + nodes) // (16 + nodes)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest, most = (LARGEST_BUDGET, ACTIVATIONS) if model.device.type == "cpu" else (LARGEST_GPU_BUDGET, GPU_ACTIVATIONS)
    return max(64, min(largest, min(memory_bytes // 8, max(0, memory_bytes - weights) // 2, most) // per_token))
