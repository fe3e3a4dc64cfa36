"""ops.focus_gates: the gates of FocusLayer in two passes, against PyTorch's operations in float64."""

import math
import re

import pytest
import torch

from fastkit import _native
from fastkit.ops.focus_gates import focus_gates
from fastkit.reference import focus_gates as reference

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(_native.REASON is not None, reason=f"no library: {_native.REASON}"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

SIZES = [((1,), 1), ((2, 30), 6), ((5,), 16), ((3, 7), 17), ((2, 3, 5), 40), ((0,), 4)]
SIZES += [((1311, 7), 64), ((2001,), 264)]  # some blocks of rows and a piece; of the last, logits are kept


def inputs(lead, channels, scale=1.0):
    """f, y, weight, bias, reset, residual."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    def matrix(rows):
        return (torch.randn(rows, channels, generator=generator) / channels**0.5).requires_grad_()

    f, y, residual = (normal(*lead, channels) for _ in range(3))
    return f, y, matrix(3 * channels), normal(3 * channels), matrix(channels), residual


def gradients(function, arguments):
    y = function(*arguments)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return y, *torch.autograd.grad(y, arguments, cotangent)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("lead", "channels"), SIZES)
def test_value_and_gradients(lead, channels, scale):
    """Within some roundings of each number that enters, and of the sums of the products between them."""
    arguments = inputs(lead, channels, scale)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    names = "o", "f", "y", "weight", "bias", "reset", "residual"
    results = gradients(focus_gates, arguments), gradients(reference.focus_gates, exact)
    for name, ours, expected in zip(names, *results, strict=True):
        assert ours.dtype == torch.float32
        largest = float(expected.detach().abs().amax()) if expected.numel() else 0.0
        rows = math.prod(lead) if name in ("weight", "bias", "reset") else 0
        budget = (2 * channels + rows + 16) * 2.0**-23 * max(largest, scale * scale)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=budget)


def test_sigmoid_to_some_units_in_the_last_place():
    u = torch.linspace(-100, 100, 40001)[:, None]
    zero, one, none = torch.zeros_like(u), torch.ones_like(u), torch.zeros(1, 1)
    of_u, of_h = (torch.eye(3)[:, i : i + 1] for i in (1, 2))
    kept = focus_gates(u, zero, of_u, torch.zeros(3), none, one)  # 1 - sigmoid(u)
    torch.testing.assert_close(kept.double(), 1 - u.double().sigmoid(), rtol=0, atol=3 * 2.0**-24)
    silu = focus_gates(u, zero, of_h, torch.tensor([0.0, 1e4, 0.0]), none, zero)
    expected = torch.nn.functional.silu(u.double())
    torch.testing.assert_close(silu.double(), expected, rtol=8 * 2.0**-24, atol=2e-36)


def test_nan_and_infinity():
    nan, inf = torch.nan, torch.inf
    for logits in ([nan, 0, 0], [0, nan, 0], [0, 0, nan], [0, inf, 3.0], [0, -inf, 3.0], [0, -1, inf]):
        f, weight, one = torch.zeros(1, 1), torch.zeros(3, 1), torch.ones(1, 1)
        given = f, one, weight, torch.tensor(logits), one, 2 * one
        torch.testing.assert_close(focus_gates(*given), reference.focus_gates(*given), equal_nan=True)


@pytest.mark.parametrize("channels", [5, 65])
def test_second_derivatives(channels):
    arguments = inputs((4,), channels, 0.3)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    results = []
    for function, given in ((focus_gates, arguments), (reference.focus_gates, exact)):
        y = function(*given)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_third_derivatives():
    results = []
    for function, dtype in ((focus_gates, torch.float32), (reference.focus_gates, torch.float64)):
        given = [t.detach().to(dtype).requires_grad_() for t in inputs((4,), 5, 0.5)]
        y = function(*given)
        for _ in range(2):
            y = sum(g.square().sum() for g in torch.autograd.grad(y.square().sum(), given, create_graph=True))
        results.append(torch.autograd.grad(y, given))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            ours.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("channels", [5, 65])
def test_backward_under_autocast_and_of_many_gradients_at_once(channels):
    arguments = inputs((6,), channels)
    cotangents = torch.randn(3, 6, channels)
    expected = [torch.autograd.grad(focus_gates(*arguments), arguments, go) for go in cotangents]
    y = focus_gates(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, arguments, cotangents[0], retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected[0], strict=True))
    together = torch.autograd.grad(y, arguments, cotangents, is_grads_batched=True)
    for one, others in zip(together, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", range(6))
def test_what_is_frozen_has_no_gradient(trained):
    arguments = inputs((7,), 6)
    expected = torch.autograd.grad(focus_gates(*arguments).sum(), arguments[trained])[0]
    frozen = [t.detach().requires_grad_(place == trained) for place, t in enumerate(arguments)]
    focus_gates(*frozen).sum().backward()
    assert [t.grad is not None for t in frozen] == [place == trained for place in range(6)]
    torch.testing.assert_close(frozen[trained].grad, expected)


def test_strides_and_threads_change_nothing():
    arguments = inputs((40, 20), 24)
    expected = gradients(focus_gates, arguments)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in arguments]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for ours in (gradients(focus_gates, arguments), gradients(focus_gates, strided)):
            for one, other in zip(ours, expected, strict=True):  # products are PyTorch's
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_reference(dtype):
    arguments = [t.detach().to(dtype).requires_grad_() for t in inputs((4,), 5)]
    assert torch.equal(focus_gates(*arguments), reference.focus_gates(*arguments))


def test_compile_and_transforms():
    arguments = inputs((6,), 5)
    compiled = torch.compile(focus_gates, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(compiled, arguments), gradients(focus_gates, arguments), strict=True):
        torch.testing.assert_close(one, other)
    rows = torch.func.vmap(focus_gates, (0, 0, None, None, None, 0))(*arguments)
    torch.testing.assert_close(rows, focus_gates(*arguments))


def test_opcheck():
    m, y, _, _, _, residual = (t.detach() for t in inputs((4,), 5))
    logits = torch.randn(4, 15)
    ops = torch.ops.fastkit
    torch.library.opcheck(ops.focus_gates_reset.default, (logits, y))
    torch.library.opcheck(ops.focus_gates_update_.default, (m.clone(), logits, residual))
    torch.library.opcheck(ops.focus_gates_update_bwd_.default, (logits.clone(), m.clone(), residual, y))
    torch.library.opcheck(ops.focus_gates_reset_bwd_.default, (logits.clone(), m.clone(), y))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("reset", ((4, 5), (4, 2)), "logits must be float32 on the CPU, dense and have shape (N, 3 C)"),
        ("reset", ((4, 6), (4, 3)), "y must be float32 on the CPU, dense and have shape (4, 2)"),
        ("update_", ((4, 2), (4, 6), (3, 2)), "residual must be float32"),
        ("update_", ((3, 2), (4, 6), (4, 2)), "m must be float32"),
        ("update_bwd_", ((4, 6), (4, 2), (4, 2), (4, 1)), "go must be float32"),
        ("reset_bwd_", ((4, 6), (5, 2), (4, 2)), "gs must be float32"),
    ],
)
def test_refusals(name, arguments, message):
    op = getattr(torch.ops.fastkit, f"focus_gates_{name}")
    given = [torch.zeros(shape) for shape in arguments]
    with pytest.raises(RuntimeError, match=re.escape(f"focus_gates: {message}")):
        op(*given)
    for wrong in (torch.Tensor.double, lambda t: t.repeat(1, 2)[:, ::2]):
        with pytest.raises(RuntimeError, match=r"focus_gates: .* must be float32 on the CPU, dense"):
            op(*(wrong(t) for t in given))
