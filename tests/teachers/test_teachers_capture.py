"""A capture from files to a cache: its numbers against full prompts, its manifest, that it repeats to the byte and scores nothing twice."""

import json
import shutil

import polars as pl
import pyarrow as pa
import pytest
import torch

from pipeline.cache import folder as cache_module
from pipeline.cache.fingerprint import ENGINE_VERSION
from pipeline.cache.folder import read_cache
from pipeline.teachers import scorer as scorer_module
from pipeline.errors import ShotlessError, UsageError
from pipeline.files import read_json
from pipeline.files import context_id, example_id, sha256_ids
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.models.loading import load_model
from pipeline.params import CacheParams, TaskParams
from pipeline.schema import CONTEXTS, examples, write_table
from pipeline.task import Task
from pipeline.teachers.capture import capture, content_free_queries

TEMPLATE = "Review: {text}\nSentiment:"
VERBALISERS = {"negative": " bad", "mixed": " so-so", "positive": " good"}  # the second has several tokens
KEPT = CacheParams(encoding="top_k_tail", top_k=5, resolution_nats=None)
TASK = Task(TaskParams(template=TEMPLATE, verbalisers=VERBALISERS, content_free=("N/A", "")))
SHOTS = ["Review: a warm film\nSentiment: good\n\n", "Review: bored\nSentiment: bad\n\nReview: I loved it\nSentiment: good\n\n"]
TEXTS = ["a warm and funny film", "a dull, lifeless mess", "funny", "strange", "the plot goes nowhere", "cold food", "N/A x", "x", "late x"]


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


class World:
    """A folder with a teacher, its contexts and a transfer set."""

    def __init__(self, root, model_folder):
        self.artifacts, self.work = root / "artifacts", root / "work"
        self.model = self.artifacts / "models" / "tiny"
        shutil.copytree(model_folder, self.model)
        self.write_contexts(["", *SHOTS])
        self.write_transfer(TEXTS)

    def write_contexts(self, texts):
        rows = [
            {"context_id": context_id(text), "name": f"shots/{number}", "text": text, "example_ids": [], "tokens": len(text)}
            for number, text in enumerate(texts)
        ]
        write_table(pa.Table.from_pylist(rows, CONTEXTS), self.artifacts / "contexts.parquet")

    def write_transfer(self, texts):
        rows = [{"example_id": key_of(text), "label": None, "source": "s", "line": n, "text": text} for n, text in enumerate(texts, 1)]
        write_table(pa.Table.from_pylist(rows, examples(TASK.fields)), self.artifacts / "transfer.parquet")

    def capture(self, output="scores", model=None, task=TASK):
        """Run the stage as DVC does: its output folder is emptied first."""
        folder = self.artifacts / output
        shutil.rmtree(folder, ignore_errors=True)
        contexts, transfer = self.artifacts / "contexts.parquet", self.artifacts / "transfer.parquet"
        capture("few", model or self.model, contexts, transfer, folder, task, KEPT, "float32", self.work, 1)
        return read_cache(folder)

    def scored(self):
        """The keys of every row that an engine has scored, with its repetitions, from the store's parts."""
        parts = sorted(self.work.glob("scores/*/part-*.parquet"))
        return [key for part in parts for key in pl.read_parquet(part, columns=["context_id", "example_id"]).iter_rows()]


def key_of(text):
    return example_id({"text": text})


def keys_of(contexts, texts):
    return [(context_id(context), key_of(text)) for context in contexts for text in texts]


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scorer_module, "ROWS_PER_PART", 4)
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 13)
    monkeypatch.setattr("pipeline.teachers.batches.LARGEST_BUDGET", 64)


@pytest.fixture
def world(tmp_path, model_folder):
    return World(tmp_path / "one", model_folder("llama"))


@pytest.fixture
def other(tmp_path, model_folder):
    return World(tmp_path / "two", model_folder("llama"))


@torch.no_grad()
def naive_row(model, tokenizer, context, text):
    """The prompt's ids, each label's log-probability and the whole distribution, token by token from full prompts."""
    prompt = tokenizer(context).input_ids + tokenizer(TEMPLATE.format(text=text)).input_ids
    labels = []
    for verbaliser in VERBALISERS.values():
        ids, total = tokenizer(verbaliser).input_ids, 0.0
        for place, token in enumerate(ids):
            logits = model(torch.tensor([prompt + ids[:place]])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
        labels.append(total)
    return prompt, labels, model(torch.tensor([prompt])).logits[0, -1].double()


def test_every_row_is_what_the_full_prompt_gives(world, tokenizer):
    rows = world.capture().rows.to_pylist()
    asked = [(context, text) for context in ["", *SHOTS] for text in ["N/A", "", *TEXTS]]
    assert [(row["context_id"], row["example_id"]) for row in rows] == [(context_id(context), key_of(text)) for context, text in asked]
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


def test_the_manifest_says_what_the_scores_belong_to(world, tokenizer):
    manifest = world.capture().manifest
    assert manifest["fingerprint"] == {
        "weights": weights_sha256(world.model),
        "tokenizer": tokenizer_sha256(world.model),
        "template": TEMPLATE,
        "verbalisers": VERBALISERS,
        "completions": [tokenizer(text).input_ids for text in VERBALISERS.values()],
        "dtype": "float32",
        "cache": KEPT.model_dump(mode="json"),
        "completion": None,
        "engine_version": ENGINE_VERSION,
        "schema_version": 2,
    }
    assert manifest["engine"]["name"] == "shared_prefix"
    assert "from the plain forward" in manifest["engine"]["why"]
    assert manifest["engine"]["device"] == "cpu"
    assert manifest["teacher"] == "few"
    assert manifest["model"] == "models/tiny"
    assert manifest["labels"] == list(VERBALISERS)
    assert [context["context_id"] for context in manifest["contexts"]] == [context_id(text) for text in ["", *SHOTS]]
    assert manifest["content_free"] == [key_of("N/A"), key_of("")]
    assert manifest["examples"] == len(TEXTS)
    assert manifest["totals"]["rows"] == 3 * (2 + len(TEXTS)) == sum(shard["rows"] for shard in manifest["shards"])
    assert str(world.artifacts) not in json.dumps(manifest)


def test_a_model_that_the_fast_engine_refuses_is_captured_by_the_generic_one(tmp_path, model_folder, tokenizer):
    world = World(tmp_path, model_folder("mistral", sliding_window=8))
    cache = world.capture()
    assert cache.manifest["engine"]["name"] == "generic"
    assert "a sliding window of 8 tokens" in cache.manifest["engine"]["why"]
    row = cache.rows.to_pylist()[-1]
    assert row["label_logprobs"] == pytest.approx(naive_row(load_model(world.model), tokenizer, SHOTS[-1], TEXTS[-1])[1], abs=1e-4)


def test_a_second_capture_gives_the_same_bytes_and_needs_no_model(world, monkeypatch):
    world.capture("first")
    scored = world.scored()
    monkeypatch.setattr(scorer_module, "load_model", None)
    world.capture("second")
    assert bytes_of(world.artifacts / "first") == bytes_of(world.artifacts / "second")
    assert world.scored() == scored


def test_a_capture_elsewhere_gives_the_same_bytes(world, other):
    world.capture()
    other.capture()
    assert bytes_of(world.artifacts / "scores") == bytes_of(other.artifacts / "scores")


def test_more_examples_score_only_those(world):
    world.write_transfer(TEXTS[:6])
    before = world.capture().rows.to_pylist()
    first = world.scored()
    assert sorted(first) == sorted(keys_of(["", *SHOTS], ["N/A", "", *TEXTS[:6]]))
    world.write_transfer(TEXTS)
    after = world.capture().rows.to_pylist()
    assert sorted(world.scored()) == sorted(first + keys_of(["", *SHOTS], TEXTS[6:]))
    assert [row for row in after if row["example_id"] not in {key_of(text) for text in TEXTS[6:]}] == before


def test_one_more_context_scores_only_that(world):
    world.write_contexts(["", SHOTS[0]])
    world.capture()
    first = world.scored()
    world.write_contexts(["", *SHOTS])
    world.capture()
    assert sorted(world.scored()) == sorted(first + keys_of(SHOTS[1:], ["N/A", "", *TEXTS]))


def test_fewer_examples_in_another_order_score_nothing(world, monkeypatch):
    whole = {(row["context_id"], row["example_id"]): row for row in world.capture().rows.to_pylist()}
    monkeypatch.setattr(scorer_module, "load_model", None)
    world.write_transfer(TEXTS[5:1:-1])
    rows = world.capture().rows.to_pylist()
    assert [row["example_id"] for row in rows][2:6] == [key_of(text) for text in TEXTS[5:1:-1]]
    assert rows == [whole[row["context_id"], row["example_id"]] for row in rows]


def test_the_same_weights_in_another_folder_are_not_scored_again(world, monkeypatch):
    rows = world.capture().rows
    shutil.move(world.model, world.artifacts / "models" / "renamed")
    monkeypatch.setattr(scorer_module, "load_model", None)
    cache = world.capture(model=world.artifacts / "models" / "renamed")
    assert cache.rows.equals(rows)
    assert cache.manifest["model"] == "models/renamed"


def test_another_template_is_scored_anew(world):
    world.capture()
    first = world.scored()
    changed = Task(TASK.params.model_copy(update={"template": "{text} was"}))
    world.capture(task=changed)
    assert sorted(world.scored()) == sorted(first * 2)


@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_a_capture_killed_while_it_scores_ends_with_the_bytes_of_an_unbroken_one(world, other, monkeypatch, killed_at):
    other.capture()
    original, done = scorer_module._score_part, []

    def dying(*args):
        if len(done) == killed_at:
            raise Killed
        done.append(args)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(scorer_module, "_score_part", dying)
        with pytest.raises(Killed):
            world.capture()
    kept = world.scored()
    assert bool(kept) == bool(killed_at)
    assert len(kept) < len(other.scored())
    with pytest.raises(ShotlessError, match="this capture did not end"):
        read_cache(world.artifacts / "scores")
    world.capture()
    assert bytes_of(world.artifacts / "scores") == bytes_of(other.artifacts / "scores")
    assert sorted(world.scored()) == sorted(other.scored())


def test_a_capture_killed_while_it_writes_is_no_cache_and_is_written_again_without_the_model(world, other, monkeypatch):
    other.capture()
    original, done = cache_module.write_rows, []

    def dying(rows, path):
        if done:
            raise Killed
        done.append(path)
        return original(rows, path)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "write_rows", dying)
        with pytest.raises(Killed):
            world.capture()
    assert [file.name for file in (world.artifacts / "scores").iterdir()] == ["part-00000.parquet"]
    with pytest.raises(ShotlessError, match="this capture did not end"):
        read_cache(world.artifacts / "scores")
    monkeypatch.setattr(scorer_module, "load_model", None)
    world.capture()
    assert bytes_of(world.artifacts / "scores") == bytes_of(other.artifacts / "scores")


@pytest.mark.parametrize("texts", [["funny", "strange", "funny"], ["funny", "N/A"]], ids=["twice", "content-free"])
def test_an_example_that_would_be_asked_twice_is_refused_before_any_work(world, texts):
    world.write_transfer(texts)
    with pytest.raises(UsageError, match=r"transfer\.parquet: an example stands twice, or is one of task\.content_free"):
        world.capture()
    assert not world.work.exists()


def test_a_prompt_that_does_not_fit_is_refused_before_any_row_is_scored(world):
    world.write_transfer([*TEXTS, "long " * 600])
    with pytest.raises(UsageError, match=r"tokens and example .* takes 512"):
        world.capture()
    assert world.scored() == []


def test_content_free_inputs_fill_every_field():
    task = Task(TaskParams(template="{title}\n{text} =", verbalisers={"a": " bad", "b": " good"}, content_free=("N/A", "[MASK]")))
    assert [query.fields for query in content_free_queries(task)] == [
        {"title": "N/A", "text": "N/A"},
        {"title": "[MASK]", "text": "[MASK]"},
    ]


def test_what_the_capture_took_is_kept_beside_it_and_is_the_same_for_a_run_that_found_all_rows(world):
    contexts, transfer = world.artifacts / "contexts.parquet", world.artifacts / "transfer.parquet"
    files = [world.artifacts / "first.json", world.artifacts / "second.json"]
    for file in files:
        folder = world.artifacts / "scores"
        capture("few", world.model, contexts, transfer, folder, TASK, KEPT, "float32", world.work, 1, file)
    first, second = map(read_json, files)
    rows = read_cache(world.artifacts / "scores").rows
    assert first == second
    assert first["rows"] == first["rows_timed"] == len(rows)
    assert first["prompt_tokens"] == sum(rows["prompt_tokens"].to_pylist())
    assert first["seconds"] > 0
