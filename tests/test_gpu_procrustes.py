"""polar and procrustes on a GPU, where they are PyTorch's products and factorizations: accuracy, TF32 or not;
streams and equal bits.
"""

import pytest
import torch

from fastkit.ops import polar, procrustes
from fastkit.testing.procrustes import expected_factor, log_spaced, with_spectrum

pytestmark = [pytest.mark.native, pytest.mark.gpu]

DTYPES = [torch.float32, torch.float64]


def matrix(D, condition, dtype=torch.float32):
    return with_spectrum(log_spaced(D, condition), dtype=dtype, seed=D).cuda()


def check(m):
    w = polar(m, impl="cuda")
    assert w.device == m.device and w.dtype == m.dtype
    value, budget = expected_factor(m.cpu())
    assert ((w.cpu().double() - value).abs() <= budget).all()
    eye = torch.eye(m.shape[-1], dtype=torch.float64)
    defect = (w.cpu().double().mT @ w.cpu().double() - eye).abs().max()
    assert defect <= 64 * torch.finfo(m.dtype).eps
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("D", [1, 2, 17, 64, 300])
def test_log_spaced(D, condition, dtype):
    check(matrix(D, condition, dtype))


def test_the_error_at_a_condition_of_a_thousand():
    m = matrix(300, 1e3)
    assert (check(m).cpu() - expected_factor(m.cpu()).value).abs().max() <= 1e-5


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_those_of_ieee_whatever_the_settings(precision):
    m = matrix(120, 1e3)
    expected = polar(m, impl="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(polar(m, impl="cuda"), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_batch():
    batch = torch.stack([matrix(24, condition) for condition in (1.0, 1e2, 1e4)])
    w = polar(batch, impl="cuda")
    for each, m in zip(w, batch, strict=True):
        value, budget = expected_factor(m.cpu())
        assert ((each.cpu().double() - value).abs() <= budget).all()


def test_what_is_singular_warns_and_is_orthogonal():
    m = torch.zeros(5, 5, device="cuda")
    m[0, 1] = 2
    with pytest.warns(RuntimeWarning, match="polar: 1 of 1 matrices are singular"):
        w = polar(m, impl="cuda").double()
    assert (w.mT @ w - torch.eye(5, device="cuda")).abs().max() <= 1e-6


@pytest.mark.parametrize(("D", "E"), [(20, 20), (12, 20), (20, 12)], ids=str)
def test_procrustes_is_that_of_the_cpu(D, E):
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(500, D, generator=generator), torch.randn(500, E, generator=generator)
    w = procrustes(source.cuda(), target.cuda(), impl="cuda")
    assert torch.allclose(w.cpu(), procrustes(source, target, impl="cpu"), rtol=0, atol=2e-5)


def test_gradients_are_those_of_the_cpu():
    m = matrix(16, 10.0, torch.float64)
    gradients = []
    for leaf in (m.clone().requires_grad_(), m.cpu().requires_grad_()):
        w = polar(leaf)
        (first,) = torch.autograd.grad((w * w.cos()).sum(), leaf, create_graph=True)
        gradients.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-9, atol=1e-9)


def test_the_same_call_gives_the_same_bits():
    m = matrix(300, 1e3)
    first = polar(m, impl="cuda")
    for _ in range(5):
        assert torch.equal(polar(m, impl="cuda"), first)


def test_it_runs_on_the_current_stream():
    """m is written on it, late."""
    m = matrix(60, 1e2)
    expected = polar(m, impl="cuda")
    late = torch.ones_like(m)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(m)
        found = polar(late, impl="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)
