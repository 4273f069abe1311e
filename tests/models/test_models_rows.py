"""Packed rows, checked against what each token may see, written out token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.packed import Row, pack

IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=6)
PLAIN = st.lists(st.builds(Row, IDS), min_size=1, max_size=5)
ROWS = st.lists(st.builds(Row, IDS, st.lists(IDS, max_size=3).map(tuple)), min_size=1, max_size=5)


def tokens_of(rows):
    """Every token in order, as (row, branch or None, place in its query or branch, id)."""
    listed = []
    for number, row in enumerate(rows):
        for branch, ids in enumerate([row.query, *row.branches]):
            listed += [(number, branch - 1 if branch else None, place, token) for place, token in enumerate(ids)]
    return listed


def sees(one, other):
    """Whether a token attends to another: of its own row, in the query or its own branch, not after itself."""
    same_row, same_part = one[0] == other[0], one[1] == other[1]
    return same_row and (one[2] >= other[2] if same_part else other[1] is None)


@given(ROWS, st.integers(0, 1000))
def test_tokens_stand_end_to_end_at_the_positions_of_their_full_prompts(rows, start):
    packed = pack(rows, start)
    tokens = tokens_of(rows)
    assert packed.input_ids.tolist() == [[token for *_, token in tokens]]
    lengths = [len(row.query) for row in rows]
    positions = [start + place + (0 if branch is None else lengths[row]) for row, branch, place, _ in tokens]
    assert packed.position_ids.tolist() == [positions]
    assert [row.length for row in rows] == [sum(number == row for row, *_ in tokens) for number in range(len(rows))]


@given(ROWS)
def test_scatter_undoes_gather_and_padding_repeats_the_row_s_first_token(rows):
    packed = pack(rows, 0)
    total = sum(row.length for row in rows)
    assert packed.gather.shape == (len(rows), max(row.length for row in rows))
    assert packed.gather.flatten()[packed.scatter].tolist() == list(range(total))
    first = 0
    for number, row in enumerate(rows):
        assert packed.gather[number, : row.length].tolist() == list(range(first, first + row.length))
        assert set(packed.gather[number, row.length :].tolist()) <= {first}
        first += row.length


@given(ROWS)
def test_outputs_are_each_query_s_last_token_and_every_branch_token(rows):
    packed = pack(rows, 0)
    tokens = tokens_of(rows)
    wanted = [n for n, (row, branch, place, _) in enumerate(tokens) if branch is not None or place == len(rows[row].query) - 1]
    assert packed.outputs.tolist() == wanted
    assert packed.output_rows.tolist() == [tokens[n][0] for n in wanted]


@given(ROWS)
def test_each_token_sees_its_own_prompt_and_nothing_else(rows):
    packed = pack(rows, 0)
    tokens = tokens_of(rows)
    for number, row in enumerate(rows):
        own = [token for token in tokens if token[0] == number]
        allowed = torch.tensor([[sees(one, other) for other in own] for one in own])
        if packed.mask is None:
            assert torch.equal(allowed, torch.ones_like(allowed).tril())
        else:
            block = packed.mask[number, 0]
            assert torch.equal(block[: row.length, : row.length] == 0, allowed)
            assert set(block.flatten().tolist()) <= {0.0, -torch.inf}
            assert (block[: row.length, row.length :] == -torch.inf).all()
            assert (block == 0).any(-1).all(), "a place that sees nothing would be NaN"
    for output, number, mask in zip(packed.outputs.tolist(), packed.output_rows.tolist(), packed.output_mask, strict=True):
        own = [0.0 if sees(tokens[output], other) else -torch.inf for other in tokens if other[0] == number]
        assert mask.tolist() == own + [-torch.inf] * (len(mask) - len(own))


@given(PLAIN)
def test_rows_without_branches_need_no_mask(rows):
    assert pack(rows, 0).mask is None


@given(ROWS)
def test_a_mask_is_there_where_one_row_branches(rows):
    assert (pack(rows, 0).mask is not None) == any(row.branches for row in rows)
