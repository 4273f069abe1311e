"""The store: nothing is scored twice, a killed run ends with the bytes of an unbroken one, damage is found and scored again."""

import os
import threading

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_rows import IDENTITY, bytes_of, capture, divide, flip, keys, score, stored

from pipeline.cache.store import Store, stores
from pipeline.errors import ShotlessError
from pipeline.schema import STORED


class Killed(BaseException):
    """Not an Exception: nothing in the project may catch it."""


def dying(at):
    def before(number):
        if number == at:
            raise Killed

    return before


def test_rows_come_back_in_the_order_asked_for_repeats_included(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(10))
    asked = [*reversed(keys(10)), keys(10)[4]]
    found = store.read(asked)
    assert found["prompt_sha"].to_pylist() == asked
    part_of = {key: part for part in divide(keys(10)) for key in part}
    for row, key in enumerate(asked):
        own = stored(part_of[key], part_of[key])
        assert found.slice(row, 1).equals(own.slice(part_of[key].index(key), 1))
    assert Store(tmp_path, IDENTITY).read(asked, ["prompt_tokens"]).to_pydict() == {"prompt_tokens": found["prompt_tokens"].to_pylist()}
    assert len(store.read([])) == 0


def test_missing_prompts_are_named_once_each_in_their_order(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(4))
    with store.lock():
        asked = [*keys(3, first=5), *keys(6), keys(1, first=7)[0]]
        assert store.missing(asked) == [*keys(3, first=5), keys(1, first=4)[0]]


def test_what_was_scored_is_never_scored_again(tmp_path):
    assert sorted(score(Store(tmp_path, IDENTITY), keys(7))) == sorted(keys(7))
    assert score(Store(tmp_path, IDENTITY), keys(7)) == []
    assert sorted(score(Store(tmp_path, IDENTITY), keys(9))) == sorted(keys(2, first=7))


@pytest.mark.parametrize("part", IDENTITY)
def test_another_identity_does_not_find_the_rows(tmp_path, part):
    score(Store(tmp_path, IDENTITY), keys(3))
    other = Store(tmp_path, IDENTITY | {part: "other"})
    with other.lock():
        assert other.missing(keys(3)) == keys(3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=4), st.integers(1, 22))
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_unbroken_one(tmp_path_factory, kills, count):
    folder = tmp_path_factory.mktemp("killed")
    capture(folder / "unbroken work", folder / "unbroken", count)
    scored = []
    for at in kills:
        try:
            scored += capture(folder / "work", folder / "cache", count, dying(at))
        except Killed:
            continue
    capture(folder / "work", folder / "cache", count)
    assert bytes_of(folder / "cache") == bytes_of(folder / "unbroken")


def test_a_request_that_grew_scores_what_is_new_of_each_part(tmp_path):
    score(Store(tmp_path, IDENTITY), keys(5))
    new = keys(4, first=5)
    parts = [own for part in divide(keys(9)) if (own := [key for key in part if key in new])]
    with pytest.raises(Killed):
        score(Store(tmp_path, IDENTITY), keys(9), dying(1))
    assert score(Store(tmp_path, IDENTITY), keys(9)) == [key for own in parts[1:] for key in own]


@pytest.mark.parametrize("column", range(len(STORED)))
def test_a_part_with_a_damaged_page_is_set_aside_with_a_message_and_scored_again_to_the_same_bytes(tmp_path, capsys, column):
    capture(tmp_path / "work", tmp_path / "cache", 10)
    before = bytes_of(tmp_path / "cache")
    store = Store(tmp_path / "work", IDENTITY)
    second = divide(keys(10))[1]
    (part,) = (path for path in store.folder.glob("part-*") if pq.read_table(path)["prompt_sha"].to_pylist() == second)
    whole = part.read_bytes()
    chunk = pq.read_metadata(part).row_group(0).column(column)
    flip(part, (chunk.data_page_offset + chunk.total_compressed_size - 2) / len(whole))
    scored = capture(tmp_path / "work", tmp_path / "cache", 10)
    assert bytes_of(tmp_path / "cache") == before
    assert scored == second
    assert f"{part.name}" in (said := capsys.readouterr().err)
    assert "Its rows are scored again" in said
    assert part.read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7), st.sampled_from(["flip", "cut", "zeros"]))
@pytest.mark.slow
def test_damage_anywhere_in_a_part_changes_no_number(tmp_path_factory, place, bit, kind):
    folder = tmp_path_factory.mktemp("damaged")
    store = Store(folder, IDENTITY)
    score(store, keys(6))
    before = store.read(keys(6))
    part = sorted(store.folder.glob("part-*"))[place % 2]
    data = bytearray(part.read_bytes())
    at = place % len(data)
    if kind == "flip":
        data[at] ^= 1 << bit
    elif kind == "cut":
        del data[at:]
    else:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    part.write_bytes(data)
    again = Store(folder, IDENTITY)
    score(again, keys(6))
    assert again.read(keys(6)).equals(before)


def test_a_damaged_identity_is_written_again(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(3))
    (store.folder / "identity.json").write_text("{")
    assert stores(tmp_path) == {store.folder: None}
    assert score(Store(tmp_path, IDENTITY), keys(3)) == []
    assert stores(tmp_path) == {store.folder: IDENTITY}


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(1))
    for name in ("identity.json", "part-0f.parquet"):
        (store.folder / f".{name}.4194999.tmp").write_bytes(b"half")
    assert score(Store(tmp_path, IDENTITY), keys(1)) == []
    assert not list(store.folder.glob(".*.tmp"))


def test_a_missing_row_is_an_error_not_a_hole(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(3))
    with pytest.raises(ShotlessError, match="1 of 4 rows are not here"):
        store.read(keys(4))


def test_seconds_and_engines_are_those_of_the_parts_that_hold_the_rows(tmp_path):
    """Each part of three took a second; a row counts a third of it."""
    store = Store(tmp_path, IDENTITY)
    score(store, keys(6))
    with store.lock():
        store.write(stored(keys(3, first=6)), 4.5, {"name": "another"})
    later = Store(tmp_path, IDENTITY)
    later.read(keys(9))
    assert later.seconds([*keys(2), keys(1)[0], *keys(2, first=6)]) == pytest.approx(2 / 3 + 2 * 4.5 / 3)
    assert later.engines(keys(2)) == [{"name": "made up"}]
    assert later.engines(keys(9)) == later.engines(list(reversed(keys(9)))) == [{"name": "another"}, {"name": "made up"}]


def test_stores_are_listed_with_their_identity(tmp_path):
    identities = [IDENTITY, IDENTITY | {"dtype": "bfloat16"}]
    made = [Store(tmp_path, identity) for identity in identities]
    for store in made:
        score(store, keys(1))
    assert stores(tmp_path) == {store.folder: identity for store, identity in zip(made, identities, strict=True)}
    assert stores(tmp_path / "nowhere") == {}


def test_a_second_run_waits_for_the_first_and_finds_its_rows_and_another_request_goes_on(tmp_path):
    one, other, found = Store(tmp_path, IDENTITY), Store(tmp_path, IDENTITY), []

    def second():
        with other.request(keys(3)):
            found.append(other.missing(keys(3)))

    thread = threading.Thread(target=second)
    with one.request(keys(3)):
        thread.start()
        with Store(tmp_path, IDENTITY).request(keys(2, first=7)):
            assert not found
        one.write(stored(keys(3)), 1.0, {"name": "made up"})
        assert not found
    thread.join(10)
    assert found == [[]]


def test_what_another_run_writes_now_is_not_removed_as_left_over(tmp_path):
    store = Store(tmp_path, IDENTITY)
    score(store, keys(1))
    written = store.folder / f".part-a.parquet.{os.getpid()}.tmp"
    written.write_bytes(b"half")
    with Store(tmp_path, IDENTITY).request(keys(2)):
        assert written.is_file()
