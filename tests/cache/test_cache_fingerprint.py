"""Fingerprints fail closed: whatever decides a row's numbers, another value of it is another fingerprint, and the difference is named."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from cache_rows import FINGERPRINT, rows
from cache_world import TEACHER, Workspace

from pipeline.cache.fingerprint import Fingerprint, fingerprint_of
from pipeline.cache.folder import read_cache, write_cache
from pipeline.cache.store import Store
from pipeline.errors import MismatchError
from pipeline.files import sha256_file
from pipeline.models import identity
from pipeline.models.identity import weights_sha256
from pipeline.models.loading import load_tokenizer
from pipeline.params import CacheParams, TargetParams, TaskParams, load_params
from pipeline.schema import examples
from pipeline.targets.build import build_targets
from pipeline.task import Task, TaskTokens

TASK = TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " negative", "positive": " positive"})
CHANGED = {
    "template": ({"template": "{text} It was"}, {}),
    "verbalisers": ({"verbalisers": {"negative": " bad", "positive": " good"}}, {}),
    "cache": ({}, {"top_k": 5}),
}


@pytest.fixture
def folder(tmp_path, model_folder):
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


def made(folder, task=TASK, cache=CacheParams(), dtype="float32", remembered=None):  # noqa: B008
    return fingerprint_of(folder, TaskTokens(Task(task), load_tokenizer(folder)), cache, dtype, remembered)


@pytest.mark.parametrize("part", CHANGED)
def test_params_that_decide_a_row_are_part_of_it(folder, part):
    task, cache = CHANGED[part]
    other = made(folder, TASK.model_copy(update=task), CacheParams(**cache))
    with pytest.raises(MismatchError, match=f"\n  {part}: "):
        made(folder).check(other.model_dump(), Path("manifest.json"))


@pytest.mark.parametrize("part", list(Fingerprint.model_fields))
def test_every_part_is_compared_and_named_with_both_values(part):
    found = FINGERPRINT.model_dump() | {part: "something else"}
    with pytest.raises(MismatchError, match=f"\n  {part}: manifest.json has 'something else', this run has "):
        FINGERPRINT.check(found, Path("manifest.json"))


@pytest.mark.parametrize("part", list(Fingerprint.model_fields))
def test_a_part_that_is_missing_or_unknown_is_a_mismatch(part):
    found = FINGERPRINT.model_dump()
    del found[part]
    with pytest.raises(MismatchError, match=part):
        FINGERPRINT.check(found, Path("manifest.json"))
    with pytest.raises(MismatchError, match="novelty"):
        FINGERPRINT.check(FINGERPRINT.model_dump() | {"novelty": 1}, Path("manifest.json"))


def test_a_weight_a_config_entry_or_a_merge_of_the_tokenizer_makes_another_fingerprint(folder):
    before = made(folder)
    for name, part in {"model.safetensors": "weights", "config.json": "weights", "tokenizer_config.json": "tokenizer"}.items():
        file = folder / name
        kept = file.read_bytes()
        harmed = bytearray(kept)
        if name == "model.safetensors":
            harmed[-1] ^= 1
        else:
            harmed[:1] = b'{"an_entry_more": 1,'
        file.write_bytes(harmed)
        after = made(folder)
        assert {field for field in Fingerprint.model_fields if getattr(after, field) != getattr(before, field)} == {part}
        file.write_bytes(kept)
    assert made(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": CacheParams(top_k=7)}, r"captured with top_k 4, not 7 of teachers\.few_shot\.cache"),
        ({"model": "models/other"}, r"captured from models/\w+, not models/other"),
    ],
)
def test_targets_are_not_made_of_a_cache_captured_otherwise(tmp_path, raw_params, model_folder, monkeypatch, change, message):
    world = Workspace(tmp_path, raw_params, model_folder("llama"), monkeypatch)
    world.capture()
    params = load_params()
    teachers = {TEACHER: params.teachers[TEACHER].model_copy(update=change)}
    target = TargetParams(teachers={TEACHER: 1.0})
    with pytest.raises(MismatchError, match=message):
        build_targets(
            "few",
            target,
            teachers,
            Task(params.task),
            examples(["text"]).empty_table(),
            world.scores.parent,
            tmp_path / "targets",
            tmp_path / "metrics.json",
        )


def counted(monkeypatch):
    read = []

    def counting(file):
        read.append(file.name)
        return sha256_file(file)

    monkeypatch.setattr(identity, "sha256_file", counting)
    return read


def test_weights_are_read_once_and_again_when_anything_about_the_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_NS", 0)
    notes, read, weights = tmp_path / "notes", counted(monkeypatch), folder / "model.safetensors"
    first = weights_sha256(folder, notes)
    assert read
    read.clear()
    assert weights_sha256(folder, notes) == first == weights_sha256(folder)
    assert read == ["config.json", "model.safetensors"]  # of the call that remembers nothing
    read.clear()
    about, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))  # same size, same time: only the inode's own time tells
    assert weights_sha256(folder, notes) != first
    assert read == ["model.safetensors"]


def test_a_file_that_has_just_changed_is_not_remembered(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").touch()
    (folder / "config.json").touch()
    weights_sha256(folder, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_a_damaged_note_is_not_believed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_NS", 0)
    first = weights_sha256(folder, tmp_path / "notes")
    for note in (tmp_path / "notes").iterdir():
        note.write_text("{")
    assert weights_sha256(folder, tmp_path / "notes") == first


def test_a_second_capture_waits_for_the_first(tmp_path):
    one, other, entered = Store(tmp_path, FINGERPRINT), Store(tmp_path, FINGERPRINT), threading.Event()

    def second():
        with other.lock():
            entered.set()

    thread = threading.Thread(target=second)
    with one.lock():
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


def test_a_second_writer_of_one_cache_waits_for_the_first_and_both_leave_it_whole(tmp_path):
    started, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow():
        started.set()
        go_on.wait(10)
        yield rows(5)

    def second():
        write_cache(tmp_path / "cache", [rows(7)], FINGERPRINT, {})
        done.set()

    threads = [
        threading.Thread(target=write_cache, args=(tmp_path / "cache", slow(), FINGERPRINT, {})),
        threading.Thread(target=second),
    ]
    threads[0].start()
    started.wait(10)
    threads[1].start()
    assert not done.wait(0.3)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert read_cache(tmp_path / "cache").rows.equals(rows(7))
