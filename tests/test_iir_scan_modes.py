"""Banks, states, packed sequences and single steps, in every implementation that runs here."""

import pytest
import torch

from fastkit import reference
from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step
from fastkit.ops.iir_scan_autograd import step_of_scan
from fastkit.testing import Size, assert_matches_reference
from fastkit.testing.iir_scan import check, expected_results, make_inputs, make_packed_inputs, make_state

pytestmark = pytest.mark.native

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def channels_last(*signals):
    return [t.mT.contiguous().mT for t in signals]


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# Banks


# (dtype, carry, numerator)
OPTIONS = [
    (torch.float32, True, True),
    (torch.float32, False, False),
    (torch.float64, True, False),
    (torch.float64, False, True),
    (torch.bfloat16, True, True),
    (torch.bfloat16, False, False),
    (torch.float16, True, False),
    (torch.float16, False, True),
]


def inputs_of_options(size, filters):
    """x, a, b or None, gy and carry for each of the options."""
    for dtype, carry, numerator in OPTIONS:
        radius = 0.5 if size.chunk == 1 else 0.9  # filters that change with every sample may grow
        x, a, b, gy = make_inputs(size, filters=filters, dtype=dtype, radius=radius)
        yield x, a, b if numerator else None, gy, carry


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 16, 128])
@pytest.mark.parametrize("filters", [1, 2, 3, 5])
def test_bank(kernel, filters, chunk, layout):
    for x, a, b, gy, carry in inputs_of_options(Size(2, 17, 37, chunk), filters):
        if layout == "channels_last":
            x, gy = channels_last(x, gy)
        check(x, a, b, gy, chunk=chunk, carry=carry, impl=kernel)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("chunk", [None, 100, 128, 200])
@pytest.mark.parametrize("filters", [2, 3])
def test_bank_across_borders(native, filters, chunk, layout):
    """Backward starts again every 128 samples of a chunk from states that forward has kept."""
    for x, a, b, gy, carry in inputs_of_options(Size(1, 9, 300, chunk), filters):
        if layout == "channels_last":
            x, gy = channels_last(x, gy)
        a, b = a[:1, :1], None if b is None else b[:1, :1]  # the oracle has a matrix for each
        check(x, a, b, gy, state=make_state(x, a), chunk=chunk, carry=carry, impl=native)


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 3, 4, 0, 2), (2, 0, 1, 4, 3)], ids=str
)
@pytest.mark.parametrize("shared", ["alone", "batch", "channels", "both"])
def test_layout_and_sharing_of_a_bank(impl, shared, order):
    x, a, b, gy = make_inputs(Size(2, 11, 33, 16), filters=3)
    rows = {"alone": (2, 11), "batch": (1, 11), "channels": (2, 1), "both": (1, 1)}[shared]
    back = [order.index(dim) for dim in range(5)]
    a, b = (c[: rows[0], : rows[1]].permute(order).contiguous().permute(back) for c in (a, b))
    check(x, a, b, gy, chunk=16, impl=impl)
    check(*channels_last(x), a, b[:1, :1], gy, chunk=16, impl=impl)


@pytest.mark.parametrize("filters", [15, 33])
def test_large_bank(impl, filters):
    x, a, b, gy = make_inputs(Size(1, 5, 20, 16), filters=filters)
    check(x, a, b, gy, state=make_state(x, a), chunk=16, impl=impl)


def test_a_bank_of_one_is_its_filter(impl):
    x, a, b, gy = make_inputs(Size(2, 17, 33, 16))
    state = make_state(x, a)

    def run(a, b, state):
        leaves = [t.detach().requires_grad_() for t in (x, a, b, *state)]
        y, end = iir_scan_with_state(*leaves[:3], IIRState(*leaves[3:]), chunk=16, impl=impl)
        return [y, *end, *torch.autograd.grad((y, *end), leaves, (gy, end.y.detach(), end.x.detach()))]

    y, end_y, end_x, gx, ga, gb, gstate_y, gstate_x = run(
        a.unsqueeze(3), b.unsqueeze(3), IIRState(state.y.unsqueeze(2), state.x)
    )
    of_bank = y, end_y.squeeze(2), end_x, gx, ga.squeeze(3), gb.squeeze(3), gstate_y.squeeze(2), gstate_x
    assert_all_equal(of_bank, run(a, b, state))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("filters", [None, 3])
def test_only_some_gradients(impl, filters, wanted):
    """Of x, a, b and the two parts of the state."""
    x, a, b, gy = make_inputs(Size(2, 3, 9, 4), filters=filters)
    inputs = x, a, b, *make_state(x, a)

    def run(wanted):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        y, end = iir_scan_with_state(*leaves[:3], IIRState(*leaves[3:]), chunk=4, impl=impl)
        ((y * gy).sum() + end.y.sum()).backward()
        return [leaf.grad for leaf in leaves]

    full = run(range(5))
    for i, grad in enumerate(run(wanted)):
        assert torch.equal(grad, full[i]) if i in wanted else grad is None


# States


@pytest.mark.parametrize(("chunk", "carry"), [(None, True), (1, True), (1, False), (16, True), (16, False)])
@pytest.mark.parametrize("time", [1, 2, 3, 33, 257])
@pytest.mark.parametrize("filters", [None, 3])
def test_state(kernel, filters, time, chunk, carry):
    radius = 0.5 if chunk == 1 else 0.9
    for dtype in (torch.float32,) if time == 257 else DTYPES:
        size = Size(2, 17 if time < 257 else 2, time, chunk)
        x, a, b, gy = make_inputs(size, filters=filters, dtype=dtype, radius=radius)
        options = {"chunk": chunk, "carry": carry, "impl": kernel}
        crossed = dtype == torch.float32
        for numerator in (b, None) if crossed else (b,):
            check(x, a, numerator, gy, state=make_state(x, a), **options)
        for numerator in (None, b) if crossed else (None,):
            check(*channels_last(x), a, numerator, *channels_last(gy), state=make_state(x, a), **options)
        check(x, a, b, gy, with_state=True, **options)


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("filters", [None, 2])
def test_split_anywhere_is_one_call(impl, filters, chunk):
    """What two calls give, gradients through the state between them too, is within the budget of one call."""
    x, a, b, gy = make_inputs(Size(2, 3, 30, chunk), filters=filters)
    state = make_state(x, a)
    leaves = [t.requires_grad_() for t in (x, a, b, *state)]
    gend = make_state(x, a, seed=1)
    expected = expected_results(x, a, b, gy, state, gend, chunk=chunk)
    for t in range(0, 31, chunk or 1):
        k = slice(None) if chunk is None else slice(0, t // chunk)
        rest = slice(None) if chunk is None else slice(t // chunk, None)
        options = {"chunk": chunk, "impl": impl}
        y1, between = iir_scan_with_state(
            x[..., :t], a[:, :, k], b[:, :, k], IIRState(*leaves[3:]), **options
        )
        y2, end = iir_scan_with_state(x[..., t:], a[:, :, rest], b[:, :, rest], between, **options)
        y = torch.cat([y1, y2], -1)
        gradients = torch.autograd.grad((y, *end), leaves, (gy, *gend))
        names = "y", "end_y", "end_x", "gx", "ga", "gb", "gstate_y", "gstate_x"
        for name, result in zip(names, (y, *end, *gradients), strict=True):
            assert_matches_reference(result, *expected[name], name=f"{name}, split at {t}")


@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("which", ["both", "y", "x"])
@pytest.mark.parametrize("time", [1, 2, 33, 300])
def test_cotangents_of_the_final_state_alone(impl, time, which, filters):
    """y is not used: no cotangent comes for it, which is one of zeros."""
    if impl == "reference" and time == 300:
        pytest.skip("so many samples are for the kernels' tiles")
    x, a, b, _ = make_inputs(Size(1, 2, time, None), filters=filters)
    state, gend = make_state(x, a), make_state(x, a, seed=1)
    if which != "both":
        gend = gend._replace(
            **{"x" if which == "y" else "y": torch.zeros_like(gend.x if which == "y" else gend.y)}
        )
    leaves = [t.requires_grad_() for t in (x, a, b, *state)]
    _, end = iir_scan_with_state(*leaves[:3], IIRState(*leaves[3:]), impl=impl)
    outputs = {"both": tuple(end), "y": (end.y,), "x": (end.x,)}[which]
    cotangents = {"both": tuple(gend), "y": (gend.y,), "x": (gend.x,)}[which]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    expected = expected_results(x, a, b, torch.zeros_like(x), state, gend)
    for name, gradient in zip(("gx", "ga", "gb", "gstate_y", "gstate_x"), gradients, strict=True):
        assert_matches_reference(gradient, *expected[name], name=name)


@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_no_samples_pass_the_state_through(impl, chunk, filters):
    x, _, _, _ = make_inputs(Size(2, 3, 0, chunk))
    K = 1 if chunk is None else 0
    shape = (2, 3, K, *([] if filters is None else [filters]))
    a, b = torch.randn(*shape, 2), torch.randn(*shape, 3)
    state, gend = make_state(x, a), make_state(x, a, seed=1)
    leaves = [t.requires_grad_() for t in (a, b, *state)]
    y, end = iir_scan_with_state(x, a, b, IIRState(*leaves[2:]), chunk=chunk, impl=impl)
    assert y.shape == x.shape
    assert_all_equal(end, state)
    gradients = torch.autograd.grad(tuple(end), leaves, tuple(gend), materialize_grads=True)
    assert_all_equal(gradients, (torch.zeros_like(a), torch.zeros_like(b), *gend))


def test_the_state_given_is_not_written_to(impl):
    x, a, b, _ = make_inputs(Size(2, 17, 33, None))
    state = make_state(x, a)
    before = [part.clone() for part in state]
    for _ in range(2):
        _, end = iir_scan_with_state(x, a, b, state, impl=impl)
        assert_all_equal(state, before)
        assert not {end.y.data_ptr(), end.x.data_ptr()} & {state.y.data_ptr(), state.x.data_ptr()}


def test_strides_of_a_state_and_of_its_cotangent(impl):
    x, a, b, _ = make_inputs(Size(2, 5, 33, None), filters=3)
    dense, cotangent = make_state(x, a), make_state(x, a, seed=1)

    def run(state, gend):
        leaves = [t.requires_grad_() for t in (x.detach(), *(part.detach() for part in state))]
        _, end = iir_scan_with_state(leaves[0], a, b, IIRState(*leaves[1:]), impl=impl)
        return [*end, *torch.autograd.grad(tuple(end), leaves, tuple(gend))]

    def reversed_strides(state):
        orders = (3, 2, 1, 0), (2, 1, 0)
        return IIRState(
            *(part.permute(o).contiguous().permute(o) for part, o in zip(state, orders, strict=True))
        )

    assert_all_equal(run(reversed_strides(dense), reversed_strides(cotangent)), run(dense, cotangent))


# Packed sequences


LENGTHS = {
    "each-up-to-9": list(range(10)),
    "uneven": [0, 300, 1, 0, 129, 2],
    "ends-empty": [0, 5, 0],
    "few": [150, 0, 133],  # rows that are cut in time, if of one channel
    "one": [33],
}
CHUNKS = {
    "K-is-S": (None, False),
    "K-is-1": (None, True),
    "2": (2, False),
    "16": (16, False),
    "128": (128, False),
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("filters", [None, 3])
def test_packed(kernel, filters, lengths, chunk):
    """Every gradient is that of the sequences one by one: so the oracle computes it."""
    chunk, one_filter = CHUNKS[chunk]
    long = lengths in ("uneven", "few")
    for C in (1, 3) if long else (1, 17):
        for dtype, carry in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
            if long and dtype == torch.bfloat16:
                continue
            x, a, b, gy, offsets = make_packed_inputs(
                LENGTHS[lengths], C, chunk, filters=filters, dtype=dtype
            )
            if one_filter:
                a, b = a[:, :, :1], b[:, :, :1]
            if filters is not None and long:
                a, b = a[:, :1], b[:, :1]
            options = {"cu_seqlens": offsets, "chunk": chunk, "carry": carry, "impl": kernel}
            state = make_state(x, a, offsets)
            check(x, a, b, gy, state=state, **options)
            check(*channels_last(x), a, None, *channels_last(gy), **options)


@pytest.mark.parametrize("filters", [None, 3])
def test_packed_sequences_share_coefficients_as_rows_do(impl, filters):
    x, a, b, gy, offsets = make_packed_inputs([7, 0, 20], 5, 4, filters=filters)
    check(x, a[:, :1], b, gy, cu_seqlens=offsets, chunk=4, impl=impl)
    check(x, a, b[:, :1], gy, cu_seqlens=offsets, chunk=4, impl=impl)
    x, a, b, gy, offsets = make_packed_inputs([7, 0, 20], 5, None, filters=filters)
    check(x, a, b[:, :, :1], gy, cu_seqlens=offsets, impl=impl)
    check(x, a[:, :, :1], b, gy, cu_seqlens=offsets, impl=impl)


def test_all_sequences_are_empty(impl):
    x, a, b, _, offsets = make_packed_inputs([0, 0, 0], 5, None)
    state, gend = make_state(x, a, offsets), make_state(x, a, offsets, seed=1)
    leaves = [t.requires_grad_() for t in (a, b, *state)]
    y, end = iir_scan_with_state(x, a, b, IIRState(*leaves[2:]), cu_seqlens=offsets, impl=impl)
    assert y.shape == (1, 5, 0)
    assert_all_equal(end, state)
    gradients = torch.autograd.grad(tuple(end), leaves, tuple(gend), materialize_grads=True)
    assert_all_equal(gradients, (torch.zeros_like(a), torch.zeros_like(b), *gend))


@pytest.mark.parametrize("chunk", [None, 16])
def test_packing_equal_sequences_is_a_batch(impl, chunk):
    """The states and results of a batch, its rows put one after another."""
    x, a, b, gy = make_inputs(Size(3, 5, 33, chunk))
    offsets = 33 * torch.arange(4)
    expected = expected_results(x, a, b, gy, chunk=chunk)
    packed = [t.movedim(0, 1).flatten(1, 2)[None] for t in (x, a, b)]
    y, end = iir_scan_with_state(*packed, chunk=chunk, cu_seqlens=offsets, impl=impl)
    y = y[0].unflatten(-1, (3, 33)).movedim(1, 0)
    for name, result in {"y": y, "end_y": end.y, "end_x": end.x}.items():
        assert_matches_reference(result, *expected[name], name=name)


@pytest.mark.parametrize("form", ["int32", "strided", "strided-int32"])
def test_form_of_cu_seqlens(impl, form):
    x, a, b, _, offsets = make_packed_inputs([3, 0, 9], 5, 4)
    other = offsets.int() if "int32" in form else offsets
    if "strided" in form:
        other = torch.stack([other, other + 1], -1)[:, 0]
    want = iir_scan(x, a, b, cu_seqlens=offsets, chunk=4, impl=impl)
    assert torch.equal(iir_scan(x, a, b, cu_seqlens=other, chunk=4, impl=impl), want)


def test_sequences_have_no_history_of_each_other(impl):
    x, a, b, gy, offsets = make_packed_inputs([40, 200, 3], 5, 16)

    def run(x, gy):
        leaf = x.detach().requires_grad_()
        y = iir_scan(leaf, a, b, cu_seqlens=offsets, chunk=16, impl=impl)
        return y, torch.autograd.grad(y, leaf, gy)[0]

    clean = run(x, gy)
    louder, louder_gy = x.clone(), gy.clone()
    louder[..., 40:240] *= 2
    louder_gy[..., 40:240] *= 2
    for before, after in zip(clean, run(louder, louder_gy), strict=True):
        assert torch.equal(before[..., :40], after[..., :40])
        assert torch.equal(before[..., 240:], after[..., 240:])
        assert (before[..., 40:240] != after[..., 40:240]).all()


# Steps


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("numerator", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [None, 1, 3])
def test_a_step_is_a_scan_of_one_sample(impl, filters, dtype, numerator, shared):
    x, a, b, gy = make_inputs(Size(3, 17, 1, None), filters=filters, dtype=dtype)
    if shared:
        a, b = a[:1], b[:, :1]
    b = b if numerator else None
    state, gend = make_state(x, a), make_state(x, a, seed=1)
    leaves = {"gx": x[..., 0], "ga": a[:, :, 0], "gstate_y": state.y, "gstate_x": state.x}
    if numerator:
        leaves["gb"] = b[:, :, 0]
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    before = IIRState(leaves["gstate_y"], leaves["gstate_x"])
    y, end = iir_step(leaves["gx"], leaves["ga"], leaves.get("gb"), before, impl=impl)
    gradients = torch.autograd.grad((y, *end), list(leaves.values()), (gy[..., 0], *gend))
    results = {"y": y, "end_y": end.y, "end_x": end.x, **dict(zip(leaves, gradients, strict=True))}

    expected = expected_results(x, a, b, gy, state, gend)
    for name, (value, budget) in expected.items():
        if name in ("y", "gx"):
            value, budget = value[..., 0], budget[..., 0]
        elif name in ("ga", "gb"):
            value, budget = value[:, :, 0], budget[:, :, 0]
        assert_matches_reference(results[name], value, budget, name=name)
    assert results["y"].dtype == results["gx"].dtype == dtype
    assert results["end_y"].dtype == results["ga"].dtype == a.dtype


@pytest.mark.parametrize("filters", [None, 3])
def test_step_by_step_is_one_scan(impl, filters):
    """50 steps, with new coefficients every 7, and the gradients through all of them."""
    x, a, b, gy = make_inputs(Size(2, 5, 50, 7), filters=filters)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    state, ys = None, []
    for t in range(50):
        y, state = iir_step(x[..., t], a[:, :, t // 7], b[:, :, t // 7], state, impl=impl)
        ys.append(y)
    gend = make_state(x, a, seed=1)
    gradients = torch.autograd.grad((torch.stack(ys, -1), *state), leaves, (gy, *gend))
    expected = expected_results(x, a, b, gy, None, gend, chunk=7)
    results = torch.stack(ys, -1), *state, *gradients
    for name, result in zip(("y", "end_y", "end_x", "gx", "ga", "gb"), results, strict=True):
        assert_matches_reference(result, *expected[name], name=name)


def test_decoding_after_a_scan(impl):
    """A prompt in parallel, then sample by sample, is one scan."""
    x, a, b, gy = make_inputs(Size(2, 5, 60, None), filters=2)
    y, state = iir_scan_with_state(x[..., :40], a, b, impl=impl)
    ys = [y]
    for t in range(40, 60):
        y, state = iir_step(x[..., t], a[:, :, 0], b[:, :, 0], state, impl=impl)
        ys.append(y.unsqueeze(-1))
    assert_matches_reference(torch.cat(ys, -1), *expected_results(x, a, b, gy)["y"])


def test_a_step_writes_to_nothing_it_was_given(impl):
    x, a, b, _ = make_inputs(Size(2, 17, 1, None), filters=3)
    inputs = x[..., 0], a[:, :, 0], b[:, :, 0], *make_state(x, a)
    before = [t.clone() for t in inputs]
    y, end = iir_step(*inputs[:3], IIRState(*inputs[3:]), impl=impl)
    assert_all_equal(inputs, before)
    assert not {t.data_ptr() for t in (y, *end)} & {t.data_ptr() for t in inputs}


def test_strides_of_a_step(impl):
    x, a, b, _ = make_inputs(Size(6, 5, 1, None), filters=3)
    dense = x[..., 0], a[:, :, 0], b[:, :, 0], make_state(x, a)

    def strided(t):
        order = range(t.dim() - 1, -1, -1)
        return t.permute(*order).contiguous().permute(*order)

    y, end = iir_step(*map(strided, dense[:3]), IIRState(*map(strided, dense[3])), impl=impl)
    want_y, want = iir_step(*dense, impl=impl)
    if impl == "cuda":  # other strides are other kernels there, which round otherwise
        torch.testing.assert_close((y, *end), (want_y, *want))
    else:
        assert_all_equal((y, *end), (want_y, *want))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_a_step_of_no_rows(impl, shape):
    x, a, b, _ = make_inputs(Size(*shape, 1, None))
    leaves = [t.requires_grad_() for t in (x[..., 0], a[:, :, 0], b[:, :, 0])]
    y, end = iir_step(*leaves, make_state(x, a), impl=impl)
    assert y.shape == shape
    assert end.y.shape == end.x.shape == (*shape, 2)
    gradients = torch.autograd.grad(y.sum() + end.y.sum(), leaves)
    assert_all_equal(gradients, map(torch.zeros_like, leaves))


@pytest.mark.parametrize("filters", [None, 1, 2])
@pytest.mark.parametrize("numerator", [True, False])
def test_a_step_as_a_scan_of_one_sample(native, filters, numerator):
    """Which a step on a GPU is; here, the same on the CPU."""
    x, a, b, _ = make_inputs(Size(2, 3, 1, None), filters=filters, dtype=torch.float64)
    state = make_state(x, a)
    leaves = [x[..., 0], a[:, :, 0], b[:, :, 0] if numerator else None, *state]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    given = [t for t in leaves if t is not None]
    results = []
    for step in (step_of_scan, lambda x, a, b, *state: flat(reference.iir_step(x, a, b, IIRState(*state)))):
        outputs = step(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), given)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def flat(result):
    y, state = result
    return y, *state
