"""What an answer costs: the counts against the prompts, what a figure says of its machine, and the process that measures."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import ShotlessError
from pipeline.evaluation import cost as cost_module
from pipeline.evaluation.cost import measure, measure_costs, measured_on
from pipeline.evaluation.predictions import Answering
from pipeline.files import read_json
from pipeline.models.folders import load_model, load_tokenizer, save_model
from pipeline.params import TaskParams
from pipeline.schema import Context, Example
from pipeline.task import Task

TASK = TaskParams(template="Review: {text}\nSentiment:", verbalisers={"positive": " good", "negative": " bad"})
EXAMPLES = [Example({"text": text}) for text in ("great", "terrible food and late service", "a film")]
CONTEXTS = (Context("one", "Answer."), Context("two", demonstrations=(({"text": "bad food"}, "negative"),)))
BEFORE = ["Answer.\n\n", "Review: bad food\nSentiment: bad\n\n"]


@pytest.fixture
def ids(tokenizer):
    """Token ids of an example's full prompt behind a text."""
    return lambda before, example: tokenizer(before + TASK.template.format(**example.fields)).input_ids


def parameters(folder):
    return sum(p.numel() for p in load_model(folder).parameters())


def test_tokens_and_passes_of_a_student_are_its_prompts(model_folder, ids):
    folder = model_folder("llama")
    figures = measure([Answering(folder)], TASK, EXAMPLES, 2, 1)
    assert figures["prompt_tokens"] == np.mean([len(ids("", example)) for example in EXAMPLES[:2]])
    assert figures["forward_passes"] == 1
    assert figures["parameters"] == parameters(folder)
    assert figures["disk_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert figures["latency_ms"] > 0
    assert figures["peak_rss_bytes"] > figures["disk_bytes"]
    measured = measured_on([Answering(folder)], TASK, EXAMPLES, 2, 1)
    assert measured.keys() == {"subject", "examples", "batched", "device", "processor", "dtypes", "threads", "torch"}
    assert (measured["examples"], measured["batched"], measured["dtypes"], measured["threads"]) == (2, 3, ["float32"], 1)
    assert measured["processor"]


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_is_measured_beside_all_and_once_if_it_is_all(model_folder, monkeypatch, threads):
    used, use = [], cost_module.use_machine
    monkeypatch.setattr(cost_module, "use_machine", lambda count: used.append(count) or use(count))
    before = torch.get_num_threads()
    try:
        figures = measure([Answering(model_folder("llama"))], TASK, EXAMPLES * 6, 2, threads, one_thread=True)
    finally:
        torch.set_num_threads(before)
    assert used == [threads, *dict.fromkeys([threads, 1]), *dict.fromkeys([threads, 1])]
    assert figures["throughput"]["examples"] == 18
    assert figures["one_thread"]["throughput"]["examples"] == {1: 18, 2: cost_module.ONE_THREAD_EXAMPLES}[threads]
    assert threads == 2 or figures["one_thread"]["latency_ms"] == figures["latency_ms"]


def test_an_encoder_is_measured_as_a_decoder_is(encoder_folder, tmp_path):
    folder, labels = encoder_folder(), Task(TASK).labels
    save_model(load_model(folder, labels=labels), load_tokenizer(folder), tmp_path)
    figures = measure([Answering(tmp_path)], TASK, EXAMPLES, 2, 1, one_thread=True)
    ids = load_tokenizer(folder)([example.fields["text"] for example in EXAMPLES]).input_ids
    assert figures["prompt_tokens"] == np.mean([len(own) for own in ids[:2]])
    assert figures["parameters"] == parameters(tmp_path)
    assert figures["throughput"].items() >= {"examples": 3, "engine": "generic"}.items()
    assert min(figures["latency_ms"], figures["one_thread"]["latency_ms"]) > 0


def test_an_ensemble_pays_for_every_model_and_context_and_a_shared_model_once(model_folder, ids):
    first, second = model_folder("llama"), model_folder("qwen2")
    figures = measure([Answering(first, CONTEXTS), Answering(second), Answering(first)], TASK, EXAMPLES, 3, 1)
    lengths = [[len(ids(before, example)) for before in (*BEFORE, "", "")] for example in EXAMPLES]
    assert figures["prompt_tokens"] == pytest.approx(np.mean(list(map(sum, lengths))))
    assert figures["forward_passes"] == 4
    assert figures["parameters"] == parameters(first) + parameters(second)


def test_a_model_that_is_asked_in_two_formats_is_loaded_once(model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), folder := tmp_path / "chat")
    turns = "{% for turn in messages %}{{ turn.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns, encoding="utf-8")
    figures = measure([Answering(folder, CONTEXTS[:1], "chat"), Answering(folder)], TASK, EXAMPLES, 2, 1)
    assert figures["forward_passes"] == 2
    assert figures["parameters"] == parameters(folder)
    assert figures["throughput"]["engine"] == "shared_prefix"


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


def test_every_prompt_is_answered_once_after_one_example_to_warm_up_then_all_in_batches(model_folder, seen, ids):
    figures = measure([Answering(model_folder("llama"), CONTEXTS)], TASK, EXAMPLES, 2, 1)
    asked = [[ids(before, example) for example in EXAMPLES] for before in BEFORE]
    one, two = ([own[number] for own in asked] for number in (0, 1))
    assert seen == [[*one, *one, *two], "peak", *asked], "memory is noted before the batches; a context's prompts come together"
    assert (figures["throughput"]["examples"], figures["throughput"]["engine"]) == (3, "noting")


def test_every_window_of_a_long_text_is_measured(model_folder, seen):
    text = " ".join(["great late food"] * 20)
    windows = TASK.model_copy(update={"long_texts": "windows", "max_tokens": 20})
    figures = measure([Answering(model_folder("llama"))], windows, [Example({"text": text}), EXAMPLES[0]], 2, 1)
    one_by_one, _, batch = seen
    assert len(batch) > 4
    assert one_by_one == [*batch[:-1], *batch], "the first to warm up"
    assert figures["forward_passes"] == len(batch) / 2
    assert figures["prompt_tokens"] == sum(map(len, batch)) / 2


@pytest.mark.slow
def test_the_subject_is_weights_and_prompts_wherever_they_lie(model_folder, tmp_path):
    def subject(*models):
        return measured_on(models, TASK, EXAMPLES, 1, 1)["subject"]

    folder, moved = model_folder("llama"), tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    here = subject(Answering(folder), Answering(folder, CONTEXTS))
    assert subject(Answering(moved), Answering(moved, CONTEXTS)) == here
    other = [
        subject(Answering(folder, CONTEXTS), Answering(folder)),
        subject(Answering(folder)),
        subject(Answering(folder), Answering(folder, (CONTEXTS[0], Context("two", "Answer now.")))),
        subject(Answering(model_folder("llama", seed=1)), Answering(folder, CONTEXTS)),
    ]
    assert here not in other


@pytest.fixture
def noted(monkeypatch):
    """What would be measured, and on what counts; figures are made up."""
    found = []

    def note(models, task, examples, timed, threads, one_thread):
        found.append(([(str(model.folder), len(model.contexts)) for model in models], (len(examples), timed, threads, one_thread)))
        return {"number": len(found)} | ({"one_thread": {}} if one_thread else {})

    monkeypatch.setattr(cost_module, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(cost_module, "measure", note)
    return found


def test_each_method_is_measured_on_its_own_models_and_contexts(world, noted):
    measure_costs(world.params, world.folders)
    place = {name: world.metric("cost", name)["number"] - 1 for name in [*world.params.baselines, *world.params.students]}
    for name, asked in {
        "several": [("students/cd", 1)],  # the first of its seeds, which is the same model
        "icl": [("models/first", 1)],  # the first context
        "teacher": [("models/first", 2), ("models/second", 1)],
    }.items():
        models = [(str(world.artifacts / folder), count) for folder, count in asked]
        assert noted[place[name]] == (models, (4, 2, 1, name in world.params.students))  # of students alone, one thread beside all
    subjects = {name: world.metric("cost", name)["measured"]["subject"] for name in place}
    assert read_json(world.artifacts / "costs.json") == subjects


def test_the_same_models_and_prompts_are_measured_once(world, noted):
    measure_costs(world.params, world.folders)
    subjects = read_json(world.artifacts / "costs.json")
    assert len(noted) == len(set(subjects.values())) < len(subjects)
    measure_costs(world.params, world.folders)
    assert len(noted) == len(set(subjects.values())), "nor in another run"
    figures = world.metrics / "cost" / "teacher.json"  # no other method has its subject
    figures.write_text(figures.read_text("utf-8").replace('"threads": 1', '"threads": 7'), "utf-8")
    measure_costs(world.params, world.folders)
    assert len(noted) == len(set(subjects.values())) + 1, "figures of other threads do not serve"


@pytest.mark.slow
def test_a_process_of_its_own_measures(world):
    params = world.params.model_copy(update={"baselines": {}, "students": {"cd": world.params.students["cd"]}})
    measure_costs(params, world.folders)
    figures = world.metric("cost", "cd")
    assert (figures["measured"]["examples"], figures["measured"]["batched"]) == (2, 4)
    assert figures["peak_rss_bytes"] > 1 << 20


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_leaves_no_figures(world, monkeypatch):
    monkeypatch.setattr(cost_module, "measure", killed)
    with pytest.raises(ShotlessError, match="The process that measures the cost of icl was killed"):
        measure_costs(world.params, world.folders)
    assert not (world.metrics / "cost").exists()
