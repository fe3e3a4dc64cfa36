"""Derivatives of iir_scan and its relatives by differences, in float64, and torch.func."""

import itertools

import pytest
import torch
from contexts import without_default_device
from torch.autograd import gradcheck, gradgradcheck

from fastkit import reference
from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.testing import Size
from fastkit.testing.iir_scan import make_inputs, make_packed_inputs, make_state

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's forward mode
]

TIMES = [1, 2, 3, 8, 33]
CHUNKS = [(None, True), (1, True), (3, True), (3, False)]


ORDERS = gradcheck, gradgradcheck


def second_of_bank(check, filters):
    """Whose elements are compared with those of the reference below, in Hessians."""
    return check is gradgradcheck and filters is not None


def leaves_of(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def with_state(filters_and_state, **options):
    """The outputs for x, a, the state, and perhaps b: all that gradcheck wants is a tuple of tensors."""
    x, a, state_y, state_x, *b = filters_and_state
    y, end = iir_scan_with_state(x, a, *(b or [None]), IIRState(state_y, state_x), **options)
    return y, *end


# Gradients of first and second order


@pytest.mark.parametrize(("chunk", "carry"), CHUNKS)
@pytest.mark.parametrize("time", TIMES)
def test_gradcheck(kernel, time, chunk, carry):
    x, a, b, _ = make_inputs(Size(1, 2, time, chunk), dtype=torch.float64)
    leaves = leaves_of(x, a[:, :1], b)

    def scan(x, a, b=None):
        return iir_scan(x, a, b, chunk=chunk, carry=carry, impl=kernel)

    for inputs, check in itertools.product((leaves[:2], leaves), ORDERS):
        assert check(scan, inputs, fast_mode=check is gradgradcheck and time > 8)


BANKS = [*itertools.product((None, 3), TIMES), *itertools.product((1,), TIMES[:3])]


@pytest.mark.parametrize(("chunk", "carry"), CHUNKS)
@pytest.mark.parametrize(("filters", "time"), BANKS)
def test_gradcheck_of_banks_and_states(kernel, filters, time, chunk, carry):
    fast = time > 2
    x, a, b, _ = make_inputs(Size(2, 2, time, chunk), filters=filters, dtype=torch.float64)
    a, b = a[:, :1], b[:1]
    inputs = leaves_of(x, a, *make_state(x, a), b)

    def scan(*inputs):
        return with_state(inputs, chunk=chunk, carry=carry, impl=kernel)

    for some, check in itertools.product((inputs[:4], inputs), ORDERS):
        assert check(scan, some, fast_mode=fast or second_of_bank(check, filters))


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("filters", [None, 3])
def test_gradcheck_long(kernel, filters, carry):
    x, a, b, _ = make_inputs(Size(1, 2, 257, 128), filters=filters, dtype=torch.float64)
    inputs = leaves_of(x, a, *make_state(x, a), b)

    def scan(*inputs):
        return with_state(inputs, chunk=128, carry=carry, impl=kernel)

    for check in ORDERS:
        assert check(scan, inputs, fast_mode=True)


@pytest.mark.parametrize(("chunk", "carry", "one"), [(None, True, True), *((*c, False) for c in CHUNKS)])
@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("lengths", [[0, 3, 0, 1], [2, 33, 0, 5]], ids=str)
def test_gradcheck_of_packed_sequences(kernel, lengths, filters, chunk, carry, one):
    fast = sum(lengths) > 8
    packed = make_packed_inputs(lengths, 2, chunk, filters=filters, dtype=torch.float64)
    x, a, b, _, offsets = packed
    if one:
        a, b = a[:, :, :1], b[:, :, :1]
    a = a[:, :1]
    inputs = leaves_of(x, a, *make_state(x, a, offsets), b)

    def scan(*inputs):
        return with_state(inputs, chunk=chunk, carry=carry, cu_seqlens=offsets, impl=kernel)

    for some, check in itertools.product((inputs[:4], inputs), ORDERS):
        assert check(scan, some, fast_mode=fast or second_of_bank(check, filters))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("filters", [None, 3])
def test_gradcheck_of_a_step(kernel, filters, layout):
    x, a, b, _ = make_inputs(Size(2, 3, 1, None), filters=filters, dtype=torch.float64)
    x, a, b, state = x[..., 0], a[:1, :, 0], b[:, :1, 0], make_state(x, a)
    if layout == "channels_last":
        x = x.mT.contiguous().mT
    inputs = leaves_of(x, a, *state, b)

    def step(x, a, state_y, state_x, b=None):
        y, end = iir_step(x, a, b, IIRState(state_y, state_x), impl=kernel)
        return y, *end

    for some in (inputs[:4], inputs):
        assert gradcheck(step, some, check_forward_ad=True)
        assert gradgradcheck(step, some)


def sections_of(count):
    _, a, b, _ = make_inputs(Size(1, count, 1, None), dtype=torch.float64)
    return torch.cat([b[0, :, 0], torch.full((count, 1), 1.5).double(), a[0, :, 0]], -1)


@pytest.mark.parametrize("sections", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 4, 3)], ids=str)
def test_gradcheck_of_a_cascade(kernel, shape, sections):
    """Up to 4 rows and more than that are different kernels."""
    torch.manual_seed(0)
    inputs = leaves_of(torch.randn(shape).double(), sections_of(sections))

    def cascade(x, sos):
        return sosfilt(x, sos, impl=kernel)

    assert gradcheck(cascade, inputs, check_forward_ad=True)
    assert gradgradcheck(cascade, inputs)


# Forward mode, and what vmap makes of a call


@pytest.mark.parametrize(("chunk", "carry"), CHUNKS)
@pytest.mark.parametrize("time", [1, 2, 8, 33])
@pytest.mark.parametrize("filters", [None, 3])
def test_forward_mode_and_batched_gradients(kernel, filters, time, chunk, carry):
    x, a, b, _ = make_inputs(Size(2, 2, time, chunk), filters=filters, dtype=torch.float64)
    a, b = a[:, :1], b[:1]
    inputs = leaves_of(x, a, *make_state(x, a), b)

    def scan(*inputs):
        return with_state(inputs, chunk=chunk, carry=carry, impl=kernel)

    for some in (inputs[:4], inputs):
        assert gradcheck(scan, some, fast_mode=time > 2, check_forward_ad=True, check_backward_ad=False)
    if time <= 2:  # in slow mode, or there is nothing to batch
        assert gradcheck(scan, inputs[:4] if chunk == 1 else inputs, check_batched_grad=True)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("filters", [None, 3])
def test_forward_mode_of_packed_sequences(kernel, filters, chunk):
    packed = make_packed_inputs([0, 3, 7, 0, 1], 2, chunk, filters=filters, dtype=torch.float64)
    x, a, b, _, offsets = packed
    inputs = leaves_of(x, a, *make_state(x, a, offsets), b)

    def scan(*inputs):
        return with_state(inputs, chunk=chunk, cu_seqlens=offsets, impl=kernel)

    assert gradcheck(scan, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("filters", [None, 3])
def test_forward_mode_in_one_argument(kernel, filters, wanted):
    """Tangents of the others are None: no zeros are filtered for them, and nothing is left out."""
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), filters=filters, dtype=torch.float64)
    inputs = [x, a, *make_state(x, a), b]

    def scan(one):
        return with_state([*inputs[:wanted], one, *inputs[wanted + 1 :]], chunk=4, impl=kernel)

    tangent = torch.randn_like(inputs[wanted])
    _, found = torch.func.jvp(scan, (inputs[wanted],), (tangent,))
    step = 1e-6
    ahead, behind = (scan(inputs[wanted] + sign * step * tangent) for sign in (1, -1))
    differences = tuple((p - m) / (2 * step) for p, m in zip(ahead, behind, strict=True))
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-7)  # what differences are good for


# torch.func


def cases(filters):
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), filters=filters, dtype=torch.float64)
    return x, a[:, :1], b[:1]


@pytest.mark.parametrize("filters", [None, 2])
def test_func_grad_up_to_the_third_order(impl, filters):
    """Of each argument, against autograd through the reference."""
    inputs = cases(filters)

    def three_orders(scan):
        def loss(*inputs):
            return scan(*inputs, chunk=4).square().sum()

        def squared_gradient(loss):
            gradient = torch.func.grad(loss, argnums=(0, 1, 2))
            return lambda *inputs: sum(g.square().sum() for g in gradient(*inputs)).sqrt()

        second, third = squared_gradient(loss), squared_gradient(squared_gradient(loss))
        return [torch.func.grad(f, argnums=(0, 1, 2))(*inputs) for f in (loss, second, third)]

    found = three_orders(lambda *inputs, **options: iir_scan(*inputs, impl=impl, **options))
    torch.testing.assert_close(found, three_orders(reference.iir_scan))


@pytest.mark.parametrize("filters", [None, 2])
def test_jacobians_agree(impl, filters):
    """Forwards, backwards and by the reference."""
    inputs = cases(filters)

    def scan(*inputs):
        return iir_scan(*inputs, chunk=4, impl=impl)

    every = tuple(range(3))
    backwards = torch.func.jacrev(scan, every)(*inputs)
    torch.testing.assert_close(torch.func.jacfwd(scan, every)(*inputs), backwards)

    def by_reference(*inputs):
        return reference.iir_scan(*inputs, chunk=4)

    expected = torch.autograd.functional.jacobian(by_reference, inputs)
    torch.testing.assert_close(backwards, expected)


@pytest.mark.parametrize("way", ["forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"])
@pytest.mark.parametrize("filters", [None, 2])
def test_hessian(impl, filters, way):
    x, a, b, _ = make_inputs(Size(1, 2, 5, 3), filters=filters, dtype=torch.float64)
    func, every = torch.func, (0, 1, 2)

    def loss(scan):
        return lambda *inputs: scan(*inputs, chunk=3).pow(3).sum()

    of = loss(lambda *inputs, **options: iir_scan(*inputs, impl=impl, **options))
    if way == "forward-over-reverse":
        found = func.hessian(of, every)(x, a, b)
    elif way == "reverse-over-reverse":
        found = func.jacrev(func.jacrev(of, every), every)(x, a, b)
    else:
        found = func.jacrev(func.jacfwd(of, every), every)(x, a, b)
    expected = torch.autograd.functional.hessian(loss(reference.iir_scan), (x, a, b))
    torch.testing.assert_close(found, expected)


AXES = [axes for axes in itertools.product((0, None), repeat=3) if axes != (None, None, None)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_vmap_is_a_loop(impl, axes, filters, shared):
    """Over x, a, b and all their combinations; the results and the gradients of what is batched."""
    many = [make_inputs(Size(2, 3, 9, 4), filters=filters, dtype=torch.float64, seed=i) for i in range(4)]
    if shared:
        many = [(x, a[:1], b[:1, :1], gy) for x, a, b, gy in many]
    x, a, b, gy = (torch.stack(each) for each in zip(*many, strict=True))
    inputs = [t if axis == 0 else t[0] for t, axis in zip((x, a, b), axes, strict=True)]

    def scan(x, a, b, gy):
        y, vjp = torch.func.vjp(lambda *inputs: iir_scan(*inputs, chunk=4, impl=impl), x, a, b)
        return y, *vjp(gy)

    with without_default_device():
        found = torch.vmap(scan, (*axes, 0))(*inputs, gy)
    entries = ([t[i] if axis == 0 else t for t, axis in zip(inputs, axes, strict=True)] for i in range(4))
    looped = [scan(*entry, gy[i]) for i, entry in enumerate(entries)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_vmap_over_any_axis_and_in_two_levels(impl):
    _, a, b, _ = make_inputs(Size(2, 3, 9, None), dtype=torch.float64)
    xs = torch.randn(2, 3, 4, 9, 5).double()  # axes 2 and 4 are batched

    def scan(x):
        return iir_scan(x, a, b, impl=impl)

    with without_default_device():
        y = torch.vmap(torch.vmap(scan, 2, 2), 4, 4)(xs)
    expected = [torch.stack([scan(xs[:, :, i, :, j]) for i in range(4)], 2) for j in range(5)]
    torch.testing.assert_close(y, torch.stack(expected, 4))


@pytest.mark.parametrize("filters", [None, 2])
def test_vmap_of_a_state(impl, filters):
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), filters=filters, dtype=torch.float64)
    states = [make_state(x, a, seed=i) for i in range(4)]
    stacked = IIRState(*(torch.stack(part) for part in zip(*states, strict=True)))

    def scan(state):
        return iir_scan_with_state(x, a, b, state, chunk=4, impl=impl)

    with without_default_device():
        y, end = torch.vmap(scan)(stacked)
    looped = [scan(state) for state in states]
    torch.testing.assert_close(y, torch.stack([y for y, _ in looped]))
    torch.testing.assert_close(end.y, torch.stack([end.y for _, end in looped]))
    torch.testing.assert_close(end.x, torch.stack([end.x for _, end in looped]))


def test_vmap_of_a_step_and_of_a_cascade(impl):
    x, a, _, _ = make_inputs(Size(4, 3, 9, None), dtype=torch.float64)
    step = torch.vmap(lambda x, a: iir_step(x[None, :, 0], a[None, :, 0], impl=impl)[0])
    expected = [iir_step(x[i, None, :, 0], a[i, None, :, 0], impl=impl)[0] for i in range(4)]
    with without_default_device():
        found = step(x, a)
    torch.testing.assert_close(found, torch.stack(expected))
    sos = sections_of(3)
    cascade = torch.vmap(lambda x: sosfilt(x, sos, impl=impl))
    with without_default_device():
        found = cascade(x)
    torch.testing.assert_close(found, torch.stack([sosfilt(row, sos, impl=impl) for row in x]))


@pytest.mark.parametrize("filters", [None, 2])
def test_gradients_per_sample_equal_a_loop(impl, filters):
    x, a, b, _ = make_inputs(Size(5, 3, 9, 4), filters=filters, dtype=torch.float64)
    a, b = a[:1], b[:1]

    def loss(a, b, x):
        return iir_scan(x[None], a, b, chunk=4, impl=impl).square().sum()

    gradient = torch.func.grad(loss, (0, 1))
    with without_default_device():
        found = torch.vmap(gradient, (None, None, 0))(a, b, x)
    looped = [gradient(a, b, one) for one in x]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_vmap_of_packed_sequences_is_refused_by_the_kernel(native):
    x, a, b, _, offsets = make_packed_inputs([3, 6], 2, None)
    with pytest.raises(RuntimeError, match="vmap of packed sequences is not supported; put its axis into C"):
        torch.vmap(lambda x: iir_scan(x, a, b, cu_seqlens=offsets, impl=native))(x[None])
