"""Small random models of several architectures, a tokenizer trained on the spot, and params for them. Nothing here is downloaded."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

settings.register_profile("any machine", deadline=None)  # a busy machine fails no property
settings.load_profile("any machine")

PROJECT = Path(__file__).resolve().parent.parent
DVC = [sys.executable, "-m", "dvc"]
SENTENCES = [
    "Review: a warm and funny film\nSentiment: positive",
    "Review: a dull, lifeless mess\nSentiment: negative",
    "the plot goes nowhere and the actors seem bored",
    "I loved every minute of this strange little picture",
    "N/A x great terrible good bad service late food cold",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens, without a beginning-of-text token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


_SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "phi": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ARCHITECTURES = sorted(_SMALL)


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """`tiny_model("llama", seed=0)` → a random float32 model of 4 layers and width 32 over the test tokenizer's vocabulary."""

    def make(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        settings: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        if architecture != "gpt2":
            settings |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
            if architecture != "opt":
                settings |= {"intermediate_size": 64}
        settings |= copy.deepcopy(_SMALL.get(architecture, {})) | changes
        config = AutoConfig.for_model(architecture, **settings)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # the default initialisation is so small that every answer looks alike
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """`model_folder("llama")` → a folder with safetensors and tokenizer, as `fetch` writes it."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **changes: Any) -> Path:
        key = f"{architecture}-{sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, **changes).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


LORA = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4}}
TUNINGS = {
    "full": {},
    "frozen": {"freeze_embeddings": True},
    "upper": {"freeze_layers": 1},
    "lora": LORA,
    "kept": {**LORA, "adapters": "kept"},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
}
"""Every way of tuning, as changes of a student's params."""
ENCODERS = {
    "bert": {},
    "mpnet": {},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 130},
    "xlm-roberta": {"type_vocab_size": 1, "max_position_embeddings": 130},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64},
}


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`encoder_folder("bert")` → a folder with a random encoder of 2 layers and width 32, without a head, and a WordPiece tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str = "bert") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            # Written out: tokenizers' trainer of word pieces numbers them otherwise in each process.
            letters, words = sorted(set("".join(SENTENCES).lower())), sorted({word for text in SENTENCES for word in text.lower().split()})
            pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
            vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
            raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
            raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
            raw.add_special_tokens(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"])
            raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
            named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
            PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(folder)
            settings = {"vocab_size": raw.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            settings |= {"intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 1} | ENCODERS[family]
            torch.manual_seed(0)
            model = AutoModel.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.2)
            model.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def raw_params() -> dict[str, Any]:
    """The shipped params.yaml as plain dicts and lists, to be changed and given to `parse_params`."""
    return YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))


def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist, and all that it starts, keeps to one core: two that share all cores would wait for each other's threads."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, …
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})
        torch.set_num_threads(1)  # torch counted the cores when it was imported


LONGEST = (
    "test_real_pipeline", "test_serving_onnx", "test_stages_changes", "test_student_runs", "test_student_caches", "test_student_processes",
    "test_student_training", "test_report", "test_setup_init", "test_benchmarks_student", "test_teachers_ray", "test_models_long_texts",
    "test_evaluation_cost", "test_serving_predict_command", "test_serving_promise", "test_monitor_command", "test_serving_fallback",
)  # fmt: skip
"""Files of tests by what they take, the longest first; the rest are quick."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
