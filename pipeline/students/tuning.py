"""Which weights are learnt: all of them, LoRA's adapters, biases, or the head alone.

What is not learnt has no gradient and no moments, and below the first learnt weight autograd keeps nothing. The trade-off is the usual one:
fewer weights take less memory and move the model less, for better or worse.

- `full`: every weight; `freeze_embeddings` leaves out the token and position tables, and a head that is tied to them.
- `lora`: low-rank updates beside linear layers (2106.09685), by peft. Merged into the weights at the end, so that a student is a plain
  model; `adapters: kept` leaves the adapter beside it too.
- `bitfit`: the biases (2106.10199). Llama and its kin have none; there the weights of the norms are learnt, the other vectors that scale
  and shift what a layer passes on, which is peft's LN tuning (2312.11420). Biases are not added: the architecture would have no place for
  them when it is loaded again.
- `head`: the output matrix alone. A head tied to the embeddings is untied first, or the model's input would change under it; the student
  then has a matrix more than its base.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UsageError
from pipeline.models.loading import parameter_counts
from pipeline.models.packed import decoder_layers
from pipeline.params import LoraParams, TuningParams


@dataclass(frozen=True)
class Tuning:
    """A model with the weights to be learnt marked, and all others frozen."""

    trains: str
    """What is learnt, in words."""
    trained_parameters: int
    _adapter: Any = None
    """peft's wrapper around the model, where there are adapters."""

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write a LoRA adapter as peft does, for use on `base` with the same layers kept.

        peft lists sets in an order that differs from process to process; they are sorted here.
        """
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        config = self._adapter.peft_config["default"]
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)
        weights = get_peft_model_state_dict(self._adapter, save_embedding_layers=False)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})

    def merge(self) -> None:
        """Add adapters to the weights they stand beside and take them out, in place: what is left is the plain architecture."""
        if self._adapter is not None:
            self._adapter.merge_and_unload()


def apply_tuning(model: PreTrainedModel, params: TuningParams) -> Tuning:
    """Mark what `params.tuning` learns, in place. The model's answers stay as they are.

    Raises UsageError where the architecture has none of it.
    """
    model.requires_grad_(False)
    adapter = None
    if params.tuning == "full":
        trains = _full(model, params.freeze_embeddings)
    elif params.tuning == "lora":
        trains, adapter = _lora(model, params.lora or LoraParams(), params.seed)
    elif params.tuning == "bitfit":
        trains = _bitfit(model)
    else:
        trains = _head(model)
    if params.freeze_layers:
        trains += f", in the layers from {params.freeze_layers} on"
        _freeze_lowest(model, params.freeze_layers)
    return Tuning(trains, parameter_counts(model)[1], adapter)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnt weights by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _full(model: PreTrainedModel, freeze_embeddings: bool) -> str:
    model.requires_grad_(True)
    if not freeze_embeddings:
        return "all weights"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    return "all weights but the embeddings" + (" and the head tied to them" if _is_tied(model) else "")


def _lora(model: PreTrainedModel, lora: LoraParams, seed: int) -> tuple[str, Any]:
    from peft import LoraConfig, get_peft_model  # seconds to import, which other tunings need not wait for

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if lora.modules == "all_linear" else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with _seeded(seed), warnings.catch_warnings():
            # peft 0.21 asks for a property that transformers 5 has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            adapter = get_peft_model(model, config)
    except ValueError as error:
        if lora.modules == "all_linear":
            raise
        raise UsageError(
            f"lora.modules: peft has no usual choice for a {model.config.model_type} model ({error}); write `modules: all_linear`."
        ) from None
    adapter.eval()
    adapted = ", ".join(sorted({str(name).rsplit(".", 1)[-1] for name in adapter.targeted_module_names}))
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha} on {adapted}", adapter


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """LoRA's random halves depend on the seed alone, and torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _bitfit(model: PreTrainedModel) -> str:
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 1}
    biases = {name: parameter for name, parameter in vectors.items() if name.rsplit(".", 1)[-1] == "bias"}
    chosen = biases or vectors
    if not chosen:
        raise UsageError(f"tuning: bitfit: a {model.config.model_type} model has neither biases nor norms with weights; choose `lora`.")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return "biases" if biases else "weights of norms, as the architecture has no biases"


def _freeze_lowest(model: PreTrainedModel, layers: int) -> None:
    """Leave the embeddings (and a head tied to them) and the lowest layers as they are."""
    found = decoder_layers(model)
    if layers >= len(found):
        raise UsageError(f"freeze_layers: {layers}, and the student has {len(found)}, so that none would learn; freeze fewer.")
    for module in [*found[:layers], *(m for m in model.modules() if isinstance(m, nn.Embedding))]:
        module.requires_grad_(False)


def _head(model: PreTrainedModel) -> str:
    head: Any = model.get_output_embeddings()
    if head is None:
        raise UsageError(f"tuning: head: a {model.config.model_type} model has no output matrix of its own; choose `full` or `lora`.")
    untied = _is_tied(model)
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    head.requires_grad_(True)
    return "the head, untied from the embeddings" if untied else "the head"


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
