"""GGUF to a plain safetensors folder, once, at fetch.

transformers reads a GGUF and dequantises it; what it then holds is an ordinary float32 model that still calls itself quantised and refuses
to be saved. The marks are taken off, and the weights written as they are.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pipeline.models.loading import save_model


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Write `folder` (config, float32 safetensors, tokenizer) from a GGUF file."""
    logging.disable_progress_bar()
    where, name = gguf.parent, gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32, local_files_only=True)
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    vars(model).pop("quantization_method")
    model.config._name_or_path = ""  # names the folder of the download
    tokenizer.init_kwargs.pop("name_or_path", None)
    save_model(model, tokenizer, folder)
