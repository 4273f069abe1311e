"""What an answer costs: the counts against the prompts, one measurement for each subject, a child's failure in its own words."""

import shutil

import numpy as np
import pytest

from pipeline.errors import ShotlessError
from pipeline.evaluation import cost as cost_module
from pipeline.evaluation.cost import Job, Packed, Prompts, measure, run_job
from pipeline.models.identity import weights_sha256
from pipeline.models.loading import load_model

EXAMPLES = [[[5, 9, 3]], [[7, 11, 5, 260, 41]], [[8] * 10]]
IN_CONTEXTS = [[[1, 2, 3, 4, *prompt[0]], [6, 7, *prompt[0]]] for prompt in EXAMPLES]


def prompts(folder, examples=EXAMPLES):
    return Prompts(folder=str(folder), weights=weights_sha256(folder), examples=examples)


def job(*models, threads=1):
    return Job(models=list(models), threads=threads)


def parameters(folder):
    return sum(p.numel() for p in load_model(folder).parameters())


def test_tokens_and_passes_of_a_student_are_its_prompts(model_folder):
    folder = model_folder("llama")
    figures = run_job(job(prompts(folder)))
    assert figures["prompt_tokens"] == (3 + 5 + 10) / 3
    assert figures["forward_passes"] == 1
    assert figures["measured"] == {"subject": job(prompts(folder)).subject, "examples": 3}
    assert figures["parameters"] == parameters(folder)
    assert figures["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    assert 0 < figures["latency_ms"] <= figures["latency_p95_ms"]
    assert figures["peak_rss_bytes"] > figures["weights_bytes"]


def test_an_ensemble_pays_for_every_model_and_context(model_folder):
    first, second = model_folder("llama"), model_folder("qwen2")
    figures = run_job(job(prompts(first, IN_CONTEXTS), prompts(second)))
    every = [sum(map(len, one)) + sum(map(len, other)) for one, other in zip(IN_CONTEXTS, EXAMPLES, strict=True)]
    assert figures["prompt_tokens"] == pytest.approx(np.mean(every))
    assert figures["forward_passes"] == 3
    assert figures["parameters"] == parameters(first) + parameters(second)
    assert figures["weights_bytes"] == sum((folder / "model.safetensors").stat().st_size for folder in (first, second))


def test_every_prompt_is_answered_once_after_one_example_to_warm_up(model_folder, monkeypatch):
    answered, original = [], cost_module._answer

    def noting(model, given):
        answered.append(given)
        original(model, given)

    monkeypatch.setattr(cost_module, "_answer", noting)
    run_job(job(prompts(model_folder("llama"), IN_CONTEXTS)))
    assert answered == [IN_CONTEXTS[0], *IN_CONTEXTS]


def test_a_model_that_two_teachers_share_is_counted_once(model_folder):
    folder = model_folder("llama")
    figures = run_job(job(prompts(folder, IN_CONTEXTS), prompts(folder)))
    assert figures["parameters"] == parameters(folder)
    assert figures["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    assert figures["forward_passes"] == 3


def test_a_model_that_two_teachers_share_is_in_memory_once(model_folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(cost_module, "load_model", lambda folder: loaded.append(folder) or load_model(folder))
    run_job(job(prompts(model_folder("llama"), IN_CONTEXTS), prompts(model_folder("llama"))))
    assert len(loaded) == 1, "peak_rss_bytes would hold the same weights twice"


def test_the_subject_is_weights_and_prompts_wherever_they_lie(model_folder, tmp_path):
    folder, moved = model_folder("llama"), tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    here = job(prompts(folder), prompts(folder, IN_CONTEXTS))
    assert job(prompts(moved), prompts(moved, IN_CONTEXTS)).subject == here.subject
    assert job(prompts(folder, IN_CONTEXTS), prompts(folder)).subject != here.subject
    assert job(prompts(folder)).subject != here.subject
    assert job(prompts(folder, EXAMPLES[:2])).subject != job(prompts(folder)).subject
    assert job(prompts(folder, [[[5, 9, 4]], *EXAMPLES[1:]])).subject != job(prompts(folder)).subject
    assert job(prompts(model_folder("llama", seed=1))).subject != job(prompts(folder)).subject


def test_a_child_measures_once_and_its_figures_serve_every_method_with_the_same_prompts(model_folder, tmp_path):
    folder, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(model_folder("llama"), folder)
    asked = job(prompts(folder, IN_CONTEXTS))
    figures = measure(asked, work)
    assert figures["measured"]["subject"] == asked.subject
    assert figures["forward_passes"] == 2
    assert figures["peak_rss_bytes"] > 1 << 20
    assert [file.name for file in (work / "cost").iterdir()] == [asked.kept]
    shutil.rmtree(folder)  # a child could not measure it again
    gone = Job(models=[asked.models[0].model_copy(update={"folder": "somewhere else"})], threads=1)
    assert measure(gone, work) == figures


def test_damaged_figures_are_measured_again(model_folder, tmp_path, capsys):
    asked = job(prompts(model_folder("llama"), IN_CONTEXTS))
    kept = tmp_path / "cost" / asked.kept
    kept.parent.mkdir()
    for damaged in ("", '{"latency_ms": 0.1}'):
        kept.write_text(damaged, "utf-8")
        assert measure(asked, tmp_path)["measured"]["subject"] == asked.subject
        assert "cost is measured again" in capsys.readouterr().err


def test_a_child_that_fails_is_an_error_with_its_last_words_and_leaves_no_figures(tmp_path):
    asked = Job(models=[Prompts(folder=str(tmp_path / "nowhere"), weights="w", examples=EXAMPLES)], threads=1)
    with pytest.raises(ShotlessError, match=r"(?s)measures cost ended with 1; its last words: .*nowhere: no such model folder"):
        measure(asked, tmp_path / "work")
    assert not list((tmp_path / "work" / "cost").glob("*.json"))


def packed(prefixes, completions=((5,), (7, 9))):
    return Packed(prefixes=prefixes, queries=[prompt[0] for prompt in EXAMPLES], completions=list(map(list, completions)))


def test_the_throughput_is_of_every_query_behind_every_prefix(model_folder, monkeypatch):
    """Two teachers on one model, two contexts and one: the engine sees the three, and time stands still but for it."""
    seen, clock = [], iter(range(100))
    original = cost_module.choose_engine

    def choose(*args):
        choice = original(*args)
        score = choice.engine.score
        monkeypatch.setattr(choice.engine, "score", lambda prefix, queries: seen.append((prefix, queries)) or score(prefix, queries))
        monkeypatch.setattr(cost_module.time, "perf_counter", lambda: next(clock))
        return choice

    monkeypatch.setattr(cost_module, "choose_engine", choose)
    folder = model_folder("llama")
    two = [prompts(folder).model_copy(update={"packed": packed(prefixes)}) for prefixes in ([[1, 2, 3], [6, 7]], [[]])]
    figures = run_job(job(*two))
    queries = [prompt[0] for prompt in EXAMPLES]
    assert seen == [([1, 2, 3], queries), ([6, 7], queries), ([], queries)]
    assert figures["throughput"] == {"examples": 3, "examples_per_second": 3.0, "engine": "shared_prefix"}


def test_memory_is_noted_before_the_batches(model_folder, monkeypatch):
    order = []
    monkeypatch.setattr(cost_module, "peak_rss_bytes", lambda: order.append("peak") or 1)
    monkeypatch.setattr(cost_module, "_throughput", lambda *_: order.append("batches"))
    run_job(job(prompts(model_folder("llama"))))
    assert order == ["peak", "peak", "batches"]


def test_without_batches_there_is_no_throughput_and_with_them_figures_are_kept_apart(model_folder):
    folder = model_folder("llama")
    plain, batched = job(prompts(folder)), job(prompts(folder).model_copy(update={"packed": packed([[]])}))
    assert run_job(plain)["throughput"] is None
    assert plain.subject == batched.subject
    assert plain.kept != batched.kept


def test_disk_is_all_the_folder_s_files(model_folder):
    folder = model_folder("llama")
    assert run_job(job(prompts(folder)))["disk_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
