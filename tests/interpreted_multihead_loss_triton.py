"""The Triton kernels of multihead_loss and orthogonality_penalty in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools
import math

import pytest
import torch

from fastkit import ops, reference
from fastkit.ops import multihead_loss_penalty_products as penalty_products
from fastkit.triton import multihead_loss as kernels

pytestmark = pytest.mark.usefixtures("patched_once")

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
PROBLEMS = ("single_label", "multi_label", "regression")
KINDS = ("abs", "squared", "cos_abs", "cos_squared", "huber")

numpy_may_warn = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered")


def inputs(problem, B, H, C, D, dtype=FLOAT):
    generator = torch.Generator().manual_seed(B + H + C + D)
    C = 1 if problem == "regression" else C
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, D), (H, C, D), (H, C))
    )
    if problem == "single_label":
        target = torch.randint(C, (B,), generator=generator)
        target[1::4] = -100
    elif problem == "multi_label":
        target = torch.rand(B, C, generator=generator)
    else:
        target = torch.randn(B, generator=generator)
    active = torch.rand(H, generator=generator) < 0.7
    weights = torch.rand(C, generator=generator).to(dtype) if problem != "regression" else None
    return (x, weight, bias), target, active, weights


def both(leaves, target, **options):
    """Results and gradients of the kernels, and of the reference in float64 on the same numbers."""
    found = []
    for impl, of in (("triton", leaves), ("reference", [leaf.double() for leaf in leaves])):
        of = [leaf.detach().clone().requires_grad_() for leaf in of]
        given = dict(options)
        if impl == "reference" and given.get("class_weight") is not None:
            given["class_weight"] = given["class_weight"].double()
        result = ops.multihead_loss(*of, target, impl=impl, **given)
        cotangent = torch.linspace(0.5, 2, len(result.loss)).to(result.loss.dtype)
        found.append((result, torch.autograd.grad(result.loss, of, cotangent)))
    return found


def compare(one, other, dtype):
    """Sums of float32, of numbers around 1: some hundred roundings; gradients are rounded to the dtype."""
    (result, gradients), (expected, of_reference) = one, other
    assert result.loss.dtype == FLOAT
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=2e-5, atol=2e-5)
    assert torch.equal(result.correct, expected.correct) and result.count == expected.count
    bound = 2e-5 if dtype == FLOAT else 2 * torch.finfo(dtype).eps
    for found, want in zip(gradients, of_reference, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("B", "H", "C", "D"), [(1, 1, 2, 1), (7, 3, 3, 70), (33, 2, 17, 5), (40, 3, 64, 20), (34, 2, 150, 20)]
)
def test_shapes(problem, B, H, C, D):
    leaves, target, active, weights = inputs(problem, B, H, C, D)
    plain = both(leaves, target, problem=problem)
    compare(*plain, FLOAT)
    compare(*both(leaves, target, problem=problem, active=active, class_weight=weights), FLOAT)


@pytest.mark.parametrize("C", [3, 70])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothed_targets(C, weighted):
    leaves, target, active, weights = inputs("single_label", 9, 3, C, 8)
    options = {"label_smoothing": 0.2, "class_weight": weights if weighted else None, "active": active}
    compare(*both(leaves, target, **options), FLOAT)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_half_precision(problem, dtype):
    leaves, target, active, weights = inputs(problem, 9, 3, 5, 20, dtype)
    compare(*both(leaves, target, problem=problem, active=active, class_weight=weights), dtype)


@numpy_may_warn
def test_what_does_not_count_may_be_nan():
    (x, weight, bias), target, active, _ = inputs("single_label", 9, 4, 3, 8)
    target[0], active[:2] = 1, torch.tensor([True, False])
    expected = both((x, weight, bias), target, active=active)[0]
    x[1], weight[1], bias[1] = math.nan, math.nan, math.inf
    found = both((x, weight, bias), target, active=active)[0]
    assert torch.equal(found[0].loss, expected[0].loss) and torch.equal(found[0].correct, expected[0].correct)
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)
    assert not found[1][0][1].any() and not found[1][1][1].any()


@numpy_may_warn
def test_nan_stays_in_its_head_and_a_target_that_is_no_class_is_nan():
    (x, weight, bias), target, _, _ = inputs("single_label", 9, 4, 3, 8)
    bias[2, 0] = math.nan
    found = ops.multihead_loss(x, weight, bias, target, impl="triton")
    assert found.loss.isnan().tolist() == [False, False, True, False] and found.correct[2] == 0
    for value in (3, -1):
        target[0] = value
        loss, _, _, dz = kernels.forward(
            x, weight, bias * 0, target, None, None, "single_label", 0.0, -100, True
        )
        assert loss.isnan().all() and dz.view(4, 3, 9)[:, :, 0].isnan().all()


def test_of_no_rows_that_count_the_loss_is_0():
    (x, weight, bias), target, *_ = inputs("single_label", 5, 3, 4, 8)
    (found, gradients), _ = both((x, weight, bias), torch.full_like(target, 2), ignore_index=2)
    assert not found.loss.any() and found.count == 0 and not any(g.any() for g in gradients)


def test_int32_targets_strided_rows_and_only_some_gradients():
    (x, weight, bias), target, active, _ = inputs("single_label", 9, 4, 3, 8)
    expected = both((x, weight, bias), target, active=active)[0]
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert strided.stride(1) == 2
    found = both((strided, weight, bias), target.int(), active=active)[0]
    assert torch.equal(found[0].loss, expected[0].loss)
    for place in range(3):
        leaves = [x.clone(), weight.clone(), bias.clone()]
        leaves[place].requires_grad_()
        loss = ops.multihead_loss(*leaves, target, active=active, impl="triton").loss
        cotangent = torch.linspace(0.5, 2, 4)
        (gradient,) = torch.autograd.grad(loss, leaves[place], cotangent)
        assert torch.equal(gradient, expected[1][place])


# The penalty


def penalties(weight, **options):
    found = []
    for impl, of in (("triton", weight), ("reference", weight.double())):
        leaf = of.detach().clone().requires_grad_()
        penalty = ops.orthogonality_penalty(leaf, impl=impl, **options)
        found.append((penalty, torch.autograd.grad(penalty, leaf, 2 * penalty.detach().sign())[0]))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "C", "D"), [(1, 1, 1), (2, 3, 5), (17, 2, 20)])
def test_penalties(kind, H, C, D):
    weight = torch.randn(H, C, D, generator=torch.Generator().manual_seed(H))
    active = torch.arange(H) % 3 != 1
    for masked, centered in itertools.product((False, True), (False, True)):
        if centered and C == 1:
            continue
        options = {"kind": kind, "huber_width": 0.5, "center_classes": centered}
        if masked:
            options["active"] = active
            weight[~active] = math.nan
        (penalty, gradient), (expected, want) = penalties(weight, **options)
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_a_penalty_in_half_precision(dtype):
    weight = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    (penalty, gradient), (expected, want) = penalties(weight)
    assert penalty.dtype == FLOAT and gradient.dtype == dtype
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), want, rtol=bound, atol=bound)


def test_blocks_of_heads_are_one_matrix(monkeypatch):
    weight = torch.randn(11, 2, 7, generator=torch.Generator().manual_seed(0))
    whole = penalties(weight)[0]
    monkeypatch.setattr(penalty_products, "_GRAM_BYTES", 4 * 2 * 11 * 3)  # three heads with all
    parts = penalties(weight)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_more_heads_than_a_tile(monkeypatch):
    monkeypatch.setattr(kernels, "slopes_options", lambda: {"BH": 4, "num_warps": 1})
    weight = torch.randn(11, 2, 7, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        (penalty, gradient), (expected, want) = penalties(weight, kind=kind)
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_the_reference():
    (x, weight, bias), target, *_ = inputs("single_label", 4, 2, 3, 5)
    hessians = []
    for run in (lambda *a: ops.multihead_loss(*a, impl="triton"), reference.multihead_loss):
        leaf = weight.clone().requires_grad_()
        loss = run(x, leaf, bias, target).loss.sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        hessians.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*hessians, rtol=1e-4, atol=1e-5)
