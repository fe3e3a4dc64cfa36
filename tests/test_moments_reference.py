"""reference.moments against NumPy, in two passes of extended precision; the budgets of its results."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastkit.reference import Moments, merge_moments, moments
from fastkit.testing import assert_matches_reference
from fastkit.testing.moments import SIZES, RowsSize, check, expected_of_stream, expected_results, make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
WEIGHTS = None, "positive", "some"


def in_two_passes(x, weights):
    """count, mean, scatter: row by row, longer than float64 where the machine has that."""
    x = x.astype(np.longdouble)
    w = np.ones(len(x), np.longdouble) if weights is None else weights.astype(np.longdouble)
    count = w.sum()
    mean = sum((wi * xi for wi, xi in zip(w, x, strict=True)), np.zeros(x.shape[1])) / (count or 1)
    scatter = np.zeros((x.shape[1], x.shape[1]), np.longdouble)
    for wi, xi in zip(w, x, strict=True):
        scatter += wi * np.outer(xi - mean, xi - mean)
    return count, mean, scatter


def tensor(array):
    return torch.from_numpy(np.asarray(array, np.float64))


# Against NumPy


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", SIZES[:11], ids=str)
def test_is_the_formula_in_numpy(size, weights, offset):
    inputs = make_inputs(size, weights=weights, offset=offset, dtype=torch.float64)
    count, mean, scatter = in_two_passes(
        inputs.x.numpy(), None if inputs.weights is None else inputs.weights.numpy()
    )
    found = moments(inputs.x, weights=inputs.weights)
    budgets = expected_results(inputs)
    assert found.count.dtype == torch.float64 and found.count.shape == ()
    assert_matches_reference(found.count, tensor(count), budgets["count"].budget, name="count")
    assert_matches_reference(found.mean, tensor(mean), budgets["mean"].budget, name="mean")
    assert_matches_reference(found.scatter, tensor(scatter), budgets["scatter"].budget, name="scatter")


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_covariance_is_that_of_numpy(correction):
    x = make_inputs(RowsSize(17, 5), dtype=torch.float64, offset=3.0).x
    repeated = torch.arange(17) % 4
    whole = moments(x)
    assert whole.count == 17
    if correction != 2.5:
        expected = tensor(np.cov(x.numpy().T, ddof=correction))
        assert torch.allclose(whole.covariance(correction), expected, rtol=1e-13)
        assert torch.allclose(whole.covariance(correction), torch.cov(x.T, correction=correction), rtol=1e-13)
        expected = tensor(np.cov(x.numpy().T, fweights=repeated.numpy(), ddof=correction))
        assert torch.allclose(
            moments(x, weights=repeated.double()).covariance(correction), expected, rtol=1e-13
        )
    assert torch.equal(whole.covariance(correction), whole.scatter / (17 - correction))
    assert torch.equal(whole.covariance(), whole.covariance(1))


def test_weights_of_reliability_take_another_correction():
    """NumPy's aweights, and PyTorch's: what is subtracted from the sum is sum(w^2) / sum(w)."""
    x, w, *_ = make_inputs(RowsSize(17, 5), weights="positive", dtype=torch.float64)
    found = moments(x, weights=w)
    assert torch.allclose(
        found.covariance(0), tensor(np.cov(x.numpy().T, aweights=w.numpy(), ddof=0)), rtol=1e-13
    )
    reliable = found.covariance(float(w.square().sum() / w.sum()))
    assert torch.allclose(reliable, tensor(np.cov(x.numpy().T, aweights=w.numpy())), rtol=1e-13)
    assert torch.allclose(reliable, torch.cov(x.T, aweights=w), rtol=1e-13)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_second_moment_is_the_mean_of_products(weights):
    x, w, *_ = make_inputs(RowsSize(17, 5), weights=weights, dtype=torch.float64, offset=2.0)
    rows = torch.ones(17, dtype=torch.float64) if w is None else w
    expected = (rows.unsqueeze(1) * x).T @ x / rows.sum()
    assert torch.allclose(moments(x, weights=w).second_moment(), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_as_it_is_read(dtype):
    x, w, *_ = make_inputs(RowsSize(31, 9), weights="some", dtype=dtype)
    for weights in (None, w, w.float()):
        raised = None if weights is None else weights.float()
        for found, want in zip(moments(x, weights=weights), moments(x.float(), weights=raised), strict=True):
            assert torch.equal(found, want)


def test_nothing_has_moments_of_zero():
    for found in (moments(torch.empty(0, 3)), moments(torch.ones(4, 3), weights=torch.zeros(4))):
        assert found.count == 0 and found.count.dtype == torch.float64
        assert torch.equal(found.mean, torch.zeros(3)) and torch.equal(found.scatter, torch.zeros(3, 3))


# Gradients


@pytest.mark.parametrize("weights", [False, True])
def test_gradcheck(weights):
    x, w, *_ = make_inputs(RowsSize(5, 3), weights="positive", dtype=torch.float64)
    if weights:
        given = (x.requires_grad_(), w.requires_grad_())
        call = lambda x, w: moments(x, weights=w)  # noqa: E731
    else:
        given = (x.requires_grad_(),)
        call = lambda x: moments(x)[1:]  # noqa: E731
    assert gradcheck(call, given) and gradgradcheck(call, given)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_oracle_is_the_reference(size, weights):
    """Gradients written out against autograd."""
    check(make_inputs(size, weights=weights, dtype=torch.float64, offset=1.0), impl="reference")


# Budgets accept every honest order


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_accepts_the_reference(dtype, weights):
    for size, offset in itertools.product((SIZES[8], SIZES[12]), (0.0, -30.0)):
        check(make_inputs(size, weights=weights, dtype=dtype, offset=offset), impl="reference")


def row_by_row(x, w):
    """West's updates: the mean moves with each row."""
    count, mean, scatter = torch.zeros(()), torch.zeros_like(x[0]), torch.zeros(x.shape[1], x.shape[1])
    for row, weight in zip(x, w, strict=True):
        count = count + weight
        before = row - mean
        mean = mean + before * (weight / count.clamp_min(1e-30))
        scatter = scatter + weight * torch.outer(before, row - mean)
    return Moments(w.sum(dtype=torch.float64), mean, (scatter + scatter.T) / 2)


def in_two_passes_of_float32(x, w):
    count = w.sum()
    mean = (w @ x) / count
    centred = x - mean
    return Moments(w.sum(dtype=torch.float64), mean, (w.unsqueeze(1) * centred).T @ centred)


def shifted_by_the_first_rows(x, w):
    """One pass, and a correction at the end."""
    shift = x[:8].mean(0)
    shifted, count = x - shift, w.sum()
    off = (w @ shifted) / count
    scatter = (w.unsqueeze(1) * shifted).T @ shifted - count * torch.outer(off, off)
    return Moments(w.sum(dtype=torch.float64), shift + off, scatter)


def blocks_merged(x, w):
    """Blocks of 24 rows in float32, about means of their own; their sum in float64, rounded once."""
    total = moments(x[:0].double())
    for rows, weights in zip(x.split(24), w.split(24), strict=True):
        total = merge_moments(total, Moments(*(t.double() for t in moments(rows, weights=weights))))
    return Moments(total.count, total.mean.float(), total.scatter.float())


def by_roots_of_weights(x, w):
    count = w.sum()
    centred = w.sqrt().unsqueeze(1) * (x - (w @ x) / count)
    return Moments(w.sum(dtype=torch.float64), (w @ x) / count, centred.T @ centred)


def assert_within_budget(found, inputs):
    expected = expected_results(inputs)
    for name, result in found._asdict().items():
        assert_matches_reference(result, *expected[name], name=name)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [SIZES[i] for i in (6, 8, 10, 12)], ids=str)
@pytest.mark.parametrize(
    "order",
    [
        row_by_row,
        in_two_passes_of_float32,
        shifted_by_the_first_rows,
        blocks_merged,
        by_roots_of_weights,
    ],
)
def test_budget_accepts_another_order(order, size, weights):
    if order is shifted_by_the_first_rows and weights == "some":
        return  # rows that have no weight may lie far from the mean: a shift has to be a weighted one
    inputs = make_inputs(size, weights=weights, offset=0.5)
    w = torch.ones(size.N) if inputs.weights is None else inputs.weights
    assert_within_budget(order(inputs.x, w), inputs)


# and reject planted faults


def not_shifted(x, w):
    count, mean, _ = moments(x, weights=w)
    scatter = (w.unsqueeze(1) * x).T @ x - w.sum() * torch.outer(mean, mean)
    return Moments(count, mean, scatter)


def last_row_forgotten(x, w):
    return moments(x[:-1], weights=w[:-1])


def divided_by_one_less(x, w):
    count, mean, scatter = moments(x, weights=w)
    return Moments(count, mean * (count / (count - 1)).float(), scatter)


def weights_squared(x, w):
    return moments(x, weights=w * w)


def weights_ignored(x, w):
    return moments(x)


def scatter_divided(x, w):
    count, mean, scatter = moments(x, weights=w)
    return Moments(count, mean, scatter / count)


def shift_not_corrected(x, w):
    shifted = x - x[:8].mean(0)
    count, mean, _ = moments(x, weights=w)
    return Moments(count, mean, (w.unsqueeze(1) * shifted).T @ shifted)


def blocks_added(x, w):
    """Without the scatter between their means."""
    scatter = sum(moments(*some).scatter for some in ((x[:24],), (x[24:],)))
    return Moments(*moments(x, weights=w)[:2], scatter)


def one_wrong_element(x, w):
    count, mean, scatter = moments(x, weights=w)
    off = torch.zeros_like(scatter)
    off[3, 2] = 1e-4 * scatter.diagonal().min()
    return Moments(count, mean, scatter + off)


def transposed_half_forgotten(x, w):
    count, mean, scatter = moments(x, weights=w)
    return Moments(count, mean, scatter.tril())


def small_gain(x, w):
    count, mean, scatter = moments(x, weights=w)
    return Moments(count, mean, scatter * (1 + 5e-6))


def in_half_precision(x, w):
    return moments(x.bfloat16(), weights=w)


@pytest.mark.parametrize(
    ("fault", "result"),
    [
        (not_shifted, "scatter"),
        (last_row_forgotten, "count"),
        (divided_by_one_less, "mean"),
        (weights_squared, "count"),
        (weights_ignored, "count"),
        (scatter_divided, "scatter"),
        (shift_not_corrected, "scatter"),
        (blocks_added, "scatter"),
        (one_wrong_element, "scatter"),
        (transposed_half_forgotten, "scatter"),
        (small_gain, "scatter"),
        (in_half_precision, "mean"),
    ],
)
def test_budget_rejects(fault, result):
    inputs = make_inputs(RowsSize(65, 25), weights="positive", offset=1000.0)
    with pytest.raises(AssertionError, match=f"^{result}: "):
        assert_within_budget(fault(inputs.x, inputs.weights), inputs)


# Merging


@pytest.mark.parametrize("cuts", [(7, 10), (1, 16), (16, 1), (0, 17), (17, 0)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_merged_is_whole(weights, cuts):
    inputs = make_inputs(RowsSize(17, 5), weights=weights, dtype=torch.float64)
    n = cuts[0]
    w = (None, None) if inputs.weights is None else (inputs.weights[:n], inputs.weights[n:])
    merged = merge_moments(moments(inputs.x[:n], weights=w[0]), moments(inputs.x[n:], weights=w[1]))
    expected = expected_of_stream(inputs, cuts, torch.float64)
    assert torch.allclose(merged.count, expected_results(inputs)["count"].value, rtol=1e-15)
    assert_matches_reference(merged.mean, *expected["mean"], name="mean")
    assert_matches_reference(merged.scatter, *expected["scatter"], name="scatter")
