"""Model folders: safetensors and tokenizer files in and out, what identifies them, and cutting layers out of a model.

A model folder is what `save_pretrained` writes. Its config says whether it is a decoder, which is asked by verbaliser, or an encoder, whose
classification head answers. Weights are only read from safetensors, or once from a GGUF file, which is converted. Code of a model's
repository never runs. A folder is identified by the hashes of its weights and of its tokenizer, not by its name.
"""

import copy
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline.errors import CorruptError, ShotlessError, UsageError, choices
from pipeline.files import MANIFEST, read_json, sha256_file, sha256_json, write_json
from pipeline.params.data import MODEL_FILES

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROBES = ("A warm, funny film.", " It's 1,024 tokens\n\nlong", "Größe: 5 € 你好 🙂", "\tdef f(x):  return x")
SERVER = "server.json"
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Entries of transformers' configs that list something for each layer."""
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text")
"""Families that number positions from behind the padding token's id."""
MEAN_BY_LAYER = ("bert", "roberta", "xlm-roberta", "camembert")
"""Families whose heads read the first token, of layers that are alike: see `add_mean_layer`."""
MEAN_SCALE = 1000.0
"""What the first token itself adds to its mean over the tokens is a thousandth of it."""


class UnsupportedModelError(Exception):
    """The architecture does something that the packed pass does not reproduce; use the plain forward."""


def build_model(path: Path, output: Path) -> None:
    """Write the model folder `output` from a model on disk: a folder is checked and copied, a GGUF file is converted.

    A folder is copied, not linked, so that a later edit of it cannot reach into an artifact. A sentence encoder that takes the mean over
    its tokens keeps doing so (`add_mean_layer`). Raises UsageError if `path` is neither, or with everything that keeps its folder from
    being loaded.
    """
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise UsageError(
            f"models.*.path: {str(path)!r} {'is a file' if path.exists() else 'does not exist'}. Give the path, absolute or from the "
            "project's folder, of a folder of safetensors and tokenizer files, or of a .gguf file."
        )
    shutil.rmtree(output, ignore_errors=True)
    if path.is_file():
        _convert_gguf(path, output)
    else:
        check_folder(path)
        output.mkdir(parents=True)
        for file in model_files(path):
            shutil.copyfile(file, output / file.name)
        if _takes_mean(path):
            _keep_mean(output)
    check_folder(output)


def _takes_mean(folder: Path) -> bool:
    """Whether sentence-transformers' settings beside a model say that a text's embedding is the mean over its tokens."""
    return any(read_json(file).get("pooling_mode_mean_tokens") for file in folder.glob("*_Pooling/config.json"))


def _keep_mean(folder: Path) -> None:
    """Let the classification head of a folder's encoder read the mean over the tokens, if its family can."""
    config = load_config(folder)
    if config.model_type == "modernbert":
        write_json(read_json(folder / "config.json") | {"classifier_pooling": "mean"}, folder / "config.json")
    elif config.model_type in MEAN_BY_LAYER:
        with _reading(folder, "weights"):
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
        add_mean_layer(model)
        model.config._name_or_path = ""
        save_model(model, load_tokenizer(folder), folder)


@torch.no_grad()
def add_mean_layer(model: PreTrainedModel) -> None:
    """Add a last layer to an encoder of `MEAN_BY_LAYER`, in place, which makes its first token the mean over all tokens, normalised.

    Sentence encoders are trained with that mean, and heads of these families read the first token. The layer's attention is the same to
    every token, as its queries and keys are zero, and so is its feed-forward part; it stays so in training, since their gradients are zero
    too. What is left is a plain model of the family, for every program. BERT's pooler begins as good as linear.
    """
    layers, width = decoder_layers(model), model.config.hidden_size
    layer: Any = copy.deepcopy(layers[-1])
    for parameter in layer.parameters():
        parameter.zero_()
    layer.attention.self.value.weight.copy_(torch.eye(width))
    layer.attention.output.dense.weight.copy_(MEAN_SCALE * torch.eye(width))
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)
    layers.append(layer)
    model.config.num_hidden_layers += 1
    pooler: Any = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.dense.weight.copy_(0.3 * torch.eye(width))
        pooler.dense.bias.zero_()


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write a folder of float32 safetensors: transformers reads a GGUF and dequantises it.

    It would parse the file three times, and build the same map of names once for each module of the model.
    """
    import gguf

    logging.disable_progress_bar()
    once: dict[str, Any] = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with _reading(file, "contents"), mock.patch.multiple(gguf, **once):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
    # It is a plain float32 model that still calls itself quantised, and transformers refuses to save such a one.
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    vars(model).pop("quantization_method")
    model.config._name_or_path = ""  # names the folder of the download
    tokenizer.init_kwargs.pop("name_or_path", None)
    save_model(model, tokenizer, folder)


def model_files(folder: Path) -> list[Path]:
    """The files that belong to a model folder, sorted by name; a trained folder's manifest is not one of them."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file() and file.name != MANIFEST})


def check_folder(folder: Path) -> None:
    """Raise UsageError with everything that keeps a folder from being loaded."""
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UsageError(f"{folder}: no such model folder. Beside it: {choices(beside)}. `dvc repro` makes it.")
    faults = []
    if fault := _config_fault(folder / "config.json"):
        faults.append(fault)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        refused = f"the weights are pickles ({', '.join(pickles)}), which can run code; convert them to safetensors"
        faults.append(refused if pickles else "no *.safetensors")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        faults.append(f"no tokenizer ({', '.join(VOCABULARY_FILES[:-1])} or {VOCABULARY_FILES[-1]})")
    if faults:
        raise UsageError(f"{folder} is not a model folder that can be loaded: {'; '.join(faults)}.")


def _config_fault(file: Path) -> str | None:
    try:
        config = read_json(file)
    except (OSError, CorruptError):
        return f"config.json is {'not JSON' if file.is_file() else 'missing'}"
    if not isinstance(config, dict):
        return "config.json is not an object"
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return None
    if "auto_map" in config:
        return f"config.json asks for code of its repository (`auto_map`), which is never run, and transformers has no model type {kind!r}"
    return f"config.json has the model type {kind!r}, which this version of transformers does not know"


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Say which folder or file cannot be read, and what of it."""
    try:
        yield
    except ShotlessError:
        raise
    except Exception as error:  # on damaged or hostile files libraries raise nearly anything (tokenizers: plain `Exception`)
        said = (str(error).strip() or "no message").splitlines()[0][:300]
        raise UsageError(
            f"{path}: its {what} cannot be read ({type(error).__name__}: {said}). Files are damaged, missing or of another kind. "
            "`dvc repro --force model@NAME` copies or converts a model again."
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    with _reading(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_config(folder: Path) -> PreTrainedConfig:
    """A folder's config.json."""
    with _reading(folder, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a config is an encoder's: of a family with a masked language model, and saved as neither a decoder nor an encoder-decoder."""
    is_decoder = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder and not named


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model, or an encoder with its family's classification head, in evaluation mode.

    With `labels` an encoder gets a new head for them, random by `seed`, unless its own is for the same labels. Raises UsageError with
    everything that is wrong with the folder, or if weights are missing or have another shape, which transformers would fill with random
    numbers.
    """
    check_folder(folder)
    config = load_config(folder)
    settings: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    kind: Any = AutoModelForCausalLM
    if is_encoder(config):
        kind = AutoModelForSequenceClassification
        if labels and list((config.id2label or {}).values()) != list(labels):
            config.id2label, config.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
            settings |= {"config": config, "ignore_mismatched_sizes": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said below
    try:
        with _reading(folder, "weights or config (model.safetensors, config.json)"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = kind.from_pretrained(folder, output_loading_info=True, **settings)
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if kind is AutoModelForSequenceClassification:
        is_new = "config" in settings
        below = f"{model.base_model_prefix}."
        absent = [key for key in absent if not is_new or (below in key and ".pooler." not in key)]
        if absent and not is_new:
            raise UsageError(f"{folder}: an encoder without a head for labels (no {absent[0]}). Tune it first: `tuned` in params.yaml.")
    if absent:
        raise UsageError(f"{folder}: {len(absent)} weights are missing or have another shape than config.json says, first {absent[0]}.")
    torch.nn.Module.to(model, device)
    return model.eval()


def context_limit(folder: Path) -> int | None:
    """The longest sequence that the model takes, in tokens; None if its config or server does not say."""
    if (server := server_of(folder)) is not None:
        return server["found"]["context_tokens"]
    config = load_config(folder).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit - config.pad_token_id - 1 if limit is not None and config.model_type in OFFSET_POSITIONS else limit


def server_of(folder: Path) -> dict[str, Any] | None:
    """What the stage `server` wrote of a server: its `settings`, and what was `found`; None for a folder with a model."""
    return read_json(folder / SERVER) if (folder / SERVER).is_file() else None


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder that versions 4 and 5 read alike.

    Version 4 does not know version 5's class of tokenizers, and takes its default for a rotary base that it does not find, without a word.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config, settings = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    rotary = config.get("rope_parameters") or {}
    config |= {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
    config |= {"rope_scaling": rotary} if rotary.get("rope_type", "default") != "default" else {}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} if settings.get("tokenizer_class") == "TokenizersBackend" else {}
    write_json(config, folder / "config.json")
    write_json(settings, folder / "tokenizer_config.json")
    for file in folder.glob("*.safetensors"):  # which safetensors makes for their owner's eyes only
        file.chmod((folder / "config.json").stat().st_mode)


def weights_sha256(folder: Path) -> str:
    """One hash of a model's config and weights, by content; file times and names of folders do not count."""
    return sha256_json({file.name: sha256_file(file) for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"])})


def tokenizer_sha256(folder: Path) -> str:
    """One hash of what a folder's tokenizer makes of text: the ids of its ordinary tokens and of a few texts.

    Settings and control tokens that change no text's ids do not count, so an instruct model and its base have the same.
    """
    tokenizer = load_tokenizer(folder)
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token not in control}
    probes = tokenizer(list(PROBES), add_special_tokens=False, split_special_tokens=True).input_ids  # type: ignore[call-arg]
    return sha256_json([vocabulary, probes])


def parse_layers(text: str, depth: int) -> list[int]:
    """`"0-19, 26-29"` → the layer numbers, in order.

    Raises UsageError if a part is neither a number nor a range, leaves 0…depth-1, repeats, or goes backwards.
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"layers: {part.strip()!r} in {text!r} is neither a layer nor a range. Write for example `0-19, 26-29`.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not (chosen[-1] if chosen else -1) < first <= last < depth:
            raise UsageError(f"layers: {text!r} must name layers between 0 and {depth - 1}, each once, in rising order.")
        chosen += range(first, last + 1)
    return chosen


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of decoder layers: the module list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {depth} layers")


def label_layer(model: PreTrainedModel) -> torch.nn.Linear:
    """An encoder's last layer: the labels' logits from its embedding of an input."""
    body = set(getattr(model, model.base_model_prefix).modules())
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in body]
    if not head or head[-1].out_features != model.config.num_labels:
        raise UnsupportedModelError(f"{type(model).__name__} does not end with a linear layer for its labels")
    return head[-1]


def cut_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Keep only `layers` of a model, in place: modules, their numbers, and the config's depth and per-layer lists.

    What is left is an ordinary model of the same architecture. Middle-to-late layers can be spared most.
    """
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
