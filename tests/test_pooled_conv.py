"""ops.pooled_conv: a convolution whose maxima alone are kept, against the sums written out."""

import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastkit import _native
from fastkit.ops.pooled_conv import pooled_conv
from fastkit.reference import pooled_conv as reference

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(_native.REASON is not None, reason=f"no library: {_native.REASON}"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def written_out(x, taps, block, pool):
    """Sample by sample, in float64; the maxima and what was added up to them."""
    B, T, C = x.shape
    K = (T - 1) // block
    x, taps = x.double(), taps.double()
    y, size = torch.zeros(2, B, K * block, C, dtype=torch.float64)
    for n in range(min(taps.shape[1], K * block)):
        y[:, n:] += taps[:, n] * x[:, : K * block - n]
        size[:, n:] += (taps[:, n] * x[:, : K * block - n]).abs()
    cells = y.unflatten(1, (K, pool, block // pool)) if K else y.reshape(B, 0, pool, block // pool, C)
    return cells.max(3).values.transpose(2, 3), size.amax() if size.numel() else 0.0


SHAPES = [  # B, T, C, taps, block, pool
    (2, 30, 3, 5, 8, 4),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 1, 1),
    (3, 17, 16, 40, 8, 8),
    (2, 65, 17, 64, 16, 2),
    (2, 64, 33, 63, 16, 1),
    (1, 100, 5, 1, 9, 3),
    (2, 8, 4, 3, 8, 4),
    (1, 400, 20, 130, 40, 8),
    (0, 30, 3, 5, 8, 4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_sum_written_out(shape, dtype):
    B, T, C, n, block, pool = shape
    x, taps = torch.randn(B, T, C, dtype=dtype), torch.randn(C, n, dtype=dtype)
    expected, size = written_out(x, taps, block, pool)
    y = pooled_conv(x, taps, block, pool)
    assert y.shape == (B, (T - 1) // block, C, pool) and y.dtype == dtype
    # A sum of n products, one after the other: each addition rounds once.
    budget = (n + 1) * torch.finfo(dtype).eps / 2 * float(size)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=budget)
    torch.testing.assert_close(y, reference.pooled_conv(x, taps, block, pool), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_references(shape):
    B, T, C, n, block, pool = shape
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(C, n, dtype=torch.float64, requires_grad=True)
    y = pooled_conv(x, taps, block, pool)
    cotangent = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, taps), cotangent)
    expected = torch.autograd.grad(reference.pooled_conv(x, taps, block, pool), (x, taps), cotangent)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 30, 3, 5, 8, 4), (1, 17, 2, 40, 8, 2), (1, 9, 2, 3, 3, 1)])
def test_gradcheck(shape):
    B, T, C, n, block, pool = shape
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(C, n, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *a: pooled_conv(*a, block, pool), (x, taps))
    assert gradgradcheck(lambda *a: pooled_conv(*a, block, pool), (x, taps))


def test_a_maximum_depends_on_no_bit_of_later_blocks():
    x, taps = torch.randn(2, 81, 20), torch.randn(20, 50)
    y = pooled_conv(x, taps, 16, 4)
    for t in (0, 15, 16, 33, 63, 80):
        changed = x.clone()
        changed[:, t:] += 1e6
        assert torch.equal(pooled_conv(changed, taps, 16, 4)[:, : t // 16], y[:, : t // 16])
        assert torch.equal(pooled_conv(x[:, : t + 1], taps, 16, 4), y[:, : t // 16])


def test_strides_and_threads_change_no_bit():
    x, taps = torch.randn(3, 70, 18), torch.randn(18, 33)
    gradients = []
    for form in (x, x.mT.contiguous().mT, torch.randn(3, 140, 36)[:, ::2, ::2].copy_(x)):
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                leaf, h = form.detach().requires_grad_(), taps.clone().requires_grad_()
                y = pooled_conv(leaf, h, 16, 4)
                y.square().sum().backward()
            finally:
                torch.set_num_threads(before)
            gradients.append((y.detach(), leaf.grad, h.grad))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_equal_maxima_send_the_gradient_to_the_first():
    x = torch.ones(1, 9, 1, requires_grad=True)
    pooled_conv(x, torch.ones(1, 1), 8, 2).sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_nan_is_a_maximum():
    x = torch.zeros(1, 9, 1)
    x[0, 2] = torch.nan
    x[0, 3] = 5.0
    assert pooled_conv(x, torch.ones(1, 1), 8, 2).isnan().flatten().tolist() == [True, False]


def test_opcheck():
    x, taps = torch.randn(2, 30, 3), torch.randn(3, 5)
    maxima, places = torch.ops.fastkit.pooled_conv_fwd(x, taps, 8, 4)
    torch.library.opcheck(torch.ops.fastkit.pooled_conv_fwd.default, (x, taps, 8, 4))
    torch.library.opcheck(torch.ops.fastkit.pooled_conv_bwd.default, (maxima, places, x, taps, 8, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 3)}, "x must be on the CPU and have shape (B, T, C)"),
        ({"x": torch.zeros(1, 0, 3)}, "x must be on the CPU and have shape (B, T, C) with T, C >= 1"),
        ({"x": torch.zeros(1, 9, 3).half()}, "taps must be on the CPU, have the dtype of x"),
        ({"taps": torch.zeros(2, 5)}, "taps must be on the CPU, have the dtype of x and shape (3, n)"),
        ({"pool": 3}, "block must be a multiple of pool, got 8 and 3"),
        ({"pool": 0}, "block must be a multiple of pool, got 8 and 0"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(1, 9, 3), "taps": torch.zeros(3, 5), "block": 8, "pool": 4, **change}
    with pytest.raises(RuntimeError, match=re.escape(f"pooled_conv: {message}")):
        torch.ops.fastkit.pooled_conv_fwd(*arguments.values())


def test_places_out_of_the_block_are_refused():
    x, taps = torch.zeros(1, 9, 3), torch.zeros(3, 5)
    maxima, places = torch.ops.fastkit.pooled_conv_fwd(x, taps, 8, 4)
    with pytest.raises(RuntimeError, match="pooled_conv: places must lie in the block"):
        torch.ops.fastkit.pooled_conv_bwd(maxima, places + 8, x, taps, 8, 4)
