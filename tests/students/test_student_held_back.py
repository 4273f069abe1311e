"""What a student holds back: nobody learns it, its answers to it are its own, and all who answer for it use the temperature found there."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax

from pipeline.evaluation.predictions import models_of
from pipeline.files import write_json
from pipeline.models.held_back import HELD_BACK, LEARNT
from pipeline.schema import TARGETS, Example, read_table
from pipeline.serving import Predictor
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.train import train_student
from pipeline.targets.rounds import build_round

SOME = [Example({"text": f"{one} and {other}"}, source="s") for one in ("funny", "a dull mess", "late", "warm") for other in "abcdefgh"]
BOTH = {"held_back": 0.3, "validation_fraction": 0.2, "ce_weight": 0.5, "steps": 20}


def larger(project, verbalisers=None):
    """The project with 32 texts, whose targets are of two kinds."""
    project.task_params = project.task_params | {"verbalisers": verbalisers or project.task.verbalisers}
    project.examples = SOME
    project.write_examples("transfer", SOME)
    project.write_targets([[0.9, 0.1] if n % 3 else [0.2, 0.8] for n in range(len(SOME))])
    about = {**project.task_params, "labels": ["negative", "positive"]}
    write_json(about, project.artifacts / "targets" / "mix" / "calibration.json")
    return project


def read(folder):
    rows = read_table(folder / "held_back.parquet", HELD_BACK)
    return {name: np.array(rows[name].to_pylist()) for name in HELD_BACK.names}, read_table(folder / "learnt.parquet", LEARNT).to_pylist()


@pytest.mark.parametrize("kind", ["decoder", "long verbalisers", "encoder"])
@pytest.mark.slow
def test_answers_to_what_was_held_back_are_the_student_s_own(make_project, encoder_folder, kind):
    long = {"negative": " bad", "positive": " so-so"} if kind == "long verbalisers" else None
    project = larger(make_project(base=encoder_folder() if kind == "encoder" else None), long)
    project.train(**BOTH)
    found, learnt = read(project.output())
    texts = {example.example_id: example.fields["text"] for example in SOME}
    targets = dict(zip(texts, ([0.9, 0.1] if n % 3 else [0.2, 0.8] for n in range(len(SOME))), strict=True))
    ids = {row["example_id"] for row in learnt}  # with the validation part and the demonstrations
    assert set(found["example_id"]) == texts.keys() - ids
    assert len(ids - texts.keys()) == 4
    assert np.allclose(found["probabilities"], [targets[one] for one in found["example_id"]])
    predictor = Predictor(project.output(), 1, keep_states=True)
    answers = predictor.predict([texts[one] for one in found["example_id"]])
    temperature = project.manifest()["temperature"]
    assert temperature != 1.0
    shares = np.array([list(one.probabilities.values()) for one in answers])
    assert np.allclose(shares, softmax(found["label_logprobs"] / temperature, axis=-1), atol=1e-5)
    states = np.array([row["state"] for row in learnt if row["state"]], dtype=np.float64)
    assert 0 < len(states) < len(ids)
    scale = np.where(states.std(0) > 0, states.std(0), 1.0) * np.sqrt(states.shape[1])
    nearest = cdist(np.array([one.state for one in answers]) / scale, states / scale).min(1)
    assert np.allclose(found["distance"], nearest, rtol=0.05, atol=1e-3)

    def loss(log_temperature):
        return -(found["probabilities"] * log_softmax(found["label_logprobs"] / np.exp(log_temperature), axis=-1)).sum(-1).mean()

    grid = np.linspace(-np.log(20), np.log(20), 20001)
    assert np.log(temperature) == pytest.approx(min(grid, key=loss), abs=1e-3)


@pytest.mark.slow
def test_a_student_of_nothing_held_back_has_the_temperature_1_and_no_file(make_project):
    project = make_project()
    project.train(steps=2, held_back=0.3)
    for changes in ({"held_back": 0.0}, {"learn_from": "data/demonstrations.parquet"}):
        project.train(steps=2, **changes)
        assert project.manifest().get("temperature") == 1.0
        assert set(project.manifest()["files"]) >= {"learnt.parquet", "model.safetensors"}
        assert not (project.output() / "held_back.parquet").exists()


def test_texts_of_a_source_that_is_never_held_back_are_all_learnt_and_move_no_other(make_project):
    project = larger(make_project())
    project.train(steps=2, held_back=0.3)
    before, manifest = set(read(project.output())[0]["example_id"]), project.manifest()
    examples = [replace(example, source="p" if n % 2 else "s") for n, example in enumerate(SOME)]
    project.write_examples("transfer", examples)
    params = project.params({"cd": {"steps": 2, "held_back": 0.3}}, never_held_back=["p"])
    train_student("cd", params, project.folders)
    found, learnt = read(project.output())
    assert set(found["example_id"]) == before & {example.example_id for example in examples if example.source == "s"} != before
    assert set(found["example_id"]) | {row["example_id"] for row in learnt} == {example.example_id for example in examples}
    assert project.manifest()["sources_sha256"] != manifest["sources_sha256"]  # so that no checkpoint of the one is used for the other


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(make_project, monkeypatch):
    whole, broken = (larger(make_project(name)) for name in ("whole", "broken"))
    changes = {**BOTH, "seeds": [3, 1], "validation_fraction": 0.0}
    whole.train(**changes)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    for stopped in (1, 30):  # in the first training, and in the second
        count, save = [], Checkpoint.save

        def dying(self, *args, count=count, stopped=stopped, save=save):
            save(self, *args)
            count.append(1)
            if len(count) == stopped:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                broken.train(**changes)
    broken.train(**changes)
    assert broken.files() == whole.files()
    assert {"artifacts/students/cd/held_back.parquet", "artifacts/students/cd/seeds/1/held_back.parquet"} <= whole.files().keys()


@pytest.mark.slow
def test_evaluation_and_rounds_sharpen_as_the_student_does(make_project):
    project = larger(make_project())
    project.write_examples("pool", [Example({"text": "a plot"}, source="p")])
    project.train(**BOTH)
    temperature, rounds = project.manifest()["temperature"], {"second": {"student": "cd", "temperature": 0.5}}
    params = project.params({"cd": BOTH}, rounds=rounds)
    assert [model.temperature for model in models_of("cd", params, project.folders)] == [temperature]
    build_round("second", params, project.folders)
    found, _ = read(project.output())
    rows = read_table(project.artifacts / "rounds" / "second" / "targets.parquet", TARGETS).to_pylist()
    targets = {row["example_id"]: row["probabilities"] for row in rows}
    expected = softmax(found["label_logprobs"] / temperature / 0.5, axis=-1)
    assert np.allclose([targets[one] for one in found["example_id"]], expected, atol=1e-5)
