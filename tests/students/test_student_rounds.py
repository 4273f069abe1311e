"""A student that teaches: its answers against the definition, and the student that learns them."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.cache.store import Store
from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import read_json, write_json
from pipeline.schema import TARGETS, Example, read_examples, read_table, write_examples
from pipeline.serving import Predictor
from pipeline.students.train import train_student
from pipeline.targets.rounds import build_round
from pipeline.teachers import engines, scorer

pytestmark = pytest.mark.slow

POOL = [Example({"text": text}, source="p", line=n) for n, text in enumerate(["a warm mess", "bored and cold", "I loved the food", "plot"])]


class Rounds:
    """A project whose student `cd` has learnt, with a pool; its round `second` and the round's student `small` are made here."""

    def __init__(self, project, temperature=0.5):
        self.project, self.round = project, {"student": "cd", "temperature": temperature}
        self.folder, self.texts = project.artifacts / "rounds" / "second", [*project.examples, *POOL]
        project.train(steps=40, learning_rate=3e-3)
        project.write_examples("pool", POOL)

    def params(self, **changes):
        return self.project.params({"cd": {}, "small": {"learn_from": "rounds/second", **changes}}, rounds={"second": self.round})

    def answer(self):
        build_round("second", self.params(), self.project.folders)
        return np.array(read_table(self.folder / "targets.parquet", TARGETS)["probabilities"].to_pylist())

    def learn(self, **changes):
        train_student("small", self.params(**changes), self.project.folders)


@torch.no_grad()
def naive_scores(folder, task, texts):
    """Log-probabilities of the sorted labels, by transformers alone: [N, L]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if read_json(folder / "config.json")["architectures"][0].endswith("ForSequenceClassification"):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return np.array([log_softmax(model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()) for text in texts])
    model, scores = AutoModelForCausalLM.from_pretrained(folder).eval(), np.zeros((len(texts), len(task.labels)))
    for at, text in enumerate(texts):
        prompt = tokenizer(task.template.format(text=text)).input_ids
        for label, name in enumerate(task.labels):
            answer = tokenizer(task.verbalisers[name]).input_ids
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores[at, label] = logits.log_softmax(-1)[range(len(answer)), answer].sum()
    return scores


@pytest.fixture
def decoders(make_project):
    return Rounds(make_project())


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_round_is_the_student_s_own_answers_sharpened(make_project, encoder_folder, kind):
    rounds = Rounds(make_project(base=encoder_folder() if kind == "encoder" else None))
    found = rounds.answer()
    expected = naive_scores(rounds.project.output(), rounds.project.task, [example.fields["text"] for example in rounds.texts])
    assert np.allclose(found, softmax(expected / 0.5, axis=-1), atol=1e-5)
    assert not np.allclose(found, softmax(expected, axis=-1), atol=1e-2)
    ids = [example.example_id for example in rounds.texts]
    assert read_table(rounds.folder / "targets.parquet", TARGETS)["example_id"].to_pylist() == ids
    assert [example.example_id for example in read_examples(rounds.folder / "texts.parquet", ["text"])] == ids
    made = read_json(rounds.folder / "calibration.json")
    assert (made["student"], made["temperature"], made["labels"]) == ("cd", 0.5, ["negative", "positive"])
    runtime = rounds.project.json("metrics/runtime/round-second.json")
    assert runtime["rows"] == runtime["rows_timed"] == len(ids)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_student_of_a_round_learns_to_answer_as_its_student(make_project, encoder_folder, kind):
    rounds = Rounds(make_project(base=encoder_folder() if kind == "encoder" else None))
    targets = rounds.answer()
    rounds.learn(steps=200, learning_rate=3e-3)
    losses = rounds.project.losses("small")
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])
    predicted = Predictor(rounds.project.output("small"), 1).predict([example.fields["text"] for example in rounds.texts])
    found = np.array([one.probabilities["positive"] for one in predicted])
    assert np.abs(found - targets[:, 1]).mean() < 0.25 * np.abs(targets[:, 1] - targets[:, 1].mean()).mean()
    assert rounds.project.manifest("small")["sources_sha256"].keys() == {"targets.parquet", "calibration.json"}


@pytest.mark.parametrize(
    "changes",
    [{"loss": "hard"}, {"ce_weight": 0.5}, {"ce_weight": 0.5, "ce_target": "targets"}, {"validation_fraction": 0.3}],
)
def test_what_is_learnt_of_a_target_set_is_learnt_of_a_round(decoders, changes):
    decoders.answer()
    decoders.learn(steps=2, **changes)
    assert ("demonstrations" in decoders.project.manifest("small")["sources_sha256"]) == (changes == {"ce_weight": 0.5})
    assert ("validation_examples" in decoders.project.json("metrics/train/small.json")) == ("validation_fraction" in changes)


def test_a_round_that_was_killed_goes_on_and_ends_with_the_same_bytes(make_project, monkeypatch):
    monkeypatch.setattr(scorer, "ROWS_PER_PART", 4)
    monkeypatch.setattr(engines, "LARGEST_BUDGET", 64)
    whole, broken = (Rounds(make_project(name)) for name in ("whole", "broken"))
    whole.answer()
    write, written = Store.write, []

    def stop_at_second(self, rows, *args):
        written.append(rows["prompt_sha"].to_pylist())
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, rows, *args)

    monkeypatch.setattr(Store, "write", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        broken.answer()
    assert not broken.folder.exists()
    broken.answer()
    assert broken.project.files("artifacts/rounds") == whole.project.files("artifacts/rounds")
    kept = [key for at, keys in enumerate(written) if at != 1 for key in keys]
    assert sorted(kept) == sorted(set(kept)), "no row is scored twice"
    assert len(kept) == len(whole.texts)
    before = len(written)
    broken.round["temperature"] = 2.0
    broken.answer()
    assert len(written) == before, "another temperature asks the student nothing"


def test_what_a_round_cannot_use_is_refused_before_anything_is_written(decoders):
    project, own = decoders.project, decoders.project.task_params
    project.task_params = own | {"template": "{text} It was"}
    with pytest.raises(MismatchError, match=r"students/cd: trained with task\.template 'Review: .*Run `dvc repro`"):
        decoders.answer()
    project.task_params = own
    weights = project.output() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CorruptError, match=r"model\.safetensors: .* bytes, its manifest says"):
        decoders.answer()
    weights.write_bytes(whole)
    (project.artifacts / "data" / "pool.parquet").unlink()
    with pytest.raises(UsageError, match=r"data/pool\.parquet: no such file"):
        decoders.answer()
    assert not decoders.folder.exists()


def test_a_round_of_another_task_or_with_other_texts_is_not_learnt(decoders):
    decoders.answer()
    made = read_json(decoders.folder / "calibration.json")
    write_json(made | {"template": "{text} It was"}, decoders.folder / "calibration.json")
    with pytest.raises(MismatchError, match=r"made with template '\{text\} It was', this task has 'Review: .*dvc repro round@second"):
        decoders.learn()
    write_json(made, decoders.folder / "calibration.json")
    write_examples(decoders.texts[:3], ["text"], decoders.folder / "texts.parquet")
    with pytest.raises(MismatchError, match=r"targets\.parquet: example [0-9a-f]{64} is not among its texts.*dvc repro round@second"):
        decoders.learn()
