"""reference.iir_scan against scipy, itself in parts, and the oracle; the budgets of every mode."""

import itertools
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import pad

from fastkit.reference import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.testing import Size, assert_matches_reference, sizes
from fastkit.testing.iir_scan import check, expected_results, make_inputs, make_packed_inputs, make_state

assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
double = {"dtype": torch.float64}


def assert_same_state(state, expected):
    for part, want in zip(state, expected, strict=True):
        assert torch.equal(part, want)


# Against scipy and a state-space model


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_is_lfilter_chunk_by_chunk(chunk, carry):
    """The state enters the first chunk in any case; without carry, the others start from zero."""
    signal = pytest.importorskip("scipy.signal", reason="compares with scipy.signal.lfilter")
    x, a, b, _ = make_inputs(Size(1, 1, 10, chunk), **double)
    state = make_state(x, a)
    xs, ys = state.x[0, 0].tolist(), state.y[0, 0].tolist()  # newest first
    for k, piece in enumerate(x[0, 0].split(chunk or 10)):
        if not carry and k > 0:
            xs, ys = [0.0, 0.0], [0.0, 0.0]
        numerator, denominator = b[0, 0, k].numpy(), [1.0, *a[0, 0, k].tolist()]
        history = signal.lfiltic(numerator, denominator, ys[:2], xs[:2])
        filtered, _ = signal.lfilter(numerator, denominator, piece.numpy(), zi=history)
        y, end = iir_scan_with_state(
            x[..., : k * (chunk or 10) + len(piece)],
            a[:, :, : k + 1],
            b[:, :, : k + 1],
            state,
            chunk=chunk,
            carry=carry,
        )
        assert_close(y[0, 0, -len(piece) :], torch.from_numpy(filtered))
        xs, ys = piece.tolist()[::-1] + xs, filtered.tolist()[::-1] + ys
        assert_close(end.y[0, 0], torch.tensor(ys[:2], **double))
        assert_close(end.x[0, 0], torch.tensor(xs[:2], **double))


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 0, 40), (2, 0)], ids=str)
def test_sosfilt_is_scipys(shape):
    signal = pytest.importorskip("scipy.signal", reason="compares with scipy.signal.sosfilt")
    sos = torch.from_numpy(signal.butter(5, 0.2, output="sos"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), **double)
    if x.numel() == 0:
        assert sosfilt(x, sos).shape == shape
        return
    expected = torch.from_numpy(signal.sosfilt(sos.numpy(), x.numpy()))
    assert_close(sosfilt(x, sos), expected)
    assert_close(sosfilt(x, sos * torch.tensor([[2.0], [-3.0], [0.5]])), expected)  # a0 is divided out


def test_a_diagonal_state_space_model_is_a_bank():
    """s[t] = poles s[t-1] + B x[t], y = 2 Re(C s) + D x with N complex modes: N biquads, D in one of them."""
    N, T, D = 5, 60, 0.7
    generator = torch.Generator().manual_seed(0)
    radius, angle = torch.rand(2, N, generator=generator, **double)
    poles = torch.polar(radius, 3 * angle)
    B, C = torch.randn(2, N, generator=generator, dtype=torch.complex128)
    x = torch.randn(T, generator=generator, **double)

    s = torch.zeros(N, dtype=torch.complex128)
    expected = torch.zeros_like(x)
    for t in range(T):
        s = poles * s + B * x[t]
        expected[t] = 2 * (C * s).sum().real + D * x[t]

    a = torch.stack([-2 * poles.real, poles.abs() ** 2], -1)
    skip = torch.zeros(N, **double)
    skip[0] = D
    numerator = [2 * (C * B).real, -2 * (C * B * poles.conj()).real, torch.zeros_like(skip)]
    b = torch.stack(numerator, -1) + skip.unsqueeze(-1) * torch.cat([torch.ones(N, 1), a], -1)
    assert_close(iir_scan(x[None, None], a[None, None, None], b[None, None, None])[0, 0], expected)


# Against itself in parts


@pytest.mark.parametrize("carry", [True, False])
def test_a_bank_is_the_sum_of_its_filters(carry):
    x, a, b, _ = make_inputs(Size(2, 3, 11, 4), filters=3, **double)
    state = make_state(x, a)
    y, end = iir_scan_with_state(x, a, b, state, chunk=4, carry=carry)
    outputs, ends = zip(
        *(
            iir_scan_with_state(
                x, a[..., f, :], b[..., f, :], IIRState(state.y[:, :, f], state.x), chunk=4, carry=carry
            )
            for f in range(3)
        ),
        strict=True,
    )
    assert_close(y, sum(outputs))
    for f in range(3):
        assert_same_state(IIRState(end.y[:, :, f], end.x), ends[f])


@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_packed_is_a_call_a_sequence(chunk, carry, filters):
    lengths = [4, 0, 1, 7, 0]
    x, a, b, _, cu_seqlens = make_packed_inputs(lengths, 3, chunk, filters=filters, **double)
    state = make_state(x, a, cu_seqlens)
    for a_, b_ in [(a, b), (a[:, :, :1], b)] if chunk is None else [(a, b)]:
        y, end = iir_scan_with_state(x, a_, b_, state, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)
        k = 0
        for s, (begin, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            chunks = 1 if chunk is None else -(-(stop - begin) // chunk)
            y_s, end_s = iir_scan_with_state(
                x[..., begin:stop],
                a_ if chunk is None and a_.shape[2] == 1 else a_[:, :, k : k + chunks],
                b_[:, :, k : k + chunks],
                IIRState(state.y[s : s + 1], state.x[s : s + 1]),
                chunk=chunk,
                carry=carry,
            )
            assert torch.equal(y[..., begin:stop], y_s)
            assert_same_state(IIRState(end.y[s : s + 1], end.x[s : s + 1]), end_s)
            k += chunks
        assert k == b_.shape[2]


def test_packing_no_sequence():
    y, end = iir_scan_with_state(
        torch.zeros(1, 3, 0), torch.zeros(1, 1, 1, 2, 2), cu_seqlens=torch.zeros(1, dtype=torch.int64)
    )
    assert (y.shape, end.y.shape, end.x.shape) == ((1, 3, 0), (0, 3, 2, 2), (0, 3, 2))


@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("cut", range(6))
def test_cut_anywhere(cut, chunk, filters):
    """The state handed over: to and from parts without samples and of one sample, too."""
    x, a, b, _ = make_inputs(Size(2, 3, 5, chunk), filters=filters, **double)
    start = make_state(x, a)
    y, end = iir_scan_with_state(x, a, b, start, chunk=chunk)
    before, after = (slice(None), slice(None)) if chunk is None else (slice(cut), slice(cut, None))
    first, state = iir_scan_with_state(x[..., :cut], a[:, :, before], b[:, :, before], start, chunk=chunk)
    rest, state = iir_scan_with_state(x[..., cut:], a[:, :, after], b[:, :, after], state, chunk=chunk)
    assert torch.equal(torch.cat([first, rest], -1), y)
    assert_same_state(state, end)


@pytest.mark.parametrize("filters", [None, 2])
def test_steps_are_a_scan(filters):
    x, a, b, _ = make_inputs(Size(2, 3, 5, 1), filters=filters, **double)
    state = make_state(x, a)
    for numerator in (b, None):
        y, end = iir_scan_with_state(x, a, numerator, state, chunk=1)
        now, ys = state, []
        for t in range(5):
            b_t = None if numerator is None else numerator[:, :, t]
            y_t, now = iir_step(x[..., t], a[:, :, t], b_t, now)
            ys.append(y_t)
        assert torch.equal(torch.stack(ys, -1), y)
        assert_same_state(now, end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_stored(dtype):
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), dtype=dtype)
    state = make_state(x, a)
    y, end = iir_scan_with_state(x, a, b, state, chunk=4)
    y_float32, end_float32 = iir_scan_with_state(x.float(), a, b, state, chunk=4)
    assert y.dtype == dtype and torch.equal(y, y_float32.to(dtype))
    assert_same_state(end, end_float32)
    assert end.y.dtype == end.x.dtype == torch.float32


@pytest.mark.parametrize("numerator", [True, False])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(
    ("lengths", "chunk", "filters"),
    [([7], 3, None), ([5], 1, 2), ([1], None, 2), ([4, 0, 1, 3], 3, 2), ([4, 0, 1, 3], None, None)],
    ids=["chunks", "chunk1-bank", "one-sample", "packed-bank", "packed"],
)
def test_gradcheck(lengths, chunk, filters, carry, numerator):
    x, a, b, _, cu_seqlens = make_packed_inputs(lengths, 2, chunk, filters=filters, **double)
    cu_seqlens = None if len(lengths) == 1 else cu_seqlens
    inputs = [x, a, *make_state(x, a, cu_seqlens), *([b] if numerator else [])]

    def scan(x, a, y_state, x_state, b=None):
        state = IIRState(y_state, x_state)
        y, end = iir_scan_with_state(x, a, b, state, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)
        return y, *end

    assert gradcheck(scan, [t.requires_grad_() for t in inputs])


# The oracle


def assert_oracle_is_the_reference(x, a, b, gy, **options):
    """The recursion and its adjoint, written out, against autograd through the reference."""
    state, gend = (make_state(x, a, options.get("cu_seqlens"), seed=seed) for seed in (1, 2))
    inputs = {"gx": x, "ga": a, "gb": b, "gstate_y": state.y, "gstate_x": state.x}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    before = IIRState(leaves["gstate_y"], leaves["gstate_x"])
    y, end = iir_scan_with_state(leaves["gx"], leaves["ga"], leaves.get("gb"), before, **options)
    gradients = torch.autograd.grad((y, *end), list(leaves.values()), (gy, *gend), materialize_grads=True)
    results = {"y": y, "end_y": end.y, "end_x": end.x, **dict(zip(leaves, gradients, strict=True))}
    expected = expected_results(x, a, b, gy, state, gend, **options)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name].value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("numerator", [True, False])
@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("size", [Size(2, 3, 0, 4), *sizes("iir_scan")[:12]], ids=str)
def test_the_oracle_is_the_reference(size, filters, numerator, carry):
    x, a, b, gy = make_inputs(size, filters=filters, radius=0.5, **double)
    a, b = a[:, :1], b[:1] if numerator else None
    assert_oracle_is_the_reference(x, a, b, gy, chunk=size.chunk, carry=carry)


@pytest.mark.parametrize(("chunk", "carry"), [(None, True), (3, True), (3, False)])
@pytest.mark.parametrize("filters", [None, 3])
def test_the_oracle_of_packed_sequences_is_the_reference(filters, chunk, carry):
    packed = make_packed_inputs([4, 0, 1, 7], 3, chunk, filters=filters, **double)
    x, a, b, gy, cu_seqlens = packed
    for some in (b, None):
        assert_oracle_is_the_reference(x, a, some, gy, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)
    if chunk is None:
        assert_oracle_is_the_reference(x, a[:, :, :1], b, gy, cu_seqlens=cu_seqlens)


# The budgets of states, banks and packed sequences


CALLS = {
    "state": (Size(3, 5, 33, 16), None),
    "bank": (Size(2, 8, 33, None), 3),
    "chunk1-bank": (Size(3, 5, 33, 1), 2),
    "one-sample": (Size(3, 11, 1, None), 2),
    "last-chunk-of-one": (Size(3, 5, 33, 4), None),
}


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_budget_accepts_the_reference(call, dtype, carry):
    size, filters = CALLS[call]
    radius = 0.5 if dtype == torch.float16 else 0.9  # filters that change every sample would overflow
    x, a, b, gy = make_inputs(size, filters=filters, radius=radius, dtype=dtype)
    state = make_state(x, a)
    results = check(x, a, b, gy, state=state, chunk=size.chunk, carry=carry, impl="reference")
    names = ["y", "end_y", "end_x", "gx", "ga", "gb", "gstate_y", "gstate_x"]
    assert list(results) == names
    assert list(check(x, a, with_state=True, chunk=size.chunk, carry=carry, impl="reference")) == names[:5]


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_budget_accepts_packed_sequences(chunk, filters, carry):
    x, a, b, gy, cu_seqlens = make_packed_inputs([9, 0, 1, 33, 2], 8, chunk, filters=filters)
    state = make_state(x, a, cu_seqlens)
    options = {"chunk": chunk, "carry": carry, "cu_seqlens": cu_seqlens, "impl": "reference"}
    check(x, a, b, gy, state=state, **options)
    check(x, a, **options)
    if chunk is None:
        check(x, a[:, :, :1], b[:, :1], gy, **options)


def oldest_first(x, a, b, state, **options):
    y, end = iir_scan_with_state(x, a, b, state, **options)
    return y, IIRState(end.y.flip(-1), end.x)


def forgotten_x_state(x, a, b, state, **options):
    return iir_scan_with_state(x, a, b, IIRState(state.y, 0 * state.x), **options)


def detached_state(x, a, b, state, **options):
    return iir_scan_with_state(x, a, b, IIRState(state.y.detach(), state.x), **options)


def detached_end(x, a, b, state, **options):
    y, end = iir_scan_with_state(x, a, b, state, **options)
    return y, IIRState(end.y, end.x.detach() + 0 * x.sum())


def rounded_end(x, a, b, state, **options):
    y, end = iir_scan_with_state(x, a, b, state, **options)
    return y, IIRState(end.y.half().float(), end.x)


def state_forgotten_without_carry(x, a, b, state, *, carry, **options):
    y, end = iir_scan_with_state(x, a, b, None if not carry else state, carry=carry, **options)
    return y, IIRState(end.y + 0 * state.y, end.x + 0 * state.x)


def filters_swapped_in_the_state(x, a, b, state, **options):
    y, end = iir_scan_with_state(x, a, b, state, **options)
    return y, IIRState(end.y.flip(2), end.x)


def a_filter_short(x, a, b, state, **options):
    y, end = iir_scan_with_state(x, a, b, state, **options)
    return y - 1e-3 * iir_scan(x, a[:, :, :, :1], b[:, :, :, :1], **options), end


@pytest.mark.parametrize(
    ("bug", "result"),
    [
        (oldest_first, "end_y"),
        (forgotten_x_state, "y"),
        (detached_state, "gstate_y"),
        (detached_end, "gx"),
        (rounded_end, "end_y"),
        (state_forgotten_without_carry, "y"),
        (filters_swapped_in_the_state, "end_y"),
        (a_filter_short, "y"),
    ],
)
def test_budget_rejects(bug, result, monkeypatch):
    x, a, b, gy = make_inputs(Size(2, 3, 33, 16), filters=2)
    planted = lambda *inputs, impl, **options: bug(*inputs, **options)  # noqa: E731
    monkeypatch.setattr("fastkit.ops.iir_scan_with_state", planted)
    with pytest.raises(AssertionError, match=f"^{result}: "):
        check(x, a, b, gy, state=make_state(x, a), chunk=16, carry=False)


def test_budget_rejects_chunks_that_do_not_restart(monkeypatch):
    """Chunks counted over all samples, not from each sequence's first."""
    x, a, b, gy, cu_seqlens = make_packed_inputs([16, 17, 16], 4, 16)

    def running_on(x, a, b, *, impl, cu_seqlens, **options):
        return iir_scan(x, a, b, **options)

    check(x, a, b, gy, chunk=16, carry=False, cu_seqlens=cu_seqlens, impl="reference")
    monkeypatch.setattr("fastkit.ops.iir_scan", running_on)
    with pytest.raises(AssertionError, match=r"^y: "):
        check(x, a, b, gy, chunk=16, carry=False, cu_seqlens=cu_seqlens)


def test_budget_of_ga_knows_whether_y_was_stored():
    """That of one filter may read y in half precision; a bank computes its y again, in float32."""
    x, a, b, gy = make_inputs(Size(4, 8, 64, 16), dtype=torch.bfloat16)
    u = iir_scan(x.float(), torch.zeros_like(a), b, chunk=16).requires_grad_()
    y = iir_scan(u, a, chunk=16)
    (l,) = torch.autograd.grad(y, u, gy.float())  # noqa: E741
    stored = y.detach().bfloat16().float()
    past = torch.stack([pad(stored, (lag, 0))[..., :64] for lag in (1, 2)], -1)
    ga = -(l.unsqueeze(-1) * past).unflatten(2, (4, 16)).sum(3)
    assert_matches_reference(ga, *expected_results(x, a, b, gy, chunk=16)["ga"])
    # Two halves of the filter, each with half of its y.
    of_bank = expected_results(x, torch.stack([a, a], 3), torch.stack([b, b], 3) / 2, gy, chunk=16)["ga"]
    with pytest.raises(AssertionError, match="over budget"):
        assert_matches_reference(torch.stack([ga, ga], 3) / 2, *of_bank)
