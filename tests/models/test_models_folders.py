"""Model folders: what is refused and how it is said, that a folder read back gives the same numbers, hashes that follow content alone."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import ARCHITECTURES
from safetensors.torch import load_file, save_file

from pipeline.errors import UsageError
from pipeline.files import read_json
from pipeline.models.folders import (
    build_model,
    check_folder,
    context_limit,
    load_model,
    load_tokenizer,
    save_model,
    tokenizer_sha256,
    weights_sha256,
)

WITHOUT_SDPA = {"mamba": {"state_size": 4}, "bloom": {"n_head": 4, "n_layer": 4}, "gemma2": {"num_key_value_heads": 2, "head_dim": 8}}
IDS = torch.tensor([[5, 9, 3, 7, 11, 5, 260, 41]])


@pytest.fixture
def folder(tmp_path, model_folder):
    """A model folder of the test's own, which it may spoil."""
    shutil.copytree(model_folder("llama"), tmp_path / "models" / "tiny")
    return tmp_path / "models" / "tiny"


class RunsCode:
    """An object whose unpickling is seen: it leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused_by_name_and_not_opened(folder, tmp_path, name):
    trace = tmp_path / "trace"
    (folder / name).write_bytes(pickle.dumps(RunsCode(trace)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"pickles \({name}\), which can run code; convert them to safetensors"):
        load_model(folder)
    assert not trace.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder, tmp_path):
    trace = tmp_path / "trace"
    expected = logits(load_model(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(trace)))
    assert torch.equal(logits(load_model(folder)), expected)
    assert not trace.exists()


def test_code_of_a_repository_is_refused(folder):
    edit_json(folder / "config.json", model_type="strange", auto_map={"AutoModelForCausalLM": "strange.Strange"})
    with pytest.raises(UsageError, match=r"`auto_map`\), which is never run, and transformers has no model type 'strange'"):
        load_model(folder)


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer \(tokenizer\.json, tokenizer\.model or vocab\.json\)\.$"):
        load_model(folder)


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        check_folder(tmp_path / "empty")
    for fault in (str(tmp_path / "empty"), "config.json is missing", "no *.safetensors", "no tokenizer"):
        assert fault in str(caught.value)


def test_a_missing_folder_names_its_neighbours(folder):
    (folder.parent / "a-file").touch()
    (folder.parent / "another").mkdir()
    with pytest.raises(UsageError, match=r"models/tny: no such model folder\. Beside it: another, tiny\. `dvc repro` makes it"):
        load_model(folder.parent / "tny")


def test_a_missing_folder_in_a_missing_folder_has_no_neighbours(tmp_path):
    with pytest.raises(UsageError, match="Beside it: –"):
        load_model(tmp_path / "no" / "where")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_read_back_gives_the_same_numbers(tiny_model, tokenizer, tmp_path, architecture):
    model = tiny_model(architecture)
    save_model(model, tokenizer, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert load_tokenizer(tmp_path / "saved")("Review: a warm film").input_ids == tokenizer("Review: a warm film").input_ids


def test_a_saved_folder_says_what_version_4_of_transformers_looks_for(tiny_model, tokenizer, tmp_path):
    save_model(tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), tokenizer, tmp_path)
    assert read_json(tmp_path / "config.json")["rope_theta"] == 5000.0
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_model(tmp_path).config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("architecture", WITHOUT_SDPA)
def test_architectures_without_fused_attention_are_read_back_too(tiny_model, tokenizer, tmp_path, architecture):
    model = tiny_model(architecture, **WITHOUT_SDPA[architecture])
    save_model(model, tokenizer, tmp_path / "saved")
    assert torch.allclose(logits(load_model(tmp_path / "saved")), logits(model), atol=1e-5)


def test_saving_what_was_read_gives_the_same_bytes(folder, tmp_path):
    save_model(load_model(folder), load_tokenizer(folder), tmp_path / "once")
    save_model(load_model(tmp_path / "once"), load_tokenizer(tmp_path / "once"), tmp_path / "twice")
    once, twice = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("once", "twice"))
    assert once == twice
    assert once["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(folder, tmp_path):
    save_model(load_model(folder), load_tokenizer(folder), tmp_path / "saved")
    assert {file.stat().st_mode for file in (tmp_path / "saved").iterdir()} == {(folder / "config.json").stat().st_mode}


def test_hashes_change_with_one_weight_and_one_setting_and_not_with_the_folder(folder, tmp_path):
    before, tokenizer_before = weights_sha256(folder), tokenizer_sha256(folder)
    moved = tmp_path / "elsewhere" / "of-another-name"
    shutil.copytree(folder, moved)
    (moved / "model.safetensors").touch()
    (moved / "manifest.json").write_text("{}", encoding="utf-8")
    assert weights_sha256(moved) == before
    assert tokenizer_sha256(moved) == tokenizer_before
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(moved) != before
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert weights_sha256(folder) != before


def test_a_setting_that_changes_no_text_s_ids_does_not_change_the_tokenizer_s_hash(folder):
    before = tokenizer_sha256(folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=8192, padding_side="left", pad_token=None)
    assert tokenizer_sha256(folder) == before


def test_a_setting_that_changes_a_prompt_s_ids_changes_the_tokenizer_s_hash(folder):
    before, ids = tokenizer_sha256(folder), load_tokenizer(folder)("film").input_ids
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    assert load_tokenizer(folder)("film").input_ids != ids
    assert tokenizer_sha256(folder) != before


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {"max_position_embeddings": 96}), ("gpt2", {"n_positions": 96})])
def test_the_context_limit_is_the_config_s_under_whatever_name(model_folder, architecture, changes):
    assert context_limit(model_folder(architecture, **changes)) == 96


def test_a_config_that_names_no_limit_has_none(tiny_model, tmp_path):
    model = tiny_model("bloom", n_head=4, n_layer=4)
    del model.config.max_position_embeddings  # set by the fixture; bloom itself knows none
    model.config.save_pretrained(tmp_path)
    assert context_limit(tmp_path) is None


def test_a_folder_is_built_without_code_and_pickles(folder, tmp_path):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "strange.Model"})
    (folder / "strange.py").write_text("", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "trace")))
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.json").write_text("{}", encoding="utf-8")
    (folder / "link.json").symlink_to("/etc")
    output = tmp_path / "artifacts" / "models" / "tiny"
    output.mkdir(parents=True)
    (output / "old.safetensors").touch()
    build_model(folder, output)
    assert {file.name for file in output.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [file for file in output.rglob("*") if file.suffix in {".py", ".bin"} or file.is_symlink() or file.is_dir()]
    assert not {"manifest.json", "old.safetensors"} & {file.name for file in output.iterdir()}
    assert torch.equal(logits(load_model(output)), logits(load_model(folder)))
    edit_json(folder / "config.json", rms_norm_eps=1e-1)
    assert not torch.equal(logits(load_model(output)), logits(load_model(folder))), "it is a copy"


@pytest.mark.parametrize(("path", "said"), [("gone", "does not exist"), ("notes.txt", "is a file")])
def test_what_is_not_a_model_is_not_built(tmp_path, path, said):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=said):
        build_model(tmp_path / path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UsageError, match=r"model\.gguf: its contents cannot be read"):
        build_model(tmp_path / "model.gguf", tmp_path / "out")
