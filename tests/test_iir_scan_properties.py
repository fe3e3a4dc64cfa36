"""What ops.iir_scan must be whatever its sizes: linear, causal, a filter, and the sum or row of its parts."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit.ops import iir_scan, iir_scan_with_state
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import Size, assert_matches_reference
from fastkit.testing.iir_scan import expected_results, make_inputs, make_packed_inputs, make_state

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
def test_a_bank_is_the_sum_of_its_filters(impl, size, seed):
    x, a, b, gy = make_inputs(size, filters=1 + seed % 4, seed=seed)
    state, scan = make_state(x, a, seed=seed), {"chunk": size.chunk, "impl": impl}
    y, end = iir_scan_with_state(x, a, b, state, **scan)
    filters = zip(a.unbind(3), b.unbind(3), state.y.unbind(2), strict=True)
    alone = [iir_scan_with_state(x, a, b, state._replace(y=y), **scan) for a, b, y in filters]
    expected = expected_results(x, a, b, gy, state, chunk=size.chunk)
    assert_matches_reference(sum(y for y, _ in alone), *expected["y"])
    assert_matches_reference(y, *expected["y"])
    ends = torch.stack([end.y for _, end in alone], 2)
    assert_matches_reference(ends, *expected["end_y"])
    assert_matches_reference(end.y, *expected["end_y"])
    assert all(torch.equal(end.x, end_f.x) for _, end_f in alone)


@given_calls
def test_the_state_carries_on(impl, size, seed):
    """Cut where a chunk ends, or anywhere if there is one filter."""
    x, a, b, gy = make_inputs(size, seed=seed)
    state = make_state(x, a, seed=seed)
    whole = a.shape[2] == 1
    cut = seed % (size.T + 1) if whole else size.chunk * (seed % a.shape[2])
    chunk = None if whole else size.chunk
    k = slice(None) if whole else slice(0, cut // size.chunk)
    rest = slice(None) if whole else slice(cut // size.chunk, None)
    options = {"chunk": chunk, "impl": impl}
    y1, between = iir_scan_with_state(x[..., :cut], a[:, :, k], b[:, :, k], state, **options)
    y2, end = iir_scan_with_state(x[..., cut:], a[:, :, rest], b[:, :, rest], between, **options)
    expected = expected_results(x, a, b, gy, state, chunk=chunk)
    assert_matches_reference(torch.cat([y1, y2], -1), *expected["y"])
    assert_matches_reference(end.y, *expected["end_y"])
    newest_first = torch.cat([state.x.flip(-1), x], -1)[..., -2:].flip(-1)
    assert torch.equal(end.x, newest_first)


@given_calls
def test_packed_is_a_loop_over_sequences(impl, size, seed):
    """Of one channel to 20, lengths from nothing on."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, size.T + 1, (2 + seed % 5,), generator=generator).tolist()
    filters = None if seed % 2 else 2
    x, a, b, gy, offsets = make_packed_inputs([*lengths, 1], size.C, size.chunk, filters=filters, seed=seed)
    state, options = make_state(x, a, offsets), {"chunk": size.chunk}
    y, end = iir_scan_with_state(x, a, b, state, cu_seqlens=offsets, impl=impl, **options)
    expected = expected_results(x, a, b, gy, state, cu_seqlens=offsets, **options)
    assert_matches_reference(y, *expected["y"])
    assert_matches_reference(end.y, *expected["end_y"])
    assert torch.equal(end.x.double(), expected["end_x"].value)


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
