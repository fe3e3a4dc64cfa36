"""What moments must be whatever its rows: additive, blind to order and shifts, positive."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import merge_moments, moments
from fastkit.ops.moments import KERNELS
from fastkit.testing import assert_matches_reference
from fastkit.testing.moments import RowsSize, expected_results, make_inputs

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native


@pytest.fixture(params=["cpu", "reference"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def given_calls(test):
    """Runs ``test`` on many sizes, with and without weights; always the same ones."""
    inputs = strategies.builds(
        make_inputs,
        strategies.builds(RowsSize, N=strategies.integers(1, 60), D=strategies.integers(1, 20)),
        weights=strategies.sampled_from([None, "positive", "some"]),
        offset=strategies.sampled_from([0.0, -3.0, 100.0]),
        seed=strategies.integers(0, 1000),
    )
    settings = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(inputs=inputs)(test))


def in_float64(inputs):
    return inputs.x.double(), None if inputs.weights is None else inputs.weights.double()


def part(x, w, rows, impl):
    return moments(x[rows], weights=None if w is None else w[rows], impl=impl)


def assert_near(found, want):
    """In float64, up to the rounding of some sums."""
    size = 1 + want.mean.abs().max() ** 2 + want.scatter.diagonal().max()
    for one, other in zip(found, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12 * float(size))


@given_calls
def test_merging_is_associative_and_commutative(impl, inputs):
    x, w = in_float64(inputs)
    cuts = torch.tensor_split(torch.arange(len(x)), 3)
    a, b, c = (part(x, w, rows, impl) for rows in cuts)
    whole = moments(x, weights=w, impl=impl)
    for merged in (
        merge_moments(merge_moments(a, b), c),
        merge_moments(a, merge_moments(b, c)),
        merge_moments(merge_moments(c, b), a),
        merge_moments(merge_moments(a, c), b),
    ):
        assert_near(merged, whole)
    one, other = merge_moments(a, b), merge_moments(b, a)
    assert torch.equal(one.count, other.count)
    assert_near(one, other)


@given_calls
def test_the_order_of_rows_is_no_matter(impl, inputs):
    order = torch.randperm(len(inputs.x), generator=torch.Generator().manual_seed(0))
    found = part(inputs.x, inputs.weights, order, impl)
    expected = expected_results(inputs)
    for name, result in found._asdict().items():
        assert_matches_reference(result, *expected[name], name=name)


@given_calls
def test_a_shift_moves_the_mean_alone(impl, inputs):
    """By numbers that float64 adds exactly; the budget is that of the rows, as they lie."""
    x, w = in_float64(inputs)
    shift = torch.arange(x.shape[1], dtype=torch.float64) * 1024
    want, found = moments(x, weights=w, impl=impl), moments(x + shift, weights=w, impl=impl)
    assert torch.equal(found.count, want.count)
    if want.count != 0:
        assert torch.allclose(found.mean, want.mean + shift, rtol=1e-12, atol=1e-12)
    size = float(1 + want.scatter.diagonal().max())
    assert torch.allclose(found.scatter, want.scatter, rtol=1e-8, atol=1e-8 * size)


@given_calls
def test_columns_are_apart(impl, inputs):
    """A linear map of the rows maps the mean, and the scatter on both sides."""
    x, w = in_float64(inputs)
    want = moments(x, weights=w, impl=impl)
    matrix = torch.randn(4, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = moments(x @ matrix.T, weights=w, impl=impl)
    size = float(1 + x.abs().max() ** 2) * x.shape[1] ** 2 * len(x)
    assert torch.allclose(found.mean, matrix @ want.mean, atol=1e-12 * size)
    assert torch.allclose(found.scatter, matrix @ want.scatter @ matrix.T, atol=1e-12 * size)


@given_calls
def test_the_scatter_is_symmetric_and_positive(impl, inputs):
    found = moments(inputs.x, weights=inputs.weights, impl=impl)
    scatter = found.scatter.double()
    assert torch.equal(scatter, scatter.T) and (scatter.diagonal() >= 0).all()
    budget = expected_results(inputs)["scatter"].budget
    assert torch.linalg.eigvalsh(scatter)[0] >= -float(budget.sum(1).max())  # Gershgorin


@given_calls
def test_weights_are_repetitions(impl, inputs):
    times = (torch.arange(len(inputs.x)) * 7 + 3) % 4
    repeated = inputs.x.repeat_interleave(times, 0)
    found = moments(inputs.x, weights=times.float(), impl=impl)
    want = moments(repeated, impl=impl)
    expected = expected_results(inputs._replace(x=repeated, weights=None))
    assert torch.equal(found.count, want.count)
    for name in ("mean", "scatter"):
        assert_matches_reference(getattr(found, name), *expected[name], name=name)
    if want.count > 1:
        assert torch.allclose(found.covariance(), want.covariance(), rtol=1e-4, atol=1e-3)


@given_calls
def test_weights_of_one_and_rows_of_weight_zero(impl, inputs):
    x, w = in_float64(inputs)
    assert_near(moments(x, weights=torch.ones(len(x)).double(), impl=impl), moments(x, impl=impl))
    if w is not None:
        assert_near(part(x, w, w > 0, impl), moments(x, weights=w, impl=impl))


@given_calls
def test_a_factor_of_two_in_the_weights_is_exact(impl, inputs):
    if inputs.weights is None:
        return
    want = moments(inputs.x, weights=inputs.weights, impl=impl)
    found = moments(inputs.x, weights=4 * inputs.weights, impl=impl)
    assert torch.equal(found.count, 4 * want.count)
    assert torch.equal(found.mean, want.mean) and torch.equal(found.scatter, 4 * want.scatter)
