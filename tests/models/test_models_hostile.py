"""Bad and hostile model folders: refused by name with what is wrong; pickles are never read, and a repository's code never runs."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import ShotlessError, UsageError
from pipeline.models.folders import check_folder, context_limit, load_model, load_tokenizer, tokenizer_sha256, weights_sha256


class Canary:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def edit(name, **changes):
    """Change entries of one of a folder's JSON files."""

    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def pickles(folder):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "weights.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Canary()))


def pickle_called_safetensors(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary()))


def code(kind):
    """A repository that brings its own classes, and asks for them."""

    def change(folder):
        (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Evil: pass\n", "utf-8")
        mapping = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.Evil")
        if kind == "tokenizer":
            edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")(folder)
        else:
            edit("config.json", auto_map=mapping, **({"model_type": "evil"} if kind == "new" else {}))(folder)

    return change


def tensors(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def header(text, length=None):
    """A safetensors file with a header of our own."""
    raw = text.encode()
    return write("model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(64))


def cut(name, share):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: int((folder / name).stat().st_size * share)])


FOLDERS = {  # how a folder is spoilt, and what the message names; None: it loads
    "pickles alone": (pickles, "pickles"),
    "a pickle called safetensors": (pickle_called_safetensors, "model.safetensors"),
    "code for a known architecture": (code("known"), None),
    "code for a new architecture": (code("new"), "auto_map"),
    "code for a tokenizer": (code("tokenizer"), "custom code"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config: empty": (write("config.json", b""), "config.json"),
    "config: cut": (cut("config.json", 0.5), "config.json"),
    "config: a list": (write("config.json", b"[]"), "config.json"),
    "config: not UTF-8": (write("config.json", b"\xff\xff"), "config.json"),
    "config: deep": (write("config.json", b"[" * 100_000), "config.json"),
    "config: unknown type": (edit("config.json", model_type="nothing"), "nothing"),
    "config: type is a list": (edit("config.json", model_type=["llama"]), "config.json"),
    "config: negative width": (edit("config.json", hidden_size=-32), ""),
    "config: width is a text": (edit("config.json", hidden_size="x"), ""),
    "config: width is null": (edit("config.json", hidden_size=None), ""),
    "config: no heads": (edit("config.json", num_attention_heads=0), ""),
    "config: layers are a text": (edit("config.json", num_hidden_layers="x"), ""),
    "config: one layer more": (edit("config.json", num_hidden_layers=5), "missing"),
    "config: another width": (edit("config.json", hidden_size=64), ""),
    "config: an unknown activation": (edit("config.json", hidden_act="evil"), ""),
    "config: quantised by nobody": (edit("config.json", quantization_config={"quant_method": "evil"}), None),
    "weights: empty": (write("model.safetensors", b""), "model.safetensors"),
    "weights: cut": (cut("model.safetensors", 0.5), "model.safetensors"),
    "weights: cut in the header": (cut("model.safetensors", 0.01), "model.safetensors"),
    "weights: no JSON in front": (header("{", None), "model.safetensors"),
    "weights: a header of exabytes": (header("{}", 2**62), "model.safetensors"),
    "weights: offsets outside": (header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999999]}}'), "model.safetensors"),
    "weights: offsets backwards": (header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}'), "model.safetensors"),
    "weights: a shape that overflows": (
        header('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 64]}}'),
        "model.safetensors",
    ),
    "weights: an unknown dtype": (header('{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}'), "model.safetensors"),
    "weights: of nothing": (tensors(lambda weights: weights.clear()), "missing"),
    "weights: one lacks": (tensors(lambda weights: weights.pop("model.norm.weight")), "model.norm.weight"),
    "weights: one of another shape": (tensors(lambda weights: weights.update({"model.norm.weight": torch.ones(7)})), ""),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer: empty": (write("tokenizer.json", b""), "tokenizer"),
    "tokenizer: cut": (cut("tokenizer.json", 0.5), "tokenizer"),
    "tokenizer: a list": (write("tokenizer.json", b"[]"), "tokenizer"),
    "tokenizer: not UTF-8": (write("tokenizer.json", b"\xff"), "tokenizer"),
    "tokenizer: an unknown model": (edit("tokenizer.json", model={"type": "Evil"}), "tokenizer"),
    "tokenizer config: cut": (cut("tokenizer_config.json", 0.5), "tokenizer"),
    "tokenizer config: a list": (write("tokenizer_config.json", b"[]"), "tokenizer"),
    "tokenizer config: unknown class": (edit("tokenizer_config.json", tokenizer_class="Evil"), None),
    "a link to a file that is not there": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("gone")), "",
    ),
}  # fmt: skip


def load(folder):
    check_folder(folder)
    load_tokenizer(folder)
    context_limit(folder)
    return load_model(folder)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_spoilt_folder_is_refused_by_name_and_nothing_of_it_runs(tmp_path, monkeypatch, model_folder, name):
    spoil, named = FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    spoil(folder)
    if named is None:
        assert same(load(folder), load_model(model_folder("llama")))
    else:
        with pytest.raises(UsageError) as caught:
            load(folder)
        assert str(folder) in str(caught.value)
        assert named in str(caught.value)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    place=st.floats(0, 0.999),
    bits=st.integers(1, 255),
)
def test_a_damaged_folder_is_refused_or_has_other_hashes(tmp_path, model_folder, name, place, bits):
    """Any byte changed: there is no traceback, and what loads all the same is not taken for the model that it was."""
    good, folder = model_folder("llama"), tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    data = bytearray((folder / name).read_bytes())
    data[int(min(len(data), 4000) * place)] ^= bits  # headers and settings
    (folder / name).write_bytes(data)
    try:
        load(folder)
        hashes = [(weights_sha256(own), tokenizer_sha256(own)) for own in (good, folder)]
    except ShotlessError:
        return
    if hashes[0] == hashes[1]:  # a setting of the tokenizer that changes no text's ids
        assert name in {"tokenizer.json", "tokenizer_config.json"}
        ids = [load_tokenizer(own)(SENTENCES, add_special_tokens=False, split_special_tokens=True).input_ids for own in (good, folder)]
        assert ids[0] == ids[1]
