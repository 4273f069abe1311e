"""Which weights are learnt, and how a step updates them.

- `full`: every weight. `freeze_embeddings` leaves out the token and position tables, and a head that is tied to them.
- `lora`: low-rank updates beside linear layers (2106.09685), by peft. They are merged at the end, so that a student is a plain model;
  `adapters: kept` leaves the adapter beside it too.
- `bitfit`: the biases (2106.10199). Llama and its kin have none; there the norms' weights are learnt (peft's LN tuning, 2312.11420).
- `head`: an encoder's classification head, or a decoder's output matrix. One tied to the embeddings is untied first, or the model's input
  would change under it; the student then has a matrix more than its base.
- `contrastive`: all weights of an encoder but its last layer, by pairs of texts; then that layer, by a logistic regression on the
  embeddings (SetFit, 2209.11055).

Weights that are not learnt have no gradient and no moments, and below the first learnt weight autograd keeps nothing.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UsageError
from pipeline.models.folders import is_encoder, label_layer
from pipeline.models.packed import decoder_layers
from pipeline.params import LoraParams, TuningParams


@dataclass(frozen=True)
class Tuning:
    """A model whose learnt weights are marked; all others are frozen."""

    trains: str  # what is learnt, in words
    trained_parameters: int
    _adapter: Any = None  # peft's wrapper around the model, if there are adapters

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write a LoRA adapter as peft does, for use on `base` with the same layers kept."""
        config = self._adapter.peft_config["default"]
        config.base_model_name_or_path = base
        config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
        self._adapter.save_pretrained(folder, save_embedding_layers=False)
        (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode)  # as in `save_model`
        (folder / "README.md").unlink()

    def merge(self) -> None:
        """Add adapters to the weights beside them, in place: what is left is the plain architecture."""
        if self._adapter is not None:
            self._adapter.merge_and_unload()


def apply_tuning(model: PreTrainedModel, params: TuningParams) -> Tuning:
    """Mark what `params.tuning` learns, in place. The model's answers stay as they are.

    Raises UsageError if the architecture has none of it.
    """
    adapter = None
    model.requires_grad_(params.tuning == "full")
    if params.tuning == "full":
        tied = " and the head tied to them" if _is_tied(model) else ""
        trains = f"all weights but the embeddings{tied}" if params.freeze_embeddings else "all weights"
    elif params.tuning == "lora":
        trains, adapter = _lora(model, params.lora or LoraParams(), params.seed)
    else:
        trains = {"bitfit": _bitfit, "head": _head, "contrastive": _contrastive}[params.tuning](model)
    layers = decoder_layers(model) if params.freeze_layers else nn.ModuleList()
    if params.freeze_layers:
        if params.freeze_layers >= len(layers):
            raise UsageError(f"freeze_layers: {params.freeze_layers}, and the student has {len(layers)}: none would learn. Freeze fewer.")
        trains += f", in the layers from {params.freeze_layers} on"
    if params.freeze_embeddings or params.freeze_layers:
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]  # of tokens and positions
        for module in (*tables, *layers[: params.freeze_layers]):
            module.requires_grad_(False)
    return Tuning(trains, model.num_parameters(only_trainable=True), adapter)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnt weights by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _lora(model: PreTrainedModel, lora: LoraParams, seed: int) -> tuple[str, Any]:
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if lora.modules == "all_linear" else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if is_encoder(model.config) else "CAUSAL_LM",  # an encoder's head is learnt whole
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)  # the random halves depend on the seed alone
            # peft 0.21 asks for a property that transformers 5 has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            adapter = get_peft_model(model, config)
    except ValueError as error:
        if lora.modules == "all_linear":
            raise
        what = f"peft has no usual choice for the model type {model.config.model_type!r} ({error})"
        raise UsageError(f"lora.modules: {what}. Write `modules: all_linear`.") from None
    adapter.eval()
    adapted = ", ".join(sorted({str(name).rsplit(".", 1)[-1] for name in adapter.targeted_module_names}))
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha} on {adapted}", adapter


def _bitfit(model: PreTrainedModel) -> str:
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 1}
    biases = {name: parameter for name, parameter in vectors.items() if name.rsplit(".", 1)[-1] == "bias"}
    if not vectors:
        raise UsageError(f"tuning: bitfit: a {model.config.model_type} model has neither biases nor norms with weights. Choose `lora`.")
    for parameter in (biases or vectors).values():
        parameter.requires_grad_(True)
    return "biases" if biases else "weights of norms, as the architecture has no biases"


def _head(model: PreTrainedModel) -> str:
    if is_encoder(model.config):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(f"{model.base_model_prefix}."))
        return "the classification head"
    head: Any = model.get_output_embeddings()
    if head is None:
        raise UsageError(f"tuning: head: a {model.config.model_type} model has no output matrix of its own. Choose `full` or `lora`.")
    untied = _is_tied(model)
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    head.requires_grad_(True)
    return "the head, untied from the embeddings" if untied else "the head"


def _contrastive(model: PreTrainedModel) -> str:
    if not is_encoder(model.config):
        raise UsageError(f"tuning: contrastive: it is for encoders, and a {model.config.model_type} model is a decoder. Choose `full`.")
    model.requires_grad_(True)
    label_layer(model).requires_grad_(False)
    return "all weights by pairs of texts, then the last layer by a logistic regression"


@torch.no_grad()
def fit_label_layer(model: PreTrainedModel, embeddings: Tensor, labels: Sequence[int]) -> float:
    """Make an encoder's last layer the logistic regression of `labels` [N] on `embeddings` [N, H]; its mean cross-entropy, nats.

    Labels count alike, however many examples each has: with few of each, it would else name the label that has the most. Its penalty is
    for embeddings of unit length (C = 1), so they are divided by their mean length.
    """
    length = embeddings.norm(dim=-1).mean()
    scaled = (embeddings / length).double().cpu().numpy()
    fitted = LogisticRegression(max_iter=1000, class_weight="balanced").fit(scaled, labels)
    weights, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(bias) == 1:  # two labels have one score
        weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2
    layer = label_layer(model)
    layer.weight.copy_(weights / length.double().cpu())
    layer.bias.copy_(bias)
    return float(log_loss(labels, fitted.predict_proba(scaled)))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def adamw(model: PreTrainedModel, params: TuningParams) -> torch.optim.AdamW:
    """AdamW over the learnt weights, tied ones once.

    Weight decay is for weight matrices alone: a norm or bias only moves the scale, and an embedding row whose token never occurs would
    shrink for no reason. torch's fused kernel is ten times as fast on a CPU as the default (0.064 s a step for 135M parameters).
    """
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    undecayed = {id(weight) for module in tables for weight in module.parameters()}
    trained = trained_weights(model).values()
    decayed = [weight for weight in trained if weight.dim() >= 2 and id(weight) not in undecayed]
    others = [weight for weight in trained if weight.dim() < 2 or id(weight) in undecayed]
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=params.learning_rate, fused=True)


def learning_rate(step: int, params: TuningParams) -> float:
    """The learning rate of a step, counted from 0: a linear rise over the warm-up, then constant, or falling towards 0 at the end."""
    warmup = round(params.warmup * params.steps)
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    share = (step - warmup) / (params.steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}
    return params.learning_rate * factors[params.decay]
