"""nn.FocusLayer on a GPU: as on a CPU, causal to the last bit, token by token, in half precision, padded."""

import copy

import pytest
import torch

from fastkit.nn import FocusLayer

pytestmark = [pytest.mark.native, pytest.mark.gpu]

OPTIONS = [
    {},
    {"coefficients": "constant", "position": "rotary", "num_heads": 2},
    {"kernel_length": None, "position": "none"},
    {"conv_glu": True, "causal": False},
]


def pair(**options):
    torch.manual_seed(0)
    layer = FocusLayer(32, **{"attn_chunk": 16, "bin_length": 24, "kernel_length": 100, **options})
    return layer, copy.deepcopy(layer).cuda()


def gradients(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    cotangent = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
    return y, *torch.autograd.grad(y, (x, *module.parameters()), cotangent)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("time", [1, 24, 100])
def test_as_on_a_cpu(time, options):
    on_cpu, on_gpu = pair(**options)
    x = torch.randn(3, time, 32, generator=torch.Generator().manual_seed(1))
    for expected, actual in zip(gradients(on_cpu, x), gradients(on_gpu, x.cuda()), strict=True):
        scale = max(1.0, float(expected.detach().abs().amax()))
        torch.testing.assert_close(actual.cpu() / scale, expected / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_causal_to_the_last_bit(options):
    _, layer = pair(**options)
    x = torch.randn(2, 100, 32, device="cuda")
    y = layer(x)
    for t in (0, 15, 16, 23, 24, 71, 99):
        changed = x.clone()
        changed[:, t] += 100.0
        assert torch.equal(layer(changed)[:, :t], y[:, :t])


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_token_by_token(options):
    """Over the ends of chunks and bins, of rows that are not at the same place."""
    _, layer = pair(**options)
    x = torch.randn(2, 100, 32, device="cuda")
    rows, places = torch.arange(2, device="cuda"), torch.tensor([20, 47], device="cuda")
    y, state = layer.forward_with_state(x, places)
    for _ in range(50):
        step = layer.step(x[rows, places], state, places)
        torch.testing.assert_close(step, y[rows, places], rtol=1e-4, atol=1e-4)
        places = places + 1


def test_autocast():
    _, layer = pair()
    x = torch.randn(2, 100, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_padding():
    _, layer = pair()
    x, mask = torch.randn(2, 60, 32, device="cuda"), torch.ones(2, 60, device="cuda")
    mask[0, :13] = 0
    y = layer(x, padding_mask=mask)
    torch.testing.assert_close(y[:1, 13:], layer(x[:1, 13:]), rtol=1e-4, atol=1e-4)
