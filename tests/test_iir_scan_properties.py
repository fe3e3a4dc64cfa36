"""What ops.iir_scan must be whatever its sizes: linear, causal, a filter, and chunk by chunk."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit.ops import iir_scan
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import Size, assert_matches_reference
from fastkit.testing.iir_scan import expected_results, make_inputs

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def given_calls(test):
    """Runs ``test`` on many sizes, in float64; always the same ones."""
    size = strategies.builds(
        Size,
        B=strategies.integers(1, 3),
        C=strategies.integers(1, 20),
        T=strategies.integers(1, 40),
        chunk=strategies.one_of(strategies.none(), strategies.integers(1, 45)),
    )
    settings = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(size=size, seed=strategies.integers(0, 1000))(test))


def filtered_by(impl, chunk, **options):
    return lambda x, a, b: iir_scan(x, a, b, chunk=chunk, impl=impl, **options)


@given_calls
def test_linear_in_x(impl, size, seed):
    x, a, b, z = make_inputs(size, dtype=torch.float64, seed=seed)
    scan = filtered_by(impl, size.chunk)
    torch.testing.assert_close(scan(2 * x - z, a, b), 2 * scan(x, a, b) - scan(z, a, b))


@given_calls
def test_causal(impl, size, seed):
    """A change of x[t] changes y from t on, and before t not a bit."""
    x, a, b, z = make_inputs(size, seed=seed)
    t = seed % size.T
    changed = x.clone()
    changed[..., t] += z[..., t]
    y, y_changed = (filtered_by(impl, size.chunk)(signal, a, b) for signal in (x, changed))
    assert torch.equal(y[..., :t], y_changed[..., :t])
    assert (y[..., t] != y_changed[..., t]).all()


@given_calls
def test_carry_with_equal_coefficients_is_one_filter(impl, size, seed):
    x, a, b, gy = make_inputs(size, dtype=torch.float64, seed=seed)
    y = filtered_by(impl, size.chunk)(x, a[:, :, :1].expand(a.shape), b[:, :, :1].expand(b.shape))
    expected = expected_results(x, a[:, :, :1], b[:, :, :1], gy)["y"]
    assert_matches_reference(y, *expected)


@given_calls
def test_reset_is_each_chunk_apart(impl, size, seed):
    x, a, b, gy = make_inputs(size, seed=seed)
    pieces = zip(x.split(size.chunk or size.T, -1), a.split(1, 2), b.split(1, 2), strict=True)
    apart = torch.cat([filtered_by(impl, None)(*piece) for piece in pieces], -1)
    expected = expected_results(x, a, b, gy, chunk=size.chunk, carry=False)["y"]
    assert_matches_reference(apart, *expected)
    assert_matches_reference(filtered_by(impl, size.chunk, carry=False)(x, a, b), *expected)


@given_calls
def test_one_filter_is_lfilter(impl, size, seed):
    signal = pytest.importorskip("scipy.signal")
    x, a, b, _ = make_inputs(size._replace(chunk=None), dtype=torch.float64, seed=seed)
    y = filtered_by(impl, None)(x, a, b)
    for row in range(size.B):
        for channel in range(size.C):
            numerator, denominator = b[row, channel, 0], torch.cat([torch.ones(1), a[row, channel, 0]])
            expected = signal.lfilter(numerator, denominator, x[row, channel])
            torch.testing.assert_close(y[row, channel], torch.from_numpy(expected))
