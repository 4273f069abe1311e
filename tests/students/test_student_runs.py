"""Students and tuned teachers from files to files: what is written, that it repeats to the byte, that a killed run goes on to the same."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import TUNINGS
from pydantic import ValidationError
from scipy.special import log_softmax
from students.conftest import GOLD
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.cache.labelled import folds_of
from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import sha256_file, write_json
from pipeline.models.folders import weights_sha256
from pipeline.models.trained import open_trained
from pipeline.params import StudentParams
from pipeline.schema import LABELLED, NO_CONTEXT, TARGETS, Example, read_table, write_table
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.train import train_student
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = {
    "kl": {},
    "hard": {"loss": "hard"},
    "reverse": {"loss": "reverse_kl", "ce_weight": 0.5},
    "js": {
        "loss": "jensen_shannon",
        "ce_weight": 0.5,
        "ce_target": "targets",
        "validation_fraction": 0.4,
        "evaluate_every": 1,
        "patience": 2,
    },
    "labels": {"learn_from": "data/demonstrations.parquet"},
}


@pytest.mark.parametrize(
    ("objective", "tuning"), [*(("kl", tuning) for tuning in TUNINGS), *((own, "kept") for own in OBJECTIVES if own != "kl")]
)
def test_every_objective_with_every_tuning_leaves_a_plain_student(make_project, objective, tuning):
    project, layers = make_project(), None if objective == "kl" else "0-1, 3"
    project.train(steps=2, layers=layers, **OBJECTIVES[objective], **TUNINGS[tuning])
    folder = project.output()
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(loaded.model.layers) == (4 if layers is None else 3)
    metrics, manifest = project.json("metrics/train/cd.json"), project.manifest()
    assert manifest["trains"]
    assert metrics["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert 0 < metrics["trained_parameters"] <= metrics["parameters"]
    assert len(project.curve()) == metrics["steps"]
    assert (folder / "adapter" / "adapter_config.json").is_file() == (tuning == "kept")
    assert open_trained(folder).name == "cd"
    assert ("adapter/adapter_model.safetensors" in manifest["files"]) == (tuning == "kept")
    assert project.checkpoints() == []


def test_a_student_s_folder_loads_with_transformers_alone_and_says_what_it_is(make_project):
    project = make_project()
    project.train(layers="0-1, 3", ce_weight=0.5)
    folder, manifest, metrics = project.output(), project.manifest(), project.json("metrics/train/cd.json")
    model, tokenizer = (auto.from_pretrained(folder, local_files_only=True) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model(**tokenizer("Review: x", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert len(model.model.layers) == model.config.num_hidden_layers == metrics["layers"] == 3
    assert str(project.root) not in "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.json"))
    assert manifest["base"] == metrics["base"] == "models/tiny"
    assert manifest["base_weights_sha256"] != weights_sha256(folder)
    assert manifest["labels"] == ["negative", "positive"]
    assert manifest["task"]["verbalisers"]["positive"] == " good"
    assert manifest["layers"] == "0-1, 3"
    assert manifest["params"]["learning_rate"] == 1e-3
    assert manifest["forward"].startswith("packed")
    sources = manifest["sources_sha256"]
    assert set(sources) == {"targets.parquet", "calibration.json", "demonstrations"}
    assert sources["targets.parquet"] == sha256_file(project.artifacts / "targets/mix/targets.parquet")
    assert (metrics["steps"], metrics["examples"], metrics["learn_from"]) == (12, 12 * 5, "targets/mix")
    assert [row["step"] for row in project.curve()] == [str(n) for n in range(1, 13)]
    assert list(project.curve()[0]) == ["step", "loss", "learning_rate"]
    assert metrics["final_loss"] == pytest.approx(project.losses()[-1], rel=1e-5)
    runtime = project.json("metrics/runtime/student-cd.json")
    assert set(runtime) == {"seconds", "tokens_per_second", "peak_rss_bytes", "threads", "resumed_at_step"}
    assert runtime["peak_rss_bytes"] > 0


def test_a_changed_weight_is_refused_by_name(make_project):
    project = make_project()
    project.train(steps=1)
    file = project.output() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptError, match=r"students/cd/model\.safetensors: sha256"):
        open_trained(project.output())


@pytest.mark.slow
def test_a_tuned_teacher_is_pbft_without_a_cut(make_project):
    project = make_project()
    project.train("pbft", learn_from="data/demonstrations.parquet", steps=40, learning_rate=3e-3)
    project.tune(steps=40, learning_rate=3e-3)
    assert project.json("metrics/train/pbft.json")["final_loss"] < 0.1
    assert (project.artifacts / "tuned/tuned/model.safetensors").read_bytes() == project.weights("pbft")
    assert project.json("metrics/train/tuned-tuned.json")["layers"] == 4
    manifest = project.json("artifacts/tuned/tuned/manifest.json")
    assert (manifest["kind"], manifest["learn_from"]) == ("tuned", "data/demonstrations.parquet")
    assert set(manifest["sources_sha256"]) == {"demonstrations"}
    assert (project.root / "metrics/curves/tuned-tuned.csv").is_file()
    assert (project.root / "metrics/runtime/tuned-tuned.json").is_file()
    project.tune("other", tuning="lora", steps=2)
    assert project.json("artifacts/tuned/other/manifest.json")["trains"].startswith("LoRA of rank 8")


@pytest.mark.slow
def test_labelled_examples_are_answered_by_models_without_their_fold_with_the_teacher_s_lean(make_project):
    whole, answered = make_project("whole"), {}
    whole.tune(steps=8, learning_rate=3e-3)
    for row in read_table(whole.artifacts / "tuned/tuned/labelled.parquet", LABELLED).to_pylist():
        answered[row["example_id"]] = row["label_logprobs"]
    labelled = [Example({"text": text}, label, source="s", line=line) for line, (text, label) in enumerate(GOLD)]
    folds = [[labelled[place] for place in places] for places in folds_of([label for _, label in GOLD])]
    assert sum(map(len, folds)) == len(answered) == len(labelled)

    def scores(project, examples):
        with Scorer(project.artifacts / "tuned/tuned", Task(project.task), work=None, threads=1) as scorer:
            return log_softmax(scorer.label_scores([NO_CONTEXT], examples, "scores")[0], axis=-1)

    for number, fold in enumerate(folds):
        other = make_project(f"without fold {number}")
        other.write_examples("demonstrations", [one for one in labelled if one not in fold])
        other.tune(steps=math.ceil(8 * (len(labelled) - len(fold)) / len(labelled)), learning_rate=3e-3)
        moved = scores(whole, whole.examples).mean(0) - scores(other, whole.examples).mean(0)
        for one, own in zip(fold, scores(other, fold), strict=True):
            assert answered[one.example_id] == pytest.approx((own + moved).tolist(), abs=1e-4)


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gives_the_same_bytes(make_project):
    one, two = (make_project(name) for name in ("one", "two"))
    changes = {"layers": "0, 2-3", "ce_weight": 0.3, "weight_decay": 0.01, "decay": "cosine", "steps": 6} | TUNINGS["kept"]
    one.train(**changes)
    in_another_process(two, changes, PYTHONHASHSEED="4711").communicate()
    assert one.files() == two.files()


def in_another_process(project, changes, prepare="", **environment):
    """`train_student` in a process of its own, after `prepare`."""
    code = (
        "import sys; from pathlib import Path; from pipeline.files import Folders; from pipeline.params import Params\n"
        "from pipeline.students.train import train_student\n"
        "params, folders = Params.model_validate_json(sys.argv[1]), Folders.here(Path(sys.argv[2]))\n"
        f"{prepare}\ntrain_student('cd', params, folders)\n"
    )
    raw = json.dumps(project.params({"cd": changes}).model_dump(mode="json"))
    return subprocess.Popen(
        [sys.executable, "-c", code, raw, str(project.root)], cwd=ROOT, env={**os.environ, "PYTHONPATH": ".", **environment}
    )


@pytest.mark.slow
def test_after_kill_9_the_next_run_goes_on_to_the_same_bytes(make_project):
    one, two = make_project("one"), make_project("two")
    changes = {"steps": 40, "weight_decay": 0.01, "ce_weight": 0.3, "seeds": [4, 2], "validation_fraction": 0.3, "evaluate_every": 7}
    one.train(**changes)
    always = "from pipeline.students.checkpoint import Checkpoint; Checkpoint.due = lambda self: True"
    process = in_another_process(two, changes, always)
    while len(two.checkpoints()) < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: raise `steps`"
    assert not (two.output() / "manifest.json").exists()
    two.train(**changes)
    assert two.json("metrics/runtime/student-cd.json")["resumed_at_step"] > 0
    assert one.files() == two.files()
    assert two.checkpoints() == []


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


def killed_at_save(project, monkeypatch, number, **changes):
    """A run that ends after its checkpoint `number`; checkpoints are taken at every step."""
    saved, original = [], Checkpoint.save

    def dying(self, *args):
        original(self, *args)
        saved.append(1)
        if len(saved) == number:
            raise Killed

    params = project.params({"cd": changes})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "due", lambda self: True)
        patch.setattr(Checkpoint, "save", dying)
        with pytest.raises(Killed):
            train_student("cd", params, project.folders)


@pytest.mark.slow
def test_a_run_that_stopped_early_stops_at_the_same_step_after_a_kill(make_project, monkeypatch):
    one, two = make_project("one"), make_project("two")
    changes = {"steps": 40, "learning_rate": 0.3, "validation_fraction": 0.3, "evaluate_every": 2, "patience": 2}
    one.train(**changes)
    steps = one.json("metrics/train/cd.json")["steps"]
    assert steps < 40
    killed_at_save(two, monkeypatch, steps, **changes)  # the last checkpoint says that patience is over
    two.train(**changes)
    assert two.json("metrics/runtime/student-cd.json")["resumed_at_step"] == steps
    assert one.files() == two.files()


@pytest.mark.parametrize("what", ["params", "targets"])
@pytest.mark.slow
def test_a_checkpoint_of_other_params_or_targets_is_not_used_and_does_not_stay(make_project, monkeypatch, what):
    project = make_project()
    killed_at_save(project, monkeypatch, 3)
    if what == "targets":
        project.write_targets([[0.2, 0.8]] * 10)
    project.train(**({"learning_rate": 2e-3} if what == "params" else {}))
    assert project.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 0
    assert project.checkpoints() == []


@pytest.mark.slow
def test_several_seeds_are_trainings_of_their_own_each_in_a_complete_folder(make_project):
    project, single = make_project("one"), make_project("two")
    project.train(steps=5, seeds=[3, 1])
    folders = {3: project.output(), 1: project.output() / "seeds" / "1"}
    for seed, folder in folders.items():
        single.train(f"alone{seed}", steps=5, seed=seed)
        assert (folder / "model.safetensors").read_bytes() == single.weights(f"alone{seed}")
        manifest = open_trained(folder).manifest
        assert manifest["params"]["seed"] == seed
        assert set(manifest["files"]) == set(single.manifest(f"alone{seed}")["files"])
    metrics = project.json("metrics/train/cd.json")
    assert list(metrics["seeds"]) == ["3", "1"]
    assert metrics["final_loss"] == metrics["seeds"]["3"]["final_loss"] != metrics["seeds"]["1"]["final_loss"]
    assert [row["seed"] for row in project.curve()] == ["3"] * 5 + ["1"] * 5
    assert project.checkpoints() == []


@pytest.mark.slow
def test_seeds_that_were_done_before_a_kill_are_not_trained_again(make_project, monkeypatch):
    one, two = make_project("one"), make_project("two")
    changes = {"steps": 5, "seeds": [0, 1]}
    one.train(**changes)
    killed_at_save(two, monkeypatch, 6, **changes)  # five of the first seed, one of the second
    two.train(**changes)
    assert one.files() == two.files()
    assert two.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 5 + 1


def test_what_the_validation_came_to_is_in_metrics_manifest_and_curve(make_project):
    project = make_project()
    project.write_targets([[0.05, 0.95]] * 10)
    project.train(steps=7, validation_fraction=0.4, evaluate_every=3, learning_rate=3e-3)
    metrics = project.json("metrics/train/cd.json")
    assert 0 < metrics["validation_examples"] < 10
    assert metrics["validation_kl_nats"] < metrics["validation_kl_nats_before"]
    assert project.manifest()["best_step"] == metrics["best_step"]
    found = {int(row["step"]): float(row["validation_kl"]) for row in project.curve() if row["validation_kl"]}
    assert list(found) == [3, 6, 7]
    assert found[metrics["best_step"]] == metrics["validation_kl_nats"] == min(found.values())


@pytest.mark.slow
def test_gold_labels_reach_only_a_student_that_is_given_them(make_project):
    projects = [make_project(name) for name in ("a", "b", "c")]
    turned = [Example({"text": text}, label, source="s") for text, label in (("warm and funny", "negative"), ("bored", "positive"))]
    projects[1].write_examples("demonstrations", turned)
    (projects[2].artifacts / "data/demonstrations.parquet").unlink()
    for project in projects:
        project.train(validation_fraction=0.4)
    assert projects[0].weights() == projects[1].weights() == projects[2].weights()
    for project in projects[:2]:
        project.train(ce_weight=0.5)
    assert projects[0].weights() != projects[1].weights()


@pytest.mark.slow
def test_hard_labels_need_no_more_than_the_argmax_of_the_targets(make_project):
    projects = [make_project(name) for name in ("a", "b")]
    rows = read_table(projects[1].artifacts / "targets/mix/targets.parquet", TARGETS).to_pylist()
    projects[1].write_targets([[float(p == max(row["probabilities"])) for p in row["probabilities"]] for row in rows])
    for project in projects:
        project.train(loss="hard")
    assert projects[0].weights() == projects[1].weights()


@pytest.mark.slow
def test_demonstrations_a_step_are_a_quarter_of_the_batch_or_what_is_asked(make_project):
    project = make_project()
    for changes, size in (({}, 1), ({"batch_size": 2}, 1), ({"batch_size": 9}, 2), ({"ce_batch_size": 3}, 3)):
        project.train(steps=2, ce_weight=0.5, **changes)
        assert project.json("metrics/train/cd.json")["examples"] == 2 * (changes.get("batch_size", 4) + size)


def test_no_dropout_in_training(make_project, model_folder):
    projects = [make_project(f"p{p}", base=model_folder("gpt2", resid_pdrop=p, embd_pdrop=p)) for p in (0.0, 0.5)]
    for project in projects:
        project.train(steps=4)
    assert projects[0].weights() == projects[1].weights()


def damaged_targets(project):
    write_json(
        {**project.json("artifacts/targets/mix/calibration.json"), "template": "{text} It was"},
        project.artifacts / "targets/mix/calibration.json",
    )


def other_labels(project):
    write_json(
        {**project.json("artifacts/targets/mix/calibration.json"), "labels": ["no", "yes"]},
        project.artifacts / "targets/mix/calibration.json",
    )


def fewer_texts(project):
    project.write_examples("transfer", project.examples[:3])


def no_targets(project):
    write_table(pa.Table.from_pylist([], TARGETS), project.artifacts / "targets/mix/targets.parquet")


def unlabelled(project):
    project.write_examples("demonstrations", [Example({"text": "x"}, "maybe", source="s")])


@pytest.mark.parametrize(
    ("damage", "changes", "error", "message"),
    [
        (damaged_targets, {}, MismatchError, r"made with template '\{text\} It was', this task has 'Review: .*dvc repro targets@mix"),
        (other_labels, {}, MismatchError, r"made with labels \['no', 'yes'\], this task has \['negative', 'positive'\]"),
        (fewer_texts, {}, MismatchError, r"targets\.parquet: example [0-9a-f]{64} is not among its texts.*dvc repro targets@mix"),
        (no_targets, {}, MismatchError, r"targets/mix: no rows"),
        (unlabelled, {"ce_weight": 0.5}, MismatchError, r"has the label 'maybe', and the task has negative, positive"),
        (None, {"layers": "0-9"}, UsageError, "between 0 and 3|0 to 3"),
        (None, {"validation_fraction": 1e-6}, UsageError, "validation_fraction: 1e-06 of 10 examples leaves none for it"),
        (None, {"freeze_layers": 4}, UsageError, "freeze_layers: 4, and the student has 4"),
        (None, {"base": "models/other"}, UsageError, r"models/other: no such model folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused_before_training(make_project, damage, changes, error, message):
    project = make_project()
    if damage is not None:
        damage(project)
    with pytest.raises(error, match=message):
        project.train(**changes)
    assert not (project.output() / "manifest.json").exists()


def test_an_example_longer_than_the_model_is_refused_before_training(make_project, model_folder):
    project = make_project(base=model_folder("llama", max_position_embeddings=8))
    with pytest.raises(UsageError, match=r"line 1 of s is too long: its text has 5 tokens, and 3 fit .*models/tiny\. At least 16 must fit"):
        project.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn_from": "data/demonstrations.parquet", "ce_weight": 0.5}, "`ce_weight` is about targets"),
        ({"learn_from": "data/demonstrations.parquet", "loss": "hard"}, "`loss` is about targets"),
        ({"ce_batch_size": 2}, "`ce_batch_size` is for a `ce_weight` on the demonstrations"),
        ({"ce_batch_size": 2, "ce_weight": 0.5, "ce_target": "targets"}, "`ce_batch_size` is for a `ce_weight` on the demonstrations"),
        ({"seeds": [1, 1]}, "one occurs twice"),
    ],
)
def test_params_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        StudentParams(**({"base": "models/tiny", "learn_from": "targets/mix", "steps": 1, "learning_rate": 1e-3} | changes))


@pytest.fixture(scope="module")
def other_tokenizer():
    """A word-level tokenizer with a beginning-of-text token: other ids, other splits, verbalisers of several tokens."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(["Review: a warm film and the plot goes nowhere\nSentiment:" + word for word in (" bad", " good")] * 3, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>", eos_token="<s>")


@pytest.mark.parametrize(("architecture", "tuning"), [("gpt2", "full"), ("opt", "lora")])
@pytest.mark.slow
def test_a_student_of_another_family_with_another_tokenizer_learns_the_targets(
    make_project, tiny_model, other_tokenizer, architecture, tuning
):
    project = make_project()
    base = project.artifacts / "models" / "other"
    tiny_model(architecture, vocab_size=len(other_tokenizer)).save_pretrained(base)
    other_tokenizer.save_pretrained(base)
    project.train(base="models/other", steps=120, batch_size=10, learning_rate=1e-2, tuning=tuning)
    targets = [row["probabilities"] for row in read_table(project.artifacts / "targets/mix/targets.parquet", TARGETS).to_pylist()]
    before, after = (agreement(folder, project.examples, targets) for folder in (base, project.output()))
    assert after < 0.3 * before
    assert project.manifest()["forward"].startswith("packed")


@torch.no_grad()
def agreement(folder, examples, targets):
    """Mean KL of a folder's answers to the targets, by plain transformers: its tokenizer with its beginning-of-text token, its logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for example, target in zip(examples, torch.tensor(targets), strict=True):
        query = f"Review: {example.fields['text']}\nSentiment:"
        prompt = tokenizer(query).input_ids
        scores = []
        for word in (" bad", " good"):
            whole = tokenizer(query + word).input_ids
            assert whole[: len(prompt)] == prompt
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
        total += float((target * (target.log() - torch.tensor(scores).log_softmax(-1))).sum())
    return total / len(examples)
