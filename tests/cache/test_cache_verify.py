"""`shotless verify`: every kind of damage is found and named, and repaired to the bytes there were, scoring no more than what is lost."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_world import TEACHER, Workspace

from pipeline.cache.check import row_faults
from pipeline.cache.folder import read_cache, read_manifest, write_cache
from pipeline.cache.keys import KEY
from pipeline.cache.rows import write_rows
from pipeline.commands.verify import verify
from pipeline.teachers import scorer as scorer_module
from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import sha256_file, sha256_json


@pytest.fixture
def world(tmp_path, raw_params, model_folder, monkeypatch):
    made = Workspace(tmp_path, raw_params, model_folder("llama"), monkeypatch)
    made.capture()
    return made


def flip(file, position=0.5):
    data = bytearray(file.read_bytes())
    data[int(len(data) * position)] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def swap(folder):
    one, other = folder / "part-00000.parquet", folder / "part-00001.parquet"
    kept = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(kept)


def edit_manifest(folder, **changes):
    """As someone with an editor would: the hash of the manifest is left as it was."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def seal_manifest(folder, change):
    """As another run would have written it."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    file.write_text(json.dumps(manifest | {"manifest_sha256": sha256_json(manifest)}))


def with_column(rows, name, values):
    place = rows.schema.names.index(name)
    return rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))


SHARD_DAMAGE = {
    "bit flipped": (lambda folder: flip(folder / "part-00001.parquet"), r"part-00001\.parquet: sha256 \w+ is not the manifest's"),
    "truncated": (lambda folder: truncate(folder / "part-00001.parquet"), r"part-00001\.parquet: sha256 .* bytes are not "),
    "empty": (lambda folder: (folder / "part-00002.parquet").write_bytes(b""), r"part-00002\.parquet: sha256 .* and 0 bytes are not"),
    "missing": (
        lambda folder: (folder / "part-00000.parquet").unlink(),
        r"part-00000\.parquet: the manifest names this shard, and it is mi",
    ),
    "swapped": (swap, r"part-00000\.parquet: sha256[\s\S]*part-00001\.parquet: sha256"),
    "manifest edited": (lambda folder: edit_manifest(folder, examples=12), r"manifest\.json: its contents have sha256"),
    "manifest cut": (lambda folder: truncate(folder / "manifest.json"), r"manifest\.json: not valid JSON"),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: missing, so this capture did not end"),
    "stranger": (lambda folder: (folder / "part-00009.parquet").write_bytes(b"x"), r"the manifest does not name part-00009\.parquet"),
}


def test_a_cache_in_order_passes_and_nothing_is_changed(world, capsys):
    before, store = world.bytes(), sorted(world.store.rglob("*"))
    verify([TEACHER])
    said = capsys.readouterr().out
    assert "few_shot: 24 rows in 3 shards" in said
    assert "row store: every part is in order" in said
    assert world.bytes() == before
    assert sorted(world.store.rglob("*")) == store


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damage_is_found_and_repaired_from_the_store_to_the_same_bytes_without_the_model(world, capsys, monkeypatch, damage):
    before = world.bytes()
    harm, message = SHARD_DAMAGE[damage]
    harm(world.scores)
    with pytest.raises(CorruptError, match="few_shot"):
        verify([TEACHER])
    assert re.search(message, capsys.readouterr().out)
    monkeypatch.setattr(scorer_module, "load_model", None)
    verify([TEACHER], repair=True)
    assert world.bytes() == before
    verify([TEACHER])


@pytest.mark.parametrize("damage", ["bit flipped", "truncated", "missing", "swapped"])
def test_without_a_store_only_the_rows_of_damaged_shards_are_scored_and_the_bytes_are_the_same(world, tmp_path, damage):
    before = world.bytes()
    SHARD_DAMAGE[damage][0](world.scores)
    shutil.rmtree(tmp_path / "work")
    scored = world.count_scored()
    verify([TEACHER], repair=True)
    assert world.bytes() == before
    assert len(scored) == len(set(scored)) == (16 if damage == "swapped" else 8)


def test_the_rows_to_score_again_are_named(world, tmp_path, capsys):
    (world.scores / "part-00002.parquet").unlink()
    lost = read_keys(world)[16:]
    with pytest.raises(CorruptError):
        verify([TEACHER], rows=tmp_path / "rows.csv")
    said = capsys.readouterr().out
    assert f"8 rows to score again in context {lost[0][0][:12]}: examples {lost[0][1][:12]}" in said
    assert "8 rows to be had again: 8 are in the store, 0 not" in said
    assert (tmp_path / "rows.csv").read_text().splitlines()[1:] == [f"few_shot,{context},{example}" for context, example in lost]


def read_keys(world):
    contexts = pq.read_table(world.contexts)["context_id"].to_pylist()
    examples = pq.read_table(world.transfer)["example_id"].to_pylist()
    free = json.loads((world.scores / "manifest.json").read_text())["content_free"]
    return [(context, example) for context in contexts for example in [*free, *examples]]


@pytest.mark.parametrize("harm", ["flip", "truncate", "unreadable"])
def test_a_damaged_part_of_the_store_is_found_and_scored_again_rather_than_read(world, capsys, harm):
    before = world.bytes()
    part = sorted(world.store.glob("part-*.parquet"))[2]
    keys, whole = {(row["context_id"], row["example_id"]) for row in pq.read_table(part, columns=KEY).to_pylist()}, part.name
    if harm == "unreadable":
        part.unlink()
        part.mkdir()
    else:
        {"flip": flip, "truncate": truncate}[harm](part)
    with pytest.raises(CorruptError, match="row store is damaged"):
        verify([TEACHER])
    said = capsys.readouterr().out
    assert part.name in said
    assert f"{len(keys)} rows to score again when next asked for" in said
    scored = world.count_scored()
    assert world.capture() == before
    assert set(scored) == keys
    assert len(scored) == len(keys)
    assert (world.store / whole).is_file()
    verify([TEACHER])


def test_a_damaged_part_that_a_cache_still_holds_is_had_from_there(world, monkeypatch, capsys):
    before = world.bytes()
    flip(sorted(world.store.glob("part-*.parquet"))[2])
    monkeypatch.setattr(scorer_module, "load_model", None)
    verify([TEACHER], repair=True)
    assert world.capture() == before
    verify([TEACHER])
    assert not list(world.store.glob("*.damaged"))


def test_a_damaged_part_and_a_damaged_shard_cost_the_part_s_rows_alone(world):
    before = world.bytes()
    part = sorted(world.store.glob("part-*.parquet"))[1]
    keys = pq.read_table(part, columns=KEY).to_pylist()
    flip(part)
    for shard in world.scores.glob("part-*.parquet"):
        flip(shard)
    scored = world.count_scored()
    verify([TEACHER], repair=True)
    assert world.bytes() == before
    assert sorted(scored) == sorted((row["context_id"], row["example_id"]) for row in keys)


def test_a_damaged_plan_is_found_and_costs_nothing_that_is_there(world, capsys, monkeypatch):
    before = world.bytes()
    for plan in (world.store / "plans").glob("*.parquet"):
        flip(plan)
    with pytest.raises(CorruptError, match="row store is damaged"):
        verify([TEACHER])
    monkeypatch.setattr(scorer_module, "load_model", None)
    assert world.capture() == before


def test_another_teacher_s_cache_is_a_mismatch_and_is_not_scored_under_the_name_of_repair(world, capsys):
    world.raw["task"]["template"] = "{text} It was"
    world.write_params()
    scored = world.count_scored()
    for repair in (False, True):
        with pytest.raises(MismatchError):
            verify([TEACHER], repair=repair)
        assert "template: " in capsys.readouterr().out
    assert not scored


def test_a_manifest_of_another_run_is_found_and_repaired_from_the_store(world, tmp_path, capsys, monkeypatch):
    before = world.bytes()

    def other(manifest):
        manifest["fingerprint"]["weights"] = "0" * 64

    seal_manifest(world.scores, other)
    with pytest.raises(MismatchError, match="few_shot"):
        verify([TEACHER])
    assert "weights: " in capsys.readouterr().out
    monkeypatch.setattr(scorer_module, "load_model", None)
    verify([TEACHER], repair=True)
    assert world.bytes() == before


def test_more_data_than_the_cache_has_is_no_damage(world, capsys):
    world.write_transfer(12)
    with pytest.raises(MismatchError, match="`dvc repro` captures what is lacking"):
        verify([TEACHER])
    assert "24 rows, and this run's data ask for 26" in capsys.readouterr().out


def test_bytes_are_checked_where_neither_model_nor_data_are(world, capsys):
    shutil.rmtree(world.model)
    world.transfer.unlink()
    verify([TEACHER])
    said = capsys.readouterr().out
    assert "24 rows in 3 shards" in said
    assert "not compared with this run's data" in said
    assert "not compared with this run's teacher" in said
    flip(world.scores / "part-00000.parquet")
    with pytest.raises(CorruptError):
        verify([TEACHER])
    with pytest.raises(UsageError, match="cannot be repaired here"):
        verify([TEACHER], repair=True)


def test_a_teacher_that_params_do_not_have_is_named_with_the_choices(world):
    with pytest.raises(UsageError, match="few_shot"):
        verify(["nope"])


def test_rows_that_cannot_be_are_found_under_a_right_checksum(world, capsys):
    shard = world.scores / "part-00001.parquet"
    rows = pq.read_table(shard)
    lists = rows["topk_ids"].to_pylist()
    lists[3][0] = lists[3][0][:-1]
    write_rows(with_column(rows, "topk_ids", lists), shard)

    def reseal(manifest):
        manifest["shards"][1] |= {"sha256": sha256_file(shard), "bytes": shard.stat().st_size}

    seal_manifest(world.scores, reseal)
    with pytest.raises(CorruptError):
        verify([TEACHER])
    assert "lists of another length in topk_logprobs than in topk_ids" in capsys.readouterr().out


def test_log_probabilities_that_are_none_are_found(world):
    cache = read_cache(world.scores)
    assert row_faults(cache.rows, cache.manifest) == []
    rows = with_column(cache.rows, "label_logprobs", [[float("nan"), 1.0], *cache.rows["label_logprobs"].to_pylist()[1:]])
    assert row_faults(rows, cache.manifest) == ["2 values in label_logprobs are no log-probabilities"]


def test_a_row_that_stands_twice_is_found(world, capsys):
    manifest, rows = read_manifest(world.scores), read_cache(world.scores).rows
    about = {key: manifest[key] for key in ("teacher", "model", "engine", "labels", "contexts", "content_free", "examples")}
    fingerprint = scorer_module.Fingerprint.model_validate(manifest["fingerprint"])
    write_cache(world.scores, [rows.slice(0, 23), rows.slice(0, 1)], fingerprint, about)
    with pytest.raises(CorruptError):
        verify([TEACHER])
    said = capsys.readouterr().out
    assert "1 rows stand in it more than once" in said or "is not the one that this run's data ask for" in said
