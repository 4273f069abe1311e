"""Hidden-state matching against its definition: distances in the teacher's standard deviations, projections that come and go."""

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.students.matching import HiddenLesson, attach, detach

STATES = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 100, 32) + 3.0


def lesson(pairs=((1, 0), (-1, -1)), states=STATES):
    return HiddenLesson.of(0.5, pairs, (1, -1), states, "students.cd.also.few")


def test_the_distance_is_the_mean_square_in_standard_deviations_of_the_teacher(tiny_model):
    (matching,) = attach(tiny_model("llama"), [lesson()], 0)
    student, teacher = torch.randn(7, 2, 32), STATES[:7]
    expected = torch.zeros(7)
    for pair, layer in ((0, 0), (1, 1)):
        deviation = STATES[:, layer].std(0, correction=0)
        for position in range(7):
            for dimension in range(32):
                off = (student[position, pair, dimension] - teacher[position, layer, dimension]) / deviation[dimension]
                expected[position] += off**2 / 32 / 2
    torch.testing.assert_close(matching(student.flatten(1), teacher), expected, rtol=1e-4, atol=0)


def test_the_teacher_s_own_state_is_at_0_and_its_mean_state_at_1(tiny_model):
    (matching,) = attach(tiny_model("llama"), [lesson()], 0)
    assert matching(STATES.flatten(1), STATES).abs().max() == 0
    mean = STATES.mean(0, keepdim=True).expand(len(STATES), 2, 32)
    assert matching(mean.flatten(1), STATES).mean() == pytest.approx(1.0, abs=1e-4)


def test_a_dimension_that_never_varies_has_a_finite_distance(tiny_model):
    constant = STATES.clone()
    constant[..., 5] = 2.0
    (matching,) = attach(tiny_model("llama"), [lesson(states=constant)], 0)
    assert torch.isfinite(matching(torch.zeros(3, 64), constant[:3])).all()


@pytest.mark.parametrize("width", [32, 48])
def test_a_projection_is_learnt_only_where_widths_differ_and_is_gone_afterwards(tiny_model, width):
    model = tiny_model("llama", hidden_size=width)
    before = dict(model.named_parameters())
    (matching,) = attach(model, [lesson()], 7)
    learnt = [parameter for name, parameter in model.named_parameters() if name not in before]
    assert bool(learnt) == (width != 32)
    distances = matching(torch.randn(5, 2 * width), STATES[:5])
    assert distances.shape == (5,)
    if learnt:
        distances.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learnt)
    detach(model)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_projections_lie_where_the_model_does(tiny_model):
    """The meta device stands for a GPU: what is left behind on the CPU is an error."""
    (matching,) = attach(tiny_model("llama", hidden_size=48).to("meta"), [lesson()], 7)
    assert {parameter.device.type for parameter in matching.parameters()} == {"meta"}
    assert matching(torch.zeros(5, 96, device="meta"), STATES[:5]).device.type == "meta"


def test_projections_depend_on_the_seed_alone(tiny_model):
    models = [tiny_model("llama", hidden_size=48) for _ in range(3)]
    first, again, other = (attach(model, [lesson()], seed)[0] for model, seed in zip(models, (1, 1, 2), strict=True))
    assert torch.equal(first.projections["0"].weight, again.projections["0"].weight)
    assert not torch.equal(first.projections["0"].weight, other.projections["0"].weight)


def test_a_layer_that_the_cache_lacks_is_named_with_those_it_has():
    with pytest.raises(UsageError, match=r"students\.cd\.also\.few\.layers: .*layer 3; it has 1, -1"):
        lesson(pairs=((3, -1),))


def test_a_layer_that_the_student_lacks_is_refused(tiny_model):
    with pytest.raises(UsageError, match="the student has no layer 9; it has 4"):
        attach(tiny_model("llama"), [lesson(pairs=((-1, 9),))], 0)
