"""Students and tuned teachers from files to files: what is written, that it repeats to the byte, that a killed run goes on to the same."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from student_world import TASK, make_world, student, tuned
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.files import write_sealed_json
from pipeline.files import sha256_file
from pipeline.models.identity import weights_sha256
from pipeline.models.provenance import check_provenance
from pipeline.schema import write_table
from pipeline.students import jobs, loop
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.runs import train_student, tune_teacher

PROJECT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


@pytest.fixture
def world(tmp_path, model_folder):
    return make_world(tmp_path / "one", model_folder("llama"))


@pytest.fixture
def other(tmp_path, model_folder):
    return make_world(tmp_path / "two", model_folder("llama"))


def run(world, name="cd", **changes):
    train_student(name, student(**changes), TASK, world.places, threads=1)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_student_s_folder_loads_with_transformers_alone(world):
    run(world, layers="0-1, 3")
    folder = world.places.artifacts / "students" / "cd"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert "shotless" not in (folder / "config.json").read_text(encoding="utf-8")
    assert str(world.root) not in "".join(f.read_text(encoding="utf-8") for f in folder.glob("*.json"))
    assert model(**tokenizer("Review: x", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_provenance_and_metrics_say_where_it_comes_from(world):
    run(world, layers="0-1, 3", ce_weight=0.5)
    found = world.json("artifacts/students/cd/provenance.json")
    targets = world.places.artifacts / "targets" / "mix" / "targets.parquet"
    assert found["base"] == "models/tiny"
    assert found["weights_sha256"] == weights_sha256(world.places.artifacts / "students" / "cd") != found["base_weights_sha256"]
    check_provenance(world.places.artifacts / "students" / "cd").check_task(TASK.params)
    assert found["layers"] == "0-1, 3"
    assert found["sources_sha256"]["targets"] == sha256_file(targets)
    assert set(found["sources_sha256"]) == {"targets", "calibration", "demonstrations"}
    assert found["labels"] == ["negative", "positive"]
    assert found["verbalisers"]["positive"]["text"] == " good"
    assert found["params"]["learning_rate"] == 1e-3
    assert found["forward"].startswith("packed")
    metrics = world.json("metrics/train/cd.json")
    assert metrics["steps"] == 12
    assert metrics["examples"] == 12 * 5
    assert metrics["layers"] == 3
    assert metrics["learn_from"] == "targets/mix"
    assert metrics["parameters"] == metrics["trained_parameters"]
    weights = AutoModelForCausalLM.from_pretrained(world.places.artifacts / "students" / "cd")
    assert metrics["parameters"] == sum(p.numel() for p in weights.parameters())
    curve = pl.read_csv(world.root / "metrics/curves/cd.csv")
    assert curve.columns == ["step", "loss", "learning_rate"]
    assert curve["step"].to_list() == list(range(1, 13))
    assert metrics["final_loss"] == pytest.approx(curve["loss"][-1], rel=1e-5)
    runtime = world.json("metrics/runtime/student-cd.json")
    assert runtime["peak_rss_bytes"] > 0
    assert runtime["tokens_per_second"] > 0


def test_pbft_learns_the_demonstrations_labels(world):
    run(world, "pbft", learn_from="data/demonstrations.parquet", steps=40, learning_rate=3e-3)
    metrics = world.json("metrics/train/pbft.json")
    assert metrics["final_loss"] < 0.1
    assert set(world.json("artifacts/students/pbft/provenance.json")["sources_sha256"]) == {"demonstrations"}


def test_a_tuned_teacher_is_pbft_without_a_cut(world):
    run(world, "pbft", learn_from="data/demonstrations.parquet")
    tune_teacher("tuned", tuned(), TASK, world.places, threads=1)
    assert world.weights("tuned/tuned") == world.weights("students/pbft")
    assert world.json("metrics/train/tuned-tuned.json")["layers"] == 4
    assert world.json("artifacts/tuned/tuned/provenance.json")["kind"] == "tuned"
    assert (world.root / "metrics/curves/tuned-tuned.csv").is_file()
    assert (world.root / "metrics/runtime/tuned-tuned.json").is_file()


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_two_runs_give_the_same_bytes(tmp_path, model_folder, architecture):
    worlds = [make_world(tmp_path / name, model_folder(architecture)) for name in ("a", "b")]
    for world in worlds:
        run(world, layers="0, 2-3", ce_weight=0.3, weight_decay=0.01, decay="cosine", steps=6)
    one, two = (files(world.places.artifacts / "students") | files(world.root / "metrics" / "train") for world in worlds)
    assert one == two
    assert files(worlds[0].root / "metrics" / "curves") == files(worlds[1].root / "metrics" / "curves")


def test_another_process_with_another_hash_seed_gives_the_same_bytes(world, other):
    run(world, ce_weight=0.3)
    code = (
        "import sys; sys.path.insert(0, 'tests/student')\n"
        "from pathlib import Path; from student_world import TASK, World, student\n"
        "from pipeline.students.runs import train_student\n"
        f"world = World(Path({str(other.root)!r}), Path())\n"
        "train_student('cd', student(ce_weight=0.3), TASK, world.places, threads=1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": "."})
    assert files(world.places.artifacts / "students") == files(other.places.artifacts / "students")


@pytest.mark.parametrize("kill_at", [1, 5, 11])
def test_a_killed_student_goes_on_to_the_same_bytes(world, other, monkeypatch, kill_at):
    run(world, ce_weight=0.3, weight_decay=0.01)
    steps = []

    def dying(*args):
        if len(steps) == kill_at:
            raise Killed
        steps.append(1)
        return objective(*args)

    objective = loop.objective
    monkeypatch.setattr(loop, "objective", dying)
    with pytest.raises(Killed):
        train_student("cd", student(ce_weight=0.3, weight_decay=0.01), TASK, other.places, 1, seconds_between=0)
    assert len(other.checkpoints()) == 1
    assert not (other.places.artifacts / "students").exists()
    monkeypatch.undo()
    train_student("cd", student(ce_weight=0.3, weight_decay=0.01), TASK, other.places, 1, seconds_between=0)
    assert other.json("metrics/runtime/student-cd.json")["resumed_at_step"] == kill_at
    assert files(world.places.artifacts / "students") == files(other.places.artifacts / "students")
    assert files(world.root / "metrics" / "curves") == files(other.root / "metrics" / "curves")
    assert files(world.root / "metrics" / "train") == files(other.root / "metrics" / "train")
    assert other.checkpoints() == []


def interrupted(world, monkeypatch, **changes):
    calls = []

    def dying(*args):
        if len(calls) == 4:
            raise Killed
        calls.append(1)
        return objective(*args)

    objective = loop.objective
    monkeypatch.setattr(loop, "objective", dying)
    with pytest.raises(Killed):
        train_student("cd", student(**changes), TASK, world.places, 1, seconds_between=0)
    monkeypatch.undo()


def test_a_checkpoint_of_other_params_is_not_used_and_does_not_stay(world, monkeypatch):
    interrupted(world, monkeypatch)
    train_student("cd", student(learning_rate=2e-3), TASK, world.places, 1)
    assert world.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 0
    assert world.checkpoints() == []


def test_a_checkpoint_of_other_targets_is_not_used(world, monkeypatch, tmp_path, model_folder):
    interrupted(world, monkeypatch)
    changed = make_world(tmp_path / "changed", model_folder("llama"), labels=("positive", "negative"))
    for file in ("targets.parquet", "calibration.json"):
        (world.places.artifacts / "targets/mix" / file).write_bytes((changed.places.artifacts / "targets/mix" / file).read_bytes())
    run(world)
    assert world.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 0


def test_a_broken_checkpoint_starts_the_training_again(world, other, monkeypatch):
    interrupted(world, monkeypatch)
    [checkpoint] = world.checkpoints()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    run(world)
    run(other)
    assert world.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 0
    assert world.weights() == other.weights()


def test_one_student_s_checkpoint_is_safe_from_another_with_a_longer_name(tmp_path):
    short, long = (Checkpoint(tmp_path, name, "0123456789abcdef00") for name in ("student-cd", "student-cd-raw"))
    long.path.write_bytes(b"")
    short.remove()
    assert long.path.exists()


def test_targets_in_another_order_of_labels_are_reordered(tmp_path, model_folder, world):
    reversed_world = make_world(tmp_path / "reversed", model_folder("llama"), labels=("positive", "negative"))
    run(world)
    run(reversed_world)
    assert world.weights() == reversed_world.weights()


def test_targets_of_another_template_are_refused(world):
    file = world.places.artifacts / "targets/mix/calibration.json"
    write_sealed_json({"labels": ["negative", "positive"], "template": "{text} It was"}, file)
    with pytest.raises(MismatchError, match=r"made with template '\{text\} It was'.*dvc repro targets@mix"):
        run(world)


def test_targets_for_other_labels_are_refused(world):
    file = world.places.artifacts / "targets/mix/calibration.json"
    write_sealed_json({"labels": ["no", "yes"]}, file)
    with pytest.raises(MismatchError, match="made for the labels no, yes"):
        run(world)


def test_a_target_without_its_example_is_refused(world):
    file = world.places.artifacts / "data/transfer.parquet"
    write_table(pq.read_table(file).slice(0, 3), file)
    with pytest.raises(ShotlessError, match=r"transfer\.parquet"):
        run(world)


def test_missing_targets_name_the_file_and_the_command(world):
    with pytest.raises(UsageError, match=r"targets/none/calibration\.json: no such file; `dvc repro` makes it"):
        run(world, learn_from="targets/none")


def test_cross_entropy_beside_cross_entropy_is_refused(world):
    with pytest.raises(UsageError, match=r"students\.cd\.ce_weight: 0\.5"):
        run(world, learn_from="data/demonstrations.parquet", ce_weight=0.5)


def test_an_example_longer_than_the_model_is_refused_before_training(tmp_path, model_folder):
    world = make_world(tmp_path, model_folder("llama", max_position_embeddings=8))
    with pytest.raises(UsageError, match=r"tokens with its answer, and .*models/tiny takes 8"):
        run(world)
    assert world.checkpoints() == []


def test_a_layer_that_is_not_there_is_refused(world):
    with pytest.raises(UsageError, match="between 0 and 3"):
        run(world, layers="0-9")


def test_gold_labels_do_not_reach_a_student_that_is_not_given_them(world, other):
    (other.places.artifacts / "data/demonstrations.parquet").unlink()
    run(world)
    run(other)
    assert world.weights() == other.weights()


def test_curves_are_plain_csv(world):
    run(world, steps=3)
    lines = (world.root / "metrics/curves/cd.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,loss,learning_rate"
    assert len(list(csv.reader(lines))) == 4


def test_demonstrations_a_step_are_a_quarter_and_at_least_one():
    assert [jobs.demonstrations_a_step(size) for size in (1, 4, 8, 16)] == [1, 1, 2, 4]


def test_no_dropout_in_training(tmp_path, model_folder):
    worlds = [make_world(tmp_path / name, model_folder("gpt2", resid_pdrop=p, embd_pdrop=p)) for name, p in (("a", 0.0), ("b", 0.5))]
    for world in worlds:
        run(world, steps=4)
    assert torch.equal(*(load_first_weight(world) for world in worlds))


def load_first_weight(world):
    return next(AutoModelForCausalLM.from_pretrained(world.places.artifacts / "students" / "cd").parameters())
