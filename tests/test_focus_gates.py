"""ops.focus_gates: the gates of FocusLayer in two passes, against PyTorch's operations in float64."""

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

SIZES = [((1,), 1), ((2, 30), 6), ((5,), 16), ((3, 7), 17), ((2, 3, 5), 40), ((0,), 4), ((300, 7), 64)]


def inputs(lead, channels, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    weight = (torch.randn(channels, channels, generator=generator) / channels**0.5).requires_grad_()
    return normal(*lead, 3 * channels), normal(*lead, channels), weight, normal(*lead, channels)


def gradients(function, arguments):
    y = function(*arguments)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return y, *torch.autograd.grad(y, arguments, cotangent)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("lead", "channels"), SIZES)
def test_value_and_gradients(lead, channels, scale):
    """Within some roundings of each number that enters, and of the sum over C of the product between."""
    arguments = inputs(lead, channels, scale)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    for ours, expected in zip(
        gradients(focus_gates, arguments), gradients(reference.focus_gates, exact), strict=True
    ):
        assert ours.dtype == torch.float32
        largest = float(expected.detach().abs().amax()) if expected.numel() else 0.0
        budget = (channels + 16) * 2.0**-23 * max(largest, scale * scale)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=budget)


def test_sigmoid_to_some_units_in_the_last_place():
    u = torch.linspace(-100, 100, 40001)
    logits = torch.stack([torch.zeros_like(u), u, torch.zeros_like(u)], -1)
    zero, one = torch.zeros(len(u), 1), torch.ones(len(u), 1)
    kept = focus_gates(logits, zero, torch.zeros(1, 1), one).flatten()  # 1 - sigmoid(u)
    torch.testing.assert_close(kept.double(), 1 - u.double().sigmoid(), rtol=0, atol=3 * 2.0**-24)
    silu = focus_gates(logits.roll(1, -1) + torch.tensor([0.0, 1e4, 0.0]), zero, torch.zeros(1, 1), zero)
    expected = torch.nn.functional.silu(u.double())
    torch.testing.assert_close(silu.flatten().double(), expected, rtol=8 * 2.0**-24, atol=2e-36)


def test_nan_and_infinity():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[nan, 0, 0], [0, nan, 0], [0, 0, nan], [0, inf, 3.0], [0, -inf, 3.0], [0, -1, inf]]
    )
    y, weight, residual = torch.ones(6, 1), torch.ones(1, 1), torch.full((6, 1), 2.0)
    torch.testing.assert_close(
        focus_gates(logits, y, weight, residual),
        reference.focus_gates(logits, y, weight, residual),
        equal_nan=True,
    )


def test_second_derivatives():
    arguments = inputs((4,), 5)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    results = []
    for function, given in ((focus_gates, arguments), (reference.focus_gates, exact)):
        y = function(*given)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_strides_and_threads_change_no_bit():
    arguments = inputs((40, 20), 24)
    expected = gradients(focus_gates, arguments)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in arguments]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for ours in (gradients(focus_gates, arguments), gradients(focus_gates, strided)):
            for one, other in zip(ours[:2], expected[:2], strict=True):  # products are PyTorch's
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
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
    rows = torch.func.vmap(focus_gates, (0, 0, None, 0))(*arguments)
    torch.testing.assert_close(rows, focus_gates(*arguments))


def test_opcheck():
    logits, y, _, residual = (t.detach() for t in inputs((4,), 5))
    ops = torch.ops.fastkit
    torch.library.opcheck(ops.focus_gates_reset.default, (logits, y))
    torch.library.opcheck(ops.focus_gates_update.default, (logits, y, residual))
    torch.library.opcheck(ops.focus_gates_update_bwd.default, (y, logits, y, residual))
    torch.library.opcheck(ops.focus_gates_reset_bwd_.default, (logits.clone(), y, logits, y))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "reset",
            (torch.zeros(4, 5), torch.zeros(4, 2)),
            "logits must be float32 on the CPU and have shape (N, 3 C)",
        ),
        ("reset", (torch.zeros(4, 6).double(), torch.zeros(4, 2)), "logits must be float32"),
        (
            "reset",
            (torch.zeros(4, 6), torch.zeros(4, 3)),
            "y must be float32 on the CPU and have shape (4, 2)",
        ),
        ("update", (torch.zeros(4, 6), torch.zeros(4, 2), torch.zeros(3, 2)), "residual must be float32"),
        (
            "reset_bwd_",
            (torch.zeros(3, 6), torch.zeros(4, 2), torch.zeros(4, 6), torch.zeros(4, 2)),
            "glogits must be dense and shaped like logits",
        ),
    ],
)
def test_refusals(name, arguments, message):
    with pytest.raises(RuntimeError, match=re.escape(f"focus_gates: {message}")):
        getattr(torch.ops.fastkit, f"focus_gates_{name}")(*arguments)
