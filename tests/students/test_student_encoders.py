"""Encoder students and encoder teachers, from files to files."""

from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ENCODERS, TUNINGS
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.errors import MismatchError, UsageError
from pipeline.models.folders import label_layer, load_model
from pipeline.schema import NO_CONTEXT, Example, read_examples
from pipeline.serving import Predictor
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.data import TargetRow
from pipeline.students.loop import StudentForward
from pipeline.students.losses import contrast
from pipeline.students.tuning import fit_label_layer
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

LABELLED = {"learn_from": "data/demonstrations.parquet", "tuning": "contrastive"}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_leaves_a_plain_classifier(make_project, encoder_folder, tuning):
    project = make_project(base=encoder_folder())
    project.train(steps=2, layers="1" if tuning == "full" else None, ce_weight=0.5, validation_fraction=0.3, **TUNINGS[tuning])
    loaded, info = AutoModelForSequenceClassification.from_pretrained(project.output(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == (1 if tuning == "full" else 2)
    assert 0 < project.json("metrics/train/cd.json")["trained_parameters"] <= loaded.num_parameters()


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.slow
def test_transformers_alone_gives_the_labels_and_probabilities_of_predict(make_project, encoder_folder, family):
    project = make_project(base=encoder_folder(family))
    project.train(steps=20, learning_rate=3e-3)
    texts = [example.fields["text"] for example in project.examples]
    found = pipeline("text-classification", str(project.output()), top_k=None)(texts)
    for answer, expected in zip(Predictor(project.output(), 1).predict(texts), found, strict=True):
        shares = {one["label"]: one["score"] for one in expected}
        assert answer.probabilities == pytest.approx(shares, abs=1e-5)
    losses = project.losses()
    assert losses[-1] < losses[0], "it learns its targets"


@pytest.mark.parametrize("learnt", [{}, LABELLED], ids=["targets", "contrast"])
def test_an_interrupted_training_ends_with_the_same_bytes(make_project, encoder_folder, monkeypatch, learnt):
    whole, broken = (make_project(name, base=encoder_folder()) for name in ("whole", "broken"))
    whole.train(steps=6, seed=3, **learnt)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    step = torch.optim.AdamW.step

    def stop_at_fourth(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    taken = []
    monkeypatch.setattr(torch.optim.AdamW, "step", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        broken.train(steps=6, seed=3, **learnt)
    broken.train(steps=6, seed=3, **learnt)
    assert broken.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 3
    assert broken.files() == whole.files()


@pytest.mark.slow
def test_a_contrastive_student_brings_texts_of_one_label_together(make_project, encoder_folder):
    project = make_project(base=encoder_folder())
    project.train(steps=40, learning_rate=1e-3, **LABELLED)
    demonstrations = read_examples(project.artifacts / "data/demonstrations.parquet", ("text",))
    answers = Predictor(project.output(), 1).predict([example.fields["text"] for example in demonstrations])
    assert [answer.label for answer in answers] == [example.label for example in demonstrations]
    losses = project.losses()
    assert len(losses) == 41, "the head is fitted in one more step"
    assert losses[39] < 0.5 * losses[0]


def test_without_a_step_the_head_is_a_logistic_regression_on_the_frozen_encoder(make_project, encoder_folder):
    """The oracle: sklearn's own probabilities on embeddings that transformers gives."""
    project = make_project(base=encoder_folder())
    project.train(steps=0, **LABELLED)
    demonstrations = read_examples(project.artifacts / "data/demonstrations.parquet", ("text",))
    asked = [*(example.fields["text"] for example in demonstrations), "a text that it has not seen"]
    model = load_model(encoder_folder(), labels=("negative", "positive"), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    with torch.no_grad():
        embeddings = torch.cat([model.bert(**tokenizer(text, return_tensors="pt")).pooler_output for text in asked]).double().numpy()
    embeddings /= np.linalg.norm(embeddings[:-1], axis=1).mean()
    expected = LogisticRegression().fit(embeddings[:-1], [example.label for example in demonstrations]).predict_proba(embeddings)
    answers = Predictor(project.output(), 1).predict(asked)
    found = [[answer.probabilities[label] for label in ("negative", "positive")] for answer in answers]
    assert np.allclose(found, expected, atol=1e-3)


def test_in_the_head_a_label_counts_as_if_it_had_as_many_examples_as_the_others(encoder_folder):
    """The oracle repeats the examples of the rare label; C makes up for the larger number of rows."""
    model = load_model(encoder_folder(), labels=("negative", "positive"), seed=0)
    labels = [0] * 12 + [1] * 2
    embeddings = torch.nn.functional.normalize(torch.randn(14, model.config.hidden_size, generator=torch.Generator().manual_seed(0)))
    fit_label_layer(model, embeddings, labels)
    repeated = [*range(12), *[12, 13] * 6]
    oracle = LogisticRegression(C=14 / 24).fit(embeddings[repeated].numpy(), [labels[at] for at in repeated])
    with torch.no_grad():
        found = label_layer(model)(embeddings).softmax(-1)
    assert np.allclose(found, oracle.predict_proba(embeddings.numpy()), atol=1e-3)


@pytest.mark.parametrize("family", ENCODERS)
def test_values_and_gradients_are_those_of_transformers_on_each_text_alone(encoder_folder, family):
    """The oracle has no padding, the whole vocabulary, and torch's own choice of attention."""
    model = load_model(encoder_folder(family), labels=("negative", "positive"), seed=0)
    rows = [TargetRow(str(n), (2, *range(9, 9 + n), 3), (0.0, 1.0)) for n in (1, 6, 2, 11, 3)]
    alone = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows]).log_softmax(-1)
    alone[:, 1].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    forward = StudentForward(model, [[0], [1]], rows)
    found = forward.label_log_probabilities(rows)
    assert torch.allclose(found, alone, atol=1e-5)
    found[:, 1].sum().backward()
    embeddings = model.get_input_embeddings().weight
    kept = [0, 1, 2, 3, *range(9, 20)]
    assert embeddings.shape[0] == len(kept)
    for name, parameter in model.named_parameters():
        if name in expected:
            wanted = expected[name][kept] if parameter is embeddings else expected[name]
            assert torch.allclose(parameter.grad, wanted, atol=1e-4 * max(1.0, float(wanted.abs().max()))), name
    forward.detach()
    assert model.get_input_embeddings().weight.shape[0] > len(kept)


def test_pairs_are_contrasted_as_the_definition_says():
    embeddings, labels = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 0, 1, 0, 3]
    same, other = [], []
    for i, j in combinations(range(7), 2):
        cosine = float(torch.cosine_similarity(embeddings[i], embeddings[j], dim=0))
        (same if labels[i] == labels[j] else other).append((cosine - (labels[i] == labels[j])) ** 2)
    assert float(contrast(embeddings, labels)) == pytest.approx(np.mean(same) + np.mean(other), rel=1e-5)
    assert float(contrast(embeddings[:2], [0, 1])) == pytest.approx(other[0], rel=1e-5), "no pair shares a label"


def test_a_decoder_is_not_tuned_by_contrast(make_project):
    with pytest.raises(UsageError, match="tuning: contrastive: it is for encoders, and a llama model is a decoder"):
        make_project().train(steps=2, **LABELLED)


def test_an_encoder_learns_from_no_cache(make_project, encoder_folder):
    project = make_project(base=encoder_folder(), caches=["few"])
    with pytest.raises(MismatchError, match="teachers/few: a cache over a vocabulary, which an encoder does not have"):
        project.train(learn_from="teachers/few")


@pytest.mark.parametrize("tuning", ["full", "contrastive"])
@pytest.mark.slow
def test_a_tuned_encoder_scores_as_a_teacher_does(make_project, encoder_folder, tuning):
    project = make_project(base=encoder_folder())
    project.tune(steps=80, learning_rate=3e-3, tuning=tuning)
    with Scorer(project.artifacts / "tuned/tuned", Task(project.task), work=project.root / ".work", threads=1) as scorer:
        scores = scorer.label_scores([NO_CONTEXT], [Example({"text": "warm and funny"}), Example({"text": "bored"})], "test")
    assert scores.argmax(-1).tolist() == [[1, 0]]
    assert project.json("artifacts/tuned/tuned/manifest.json")["completions"] == {"negative": [0], "positive": [1]}
