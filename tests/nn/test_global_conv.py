"""nn.GlobalConv: a convolution, of whose blocks none sees a later one."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastkit.nn import GlobalConv
from fastkit.reference.pooled_conv import cell_maxima, convolution_in_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def written_out(x, taps):
    """``y[t] = sum_n taps[n] x[t-n]``, by its sums."""
    y = torch.zeros_like(x)
    for n in range(min(taps.shape[1], x.shape[2])):
        y[..., n:] += taps[:, n : n + 1] * x[..., : x.shape[2] - n]
    return y


@pytest.mark.parametrize("block", [1, 4, 7, 16])
@pytest.mark.parametrize("length", [1, 3, 16, 17, 100])
@pytest.mark.parametrize("time", [1, 2, 16, 33, 50])
def test_is_the_sum(time, length, block):
    x, taps = torch.randn(2, 3, time).double(), torch.randn(3, length).double()
    torch.testing.assert_close(convolution_in_blocks(x, taps, block), written_out(x, taps))


@pytest.mark.parametrize(("time", "length", "block"), [(1, 1, 1), (7, 5, 3), (9, 20, 4), (8, 4, 4)])
def test_gradients(time, length, block):
    x = torch.randn(2, 2, time).double().requires_grad_()
    taps = torch.randn(2, length).double().requires_grad_()
    assert gradcheck(lambda *a: convolution_in_blocks(*a, block), (x, taps))
    assert gradgradcheck(lambda *a: convolution_in_blocks(*a, block), (x, taps))


def test_float32_errs_by_rounding():
    x, taps = torch.randn(2, 8, 1000), torch.randn(8, 300)
    y = convolution_in_blocks(x, taps, 64)
    expected = written_out(x.double(), taps.double())
    # An FFT of N samples errs by some eps log2 N of the norms, of x in a window and of taps in a part.
    norms = x.double().unfold(2, 128, 4).norm(dim=-1).amax((0, 2)) * taps.double().norm(dim=-1)
    assert ((y - expected).abs() <= torch.finfo(torch.float32).eps * 7 * 5 * norms[:, None]).all()


@pytest.mark.parametrize("block", [16, 50])
def test_later_blocks_change_no_bit(block):
    module = GlobalConv(3, 100, block=block)
    x = torch.randn(2, 200, 3)
    y = module(x)
    for t in (0, 15, 16, 17, 100, 199):
        for value in (7.0, torch.nan, torch.inf):
            changed = x.clone()
            changed[:, t] = value
            begin = t // block * block
            assert torch.equal(module(changed)[:, :begin], y[:, :begin])


def test_the_formula():
    module = GlobalConv(4, 50, block=16).double()
    k, n = module.kernel.detach(), torch.arange(50).double()
    tau = 50.0 ** (torch.arange(4).double() / 3)
    w = torch.exp(-n / tau[:, None])
    w = w / w.square().sum(1, keepdim=True).sqrt()
    h = w * k.sign() * (k.abs() - 0.1).clamp(min=0)
    x = torch.randn(2, 60, 4).double()
    expected = written_out(x.mT, h).mT + module.skip.detach() * x
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)  # the window is kept in float32


def test_small_taps_are_zero_and_have_no_gradient():
    module = GlobalConv(2, 8, block=4)
    module.kernel.data[:] = 0.05
    module.kernel.data[:, 3] = 0.5
    module(torch.randn(1, 20, 2)).sum().backward()
    assert module.kernel.grad[:, 3].abs().gt(0).all()
    assert module.kernel.grad[:, :3].eq(0).all()


def test_begins_about_as_large_as_its_input():
    module = GlobalConv(64, 1024, block=128)
    y = module(torch.randn(4, 2048, 64))
    assert 0.7 < y.std() < 2.0


def test_glu():
    module = GlobalConv(3, 10, block=4, glu=True)
    x = torch.randn(2, 9, 3)
    assert module(x).shape == x.shape
    assert set(module.state_dict()) == {"kernel", "skip", "mix.weight", "mix.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    module = GlobalConv(3, 10, block=4)
    x = torch.randn(2, 9, 3)
    if dtype == torch.float64:
        module = module.double()
    y = module(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module.float()(x), rtol=1e-2, atol=1e-2)


def test_autocast_leaves_it_alone():
    module, x = GlobalConv(3, 10, block=4), torch.randn(2, 9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.clone()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(x)
    assert torch.equal(inside, module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"squash": -1.0}, "squash must be finite and not negative, got -1"),
        ({"squash": float("nan")}, "squash must be finite and not negative, got nan"),
    ],
)
def test_options_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=f"^GlobalConv: {message}"):
        GlobalConv(3, **options)


@pytest.mark.parametrize("shape", [(3,), (2, 0, 3), (2, 5, 4)])
def test_shapes_are_refused_in_words(shape):
    with pytest.raises(ValueError, match=r"^GlobalConv: x must have shape \(B, T, 3\) with T >= 1, got"):
        GlobalConv(3, 8)(torch.randn(shape))


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("time", [1, 8, 9, 24, 30])
def test_maxima_are_those_of_the_result(time, glu):
    module = GlobalConv(3, 20, block=8, glu=glu)
    x = torch.randn(2, time, 3)
    maxima = module.maxima(x, 4)
    torch.testing.assert_close(maxima, cell_maxima(module(x), 8, 4), rtol=1e-5, atol=1e-5)
    maxima.sum().backward()
    assert module.kernel.grad is not None  # zero where no block is pooled, for what waits for each gradient


def test_pool_must_divide_the_block():
    with pytest.raises(
        ValueError, match=r"^GlobalConv: pool must divide block, got pool=3 and block=8; take block=9"
    ):
        GlobalConv(3, 20, block=8).maxima(torch.randn(1, 9, 3), 3)
