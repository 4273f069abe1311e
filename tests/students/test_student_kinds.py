"""Objectives × tunings × bases from files to files: each trains, leaves provenance and curve, goes on after a kill to the same bytes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from student_world import GOLD, TASK, TEXTS, make_world, student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UsageError
from pipeline.files import context_id
from pipeline.params import CacheParams, StudentParams, TargetParams, TeacherParams, TunedTeacherParams
from pipeline.schema import CONTEXTS, TARGETS, read_table, write_table
from pipeline.students import loop
from pipeline.students.runs import train_student, tune_teacher
from pipeline.targets.build import build_targets
from pipeline.teachers.capture import capture

PROJECT = Path(__file__).resolve().parents[2]
LORA = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4}}
TUNINGS = {
    "full": {},
    "frozen": {"freeze_embeddings": True},
    "lora": LORA,
    "kept": {**LORA, "adapters": "kept"},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
}
OBJECTIVES = {
    "kl": {},
    "hard": {"loss": "hard"},
    "reverse": {"loss": "reverse_kl", "ce_weight": 0.5},
    "js": {"loss": "jensen_shannon", "held_back": 0.3, "evaluate_every": 1, "patience": 2},
    "labels": {"learn_from": "data/demonstrations.parquet"},
}


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


def run(world, name="cd", **changes):
    train_student(name, student(**changes), TASK, world.places, threads=1)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layers", [None, "0-1, 3"], ids=["whole", "cut"])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_every_tuning_and_depth_leaves_a_plain_student(tmp_path, model_folder, objective, tuning, layers):
    world = make_world(tmp_path, model_folder("llama"))
    run(world, steps=2, layers=layers, **OBJECTIVES[objective], **TUNINGS[tuning])
    folder = world.places.artifacts / "students" / "cd"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(loaded.model.layers) == (4 if layers is None else 3)
    provenance, metrics = world.json("artifacts/students/cd/provenance.json"), world.json("metrics/train/cd.json")
    assert provenance["trains"]
    assert metrics["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert 0 < metrics["trained_parameters"] <= metrics["parameters"]
    assert len((world.root / "metrics/curves/cd.csv").read_text("utf-8").splitlines()) == 1 + metrics["steps"]
    assert (folder / "adapter" / "adapter_config.json").is_file() == (tuning == "kept")


@pytest.mark.parametrize("changes", [{"held_back": 0.3, "evaluate_every": 2}, {"micro_batch": 3}], ids=["held_back", "micro_batch"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_killed_student_of_any_kind_goes_on_to_the_same_bytes(tmp_path, model_folder, monkeypatch, tuning, changes):
    one, two = (make_world(tmp_path / name, model_folder("llama")) for name in ("one", "two"))
    params = student(ce_weight=0.3, weight_decay=0.01, learning_rate=1e-2, **changes, **TUNINGS[tuning])
    train_student("cd", params, TASK, one.places, 1)
    calls = []
    real = loop.objective

    def dying(*args):
        calls.append(1)
        if len(calls) > 8:
            raise Killed
        return real(*args)

    monkeypatch.setattr(loop, "objective", dying)
    with pytest.raises(Killed):
        train_student("cd", params, TASK, two.places, 1, seconds_between=0)
    monkeypatch.undo()
    [checkpoint] = two.checkpoints()
    with safe_open(checkpoint, framework="pt") as file:
        kept = sum(file.get_tensor(name).numel() for name in file.keys() if name.startswith("weight."))  # noqa: SIM118
    train_student("cd", params, TASK, two.places, 1)
    resumed = two.json("metrics/runtime/student-cd.json")["resumed_at_step"]
    assert resumed == (4 if "micro_batch" in changes else 8)
    assert kept <= two.json("metrics/train/cd.json")["trained_parameters"], "a checkpoint holds what is learnt and no more"
    for folder in ("artifacts/students", "metrics/curves", "metrics/train"):
        assert files(one.root / folder) == files(two.root / folder)
    assert two.checkpoints() == []


def test_a_run_that_stopped_early_stops_at_the_same_step_after_a_kill(tmp_path, model_folder, monkeypatch):
    """The kill comes after the last look, whose checkpoint says that patience is over."""
    one, two = (make_world(tmp_path / name, model_folder("llama")) for name in ("one", "two"))
    params = student(steps=40, learning_rate=0.3, held_back=0.3, evaluate_every=2, patience=2)
    train_student("cd", params, TASK, one.places, 1)
    steps = one.json("metrics/train/cd.json")["steps"]
    assert steps < 40

    def killed(*args):
        raise Killed

    monkeypatch.setattr(loop.Best, "restore", killed)
    with pytest.raises(Killed):
        train_student("cd", params, TASK, two.places, 1, seconds_between=0)
    monkeypatch.undo()
    train_student("cd", params, TASK, two.places, 1)
    assert two.json("metrics/runtime/student-cd.json")["resumed_at_step"] == steps
    for folder in ("artifacts/students", "metrics/curves", "metrics/train"):
        assert files(one.root / folder) == files(two.root / folder)


def test_what_the_choice_came_to_stands_in_metrics_provenance_and_curve(tmp_path, model_folder):
    world = make_world(tmp_path, model_folder("llama"))
    run(world, steps=7, held_back=0.3, evaluate_every=3, learning_rate=3e-3)
    metrics, provenance = world.json("metrics/train/cd.json"), world.json("artifacts/students/cd/provenance.json")
    assert metrics["held_back_examples"] + 0 < len(TEXTS)
    assert metrics["held_back_kl_nats"] < metrics["held_back_kl_nats_before"]
    assert provenance["best_step"] == metrics["best_step"]
    with (world.root / "metrics/curves/cd.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    looks = {int(row["step"]): float(row["held_back_kl"]) for row in rows if row["held_back_kl"]}
    assert list(looks) == [3, 6, 7]
    assert looks[metrics["best_step"]] == metrics["held_back_kl_nats"] == min(looks.values())


def test_gold_labels_do_not_choose_the_step(tmp_path, model_folder):
    """Other gold labels in the demonstrations change nothing of a student that learns from targets and is chosen by them."""
    worlds = [make_world(tmp_path / name, model_folder("llama")) for name in ("a", "b")]
    file = worlds[1].places.artifacts / "data" / "demonstrations.parquet"
    table = pa.parquet.read_table(file)
    turned = ["positive" if label == "negative" else "negative" for _, label in GOLD]
    write_table(table.set_column(table.schema.get_field_index("label"), table.schema.field("label"), pa.array(turned)), file)
    for world in worlds:
        run(world, held_back=0.3)
    assert worlds[0].weights() == worlds[1].weights()


def test_hard_labels_need_no_more_than_the_argmax_of_the_targets(tmp_path, model_folder):
    worlds = [make_world(tmp_path / name, model_folder("llama")) for name in ("a", "b")]
    file = worlds[1].places.artifacts / "targets" / "mix" / "targets.parquet"
    rows = read_table(file, TARGETS).to_pylist()
    for row in rows:
        row["probabilities"] = [float(p == max(row["probabilities"])) for p in row["probabilities"]]
    write_table(pa.Table.from_pylist(rows, TARGETS), file)
    for world in worlds:
        run(world, loss="hard")
    assert worlds[0].weights() == worlds[1].weights()


def test_a_kept_adapter_has_the_same_bytes_in_another_process(tmp_path, model_folder):
    one, two = (make_world(tmp_path / name, model_folder("llama")) for name in ("one", "two"))
    changes = {**LORA, "adapters": "kept", "layers": "0, 2-3", "steps": 2}
    run(one, **changes)
    code = (
        "import sys; sys.path.insert(0, 'tests/student')\n"
        "from pathlib import Path; from student_world import TASK, World, student\n"
        "from pipeline.students.runs import train_student\n"
        f"world = World(Path({str(two.root)!r}), Path())\n"
        f"train_student('cd', student(**{changes!r}), TASK, world.places, threads=1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": "."})
    assert files(one.places.artifacts / "students") == files(two.places.artifacts / "students")


def test_a_tuned_teacher_can_be_tuned_with_adapters(tmp_path, model_folder):
    world = make_world(tmp_path, model_folder("llama"))
    params = TunedTeacherParams(base="models/tiny", steps=4, batch_size=2, learning_rate=1e-2, tuning="lora")
    tune_teacher("tuned", params, TASK, world.places, threads=1)
    assert world.json("artifacts/tuned/tuned/provenance.json")["trains"].startswith("LoRA of rank 8")


def test_a_share_that_holds_nothing_back_is_refused_before_training(tmp_path, model_folder):
    world = make_world(tmp_path, model_folder("llama"))
    with pytest.raises(UsageError, match=r"held_back: of 10 examples, a share of 1e-06 leaves none held back"):
        run(world, held_back=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": "kept"}, "`adapters` is for `tuning: lora`, and tuning is 'full'"),
        ({"tuning": "bitfit", "lora": {"rank": 4}}, "`lora` is for `tuning: lora`, and tuning is 'bitfit'"),
        ({"patience": 2}, "`patience` needs a part of the transfer set"),
        ({"learn_from": "data/demonstrations.parquet", "loss": "hard"}, "`loss` is about targets"),
        ({"learn_from": "data/demonstrations.parquet", "held_back": 0.1}, "`held_back` is about targets"),
        ({"held_back": 1.0}, "less than 1"),
    ],
)
def test_params_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        StudentParams(**({"base": "models/tiny", "learn_from": "targets/mix", "steps": 1, "learning_rate": 1e-3} | changes))


@pytest.fixture(scope="module")
def other_tokenizer():
    """A word-level tokenizer with a beginning-of-text token: other ids, other splits, another vocabulary."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False)
    raw.train_from_iterator([TASK.query({"text": text}) + word for text in TEXTS for word in (" bad", " good")] * 3, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>", eos_token="<s>")


@pytest.mark.parametrize("tuning", ["full", "lora", "bitfit", "head"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_student_of_another_family_with_another_tokenizer_learns_a_llama_s_answers(
    tmp_path, model_folder, tiny_model, other_tokenizer, architecture, tuning
):
    world = make_world(tmp_path, model_folder("llama"))
    artifacts = world.places.artifacts
    shot = f"{TASK.query({'text': GOLD[0][0]})} good\n\n"
    contexts = [{"context_id": context_id(shot), "name": "shots/0", "text": shot, "example_ids": [], "tokens": 9}]
    write_table(pa.Table.from_pylist(contexts, CONTEXTS), artifacts / "data" / "contexts" / "shots.parquet")
    transfer = artifacts / "data" / "transfer.parquet"
    shots = artifacts / "data" / "contexts" / "shots.parquet"
    capture(
        "few",
        artifacts / "models" / "tiny",
        shots,
        transfer,
        artifacts / "scores" / "few",
        TASK,
        CacheParams(encoding="top_k_tail", top_k=5, resolution_nats=None),
        "float32",
        world.places.work,
        1,
    )
    teacher = TeacherParams(model="models/tiny", contexts="shots", cache=CacheParams(encoding="top_k_tail", top_k=5, resolution_nats=None))
    texts = pa.parquet.read_table(transfer)
    params = TargetParams(teachers={"few": 1.0})
    build_targets(
        "mix", params, {"few": teacher}, TASK, texts, artifacts / "scores", artifacts / "targets/mix", world.root / "metrics/t.json"
    )
    base = artifacts / "models" / "other"
    tiny_model(architecture, vocab_size=len(other_tokenizer)).save_pretrained(base)
    other_tokenizer.save_pretrained(base)
    train_student(
        "cd", student(base="models/other", steps=150, batch_size=10, learning_rate=1e-2, tuning=tuning), TASK, world.places, threads=1
    )
    targets = np.array([row["probabilities"] for row in read_table(artifacts / "targets/mix/targets.parquet", TARGETS).to_pylist()])
    before, after = (agreement(folder, targets) for folder in (base, artifacts / "students" / "cd"))
    assert after < 0.25 * before
    assert world.json("artifacts/students/cd/provenance.json")["forward"].startswith("packed")
    assert len(AutoTokenizer.from_pretrained(artifacts / "students/cd")) != len(AutoTokenizer.from_pretrained(artifacts / "models/tiny"))


@torch.no_grad()
def agreement(folder, targets):
    """Mean KL of a folder's answers to the targets, by plain transformers: its tokenizer with its beginning-of-text token, its logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for text, target in zip(TEXTS, targets, strict=True):
        query = TASK.query({"text": text})
        prompt = tokenizer(query).input_ids
        scores = []
        for word in (" bad", " good"):
            whole = tokenizer(query + word).input_ids
            assert whole[: len(prompt)] == prompt
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
        log_p = torch.tensor(scores).log_softmax(-1).numpy()
        total += float((target * (np.log(target) - log_p)).sum())
    return total / len(TEXTS)
