"""Objectives in combination: what is learnt of further caches, of hidden states, of every token; on each tuning and each kind of base."""

import csv
import json

import pyarrow as pa
import pytest
import torch
from cached_world import LABELS, TEXTS, World

from pipeline.cache.folder import CACHES, manifest_sha256, read_cache
from pipeline.errors import MismatchError, UsageError
from pipeline.files import read_json, write_sealed_json
from pipeline.files import example_id
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.params import CacheParams, StudentParams
from pipeline.schema import TARGETS, read_table, write_table
from pipeline.students import answers, runs
from pipeline.students.answers import AnswerForward
from pipeline.students.cached import CachedTeacher, CacheTerm
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.matching import attach, detach
from pipeline.task import TaskTokens

KEPT = CacheParams(encoding="full", resolution_nats=None, hidden_layers=(1, -1))


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


def add_targets(world):
    """A target set of the labels, to which both caches belong."""
    folder = world.places.artifacts / "targets" / "mix"
    ids = [example_id({"text": text}) for text in TEXTS]
    rows = [{"example_id": key, "probabilities": [n / 11, 1 - n / 11], "agreement": 1.0} for n, key in enumerate(ids, 1)]
    write_table(pa.Table.from_pylist(rows, TARGETS), folder / "targets.parquet")
    write_sealed_json({"labels": ["negative", "positive"]}, folder / "calibration.json")
    caches = {name: {"manifest_sha256": manifest_sha256(world.places.artifacts / "scores" / name)} for name in ("few", "reader")}
    write_sealed_json(caches, folder / CACHES)


@pytest.fixture
def make(tmp_path, model_folder):
    def build(name="one", student=None):
        world = World(tmp_path / name, model_folder("llama", seed=1), student or model_folder("llama"), task=LABELS, cache=KEPT)
        world.write_contexts("reader", [""])
        world.capture(CacheParams(encoding="full", resolution_nats=None), "reader", LABELS.of_texts())
        add_targets(world)
        return world

    return build


def curve_of(world):
    with (world.places.metrics / "curves" / "cd.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


OBJECTIVES = {
    "targets": {"learn_from": "targets/mix"},
    "targets and gold labels": {"learn_from": "targets/mix", "ce_weight": 0.5},
    "targets and their labels": {"learn_from": "targets/mix", "ce_weight": 0.5, "ce_on": "targets"},
    "gold labels alone": {"learn_from": "data/demonstrations.parquet"},
    "the vocabulary at answers": {"learn_from": "targets/mix", "also": {"few": {"weight": 0.5, "batch_size": 2}}},
    "every token": {"learn_from": "targets/mix", "also": {"reader": {"weight": 0.3}}},
    "hidden states": {"learn_from": "targets/mix", "also": {"few": {"weight": 0.0, "hidden_weight": 1.0, "layers": [[1, 0], [-1, -1]]}}},
    "all of it": {
        "learn_from": "targets/mix",
        "ce_weight": 0.2,
        "also": {"few": {"hidden_weight": 0.5, "loss": "reverse_kl"}, "reader": {"weight": 0.3, "loss": "jensen_shannon"}},
    },
}
TUNINGS = {
    "full": {},
    "upper layers": {"freeze_layers": 1},
    "embeddings left": {"freeze_embeddings": True},
    "lora": {"tuning": "lora", "learning_rate": 1e-2},
    "bitfit": {"tuning": "bitfit", "learning_rate": 1e-2},
    "head": {"tuning": "head"},
}
CUTS = {"whole": {}, "cut": {"layers": "0-1, 3"}}


USES_HIDDEN = {"hidden states", "all of it"}
SENSIBLE = [(objective, tuning) for objective in OBJECTIVES for tuning in TUNINGS if not (objective in USES_HIDDEN and tuning == "head")]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("objective", "tuning"), [(o, t) for o, t in SENSIBLE if (o, t) != ("hidden states", "upper layers")])
def test_each_objective_trains_with_each_tuning_on_each_depth(make, objective, tuning, cut):
    world = make()
    world.train(**{"steps": 4, "learning_rate": 1e-3} | OBJECTIVES[objective] | TUNINGS[tuning] | CUTS[cut])
    folder = world.places.artifacts / "students" / "cd"
    found = read_json(folder / "provenance.json")
    assert found["params"]["also"].keys() == OBJECTIVES[objective].get("also", {}).keys()
    assert set(found["sources_sha256"]) >= {f"also.{teacher}" for teacher in found["params"]["also"]}
    curve = curve_of(world)
    assert [int(row["step"]) for row in curve] == [1, 2, 3, 4]
    assert all(float(row["loss"]) > 0 for row in curve)
    trained, base = load_model(folder), load_model(world.base)
    assert not any("matching" in name or "lora" in name for name in trained.state_dict())
    if not cut.startswith("cut"):
        moved = [name for name, weight in base.state_dict().items() if not torch.equal(weight, trained.state_dict()[name])]
        assert moved
        if tuning == "upper layers":
            assert not any(".layers.0." in name or "embed" in name for name in moved)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3", "gpt_neox"])
def test_caches_teach_other_families_with_the_same_tokenizer(make, model_folder, architecture):
    world = make(student=model_folder(architecture))
    changes = {"also": {"few": {"weight": 0.2, "hidden_weight": 0.5}, "reader": {"weight": 0.3}}}
    world.train(learn_from="targets/mix", steps=20, learning_rate=3e-3, **changes)
    losses = [float(row["loss"]) for row in curve_of(world)]
    assert sum(losses[-5:]) < sum(losses[:5])


@torch.no_grad()
def test_a_text_s_cache_holds_the_teacher_s_distribution_at_each_of_its_tokens(make):
    world = make()
    tokenizer, model = load_tokenizer(world.teacher), load_model(world.teacher)
    rows = {row["example_id"]: row for row in read_cache(world.places.artifacts / "scores" / "reader").rows.to_pylist()}
    for text in TEXTS:
        ids = tokenizer(LABELS.query({"text": text})).input_ids
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        row = rows[example_id({"text": text})]
        assert row["completion_ids"] == ids[1:]
        torch.testing.assert_close(torch.tensor(row["full_logprobs"]), expected, rtol=0, atol=1e-4)
        assert row["completion_logprobs"] == pytest.approx(expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=1e-4)


def test_texts_that_begin_alike_have_draws_of_their_own(make):
    world = make()
    world.capture(CacheParams(encoding="sampled", samples=4), "reader", LABELS.of_texts())
    rows = read_cache(world.places.artifacts / "scores" / "reader").rows.to_pylist()
    assert len({row["prompt_sha"] for row in rows}) == len(rows)
    assert len({json.dumps(row["sampled_ids"][0]) for row in rows}) > 1  # the first position's distribution is the same for all


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_to_hidden_states_is_that_of_plain_forwards(make, model_folder, architecture):
    world = make(student=model_folder(architecture))
    tokens = TaskTokens(LABELS, load_tokenizer(world.base))
    source = CachedTeacher(
        world.scores, world.places.work, tokens, read_json(world.scores / "manifest.json")["fingerprint"]["tokenizer"], 1.0
    )
    rows = source.lessons(world.places.artifacts / "data" / "transfer.parquet", tokens)
    lesson = source.hidden_lesson(0.7, ((1, 0), (-1, 2)), rows, "here")
    model = load_model(world.base)
    (matching,) = attach(model, [lesson], 0)
    assert matching is not None
    term = CacheTerm("kl", 0.0, 4, rows, source, lesson)
    forward = AnswerForward(model, term, matching)
    batch = rows[:6]
    found = float(forward.loss(batch, len(batch)).detach())
    forward.detach()
    detach(model)
    total = 0.0
    for row in batch:
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        own = torch.stack([states[1][0, -1], states[3][0, -1]]).flatten()[None]  # outputs of layers 0 and 2
        total += 0.7 * float(matching(own, source.hidden([row.row])).sum()) / len(batch)
    assert found == pytest.approx(total, rel=1e-4)


def test_micro_batches_of_all_summands_add_up_to_the_step(make):
    losses = []
    for micro_batch in (None, 1):
        world = make(f"micro-{micro_batch}")
        world.train(learn_from="targets/mix", steps=3, micro_batch=micro_batch, also=OBJECTIVES["all of it"]["also"])
        losses.append([float(row["loss"]) for row in curve_of(world)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_held_back_is_learnt_from_no_cache(make, monkeypatch):
    world, seen = make(), set()
    original = AnswerForward.loss

    def spied(self, batch, positions, term=None):
        seen.update(row.example_id.rpartition(":")[2] for row in batch)
        return original(self, batch, positions, term)

    monkeypatch.setattr(AnswerForward, "loss", spied)
    world.train(learn_from="targets/mix", steps=20, held_back=0.3, evaluate_every=5, also={"few": {"hidden_weight": 0.5}, "reader": {}})
    held = read_json(world.places.artifacts / "students" / "cd" / "provenance.json")["held_back_examples"]
    assert held > 0
    assert len(seen) == len(TEXTS) - held


@pytest.mark.parametrize("caches", [{"few": {}}, {"few": {"hidden_weight": 0.5}, "reader": {}}])
def test_where_packed_rows_are_refused_all_terms_run_the_plain_model(make, monkeypatch, caches):
    """As with a real model whose logits over all tokens differed by more than was allowed: its attention cannot be both."""
    packed = make("packed")
    packed.train(learn_from="targets/mix", steps=3, ce_weight=0.5, also=caches)
    plain = make("plain")
    monkeypatch.setattr(answers, "packed_if_exact", lambda model, difference: (None, "refused"))
    plain.train(learn_from="targets/mix", steps=3, ce_weight=0.5, also=caches)
    provenances = [read_json(world.places.artifacts / "students/cd/provenance.json") for world in (packed, plain)]
    forwards = [provenance["forward"] for provenance in provenances]
    assert "plain" not in forwards[0]
    assert "packed:" not in forwards[1]
    losses = [[float(row["loss"]) for row in curve_of(world)] for world in (packed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_not_among_the_targets_is_learnt_from_no_cache(make, monkeypatch):
    """A target set may be made of some of the transfer set's sources, while the caches hold all of them."""
    world, seen = make(), set()
    file = world.places.artifacts / "targets" / "mix" / "targets.parquet"
    kept = read_table(file, TARGETS).slice(0, 4)
    write_table(kept, file)
    original = AnswerForward.loss

    def spied(self, batch, positions, term=None):
        seen.update(row.example_id.rpartition(":")[2] for row in batch)
        return original(self, batch, positions, term)

    monkeypatch.setattr(AnswerForward, "loss", spied)
    world.train(learn_from="targets/mix", steps=20, also={"few": {"hidden_weight": 0.5}, "reader": {}})
    assert seen == set(kept["example_id"].to_pylist())


def test_a_killed_training_with_all_summands_ends_with_the_bytes_of_an_unbroken_one(make, monkeypatch):
    changes = {"learn_from": "targets/mix", "steps": 8, "held_back": 0.2, "evaluate_every": 3, "also": OBJECTIVES["all of it"]["also"]}
    world, other = make("one"), make("two")
    other.train(**changes)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    original, saved = Checkpoint.save, []

    def dying(self, *args):
        original(self, *args)
        saved.append(True)
        if len(saved) == 3:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(Killed):
        world.train(**changes)
    world.train(**changes)
    assert world.weights() == other.weights()


def test_a_cache_that_is_not_the_target_set_s_is_refused(make):
    world = make()
    world.capture(CacheParams(encoding="top_k_tail", top_k=5), "reader", LABELS.of_texts())
    with pytest.raises(MismatchError, match=r"students\.cd\.also\.reader: targets/mix was made beside a cache.*dvc repro targets@mix"):
        world.train(learn_from="targets/mix", also={"reader": {}})


def test_hidden_states_that_were_not_kept_are_asked_for_by_name(make):
    world = make()
    with pytest.raises(UsageError, match=r"also\.reader\.layers: the cache holds no hidden states of the teacher's layer -1; it has none"):
        world.train(learn_from="targets/mix", also={"reader": {"hidden_weight": 1.0}})


def test_several_seeds_are_trainings_of_their_own_in_one_folder(make):
    world, single = make("one"), make("two")
    world.train(learn_from="targets/mix", steps=5, seeds=[3, 1])
    folder = world.places.artifacts / "students" / "cd"
    for seed, weights in ((3, folder / "model.safetensors"), (1, folder / "seeds" / "1" / "model.safetensors")):
        single.train(name=f"alone{seed}", learn_from="targets/mix", steps=5, seed=seed)
        assert weights.read_bytes() == single.weights(f"alone{seed}")
    metrics = read_json(world.places.metrics / "train" / "cd.json")
    assert list(metrics["seeds"]) == ["3", "1"]
    assert metrics["final_loss"] == metrics["seeds"]["3"]["final_loss"] != metrics["seeds"]["1"]["final_loss"]
    curve = curve_of(world)
    assert [row["seed"] for row in curve] == ["3"] * 5 + ["1"] * 5
    assert not list(world.places.work.rglob("student-cd*"))


def test_seeds_that_were_done_before_a_kill_are_not_trained_again(make, monkeypatch):
    world, other, trained = make("one"), make("two"), []
    changes = {"learn_from": "targets/mix", "steps": 5, "seeds": [0, 1]}
    other.train(**changes)
    original = runs.train

    def dying(model, *args, **settings):
        trained.append(settings["title"])
        if len(trained) == 2:
            raise Killed
        return original(model, *args, **settings)

    monkeypatch.setattr(runs, "train", dying)
    with pytest.raises(Killed):
        world.train(**changes)
    world.train(**changes)
    folder = world.places.artifacts / "students" / "cd"
    assert world.weights() == other.weights()
    assert (folder / "seeds/1/model.safetensors").read_bytes() == (
        other.places.artifacts / "students" / "cd" / "seeds/1/model.safetensors"
    ).read_bytes()
    assert read_json(world.places.metrics / "runtime" / "student-cd.json")["resumed_at_step"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "one stands twice"),
        ({"also": {"few": {"weight": 0.0}}}, "both 0"),
        ({"learn_from": "data/demonstrations.parquet", "also": {"few": {}}}, "`also` is about targets"),
        ({"ce_on": "targets"}, "needs a `ce_weight`"),
        ({"freeze_layers": 2, "tuning": "head"}, "learns no layer"),
        ({"tuning": "head", "also": {"few": {"hidden_weight": 1.0}}}, "layers that are not learnt"),
        ({"freeze_layers": 2, "also": {"few": {"hidden_weight": 1.0, "layers": [[1, 1]]}}}, "layers that are not learnt"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StudentParams(**{"base": "models/tiny", "learn_from": "targets/mix", "steps": 1, "learning_rate": 1e-3} | changes)


def test_freezing_every_layer_is_refused_before_training(make):
    with pytest.raises(UsageError, match="freeze_layers: 4, and the student has 4"):
        make().train(learn_from="targets/mix", freeze_layers=4)


def test_states_below_frozen_layers_are_computed_once_and_change_nothing(make, monkeypatch):
    stored, plain = make("stored"), make("plain")
    stored.train(learn_from="targets/mix", freeze_layers=2)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.students.training.on_stored_states", lambda forward, *_: forward)
        plain.train(learn_from="targets/mix", freeze_layers=2)
    said = [read_json(world.places.artifacts / "students" / "cd" / "provenance.json")["forward"] for world in (stored, plain)]
    assert "the lowest 2 layers once for each example" in said[0]
    assert "once for each" not in said[1]
    one, other = (load_model(world.places.artifacts / "students" / "cd").state_dict() for world in (stored, plain))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-4)


def test_a_killed_training_above_frozen_layers_ends_with_the_bytes_of_an_unbroken_one(make, monkeypatch):
    world, other = make("one"), make("two")
    changes = {"learn_from": "targets/mix", "steps": 8, "freeze_layers": 2}
    other.train(**changes)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    original = Checkpoint.save

    def dying(self, *args):
        original(self, *args)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", dying)
        with pytest.raises(Killed):
            world.train(**changes)
    world.train(**changes)
    assert world.weights() == other.weights()
