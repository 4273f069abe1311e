"""Model folders: safetensors and tokenizer files in and out, what identifies them, and cutting layers out of a model.

A model folder is what `save_pretrained` writes. Weights are only read from safetensors, or once from a GGUF file, which is converted. Code
of a model's repository never runs. A folder is identified by the hashes of its weights and of its tokenizer, not by its name.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pipeline.errors import CorruptError, ShotlessError, UsageError, choices
from pipeline.files import MANIFEST, read_json, sha256_file, sha256_json, sha256_text, write_json
from pipeline.params.data import MODEL_FILES

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROBES = ("A warm, funny film.", " It's 1,024 tokens\n\nlong", "Größe: 5 € 你好 🙂", "\tdef f(x):  return x")
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Entries of transformers' configs that list something for each layer."""
SETTLED_NS = 2_000_000_000


class UnsupportedModelError(Exception):
    """The architecture does something that the packed pass does not reproduce; use the plain forward."""


def build_model(path: Path, output: Path) -> None:
    """Write the model folder `output` from a model on disk: a folder is checked and copied, a GGUF file is converted.

    A folder is copied, not linked, so that a later edit of it cannot reach into an artifact. Raises UsageError if `path` is neither, or
    with everything that keeps its folder from being loaded.
    """
    if not path.exists():
        raise UsageError(f"models.*.path: {str(path)!r} does not exist. Give a path from the project's folder, or an absolute one.")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(
            f"models.*.path: {str(path)!r} is a file. A model is a folder of safetensors and tokenizer files, or a .gguf file."
        )
    shutil.rmtree(output, ignore_errors=True)
    if path.is_file():
        _convert_gguf(path, output)
    else:
        check_folder(path)
        output.mkdir(parents=True)
        for file in model_files(path):
            shutil.copyfile(file, output / file.name)
    check_folder(output)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a folder of float32 safetensors: transformers reads a GGUF and dequantises it."""
    logging.disable_progress_bar()
    with _reading(gguf, "contents"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
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
    """What keeps a config.json from being used."""
    if not file.is_file():
        return "config.json is missing"
    try:
        config = read_json(file)
    except CorruptError:
        return "config.json is not JSON"
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


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises UsageError with everything that is wrong with the folder, or if weights are missing or have another shape, which transformers
    would fill with random numbers.
    """
    check_folder(folder)
    with _reading(folder, "weights or config (model.safetensors, config.json)"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    model, found = loaded
    if absent := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise UsageError(f"{folder}: {len(absent)} weights are missing or have another shape than config.json says, first {absent[0]}.")
    torch.nn.Module.to(model, device)
    return model.eval()


def context_limit(folder: Path) -> int | None:
    """The longest sequence that the model takes, in tokens; None if its config does not say."""
    with _reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters of a model, all and trainable; shared ones count once."""
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    return sum(p.numel() for p in unique), sum(p.numel() for p in unique if p.requires_grad)


def weights_sha256(folder: Path, remembered: Path | None = None) -> str:
    """One hash of a model's config and weights, by content; file times and names of folders do not count.

    With a folder `remembered`, the hash of a file is kept there and used again until the file is touched.
    """
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return sha256_json({file.name: remembered_sha256(file, remembered) for file in files})


def remembered_sha256(file: Path, folder: Path | None) -> str:
    """A file's sha256, read from its bytes if anything about it differs from when it was last read; with no `folder` always.

    The time of its inode's last change, which no program can set, is part of what is compared. A file changed less than `SETTLED_NS` ago is
    not remembered: a second change could have the same time.
    """
    if folder is None:
        return sha256_file(file)
    started, about = time.time_ns(), file.stat()
    state = [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    note = folder / f"{sha256_text(str(file.resolve()))[:32]}.json"
    try:
        kept = read_json(note)
    except (OSError, CorruptError):
        kept = None
    if isinstance(kept, dict) and kept.get("state") == state and isinstance(kept.get("sha256"), str):
        return kept["sha256"]
    found, after = sha256_file(file), file.stat()
    if (after.st_size, after.st_ctime_ns) == (about.st_size, about.st_ctime_ns) and max(state[3:]) < started - SETTLED_NS:
        with suppress(OSError):  # where nothing can be written, it is read each time
            write_json({"state": state, "sha256": found}, note)
    return found


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
