"""What an answer costs: the counts against the prompts, what a figure says of its machine, when it is measured and when shared."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import ShotlessError
from pipeline.evaluation import cost as cost_module
from pipeline.evaluation.cost import FIGURES, Job, Prompts, measure, measure_method, run_job
from pipeline.evaluation.predictions import models_of, read_sets
from pipeline.files import read_json
from pipeline.models.folders import load_model, weights_sha256
from pipeline.params import TaskParams
from pipeline.task import Task

TASK = TaskParams(template="Review: {text}\nSentiment:", verbalisers={"positive": " good", "negative": " bad"})
BARE = [[[5, 9, 3], [7, 11, 5, 260, 41], [8] * 10]]  # no context, three examples
IN_CONTEXTS = [[[*prefix, *ids] for ids in BARE[0]] for prefix in ([1, 2, 3, 4], [6, 7])]


def prompts(folder, ids=BARE):
    return Prompts(folder=str(folder), weights=weights_sha256(folder), dtype="float32", ids=ids)


def job(*models, timed=3, threads=1):
    return Job(task=TASK.model_dump(mode="json"), models=list(models), timed=timed, threads=threads)


def parameters(folder):
    return sum(p.numel() for p in load_model(folder).parameters())


def test_tokens_and_passes_of_a_student_are_its_prompts(model_folder):
    folder = model_folder("llama")
    figures = run_job(job(prompts(folder), timed=2))
    assert figures["prompt_tokens"] == (3 + 5) / 2
    assert figures["forward_passes"] == 1
    assert figures["parameters"] == parameters(folder)
    assert figures["disk_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert figures["latency_ms"] > 0
    assert figures["peak_rss_bytes"] > figures["disk_bytes"]


def test_figures_say_what_was_measured_and_on_what(model_folder):
    asked = job(prompts(model_folder("llama")), timed=2)
    measured = run_job(asked)["measured"]
    assert measured.keys() == {"subject", "examples", "batched", "device", "processor", "dtypes", "threads", "torch"}
    assert (measured["subject"], measured["examples"], measured["batched"]) == (asked.subject, 2, 3)
    assert (measured["dtypes"], measured["threads"]) == (["float32"], 1)
    assert measured["processor"]


def test_an_ensemble_pays_for_every_model_and_context_and_a_shared_model_once(model_folder):
    first, second = model_folder("llama"), model_folder("qwen2")
    figures = run_job(job(prompts(first, IN_CONTEXTS), prompts(second), prompts(first)))
    bare = [len(ids) for ids in BARE[0]]
    assert figures["prompt_tokens"] == pytest.approx(np.mean([4 * length + 4 + 2 for length in bare]))
    assert figures["forward_passes"] == 4
    assert figures["parameters"] == parameters(first) + parameters(second)


@pytest.fixture
def seen(monkeypatch):
    """What the plain model is given, one list for each loaded model; then "peak" and "batches" as they come."""
    found = []

    def load(*args):
        model = load_model(*args)
        own = []
        found.append(own)
        model.register_forward_pre_hook(lambda _, __, given: own.append(given["input_ids"][0].tolist()), with_kwargs=True)
        return model

    class Engine:
        name = "noting"

        def score(self, asked):
            found.append([list(prompt.ids) for prompt in asked])
            return SimpleNamespace(label_logprobs=torch.zeros(1))

    peak = cost_module.peak_rss_bytes
    monkeypatch.setattr(cost_module, "load_model", load)
    monkeypatch.setattr(cost_module, "open_engine", lambda *_: Engine())
    monkeypatch.setattr(cost_module, "peak_rss_bytes", lambda: found.append("peak") or peak())
    return found


def test_every_prompt_is_answered_once_after_one_example_to_warm_up_then_all_in_batches(model_folder, seen):
    figures = run_job(job(prompts(model_folder("llama"), IN_CONTEXTS), timed=2))
    one, two = ([IN_CONTEXTS[0][n], IN_CONTEXTS[1][n]] for n in (0, 1))
    assert seen == [[*one, *one, *two], "peak", *IN_CONTEXTS], "memory is noted before the batches; a context's prompts come together"
    assert (figures["throughput"]["examples"], figures["throughput"]["engine"]) == (3, "noting")


def test_the_subject_is_weights_and_prompts_wherever_they_lie(model_folder, tmp_path):
    folder, moved = model_folder("llama"), tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    here = job(prompts(folder), prompts(folder, IN_CONTEXTS)).subject
    assert job(prompts(moved), prompts(moved, IN_CONTEXTS)).subject == here
    other = [
        job(prompts(folder, IN_CONTEXTS), prompts(folder)),
        job(prompts(folder)),
        job(prompts(folder), prompts(folder, [IN_CONTEXTS[0], [[6, 8, *ids] for ids in BARE[0]]])),
        job(prompts(model_folder("llama", seed=1)), prompts(folder, IN_CONTEXTS)),
    ]
    assert here not in {one.subject for one in other}


def test_a_child_measures_and_its_figures_serve_wherever_the_folders_are(model_folder, tmp_path):
    folder, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(model_folder("llama"), folder)
    asked = job(prompts(folder, IN_CONTEXTS))
    figures = measure(asked, work)
    assert figures["measured"]["subject"] == asked.subject
    assert figures["peak_rss_bytes"] > 1 << 20
    shutil.rmtree(folder)  # a child could not measure it again
    moved = Job.model_validate(asked.model_dump() | {"models": [asked.models[0].model_copy(update={"folder": "elsewhere"})]})
    assert measure(moved, work) == figures
    assert len(list((work / "cost").iterdir())) == 1


def test_a_child_that_fails_is_an_error_with_its_last_words_and_leaves_no_figures(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="out of memory"))
    with pytest.raises(ShotlessError, match="measures cost ended with 1; its last words: out of memory"):
        measure(job(prompts(model_folder("llama"))), tmp_path)
    assert not list((tmp_path / "cost").iterdir())


@pytest.fixture
def children(monkeypatch):
    """The jobs of the processes that would measure; each has another latency."""
    jobs = []

    def run(command, **_):
        jobs.append(Job.model_validate(read_json(Path(command[-1]))))
        figures = dict.fromkeys(FIGURES, 1.0) | {"latency_ms": float(len(jobs)), "measured": {"subject": jobs[-1].subject}}
        return SimpleNamespace(returncode=0, stdout=json.dumps(figures))

    monkeypatch.setattr(cost_module.subprocess, "run", run)
    return jobs


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"processor": "another"}, {"torch": "0.1"}, {"dtypes": ["bfloat16"]}])
def test_another_machine_measures_for_itself(model_folder, tmp_path, children, monkeypatch, change):
    asked = job(prompts(model_folder("llama")))
    first = measure(asked, tmp_path)
    machine = asked.machine()
    with monkeypatch.context() as patch:
        patch.setattr(Job, "machine", lambda _: machine | change)
        assert measure(asked, tmp_path)["latency_ms"] == 2.0
    assert measure(job(prompts(model_folder("llama")), threads=2), tmp_path)["latency_ms"] == 3.0
    assert measure(asked, tmp_path) == first


def test_damaged_figures_are_measured_again(model_folder, tmp_path, children, capsys):
    asked = job(prompts(model_folder("llama")))
    measure(asked, tmp_path)
    [kept] = (tmp_path / "cost").iterdir()
    kept.write_text("", encoding="utf-8")
    assert measure(asked, tmp_path)["latency_ms"] == 2.0
    assert "Cost is measured again" in capsys.readouterr().err


def measured(world, name):
    params = world.params
    examples = read_sets(params, world.folders)["near"]
    figures = measure_method(name, models_of(name, params, world.folders), params, world.folders, examples)
    assert figures == world.metric("cost", name)
    return figures


def test_methods_share_a_measurement_and_a_stage_that_runs_again_measures_again(world, children):
    world.raw["baselines"]["same"] = world.raw["baselines"]["icl"]
    assert [measured(world, name)["latency_ms"] for name in ("icl", "same")] == [1.0, 1.0]
    for file in (world.metrics / "cost").iterdir():  # as time goes by
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 10))
    assert measured(world, "icl")["latency_ms"] == 2.0
    for file in (world.folders.work / "cost").iterdir():
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 20))
    assert measured(world, "same")["latency_ms"] == 2.0, "measured since its own figures"
    assert len(children) == 2


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("several", [("students/several", 1)]),  # the first of its seeds
        ("icl", [("models/first", 1)]),  # the first context
        ("teacher", [("models/first", 2), ("models/second", 1)]),
    ],
)
def test_a_method_is_measured_on_its_own_models_and_contexts(world, children, name, asked):
    figures = measured(world, name)
    assert [(m.folder, len(m.ids)) for m in children[0].models] == [(str(world.artifacts / folder), n) for folder, n in asked]
    assert (children[0].timed, len(children[0].models[0].ids[0])) == (2, 4)
    assert ("by_demonstrations" in figures) == (name != "several")


def test_a_baseline_s_models_are_measured_behind_a_rising_number_of_demonstrations(world, tokenizer, children):
    world.raw["evaluation"]["cost_demonstrations"] = [0, 2, 4, 80]
    rows = measured(world, "teacher")["by_demonstrations"]
    task, shown = Task(world.params.task), [("a warm film", "positive"), ("bored", "negative"), ("so", "mixed")]
    one = [f"{task.query({'text': text})}{world.raw['task']['verbalisers'][label]}\n\n" for text, label in shown]
    contexts = {0: "", 2: "".join(one[:2]), 4: "".join([*one, one[0]])}
    for number, model in enumerate(("models/first", "models/second")):
        mine = rows[4 * number : 4 * number + 4]
        assert [(row["model"], row["demonstrations"]) for row in mine] == [(model, count) for count in (0, 2, 4, 80)]
        assert [row["context_tokens"] for row in mine[:3]] == [len(tokenizer(text).input_ids) for text in contexts.values()]
        assert [row.get("repeated", False) for row in mine] == [False, False, True, True]
        assert all(set(FIGURES) <= row.keys() for row in mine[:3])
        assert mine[3].keys() == {"model", "demonstrations", "context_tokens", "repeated", "too_long_for"}
        assert mine[3]["too_long_for"] == 512 < mine[3]["context_tokens"]
    expected = [[tokenizer(text + task.query({"text": asked})).input_ids for asked, _ in world.sets["near"]] for text in contexts.values()]
    assert [child.models[0].ids[0] for child in children[1:]] == expected * 2
