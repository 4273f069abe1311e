"""Logits at the answer positions of rows: packed if that gives the plain forward's numbers on a probe, else plain.

The plain forward runs rows of equal length together, so that nothing is padded. It is right for every architecture, and the packed pass is
compared with it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from pipeline.errors import UsageError
from pipeline.models.folders import decoder_layers, is_encoder
from pipeline.models.packed import LayerKeyValues, PackedModel, Row, UnsupportedModelError, pack

TOLERANCE_NATS, LOW_PRECISION_TOLERANCE_NATS = 1e-4, 1e-3
"""Largest difference of a log-probability that float32 rounding explains, for float32 weights and for others (see `in_float32`)."""

SHORT_TOKENS = 128
"""Inputs up to this length have their attention computed by plain products on a CPU: torch's fused kernel is made for long ones, and took
a third of a training step of MiniLM at 12 tokens an input."""


def plain_logits(model: PreTrainedModel, rows: Sequence[Row], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
    """Logits [N, V] at the rows' outputs by the plain forward, with a gradient if one is enabled; and `layers`' outputs there, [N, D].

    N is in `pack`'s order: for each row the query's last token, then every node of its tree. Each path through a tree costs a pass of its
    own. An encoder's logits are those of its labels, and its states those of the first token.
    """
    if is_encoder(model.config):
        with hidden_states(model, layers) as states_at:
            logits_of_labels = _classifier_logits(model, [row.query for row in rows])
        return logits_of_labels, states_at(slice(1))[:, 0] if layers else None
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []  # of each prompt: the numbers of the outputs that its last tokens are
    first = 0
    for row in rows:
        new = set(range(-1, len(row.tree.tokens)))
        for path in row.tree.paths:
            prompts.append([*row.query, *(row.tree.tokens[node] for node in path)])
            outputs.append([first + 1 + node for node in (-1, *path) if node in new])
            new.difference_update((-1, *path))
        first += row.outputs
    shapes = [(len(prompt), len(own)) for prompt, own in zip(prompts, outputs, strict=True)]
    logits: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    for (_, positions), group in groupby(sorted(range(len(prompts)), key=shapes.__getitem__), key=shapes.__getitem__):
        numbers = list(group)
        tokens = torch.tensor([prompts[number] for number in numbers], dtype=torch.long, device=model.device)
        own = [output for number in numbers for output in outputs[number]]
        with hidden_states(model, layers) as states_at:
            out = model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits[:, -positions:]
        logits |= dict(zip(own, out.flatten(0, 1), strict=True))
        if layers:
            states |= dict(zip(own, states_at(slice(-positions, None)).flatten(0, 1), strict=True))
    order = range(first)
    return torch.stack([logits[number] for number in order]), torch.stack([states[number] for number in order]) if layers else None


def _classifier_logits(model: PreTrainedModel, inputs: Sequence[Sequence[int]]) -> Tensor:
    """An encoder's logits [N, L] for inputs of token ids, padded to the longest."""
    config: Any = model.config
    ids = nn.utils.rnn.pad_sequence([torch.tensor(own) for own in inputs], batch_first=True, padding_value=config.pad_token_id or 0)
    lengths = torch.tensor([[len(own)] for own in inputs])
    given = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long()}
    if has_token_types(model):
        ends = (ids == inputs[0][-1]).long()  # the separator ends every input, and the first of a pair
        given["token_type_ids"] = (ends.cumsum(1) - ends).clamp(max=1) * given["attention_mask"]
    is_short = model.device.type == "cpu" and ids.shape[1] <= SHORT_TOKENS
    with sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext():
        return model(**{name: value.to(model.device) for name, value in given.items()}).logits


def has_token_types(model: PreTrainedModel) -> bool:
    """Whether an encoder is told which of two texts a token belongs to."""
    return (getattr(model.config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def packed_logits(
    packed: PackedModel, rows: Sequence[Row], prefix: Sequence[LayerKeyValues] = (), start: int = 0, layers: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """The same by the packed pass, behind a `prefix` of `start` tokens."""
    laid = pack(rows, start, packed.model.device)
    with hidden_states(packed.model, layers) as states_at:
        logits = packed.logits(laid, prefix)
    return logits, states_at(laid.outputs)[0] if layers else None


def packed_if_exact(
    model: PreTrainedModel, difference: Callable[[PackedModel], float], tolerance: float = TOLERANCE_NATS
) -> tuple[PackedModel | None, str]:
    """A packed pass whose `difference` from the plain forward, nats, is at most `tolerance`; else None. And why.

    With a packed pass, the model's attention implementation becomes the packed one; without, it stays as it was.
    """
    refusals = []
    for answers_only in (True, False):
        what = "the last layer on " + ("answer positions alone" if answers_only else "all tokens")
        packed = None
        try:
            packed = PackedModel(model, answers_only=answers_only)
            with torch.no_grad():
                found = difference(packed)
        except (UnsupportedModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            # A foreign architecture may fail anywhere inside its own code; the reason is kept, and the plain forward still works.
            refusals.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            numbers = f"a probe differs by {found:.1e} nats from the plain forward (allowed {tolerance:.0e})"
            if found <= tolerance:
                return packed, f"{what}; {numbers}"
            refusals.append(f"{what}: {numbers}")
        if packed is not None:
            packed.detach()
    return None, "packed rows were refused: " + "; ".join(refusals)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[float]:
    """Compute in float32 inside the block, whatever the weights' format; gives the tolerance, in nats, for comparing two passes there.

    In bfloat16 two right passes differ by tenths of a nat of rounding, so a comparison there would let wrong ones pass. In float32 the same
    weights leave less than `LOW_PRECISION_TOLERANCE_NATS` between them, and more means another function. Each module's weights are
    widened for its own forward and narrowed after it, which loses nothing, so memory holds one module's weights twice.
    """
    formats = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype in {torch.bfloat16, torch.float16}}
    if not formats:
        yield TOLERANCE_NATS
        return

    def convert(module: nn.Module, to: torch.dtype | None = None) -> None:
        with torch.inference_mode(mode=False):
            for parameter in formats.keys() & set(module.parameters(recurse=False)):
                parameter.data = parameter.data.to(to or formats[parameter])

    hooks = [module.register_forward_pre_hook(lambda module, _args: convert(module, torch.float32)) for module in model.modules()]
    hooks += [module.register_forward_hook(lambda module, _args, _out: convert(module)) for module in model.modules()]
    try:
        yield LOW_PRECISION_TOLERANCE_NATS
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():  # a pass that was left early did not narrow
            convert(module)


@contextmanager
def hidden_states(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Callable[[Tensor | slice], Tensor]]:
    """Catch the outputs of `layers` (negative ones count from the last) while the block runs.

    Gives a function of the asked tokens: their states in the last pass, layers side by side, [rows, tokens, layers · H]. A layer that ran
    on the asked tokens alone is taken as it is. Raises UsageError if the model has no such layer.
    """
    modules = decoder_layers(model) if layers else nn.ModuleList()
    if wrong := [layer for layer in layers if not -len(modules) <= layer < len(modules)]:
        raise UsageError(f"cache.hidden_layers: no layer {wrong[0]}; this model has {len(modules)}, 0 to {len(modules) - 1}.")
    asked = [modules[layer] for layer in layers]
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    def states_at(tokens: Tensor | slice) -> Tensor:
        alone = len(tokens) if isinstance(tokens, Tensor) else None
        return torch.cat([outputs[one] if outputs[one].shape[1] == alone else outputs[one][:, tokens] for one in asked], -1)

    handles = [module.register_forward_hook(keep) for module in asked]
    try:
        yield states_at
    finally:
        for handle in handles:
            handle.remove()
