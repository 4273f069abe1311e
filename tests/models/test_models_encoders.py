"""Encoders: read from the config, asked as their own class would be, in padded passes."""

import shutil

import pytest
import torch
from conftest import ARCHITECTURES, ENCODERS
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.models.folders import build_model, context_limit, is_encoder, label_layer, load_config, load_model, save_model
from pipeline.models.trained import load_tokens
from pipeline.params import TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.task import EncoderTokens, Task
from pipeline.teachers.engines import LABELS_ONLY, open_engine

VERBALISERS = {"bad": " no", "fine": " yes", "mixed": " so"}
TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers=VERBALISERS))
PAIRS = Task(TaskParams(template="{premise} So {hypothesis}?", verbalisers=VERBALISERS))
EXAMPLES = [Example({"text": text}) for text in ("a warm film", "late", "the plot goes nowhere and the actors seem bored [SEP] x", "x")]
OF_PAIRS = [
    Example({"premise": one, "hypothesis": other}) for one, other in (("a film", "late"), ("x", "the plot goes nowhere"), ("a", "b"))
]


@pytest.mark.parametrize("task", ["texts", "pairs"])
@pytest.mark.parametrize("family", ENCODERS)
def test_scores_are_those_of_each_input_alone(encoder_folder, family, task):
    """The oracle: transformers' own tokenizer call and forward pass, one input at a time."""
    task, examples = (TASK, EXAMPLES) if task == "texts" else (PAIRS, OF_PAIRS)
    folder = encoder_folder(family)
    tokens, model = load_tokens(task, folder), load_model(folder, labels=task.labels)
    assert isinstance(tokens, EncoderTokens)
    prompts = tokens.prompts(NO_CONTEXT, examples)
    engine = open_engine(model, tokens, LABELS_ONLY, prompts)
    found = engine.score(prompts).label_logprobs
    own = AutoTokenizer.from_pretrained(folder)
    for example, row in zip(examples, found, strict=True):
        settings = {"split_special_tokens": True, "return_token_type_ids": family == "bert"}
        given = own(*example.fields.values(), return_tensors="pt", **settings)
        with torch.no_grad():
            expected = model(**given).logits[0].log_softmax(-1)
        assert torch.allclose(row, expected, atol=1e-5), family
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(examples)), atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_new_head_follows_from_the_seed_and_is_kept(encoder_folder, tmp_path, family):
    folder = encoder_folder(family)
    with pytest.raises(UsageError, match="an encoder without a head for labels"):
        load_model(folder)
    one, same, other = (load_model(folder, labels=TASK.labels, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    save_model(load_model(folder, labels=TASK.labels, seed=1), AutoTokenizer.from_pretrained(folder), tmp_path)
    again = load_model(tmp_path, labels=TASK.labels, seed=9)
    assert all(torch.equal(value, one[name]) for name, value in again.state_dict().items())
    assert again.config.id2label == {0: "bad", 1: "fine", 2: "mixed"}
    assert load_model(tmp_path, labels=("no", "yes")).config.num_labels == 2


def test_a_kind_is_read_from_the_config(encoder_folder, model_folder):
    assert all(is_encoder(load_config(encoder_folder(family))) for family in ENCODERS)
    assert not any(is_encoder(load_config(model_folder(family))) for family in ARCHITECTURES)


@pytest.mark.parametrize(("family", "limit"), [("bert", 128), ("roberta", 128), ("xlm-roberta", 128), ("mpnet", 126)])
def test_the_longest_input_fits_and_one_more_token_does_not(encoder_folder, family, limit):
    folder = encoder_folder(family)
    assert context_limit(folder) == limit
    model = load_model(folder, labels=TASK.labels)
    model(input_ids=torch.full((1, limit), 7))
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.full((1, limit + 1), 7))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_the_head_of_a_sentence_encoder_reads_the_mean_over_the_tokens(encoder_folder, tmp_path, family):
    """The oracle: the mean of the given folder's last states. The head's layers before its last one are not compared: they are new."""
    given = shutil.copytree(encoder_folder(family), tmp_path / "given")
    write_json({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, given / "1_Pooling" / "config.json")
    build_model(given, tmp_path / "built")
    own, model = AutoModel.from_pretrained(given).eval(), load_model(tmp_path / "built", labels=TASK.labels)
    body = getattr(model, model.base_model_prefix)
    tokenizer = AutoTokenizer.from_pretrained(given)
    inputs = tokenizer(["a warm film", "the plot goes nowhere and the actors seem bored"], padding=True, return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mask = inputs["attention_mask"][..., None].float()
        expected = (own(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        states = body(**inputs).last_hidden_state
        if family == "modernbert":
            assert model.config.classifier_pooling == "mean"
            assert torch.allclose(states, own(**inputs).last_hidden_state, atol=1e-5)
        else:
            width = expected.shape[-1]
            assert torch.allclose(states[:, 0], functional.layer_norm(expected, (width,)), atol=0.02)
    assert label_layer(model).out_features == 3


def test_an_encoder_that_reads_its_first_token_is_left_as_it_is(encoder_folder, tmp_path):
    given = shutil.copytree(encoder_folder("bert"), tmp_path / "given")
    write_json({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, given / "1_Pooling" / "config.json")
    build_model(given, tmp_path / "built")
    assert (tmp_path / "built" / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()


def test_what_an_encoder_cannot_do_is_refused(encoder_folder):
    tokens = load_tokens(TASK, encoder_folder())
    with pytest.raises(UsageError, match="'few': an encoder has nothing in its prompt but the input"):
        tokens.prompts(Context("few", "", (({"text": "x"}, "fine"),)), EXAMPLES)
    with pytest.raises(UsageError, match="free text, which an encoder cannot give"):
        load_tokens(Task(TaskParams(template="{text}", completion={})), encoder_folder())
