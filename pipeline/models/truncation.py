"""Cutting a block of layers out of a model, so that the student is really smaller where no smaller model is at hand.

Middle-to-late layers can be spared most; the first and last are kept. What is left is an ordinary model of the same architecture.
"""

import re

from transformers import PreTrainedModel

from pipeline.errors import UsageError
from pipeline.models.packed import decoder_layers

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Entries of transformers' configs that list something for each layer."""


def parse_layers(text: str, depth: int) -> list[int]:
    """`"0-19, 26-29"` → the layer numbers, in order.

    Raises UsageError where a part is no number or range, leaves 0…depth-1, repeats, or goes backwards.
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"layers: {part.strip()!r} in {text!r} is neither a layer nor a range; write for example `0-19, 26-29`.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not (chosen[-1] if chosen else -1) < first <= last < depth:
            raise UsageError(f"layers: {text!r} must name layers between 0 and {depth - 1}, each once, in rising order.")
        chosen += range(first, last + 1)
    return chosen


def cut_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Keep only `layers` of a model, in place: modules, their numbers and the config's depth and per-layer lists."""
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    modules = decoder_layers(model)
    kept = [modules[number] for number in layers]
    del modules[:]
    modules.extend(kept)
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    for name in PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, [value[number] for number in layers])
    config.num_hidden_layers = len(layers)
    return model
