"""Ids of examples in few bytes: the same sequence, the same places, and a request's rows are known by them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.keys import ExampleIds, Request
from pipeline.files import sha256_text

IDS = [sha256_text(str(number)) for number in range(40)]
ZEROS = ["00" * 32, "ab" * 31 + "00", "ab" * 30 + "0000", "00" * 31 + "01"]


@given(st.lists(st.sampled_from(IDS + ZEROS), max_size=30), st.lists(st.sampled_from(IDS + ZEROS), max_size=10))
def test_ids_are_those_that_were_given_and_are_found_where_they_first_stand(ids, wanted):
    kept = ExampleIds(iter(ids))
    assert list(kept) == ids
    assert kept[:] == ids
    assert kept.find(wanted).tolist() == [ids.index(one) if one in ids else -1 for one in wanted]
    assert [ids[place] for place in kept.order] == sorted(ids)
    assert kept.all_different == (len(set(ids)) == len(ids))


def test_an_id_past_the_end_is_an_error():
    kept = ExampleIds(IDS[:3])
    assert kept[-1] == IDS[2]
    for place in (3, -4):
        with pytest.raises(IndexError):
            kept[place]


def test_a_request_knows_which_rows_are_its_own():
    request = Request(["one", "two"], IDS[:3])
    keys = [("one", IDS[0]), ("two", IDS[3]), ("three", IDS[1]), ("two", IDS[2])]
    assert request.holds(keys).tolist() == [True, False, False, True]
    assert list(request) == [(context, example) for context in ("one", "two") for example in IDS[:3]]
