"""What an epoch must be whatever the tables: pairs of any order, side and scale, costs, steps that lessen."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops.icp import KERNELS, icp_epoch
from fastkit.testing.icp import Inputs, assert_equal, check, make_inputs

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def given_inputs(test):
    """Runs ``test`` on many sizes, always the same ones; in either dtype."""
    case = strategies.builds(
        make_inputs,
        strategies.integers(1, 40),
        strategies.integers(1, 40),
        strategies.integers(1, 20),
        restarts=strategies.integers(1, 3),
        dtype=strategies.sampled_from([torch.float32, torch.float64]),
        seed=strategies.integers(0, 1000),
    )
    settings = hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(inputs=case)(test))


def batch_of(inputs, share=2):
    return max(1, min(len(inputs.source), len(inputs.target)) // share)


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@given_inputs
def test_any_inputs_agree_with_the_oracle(impl, inputs):
    check(inputs, batch_size=batch_of(inputs), impl=impl)
    check(inputs, batch_size=3, mutual_only=True, impl=impl)


@given_inputs
def test_the_order_of_rows_is_no_matter_to_pairs(impl, inputs):
    """Where there is no tie, as in noise; costs are sums in another order."""
    source, target, *rest = inputs
    xs, ys = order(len(source), 1), order(len(target), 2)
    found = icp_epoch(*inputs, epoch=0, batch_size=1, impl=impl)
    moved = icp_epoch(source[xs], target[ys], *rest, epoch=0, batch_size=1, impl=impl)
    assert torch.equal(ys[moved.nearest_target], found.nearest_target[:, xs])
    assert torch.equal(xs[moved.nearest_source], found.nearest_source[:, ys])
    assert torch.equal(moved.mutual, found.mutual)
    torch.testing.assert_close(moved.cost, found.cost, rtol=1e-6, atol=0)


@given_inputs
def test_the_sides_may_be_exchanged(impl, inputs):
    """Pairs, costs and numbers have the same bits; a step on all rows is the same step."""
    source, target, w_xy, w_yx, seeds = inputs
    size = min(len(source), len(target))
    source, target = source[:size], target[:size]
    options = {"epoch": 0, "batch_size": size, "eps": 1.0, "impl": impl}
    found = icp_epoch(source, target, w_xy, w_yx, seeds, **options)
    other = icp_epoch(target, source, w_yx, w_xy, seeds, **options)
    assert torch.equal(other.nearest_target, found.nearest_source)
    assert torch.equal(other.nearest_source, found.nearest_target)
    assert torch.equal(other.cost, found.cost) and torch.equal(other.mutual, found.mutual)
    tolerance = 1e-5 if source.dtype == torch.float32 else 1e-13
    assert (other.w_xy - found.w_yx).abs().max() <= tolerance
    assert (other.w_yx - found.w_xy).abs().max() <= tolerance


@given_inputs
def test_powers_of_two_have_no_part_in_pairs(impl, inputs):
    """Costs are multiplied by their square; both bit for bit."""
    found = icp_epoch(*inputs, epoch=0, batch_size=1, impl=impl)
    for scale in (2.0**-9, 2.0**12):
        scaled = inputs._replace(source=scale * inputs.source, target=scale * inputs.target)
        other = icp_epoch(*scaled, epoch=0, batch_size=1, impl=impl)
        assert torch.equal(other.nearest_target, found.nearest_target)
        assert torch.equal(other.nearest_source, found.nearest_source)
        assert torch.equal(other.cost, scale**2 * found.cost)


@given_inputs
def test_numbers_of_pairs_and_costs_are_within_their_bounds(impl, inputs):
    """With an orthogonal map and its inverse, the nearest of all pairs is found from both sides."""
    source, target, w_xy, _, seeds = inputs
    w_xy = torch.linalg.qr(w_xy.double())[0].to(w_xy.dtype)
    found = icp_epoch(source, target, w_xy, w_xy.mT, seeds, epoch=0, batch_size=1, impl=impl)
    assert ((found.mutual >= 1) & (found.mutual <= min(len(source), len(target)))).all()
    assert ((found.cost >= 0) & found.cost.isfinite()).all()


@given_inputs
def test_a_small_step_lessens_the_loss_of_its_pairs(impl, inputs):
    """On all rows of two equally long tables."""
    size = min(len(inputs.source), len(inputs.target))
    source, target = inputs.source[:size].double(), inputs.target[:size].double()
    inputs = Inputs(source, target, inputs.w_xy.double(), inputs.w_yx.double(), inputs.seeds)
    found = icp_epoch(*inputs, epoch=0, batch_size=size, lr=1e-5, impl=impl)
    for r, (there, back) in enumerate(zip(found.nearest_target, found.nearest_source, strict=True)):

        def loss(w_xy, w_yx, there=there, back=back):
            x, y = source @ w_xy.T, target @ w_yx.T
            plain = (x - target[there]).square().sum() + (y - source[back]).square().sum()
            cycle = (x @ w_yx.T - source).square().sum() + (y @ w_xy.T - target).square().sum()
            return plain + 1e-2 * cycle

        assert loss(found.w_xy[r], found.w_yx[r]) < loss(inputs.w_xy[r], inputs.w_yx[r])


@given_inputs
def test_where_all_is_in_place_nothing_moves_far(impl, inputs):
    """A table and itself, with the identity: no cost, all pairs mutual, gradients of rounding at most."""
    source, _, w_xy, _, seeds = inputs
    D = source.shape[1]
    identity = torch.eye(D, dtype=source.dtype).expand_as(w_xy)
    options = {"epoch": 0, "batch_size": len(source), "eps": 1.0, "impl": impl}
    found = icp_epoch(source, source, identity, identity, seeds, **options)
    assert (found.cost == 0).all() and (found.mutual == len(source)).all()
    assert (found.nearest_target == torch.arange(len(source))).all()
    assert (found.w_xy - identity).abs().max() <= 1e-2 * 100 * torch.finfo(source.dtype).eps


@given_inputs
def test_pairs_of_the_search_may_be_given(impl, inputs):
    options = {"epoch": 5, "batch_size": batch_of(inputs, 3), "impl": impl}
    found = icp_epoch(*inputs, **options)
    assert_equal(icp_epoch(*inputs, **options, pairs=(found.nearest_target, found.nearest_source)), found)
