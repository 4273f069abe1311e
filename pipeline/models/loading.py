"""Model folders in and out: safetensors and tokenizer files, nothing that runs code.

A model folder is what `save_pretrained` writes. Weights are only ever read from safetensors, code in a model's repository is never run, and
a folder is known by the hash of its weights and of its tokenizer, not by its name.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ShotlessError, UsageError
from pipeline.files import disk_full, sync_tree
from pipeline.models.identity import VOCABULARY_FILES


def check_folder(folder: Path) -> None:
    """Raise UsageError naming everything that keeps a folder from being loaded."""
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise UsageError(f"{folder}: no such model folder; beside it there are: {', '.join(near) or '–'}. `dvc repro` makes it.")
    faults = []
    if fault := _config_fault(folder / "config.json"):
        faults.append(fault)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        faults.append(
            f"the weights are pickles ({', '.join(pickles)}), which can run code; convert them to safetensors"
            if pickles
            else "no *.safetensors"
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        faults.append(f"no tokenizer ({', '.join(VOCABULARY_FILES[:-1])} or {VOCABULARY_FILES[-1]})")
    if faults:
        raise UsageError(f"{folder} is not a model folder that can be loaded: {'; '.join(faults)}.")


def _config_fault(file: Path) -> str | None:
    """What keeps a config.json from being used."""
    if not file.is_file():
        return "config.json is missing"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"config.json is no JSON ({error})"
    if not isinstance(config, dict):
        return "config.json is no object"
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return None
    if "auto_map" in config:
        return (
            "config.json asks for code from the repository (`auto_map`), which is never run, and transformers itself has no "
            f"model type {kind!r}"
        )
    return f"config.json has the model type {kind!r}, which this version of transformers does not know"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    with _reading(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Say which folder cannot be read, and what of it.

    Whatever the libraries raise is caught: on damaged or hostile files that is nearly any exception (tokenizers raises plain `Exception`).
    """
    try:
        yield
    except ShotlessError:
        raise
    except Exception as error:
        said = (str(error).strip() or "no message").splitlines()[0][:300]
        raise UsageError(
            f"{folder}: its {what} cannot be read ({type(error).__name__}: {said}). Files of it are damaged, missing or of another kind; "
            "`dvc repro --force fetch` gets a model again."
        ) from error


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises UsageError where the folder is not loadable, with everything that is wrong, or where weights are missing or of another shape:
    transformers would fill them with random numbers.
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
    """The longest sequence the model takes, in tokens; None where its config does not say."""
    with _reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder."""
    with disk_full(folder / "model.safetensors"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sync_tree(folder)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Parameters of a model, all and trainable; shared ones count once."""
    unique = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() for p in unique), sum(p.numel() for p in unique if p.requires_grad)
