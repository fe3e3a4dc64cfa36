"""icp_epoch by products of PyTorch, on a CPU: what a GPU does for wide tables."""

import math

import pytest
import torch

from fastkit import reference
from fastkit.ops import icp_products
from fastkit.reference import ICPEpoch
from fastkit.testing import assert_matches_reference
from fastkit.testing.icp import alone, assert_equal, assert_nearest, expected_maps, expected_mean, make_inputs

pytestmark = [pytest.mark.native]

ADAM = {"lr": 0.5, "betas": (0.5, 0.999), "eps": 1.0, "cycle_weight": 0.25}  # damped: budgets stay small


def run(inputs, **options):
    return icp_products.icp_epoch(*inputs, **({"epoch": 2, "batch_size": 16} | ADAM | options))


def check(inputs, found, **options):
    """Within the budgets of the pairs, the cost and the steps."""
    source, target, w_xy, w_yx, _ = inputs
    for r, (there, back) in enumerate(zip(found.nearest_target, found.nearest_source, strict=True)):
        assert_nearest(there, source, target, w_yx[r])
        assert_nearest(back, target, source, w_xy[r])
        means = expected_mean(there, source, target, w_yx[r]), expected_mean(back, target, source, w_xy[r])
        least = min(means, key=lambda mean: mean.value)
        assert_matches_reference(found.cost[r], *least, name="cost")
        assert found.mutual[r] == (back[there] == torch.arange(len(source))).sum()
        maps = expected_maps(inputs, found, r, **({"epoch": 2, "batch_size": 16} | ADAM | options))
        for got, expected in zip(found[:2], maps, strict=True):
            assert_matches_reference(got[r], *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m", "D"), [(1, 1, 1), (70, 50, 7), (60, 90, 65), (40, 40, 100)])
def test_matches_the_oracle(n, m, D, dtype):
    inputs = make_inputs(n, m, D, dtype=dtype)
    for options in (
        {"batch_size": 1},
        {"batch_size": min(n, m)},
        {"batch_size": 16, "mutual_only": True},
        {"cycle_weight": 0.0},
    ):
        check(inputs, run(inputs, **options), **options)


def test_is_the_reference_in_float64():
    inputs = make_inputs(80, 90, 12, dtype=torch.float64, restarts=3)
    for options in (
        {},
        {"mutual_only": True},
        {"batch_size": 500, "mutual_only": True},
        {"epoch": 2**32 - 1},
    ):
        options = {"epoch": 5, "batch_size": 16} | ADAM | options
        found, expected = run(inputs, **options), reference.icp_epoch(*inputs, **options)
        for name, one, other in zip(ICPEpoch._fields, found, expected, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape, name
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12), name
        assert_equal(run(inputs, **options, pairs=(found.nearest_target, found.nearest_source)), found)


def test_a_restart_does_not_see_others():
    inputs = make_inputs(70, 60, 65, restarts=3)
    inputs.w_yx[1, 0] = math.nan
    found = run(inputs)
    assert found.cost.isinf().tolist() == [False, True, False]
    assert torch.equal(found.w_xy[1], inputs.w_xy[1])
    assert torch.equal(found.w_yx[1].isnan(), inputs.w_yx[1].isnan())
    assert (found.nearest_target[1] == -1).all() and (found.nearest_source[1] >= 0).all()
    for r in range(3):
        assert_equal(ICPEpoch(*(t[r : r + 1] for t in found)), run(alone(inputs, r)))


def test_without_mutual_pairs_there_is_no_step():
    inputs = make_inputs(30, 30, 5)
    none = torch.arange(30).roll(1).expand(2, 30)
    found = run(inputs, pairs=(none, none), mutual_only=True)
    assert not found.mutual.any() and found.cost.isfinite().all()
    assert torch.equal(found.w_xy, inputs.w_xy) and torch.equal(found.w_yx, inputs.w_yx)
    assert found.nearest_target.is_contiguous()


@pytest.mark.parametrize("wrong", [-1, -(2**40), 40, 2**40])
def test_pairs_that_no_one_has_checked_do_no_harm(wrong):
    inputs = make_inputs(30, 40, 5)
    there, back = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)
    there[0, 7], back[0, 9] = wrong, wrong
    found = run(inputs, pairs=(there, back))
    assert found.cost.isinf().tolist() == [True, False]
    assert torch.equal(found.w_xy[0], inputs.w_xy[0]) and not torch.equal(found.w_xy[1], inputs.w_xy[1])
