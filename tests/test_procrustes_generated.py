"""polar and procrustes of generated arguments: a right answer, or a refusal in words."""

import pytest
import torch
from generated import (
    OF_CALLS,
    SIZES,
    SIZES_AND_NONE,
    TAME,
    Made,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    in_float64,
    kinds_of,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops.procrustes import KERNELS, polar, procrustes
from fastkit.ops.procrustes_iterations import LAST, QUINTICS, RATIONALS
from fastkit.testing.procrustes import expected_factor, least_divisor

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]


def polar_call(choose):
    batch, D = choose(((), (), (1,), (3,), (2, 2), (0,), (2, 0))), choose(SIZES_AND_NONE)
    return polar, spoiled(choose, {"m": drawn(choose, *batch, D, D, dtype=choose(OF_CALLS))})


def procrustes_call(choose):
    dtype, N = choose(OF_CALLS), choose(SIZES_AND_NONE)
    call = {
        "source": drawn(choose, N, choose(SIZES), dtype=dtype),
        "target": drawn(choose, N, choose(SIZES), dtype=dtype),
    }
    return procrustes, spoiled(choose, call)


def any_call(choose):
    return choose((polar_call, procrustes_call))(choose)


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, check)


def check(call, found, plain):
    op = polar if "m" in call else procrustes
    arguments = plain_values(found.arguments, None)
    w, like = found.results["result"], arguments["m" if "m" in call else "source"]
    eps = torch.finfo(torch.promote_types(like.dtype, torch.float32)).eps
    stored = torch.finfo(like.dtype).eps if like.dtype.itemsize == 2 else 0.0
    if w.numel() == 0:
        return
    assert_orthogonal(w, eps, stored)
    assert_orthogonal(plain.results["result"], eps, stored)
    if not kinds_of(call) <= set(TAME):
        return
    if op is polar:
        matrices, product_error = arguments["m"].double().reshape(-1, *w.shape[-2:]), 0.0
    else:
        source, target = arguments["source"].double(), arguments["target"].double()
        m = target.mT @ source
        matrices = (m if m.shape[0] >= m.shape[1] else m.mT).unsqueeze(0)
        sizes = target.abs().mT @ source.abs()
        product_error = eps / 2 * (len(source) + 4) * float(torch.linalg.matrix_norm(sizes))
        product_error *= 2 if like.dtype == torch.float64 else 1  # the oracle's product errs as well
    factors = (w if matrices.shape[1:] == w.shape[-2:] else w.mT).reshape(matrices.shape)
    regular = True
    for matrix, factor in zip(matrices, factors, strict=True):
        s = torch.linalg.svdvals(matrix)
        if s[-1] <= 64 * (eps * s.square().sum().sqrt() + product_error):
            regular = False
            continue  # next to singular: another factor is as good
        value, budget = expected_factor(matrix, dtype=like.dtype)
        budget = budget + product_error / least_divisor(s, len(matrix)) + stored + eps
        assert_within(factor, value, budget, "result")
    if regular and found.gradients and not found.refusal:
        check_gradients(op, found, matrices, eps)


def assert_orthogonal(w, eps, stored):
    w = w.detach().double()
    w = w if w.shape[-2] >= w.shape[-1] else w.mT
    gram = w.mT @ w - torch.eye(w.shape[-1], dtype=torch.float64)
    assert gram.abs().max() <= 64 * eps + 4 * stored * w.shape[-2] ** 0.5


def check_gradients(op, found, matrices, eps):
    """As precise as the condition of the worst matrix has it."""
    s = torch.linalg.svdvals(matrices)
    least = least_divisor(s, matrices.shape[1])
    condition = float((s[:, 0] / least).max())
    exact = in_float64(op, found)
    tables = [
        t.double().abs().max() for t in plain_values(found.arguments).values() if isinstance(t, torch.Tensor)
    ]
    size = found.cotangents["result"].double().norm() / least.min() * (1 if op is polar else max(tables))
    for path, gradient in found.gradients.items():
        value = exact.gradients[path]
        stored = torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 0.0
        budget = ((1024 * eps * condition**2 + 2 * stored) * (value.abs().max() + size)).expand(value.shape)
        assert_within(gradient, value, budget + torch.finfo(gradient.dtype).tiny, f"the gradient of {path}")


def test_generated_calls():
    check_generated(any_call, judge, 100)


def test_a_rectangular_product_with_one_small_singular_value():
    """Its factor errs as that value has it, whatever the next one is."""
    tables = {"source": Made((7, 17), torch.float64), "target": Made((7, 7), torch.float64, seed=276)}
    assert judge((procrustes, tables)) == "answer"


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200])
def test_the_reference_has_the_factor_and_its_gradient_at_any_scale(scale):
    """Squares of singular values overflowed, or vanished, and with them what is singular, and the factor."""
    m = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    usual, scaled = m.clone().requires_grad_(), (scale * m).requires_grad_()
    w, of_scaled = (polar(leaf, impl="reference") for leaf in (usual, scaled))
    assert torch.allclose(of_scaled, w, rtol=0, atol=1e-12)
    g = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64) * min(scale, 1.0)
    gradient = torch.autograd.grad(w, usual, g)[0] / scale
    assert torch.allclose(torch.autograd.grad(of_scaled, scaled, g)[0], gradient, rtol=1e-4, atol=0)
    if scale > 1e-300:
        singular = (scale * torch.ones(2, 2, dtype=torch.float64)).requires_grad_()
        with pytest.warns(RuntimeWarning, match="1 of 1 matrices are singular"):
            polar(singular, impl="reference")


@pytest.mark.parametrize("scale", [4e-309, 1e-200, 1e200])
def test_tables_of_any_scale_have_the_same_map(scale):
    """The reference's product of them vanished, which is singular, or overflowed."""
    m = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    expected = procrustes(m, m.flip(0))
    g = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64) * min(scale, 1.0)
    for impl in ("reference", "cpu"):
        usual, scaled = m.clone().requires_grad_(), (scale * m).requires_grad_()
        w = procrustes(scaled, scale * m.flip(0), impl=impl)
        assert torch.allclose(w, expected, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad(w, scaled, g)
        (of_usual,) = torch.autograd.grad(procrustes(usual, m.flip(0)), usual, g)
        assert torch.allclose(gradient, of_usual / scale, rtol=1e-9, atol=1e-12 * g.abs().max() / scale)


def test_gradients_of_the_iteration_at_any_scale():
    m = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    usual = m.clone().requires_grad_()
    expected = torch.autograd.grad(polar(usual), usual, g)[0]
    for scale in (1e-200, 1e200, 5e307):
        leaf = (scale * m).requires_grad_()
        gradient = torch.autograd.grad(polar(leaf), leaf, g)[0]
        assert torch.allclose(gradient * scale, expected, rtol=1e-12, atol=1e-12)


# The raw op


def raw_call(choose):
    dtype, B, Q = choose((torch.float32, torch.float64)), choose((1, 2, 3, 0)), choose(SIZES)
    steps = [c for step in RATIONALS for c in step], [c for step in (*QUINTICS, LAST) for c in step]
    call = {"m": drawn(choose, B, Q + choose((0, 0, 1, 5)), Q, dtype=dtype, kind="normal")}
    call |= {"rationals": choose((steps[0], [])), "quintics": choose((steps[1], []))}
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return "polar_fwd", list(call.values())


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
