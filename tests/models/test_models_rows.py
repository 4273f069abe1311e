"""Packed rows, checked against what each token may see, written out token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.packed import Row, Tree, pack, tree_of

IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=6)
PLAIN = st.lists(st.builds(Row, IDS), min_size=1, max_size=5)
COMPLETIONS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=5)


@st.composite
def trees(draw):
    """Any tree, its nodes in any order that has parents first."""
    parents = [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, 7)))]
    return Tree(draw(st.lists(st.integers(0, 9), min_size=len(parents), max_size=len(parents))), parents)


ROWS = st.lists(st.builds(Row, IDS, trees()), min_size=1, max_size=5)


def path_to(tree, node):
    """The nodes from the query to one, itself among them."""
    return [] if node < 0 else [*path_to(tree, tree.parents[node]), node]


def tokens_of(rows):
    """Every token in order, as (row, node or None, place in its full prompt, id)."""
    listed = []
    for number, row in enumerate(rows):
        listed += [(number, None, place, token) for place, token in enumerate(row.query)]
        query = len(row.query)
        listed += [(number, n, query + len(path_to(row.tree, n)) - 1, token) for n, token in enumerate(row.tree.tokens)]
    return listed


def sees(rows, one, other):
    """Whether a token attends to another: of its own row, in the query or on its own path, not after itself."""
    if one[0] != other[0] or other[2] > one[2]:
        return False
    return other[1] is None or (one[1] is not None and other[1] in path_to(rows[one[0]].tree, one[1]))


@given(COMPLETIONS)
def test_each_beginning_after_which_a_completion_goes_on_is_one_node(completions):
    tree = tree_of(completions)
    beginnings = {tuple(ids[:end]) for ids in completions for end in range(1, len(ids))}
    paths = [tuple(tree.tokens[n] for n in path_to(tree, node)) for node in range(len(tree.tokens))]
    assert sorted(paths) == sorted(beginnings), "each once"
    for ids, steps in zip(completions, tree.steps, strict=True):
        assert [token for _, token in steps] == ids
        assert [() if node < 0 else paths[node] for node, _ in steps] == [tuple(ids[:end]) for end in range(len(ids))]


def test_a_long_answer_is_a_chain_that_needs_no_mask():
    tree = tree_of([list(range(20_000))])
    assert (list(tree.tokens), list(tree.parents), tree.is_chain) == (list(range(19_999)), list(range(-1, 19_998)), True)
    assert tree.paths == [list(range(19_999))]
    assert pack([Row([1, 2], tree_of([[3, 4, 5, 6]]))], 0).mask is None


@given(trees())
def test_paths_lead_to_each_node_that_none_continues(tree):
    leaves = [node for node in range(len(tree.tokens)) if node not in tree.parents]
    assert tree.paths == ([path_to(tree, leaf) for leaf in leaves] or [[]])


@given(COMPLETIONS.filter(bool), st.integers(0, 100))
def test_label_scores_are_the_sums_over_the_tokens(completions, seed):
    tree = tree_of(completions)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 1 + len(tree.tokens), 3, generator=generator)
    log_z = torch.randn(2, 1 + len(tree.tokens), generator=generator)
    expected = [[sum(float(logits[b, n + 1, t] - log_z[b, n + 1]) for n, t in own) for own in tree.steps] for b in range(2)]
    assert torch.allclose(tree.label_scores(logits, log_z), torch.tensor(expected), atol=1e-5)


@given(ROWS, st.integers(0, 1000))
def test_tokens_stand_end_to_end_at_the_positions_of_their_full_prompts(rows, start):
    packed = pack(rows, start)
    tokens = tokens_of(rows)
    assert packed.input_ids.tolist() == [[token for *_, token in tokens]]
    assert packed.position_ids.tolist() == [[start + place for _, _, place, _ in tokens]]
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
def test_outputs_are_each_query_s_last_token_and_every_node(rows):
    packed = pack(rows, 0)
    tokens = tokens_of(rows)
    wanted = [n for n, (row, node, place, _) in enumerate(tokens) if node is not None or place == len(rows[row].query) - 1]
    assert packed.outputs.tolist() == wanted
    counts = [row.outputs for row in rows]
    assert packed.output_gather.shape == (len(rows), max(counts))
    assert packed.output_gather.flatten()[packed.output_scatter].tolist() == list(range(len(wanted)))
    assert [tokens[packed.outputs[own]][0] for row in packed.output_gather.tolist() for own in row] == [
        number for number in range(len(rows)) for _ in range(max(counts))
    ], "a row's places hold outputs of that row"


@given(ROWS)
def test_each_token_sees_its_own_prompt_and_nothing_else(rows):
    packed = pack(rows, 0)
    tokens = tokens_of(rows)
    for number, row in enumerate(rows):
        own = [token for token in tokens if token[0] == number]
        allowed = torch.tensor([[sees(rows, one, other) for other in own] for one in own])
        if packed.mask is None:
            assert torch.equal(allowed, torch.ones_like(allowed).tril())
        else:
            block = packed.mask[number, 0]
            assert torch.equal(block[: row.length, : row.length] == 0, allowed)
            assert set(block.flatten().tolist()) <= {0.0, -torch.inf}
            assert (block[: row.length, row.length :] == -torch.inf).all()
            assert (block == 0).any(-1).all(), "a place that sees nothing would be NaN"
    masks = packed.output_mask[:, 0].flatten(0, 1)[packed.output_scatter]
    for output, mask in zip(packed.outputs.tolist(), masks, strict=True):
        own = [0.0 if sees(rows, tokens[output], other) else -torch.inf for other in tokens if other[0] == tokens[output][0]]
        assert mask.tolist() == own + [-torch.inf] * (len(mask) - len(own))


@given(ROWS)
def test_a_mask_is_there_where_a_row_is_not_one_line(rows):
    lines = all(len(row.tree.paths) == 1 and row.tree.paths[0] == sorted(row.tree.paths[0]) for row in rows)
    assert (pack(rows, 0).mask is None) == lines
