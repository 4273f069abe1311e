"""What is encoded and read back, against the distribution it came from."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_rows import ENCODINGS, params_of, random_logits, table_of

from pipeline.cache.distributions import check_retained, decode, fit_vocabulary
from pipeline.cache.encodings import columns_of, encode, temperatures
from pipeline.errors import MismatchError, UsageError


def tempered(logits, temperature):
    return (logits.double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_entries_have_the_log_probabilities_of_the_definition(encoding, temperature):
    logits = random_logits()
    params = params_of(encoding, temperatures=(2.5, 0.5))
    read = decode(table_of(logits, params), params, temperature)
    expected = tempered(logits, temperature)
    real = read.log_probabilities > -torch.inf
    kept = expected.gather(-1, read.ids).masked_fill(~real, -torch.inf)
    if encoding == "top_k":
        assert torch.allclose(read.retained.double(), kept.exp().sum(-1), atol=1e-5)
        kept = kept.log_softmax(-1)
    assert torch.allclose(read.log_probabilities.double(), kept, atol=1e-4)
    drawn = read.sampled_weights > 0
    assert torch.allclose(read.sampled_log_probabilities.double()[drawn], expected.gather(-1, read.sampled_ids)[drawn], atol=1e-4)
    assert torch.allclose(read.entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("resolution", [None, 1 / 16, 0.3])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_mass_is_accounted_for(encoding, resolution, temperature):
    params = params_of(encoding, resolution_nats=resolution, temperatures=(2.5,))
    read = decode(table_of(random_logits(), params), params, temperature)
    total = read.log_probabilities.exp().sum(-1) + read.rest
    if temperature == 1.0:
        total = total + read.sampled_weights.sum(-1)
    if temperature == 1.0 or read.tail != "drawn":
        assert torch.allclose(total, torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("encoding", ["sampled", "hybrid"])
def test_draws_stand_for_each_entry_s_mass_on_average(encoding, temperature):
    logits = random_logits(positions=1, scale=1.5)
    params = params_of(encoding, temperatures=(2.5,))
    grid = (torch.arange(20_000) + 0.5) / 20_000  # the expectation over the uniform number, as an integral
    read = decode(table_of(logits.expand(len(grid), -1), params, grid.double()), params, temperature)
    mean = torch.zeros(40).index_add(0, read.sampled_ids.flatten(), read.sampled_weights.flatten()) / len(grid)
    expected = tempered(logits, temperature)[0].exp()
    expected[read.ids[0]] = 0.0
    assert torch.allclose(mean.double(), expected, atol=3e-5 if temperature == 1.0 else 1e-3)  # the grid is finite, and weights differ


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 9), st.floats(0, 1, exclude_max=True), st.floats(0.1, 40))
def test_draws_are_distinct_live_entries_outside_the_head(seed, top_k, samples, uniform, scale):
    logits = random_logits(positions=3, vocabulary=12, scale=scale, seed=seed)
    logits[:, seed % 12] = -torch.inf
    params = params_of("hybrid", top_k=top_k, samples=samples)
    read = decode(table_of(logits, params, torch.full((3,), uniform, dtype=torch.float64)), params)
    probabilities = logits.softmax(-1)
    for row in range(3):
        live = read.sampled_weights[row] > 0
        drawn = read.sampled_ids[row][live].tolist()
        kept = read.ids[row][read.log_probabilities[row] > -torch.inf].tolist()
        assert len(set(drawn)) == len(drawn)
        assert not set(drawn) & set(kept)
        assert all(probabilities[row, token] > 0 for token in drawn)
        assert seed % 12 not in [*drawn, *kept]


def test_a_uniform_number_just_under_one_draws_an_entry_that_has_mass():
    logits = torch.tensor([[5.0, 1.0, 0.0, -torch.inf, 6.0]])
    params = params_of("hybrid", top_k=2, samples=3)
    read = decode(table_of(logits, params, torch.tensor([1 - 2**-53], dtype=torch.float64)), params)
    assert set(read.sampled_ids[read.sampled_weights > 0].tolist()) <= {1, 2}


@pytest.mark.parametrize("encoding", ["top_k", "top_k_tail", "hybrid", "full"])
def test_rounding_moves_a_log_probability_by_half_the_resolution_and_the_head_s_sum_by_nothing(encoding):
    logits = random_logits()
    resolution = 1 / 8
    exact_params, params = params_of(encoding), params_of(encoding, resolution_nats=resolution)
    exact, read = decode(table_of(logits, exact_params), exact_params), decode(table_of(logits, params), params)
    moved = (exact.log_probabilities.exp() / read.log_probabilities.exp()).log().nan_to_num(0.0)
    assert float(moved.abs().max()) <= resolution + 1e-5  # rounding, and the scaling after
    assert torch.allclose(exact.log_probabilities.exp().sum(-1), read.log_probabilities.exp().sum(-1), atol=1e-5)


def test_a_hybrid_keeps_what_would_be_drawn_for_certain_and_draws_in_proportion_to_the_rest():
    logits = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.4, 0.3, 0.2, 0.1], [0.01, 0.01, 0.01, 0.97]]).log()
    params = params_of("hybrid", top_k=3, samples=10)
    read = decode(table_of(logits, params), params)
    assert [(row > -torch.inf).sum().item() for row in read.log_probabilities] == [1, 3, 1]
    assert read.sampled_weights[0].sum() == pytest.approx(0.1)
    assert (read.sampled_weights[0] > 0).sum() == 1  # 10 draws of a mass of 0.1 are one
    flat = params_of("hybrid", top_k=3, samples=2)
    assert (decode(table_of(torch.zeros(1, 40), flat), flat).log_probabilities > -torch.inf).sum() == 1  # one is kept, whatever it has


def test_ids_past_131072_come_back():
    logits = torch.full((1, 152_064), -20.0)
    logits[0, [151_645, 151_935, 7]] = torch.tensor([3.0, 2.0, 1.0])
    params = params_of("top_k_tail", top_k=3)
    assert decode(table_of(logits, params), params).ids.tolist() == [[151_645, 151_935, 7]]


def test_masked_entries_are_no_entries():
    logits = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf], [1.0, 0.0, 0.5, 0.2]])
    params = params_of("top_k_tail", top_k=3)
    read = decode(table_of(logits, params), params)
    assert (read.log_probabilities > -torch.inf).sum(-1).tolist() == [2, 3]
    assert read.rest[0] == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_several_positions_are_read_one_after_the_other_from_any_slice(encoding, tmp_path):
    params = params_of(encoding, resolution_nats=1 / 16)
    logits = random_logits(7)
    table = table_of(logits, params, torch.rand(7, generator=torch.Generator().manual_seed(1)), lengths=[2, 0, 4, 1])
    whole = decode(table, params)
    pq.write_table(table, tmp_path / "rows.parquet")
    part = decode(pq.read_table(tmp_path / "rows.parquet").slice(2, 1), params)
    assert len(whole) == 7
    assert len(part) == 4
    width = part.sampled_ids.shape[1]
    assert torch.equal(part.log_probabilities, whole.log_probabilities[2:6])
    assert torch.equal(part.sampled_weights, whole.sampled_weights[2:6, :width])
    assert torch.equal(part.rest, whole.rest[2:6])


def test_no_rows_are_no_positions():
    params = params_of("hybrid")
    assert len(decode(table_of(random_logits(), params).slice(0, 0), params)) == 0
    assert len(decode(pa.table(columns_of(encode(random_logits(0), params, torch.zeros(0)), np.zeros(3, dtype=int))), params)) == 0


def test_an_encoding_of_many_positions_is_that_of_each(monkeypatch):
    logits = random_logits(9)
    uniforms = torch.rand(9, generator=torch.Generator().manual_seed(0))
    params = params_of("hybrid", temperatures=(2.0,))
    whole = encode(logits, params, uniforms, logits[:, :4])
    monkeypatch.setattr("pipeline.cache.encodings.ENTRIES_AT_ONCE", 100)
    chunked = encode(logits, params, uniforms, logits[:, :4])
    for name in whole:
        assert torch.equal(whole[name], chunked[name]), name


def test_hidden_states_are_kept_in_half_precision():
    logits = random_logits(3)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    kept = table_of(logits, params_of("top_k"), hidden=states)["hidden_states"]
    assert kept.to_pylist() == [[row] for row in states.half().tolist()]
    assert table_of(logits, params_of("top_k"))["hidden_states"].to_pylist() == [[[]]] * 3


def test_a_temperature_that_is_not_stored_is_refused_with_those_that_are():
    params = params_of("top_k_tail", temperatures=(2.0,))
    assert temperatures(params) == (1.0, 2.0)
    with pytest.raises(UsageError, match=r"temperature 4: .* 1, 2\. .*teachers\.\*\.cache\.temperatures"):
        decode(table_of(random_logits(), params), params, 4.0)


def test_a_temperature_that_retains_too_little_is_refused_with_the_figure():
    params = params_of("top_k_tail", top_k=3, temperatures=(8.0,))
    logits = random_logits(vocabulary=400)
    with pytest.raises(UsageError, match=r"temperature 8 the cache retains \d+\.\d% .*top_k 3"):
        check_retained(decode(table_of(logits, params), params, 8.0), params, 8.0)
    peaked = random_logits(vocabulary=400, scale=30.0)
    check_retained(decode(table_of(peaked, params), params), params, 1.0)


def test_draws_at_their_own_temperature_are_never_too_little():
    params = params_of("sampled", samples=1)
    drawn = decode(table_of(random_logits(scale=0.1), params), params)
    assert drawn.retained.mean() < 0.5
    check_retained(drawn, params, 1.0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_of_the_teacher_s_vocabulary_is_dropped(encoding):
    logits = random_logits(vocabulary=48)
    logits[:, 40:] = -40.0
    params = params_of(encoding, top_k=44, samples=30)
    read = fit_vocabulary(decode(table_of(logits, params), params), 40)
    assert (read.ids < 40).all()
    assert (read.sampled_ids < 40).all()


def test_mass_past_the_student_s_vocabulary_is_refused_with_the_figure():
    logits = torch.zeros(1, 8)
    params = params_of("top_k_tail", top_k=8)
    with pytest.raises(MismatchError, match=r"up to 25\.00% .* vocabulary of 6 .* 7\)"):
        fit_vocabulary(decode(table_of(logits, params), params), 6)
