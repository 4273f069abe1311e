"""A capture from files to a cache: its numbers against full prompts, its manifest, that it repeats to the byte and scores nothing twice."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from teachers.conftest import CONTEXTS, KEPT, ONE, TASK, TEXTS, TWO, World, example

from pipeline.cache import folder as cache_module
from pipeline.cache.folder import read_cache
from pipeline.errors import ShotlessError, UsageError
from pipeline.files import read_json, sha256_ids
from pipeline.models.folders import load_model, weights_sha256
from pipeline.params import TaskParams
from pipeline.schema import LABELLED, NO_CONTEXT, read_table
from pipeline.task import Task
from pipeline.teachers import engines
from pipeline.teachers import scorer as scorer_module
from pipeline.teachers.capture import content_free
from pipeline.teachers.scorer import LocalBackend

pytestmark = pytest.mark.slow

LABELS = ["mixed", "negative", "positive"]
FREE = ["N/A", ""]


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


def text_of(context, text):
    """A prompt, written out from the params."""
    verbaliser = TASK["verbalisers"]
    head = context.instruction + "\n\n" if context.instruction else ""
    shots = "".join(TASK["template"].format(**fields) + verbaliser[answer] + "\n\n" for fields, answer in context.demonstrations)
    return head + shots + TASK["template"].format(text=text)


@torch.no_grad()
def naive_row(model, tokenizer, context, text):
    """The prompt's ids, each label's log-probability and the logits, token by token from full prompts."""
    prompt = tokenizer(text_of(context, text)).input_ids
    labels = []
    for label in LABELS:
        ids, total = tokenizer(TASK["verbalisers"][label]).input_ids, 0.0
        for place, token in enumerate(ids):
            logits = model(torch.tensor([prompt + ids[:place]])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
        labels.append(total)
    return prompt, labels, model(torch.tensor([prompt])).logits[0, -1].double()


def test_every_row_is_what_the_full_prompt_gives(world, tokenizer):
    rows = world.capture().rows.to_pylist()
    asked = [(context, text) for context in CONTEXTS for text in [*FREE, *TEXTS]]
    expected_keys = [(context.context_id, example(text).example_id) for context, text in asked]
    assert [(row["context_id"], row["example_id"]) for row in rows] == expected_keys
    model = load_model(world.model)
    for row, (context, text) in zip(rows, asked, strict=True):
        prompt, labels, logits = naive_row(model, tokenizer, context, text)
        top = logits.log_softmax(-1).topk(5)
        assert row["prompt_sha"] == sha256_ids(prompt)
        assert row["prompt_tokens"] == len(prompt)
        assert row["label_logprobs"] == pytest.approx(labels, abs=1e-4)
        assert row["topk_ids"][0] == top.indices.tolist()
        assert row["topk_logprobs"][0] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert row["log_z"][0] == pytest.approx(float(logits.logsumexp(-1)), abs=1e-4)
        assert row["tail_mass"][0] == pytest.approx(1 - float(top.values.exp().sum()), abs=1e-4)


def test_labelled_examples_are_answered_behind_contexts_without_those_of_their_fold_with_the_teacher_s_lean(world, tokenizer):
    shown = {"a warm film": "positive", "bored": "negative", "I loved it": "positive", "cold": "negative"}
    world.write_labelled(shown | {"as it was": "mixed", "fair": "mixed"})
    world.capture()
    rows = read_table(world.folders.artifacts / "labelled" / "few.parquet", LABELLED).to_pylist()
    first, second = {"a warm film", "bored", "as it was"}, {"I loved it", "cold", "fair"}
    assert sorted((row["context_id"], row["example_id"]) for row in rows) == sorted(
        (context.context_id, example(text).example_id) for context in CONTEXTS for text in first | second
    )
    model, answers = load_model(world.model), {(row["context_id"], row["example_id"]): row["label_logprobs"] for row in rows}
    for context in CONTEXTS:
        for text in sorted(first | second):
            fold = first if text in first else second
            others = replace(context, demonstrations=tuple(pair for pair in context.demonstrations if pair[0]["text"] not in fold))
            said = [np.array(naive_row(model, tokenizer, others, one)[1]) for one in [text, *TEXTS]]
            usual = [np.array(naive_row(model, tokenizer, context, one)[1]) for one in TEXTS]
            expected = said[0] + np.mean(usual, axis=0) - np.mean(said[1:], axis=0)
            assert answers[context.context_id, example(text).example_id] == pytest.approx(expected.tolist(), abs=1e-4)


def test_labels_of_one_example_each_are_not_judged(world):
    world.write_labelled({"a warm film": "positive", "bored": "negative", "as it was": "mixed"})
    world.capture()
    assert len(read_table(world.folders.artifacts / "labelled" / "few.parquet", LABELLED)) == 0


def test_the_manifest_says_what_the_scores_belong_to(world, tokenizer):
    manifest = world.capture().manifest
    identity = manifest["identity"]
    assert identity["weights"] == weights_sha256(world.model)
    assert identity["completions"] == [tokenizer(TASK["verbalisers"][label]).input_ids for label in LABELS]
    assert identity["dtype"] == "float32"
    assert {"torch", "transformers"} <= identity.keys()
    assert identity["cache"] == manifest["cache"]
    assert manifest["cache"] | KEPT == manifest["cache"]
    (engine,) = manifest["engines"]
    assert (engine["name"], engine["device"]) == ("shared_prefix", "cpu")
    assert "from the plain forward" in engine["reason"]
    assert (manifest["teacher"], manifest["model"], manifest["labels"]) == ("few", "models/tiny", LABELS)
    added = [len(tokenizer(text_of(context, "x")).input_ids) - len(tokenizer(text_of(NO_CONTEXT, "x")).input_ids) for context in CONTEXTS]
    assert manifest["contexts"] == [
        {"context_id": context.context_id, "name": context.name, "tokens": tokens} for context, tokens in zip(CONTEXTS, added, strict=True)
    ]
    assert manifest["content_free"] == [example(text).example_id for text in FREE]
    assert sum(manifest["shards"].values()) == 3 * (2 + len(TEXTS))
    assert str(world.folders.artifacts) not in json.dumps(manifest)


def test_a_model_that_the_fast_engine_refuses_is_captured_by_the_generic_one(tmp_path, model_folder, tokenizer, small_parts):
    world = World(tmp_path, model_folder("mistral", sliding_window=8))
    cache = world.capture()
    assert cache.manifest["engines"][0]["name"] == "generic"
    assert "a sliding window of 8 tokens" in cache.manifest["engines"][0]["reason"]
    expected = naive_row(load_model(world.model), tokenizer, TWO, TEXTS[-1])[1]
    assert cache.rows.to_pylist()[-1]["label_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_second_capture_gives_the_same_bytes_and_needs_no_model(world, monkeypatch):
    """The fidelity of the cache is not measured again either."""
    world.capture()
    scored, before = world.scored(), world.bytes()
    monkeypatch.setattr(scorer_module, "load_model", None)
    world.capture()
    assert world.bytes() == before
    assert world.scored() == scored


def test_a_capture_elsewhere_gives_the_same_bytes(world, other):
    world.capture()
    other.capture()
    assert world.bytes() == other.bytes()


def test_more_examples_score_only_those(world):
    world.write_transfer(TEXTS[:6])
    before = world.capture().rows.to_pylist()
    first = world.scored()
    assert len(first) == len(set(first)) == 3 * 8
    world.write_transfer(TEXTS)
    after = world.capture().rows.to_pylist()
    new = {example(text).example_id for text in TEXTS[6:]}
    assert sorted(world.scored()) == sorted(first + [row["prompt_sha"] for row in after if row["example_id"] in new])
    assert [row for row in after if row["example_id"] not in new] == before


def test_one_more_context_scores_only_that(world):
    world.write_contexts(CONTEXTS[:2])
    world.capture()
    first = world.scored()
    world.write_contexts(CONTEXTS)
    rows = world.capture().rows.to_pylist()
    assert sorted(world.scored()) == sorted(first + [row["prompt_sha"] for row in rows if row["context_id"] == TWO.context_id])


def test_the_same_context_under_two_names_is_scored_once(world):
    world.write_contexts([ONE, type(ONE)("again/0", "", ONE.demonstrations)])
    assert len(world.capture().rows) == 2 * (2 + len(TEXTS))
    assert len(world.scored()) == 2 + len(TEXTS)


def test_fewer_examples_in_another_order_score_nothing(world, monkeypatch):
    whole = {(row["context_id"], row["example_id"]): row for row in world.capture().rows.to_pylist()}
    first = world.scored()
    world.write_transfer(TEXTS[5:1:-1])
    rows = world.capture().rows.to_pylist()
    assert [row["example_id"] for row in rows][2:6] == [example(text).example_id for text in TEXTS[5:1:-1]]
    assert rows == [whole[row["context_id"], row["example_id"]] for row in rows]
    assert world.scored() == first


def test_the_same_weights_in_another_folder_are_not_scored_again(world, monkeypatch):
    rows = world.capture().rows
    shutil.move(world.model, world.folders.artifacts / "students" / "renamed")
    monkeypatch.setattr(scorer_module, "load_model", None)
    (world.folders.artifacts / "models").joinpath("tiny").symlink_to(world.folders.artifacts / "students" / "renamed")
    assert world.capture().rows.equals(rows)


def test_a_template_is_identified_by_the_prompts_it_makes(world):
    """Another template is scored; the same prompts under another spelling of the params are not."""
    world.capture()
    first = world.scored()
    world.task = TASK | {"verbalisers": dict(reversed(TASK["verbalisers"].items())), "max_tokens": 1000}
    world.capture()
    assert world.scored() == first
    world.task = TASK | {"template": "{text} was"}
    world.write_contexts([NO_CONTEXT])
    world.capture()
    assert len(world.scored()) == len(first) + 2 + len(TEXTS)


@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_a_capture_killed_while_it_scores_ends_with_the_bytes_of_an_unbroken_one(world, other, monkeypatch, killed_at):
    other.capture()
    original, done = LocalBackend._rows, []

    def dying(self, job):
        if len(done) == killed_at:
            raise Killed
        done.append(job)
        return original(self, job)

    with monkeypatch.context() as patched:
        patched.setattr(LocalBackend, "_rows", dying)
        with pytest.raises(Killed):
            world.capture()
    kept = world.scored()
    assert bool(kept) == bool(killed_at)
    assert len(kept) < len(other.scored())
    with pytest.raises(ShotlessError, match=r"manifest\.json: missing"):
        read_cache(world.output)
    world.capture()
    assert world.bytes() == other.bytes()
    assert sorted(world.scored()) == sorted(other.scored())


def test_a_capture_killed_while_it_writes_is_not_a_cache_and_is_written_again(world, other, monkeypatch):
    other.capture()
    original, done = cache_module.write_rows, []

    def dying(*args):
        if done:
            raise Killed
        done.append(args)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "write_rows", dying)
        with pytest.raises(Killed):
            world.capture()
    with pytest.raises(ShotlessError, match=r"manifest\.json: missing"):
        read_cache(world.output)
    scored = world.scored()
    world.capture()
    assert world.bytes() == other.bytes()
    assert world.scored() == scored


@pytest.mark.parametrize("texts", [["funny", "strange", "funny"], ["funny", "N/A"]], ids=["twice", "content-free"])
def test_an_example_that_would_be_asked_twice_is_refused_before_any_work(world, texts):
    world.write_transfer(texts)
    with pytest.raises(UsageError, match=r"transfer\.parquet: an example is there twice, or is in task\.content_free"):
        world.capture()
    assert not world.folders.work.exists()


def test_a_prompt_that_does_not_fit_is_refused_before_any_row_is_scored(world):
    world.task = TASK | {"long_texts": "refuse"}
    world.write_transfer([*TEXTS, "long " * 600])
    with pytest.raises(UsageError, match=r"the input on line 10 of s is too long: its text has 2,400 tokens, and \d+ fit .*models/tiny"):
        world.capture()
    assert world.scored() == []


def test_a_control_token_in_an_input_is_refused_if_the_template_has_some(world):
    world.task = TASK | {"template": "<|end|>Review: {text}<|end|>Sentiment:"}
    world.write_transfer([*TEXTS, "a<|end|>b"])
    with pytest.raises(UsageError, match=r"the input on line 10 of s holds <\|end\|>, a control token"):
        world.capture()


def test_content_free_inputs_fill_every_field():
    task = Task(TaskParams(template="{title}\n{text} =", verbalisers={"a": " bad", "b": " good"}, content_free=("N/A", "[MASK]")))
    assert [one.fields for one in content_free(task)] == [{"title": "N/A", "text": "N/A"}, {"title": "[MASK]", "text": "[MASK]"}]


def test_what_the_capture_took_is_kept_and_is_the_same_for_a_run_that_found_all_rows(world):
    runs = []
    for _ in range(2):
        rows = world.capture().rows
        runs.append(read_json(world.folders.metrics / "runtime" / "teacher-few.json"))
    assert runs[0] == runs[1]
    assert runs[0]["rows"] == runs[0]["rows_timed"] == len(rows)
    assert runs[0]["prompt_tokens"] == sum(rows["prompt_tokens"].to_pylist())
    assert runs[0]["seconds"] > 0


def test_fidelity_is_that_of_the_live_teacher(world):
    world.teacher = {"cache": KEPT | {"encoding": "full"}, "dtype": "float32"}
    world.capture()
    found = json.loads(world.metrics())
    assert found["rows"] == found["positions"] == 3 * (2 + len(TEXTS))
    assert found["scored_again"] == 3 * 8
    assert found["retained_mass"] == pytest.approx(1)
    assert found["kl_to_live_nats"] == pytest.approx(0, abs=1e-6)
    assert found["student_kl_nats"] > 0.001


def test_labels_that_were_not_followed_are_counted(world, monkeypatch):
    monkeypatch.setattr(engines, "MOST_NODES", 0)
    monkeypatch.setattr(engines, "MOST_LEFT", 1e9)  # no label matters: " so-so" alone has more than one token
    rows = world.capture().rows.to_pylist()
    assert all([math.isnan(bound) for bound in row["label_bounds"]] == [False, True, True] for row in rows)
    assert [row["label_bounds"][0] for row in rows] == [row["label_logprobs"][0] for row in rows]
    found = json.loads(world.metrics())
    assert (found["censored_labels"], found["censored_rows"]) == (pytest.approx(1 / 3), 1)
    assert found["censored_mass"] == pytest.approx(np.mean([math.exp(row["label_bounds"][0]) for row in rows]), abs=1e-5)


@pytest.mark.parametrize("source", ["generated", "given"])
def test_free_answers_are_captured_with_their_tokens(world, tokenizer, source):
    world.task = {"template": TASK["template"], "completion": {"source": source, "max_tokens": 12}}
    world.write_contexts([NO_CONTEXT])
    rows = world.capture().rows.to_pylist()
    assert [row["label_logprobs"] for row in rows] == [[]] * len(TEXTS)
    model = load_model(world.model)
    for row, text in zip(rows, TEXTS, strict=True):
        answer = tokenizer.decode(row["completion_ids"])
        assert (answer == f" {example(text).completion}\n") == (source == "given")
        prompt = tokenizer(text_of(NO_CONTEXT, text)).input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *row["completion_ids"]]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = log_p.gather(-1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
        assert row["completion_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_what_ends_generated_answers_belongs_to_their_identity(world):
    """A corrected generation_config.json of the same weights ends answers elsewhere."""
    world.task = {"template": TASK["template"], "completion": {"max_tokens": 12}}
    world.write_contexts([NO_CONTEXT])
    free = world.capture().rows.to_pylist()
    settings = world.model / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": free[0]["completion_ids"][1]}))
    cut = world.capture().rows.to_pylist()
    assert cut[0]["completion_ids"] == free[0]["completion_ids"][:2]
    assert len(world.scored()) == 2 * len(TEXTS)


def test_inputs_are_read_token_by_token_with_their_own_positions(world, tokenizer):
    world.teacher |= {"scores": "input_tokens"}
    world.write_contexts([NO_CONTEXT, ONE])
    rows = world.capture().rows.to_pylist()
    assert len(rows) == 2 * len(TEXTS)
    for row, text in zip(rows, TEXTS * 2, strict=True):
        ids = tokenizer(TASK["template"].format(text=text)).input_ids
        assert row["completion_ids"] == ids[1:]
        assert len(row["topk_ids"]) == len(ids) - 1
    assert json.loads(world.metrics())["positions"] == sum(len(row["completion_ids"]) for row in rows)


def test_fidelity_is_measured_one_example_at_a_time(world, monkeypatch):
    """Whole distributions of all positions at once do not fit in memory where texts are long."""
    world.teacher |= {"scores": "input_tokens"}
    world.write_contexts([NO_CONTEXT])
    positions = []
    original = LocalBackend.distributions
    monkeypatch.setattr(LocalBackend, "distributions", lambda self, *args: positions.append(len(found := original(self, *args))) or found)
    rows = world.capture().rows.to_pylist()
    assert len(positions) == 8
    assert max(positions) == max(len(row["completion_ids"]) for row in rows)


def test_any_name_of_a_folder_will_do(tmp_path, model_folder, small_parts, other):
    world = World(tmp_path / '-n "two" wor\'ds $HOME ünï-日本-🙂\na%20b', model_folder("llama"))
    world.capture()
    other.capture()
    assert world.bytes() == other.bytes()


@pytest.mark.parametrize("gone", [".", "model.safetensors", "tokenizer.json"])
def test_a_vanished_model_is_named_and_the_next_run_goes_on(world, other, tmp_path, gone):
    (world.model / gone).rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"models/tiny"):
        world.capture()
    (tmp_path / "gone").rename(world.model / gone)
    world.capture()
    other.capture()
    assert world.bytes() == other.bytes()
