"""reference.multihead_loss and orthogonality_penalty against loops over heads and over pairs."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fastkit import reference
from fastkit.reference import multihead_loss, orthogonality_penalty

pytestmark = [pytest.mark.usefixtures("one_thread")]

DOUBLE = torch.float64
PROBLEMS = ("single_label", "multi_label", "regression")
KINDS = ("abs", "squared", "cos_abs", "cos_squared", "huber")


def inputs(problem, B=7, H=4, C=5, D=6):
    generator = torch.Generator().manual_seed(0)
    classes = 1 if problem == "regression" else C
    x = torch.randn(B, D, generator=generator, dtype=DOUBLE)
    weight = torch.randn(H, classes, D, generator=generator, dtype=DOUBLE)
    bias = torch.randn(H, classes, generator=generator, dtype=DOUBLE)
    if problem == "single_label":
        target = torch.randint(classes, (B,), generator=generator)
    elif problem == "multi_label":
        target = torch.rand(B, classes, generator=generator, dtype=DOUBLE).round()
    else:
        target = torch.randn(B, generator=generator, dtype=DOUBLE)
    return x, weight, bias, target


def one_head(problem, z, target, weights, smoothing):
    """As PyTorch has it."""
    if problem == "single_label":
        return functional.cross_entropy(z, target, weights, label_smoothing=smoothing)
    if problem == "multi_label":
        return functional.binary_cross_entropy_with_logits(z, target, weights)
    return functional.mse_loss(z[:, 0], target)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_is_a_loop_over_heads(problem, weighted, smoothing, masked):
    x, weight, bias, target = inputs(problem)
    if problem != "single_label" and smoothing:
        smoothing = 0.0
    if problem == "single_label":
        target[2] = -100
    weights = torch.rand(weight.shape[1], dtype=DOUBLE) if weighted and problem != "regression" else None
    active = torch.tensor([True, False, True, True]) if masked else None
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = multihead_loss(
        x, weight, bias, target, problem=problem, active=active, class_weight=weights,
        label_smoothing=smoothing,
    )  # fmt: skip
    expected, right = [], []
    for head in range(4):
        z = functional.linear(x, weight[head], bias[head])
        on = active is None or bool(active[head])
        expected.append(one_head(problem, z, target, weights, smoothing) if on else z.new_zeros(()))
        if problem == "single_label":
            right.append(sum(int(row.argmax()) == int(t) for row, t in zip(z, target, strict=True)))
        elif problem == "multi_label":
            right.append(int(((z > 0) == (target == 1)).sum()))
        else:
            right.append(0)
        right[-1] *= on
    expected = torch.stack(expected)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)
    assert found.correct.tolist() == right and found.correct.dtype == torch.int64
    assert found.count.item() == {"single_label": 6, "multi_label": 35, "regression": 7}[problem]
    cotangent = torch.linspace(1, 2, 4, dtype=DOUBLE)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_heads_that_are_not_active_and_rows_that_do_not_count_may_be_nan():
    x, weight, bias, target = inputs("single_label")
    active = torch.tensor([True, False, True, True])
    target[3] = -100
    plain = multihead_loss(x, weight, bias, target, active=active)
    x[3], weight[1], bias[1] = math.nan, math.inf, math.nan
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = multihead_loss(x, weight, bias, target, active=active)
    assert torch.equal(found.loss, plain.loss) and torch.equal(found.correct, plain.correct)
    of_x, of_weight, of_bias = torch.autograd.grad(found.loss.sum(), leaves)
    assert not of_x[3].any() and not of_weight[1].any() and not of_bias[1].any()
    assert all(t.isfinite().all() for t in (of_x, of_weight, of_bias))


def test_known_numbers():
    x, weight, bias = torch.zeros(3, 2, dtype=DOUBLE), torch.zeros(2, 4, 2, dtype=DOUBLE), torch.zeros(2, 4)
    found = multihead_loss(x, weight, bias.double(), torch.tensor([0, 1, -100]))
    assert found.loss.tolist() == pytest.approx([math.log(4)] * 2)
    assert (found.correct.tolist(), found.count.item()) == ([1, 1], 2)  # of equal logits the first class
    none = multihead_loss(x, weight.requires_grad_(), bias.double(), torch.full((3,), -100))
    assert (none.loss.tolist(), none.count.item()) == ([0, 0], 0)
    assert not torch.autograd.grad(none.loss.sum(), weight)[0].any()
    binary = multihead_loss(x, weight, bias.double(), torch.ones(3, 4).double(), problem="multi_label")
    assert binary.loss.tolist() == pytest.approx([math.log(2)] * 2) and binary.correct.tolist() == [0, 0]
    square = multihead_loss(
        x, weight[:, :1], bias[:, :1].double(), torch.tensor([1.0, 2, 3]).double(), problem="regression"
    )
    assert square.loss.tolist() == pytest.approx([14 / 3] * 2)


def test_a_target_that_is_no_class_is_nan_and_a_nan_logit_is_not_right():
    x, weight, bias, target = inputs("single_label")
    target[0] = 5
    assert multihead_loss(x, weight, bias, target).loss.isnan().all()
    target[0] = 0
    bias[2, 0] = math.nan
    found = multihead_loss(x, weight, bias, torch.zeros(7, dtype=torch.int64))
    assert found.loss.isnan().tolist() == [False, False, True, False]
    assert found.correct[2] == 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_half_precision_is_widened(problem):
    x, weight, bias, target = inputs(problem)
    halves = [t.bfloat16() for t in (x, weight, bias)]
    half = multihead_loss(*halves, target, problem=problem)
    wide = multihead_loss(*(t.float() for t in halves), target, problem=problem)
    assert half.loss.dtype == torch.float32 and torch.equal(half.loss, wide.loss)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_derivatives_of_the_loss(problem, smoothing):
    x, weight, bias, target = inputs(problem, 3, 3, 3, 2)
    if problem == "single_label":
        target[1] = -100
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
    active = torch.tensor([True, True, False])

    def function(x, weight, bias):
        return multihead_loss(
            x, weight, bias, target, problem=problem, active=active, label_smoothing=smoothing
        ).loss

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


# The penalty


def rho(kind, t, width):
    if kind.endswith("abs"):
        return abs(t)
    if kind.endswith("squared"):
        return t * t
    return t * t / (2 * width) if abs(t) <= width else abs(t) - width / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_is_a_loop_over_pairs(kind, centered, masked):
    _, weight, *_ = inputs("single_label", H=5, C=3)
    active = torch.tensor([True, False, True, True, True]) if masked else None
    found = orthogonality_penalty(weight, kind=kind, huber_width=1.5, active=active, center_classes=centered)
    total = 0.0
    for one, other in itertools.combinations([i for i in range(5) if active is None or active[i]], 2):
        for c in range(3):
            rows = [weight[h, c] - (weight[h].mean(0) if centered else 0) for h in (one, other)]
            if kind.startswith("cos"):
                rows = [row / row.norm() for row in rows]
            total += rho(kind, float(rows[0] @ rows[1]), 1.5)
    assert found.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_of_orthogonal_heads_and_of_one_head_it_is_zero(kind):
    weight = torch.eye(6, dtype=DOUBLE).view(3, 2, 6) * 3
    assert orthogonality_penalty(weight, kind=kind) == 0
    assert orthogonality_penalty(weight[:1], kind=kind) == 0
    assert orthogonality_penalty(weight, kind=kind, active=torch.zeros(3, dtype=torch.bool)) == 0
    zero = torch.zeros(3, 2, 6, dtype=DOUBLE, requires_grad=True)
    penalty = orthogonality_penalty(zero, kind=kind)
    assert penalty == 0 and not torch.autograd.grad(penalty, zero)[0].any()


def test_two_classes_may_hide_one_direction_of_decision():
    """Softmax ignores what all classes of a head have in common; the penalty only where it is centered."""
    heads, u = 3, torch.zeros(8, dtype=DOUBLE)
    u[0] = 1.0
    # Common parts v_h, orthogonal to u, of products -1/4 with each other.
    gram = torch.full((heads, heads), -0.25, dtype=DOUBLE).fill_diagonal_(1.0)
    common = torch.zeros(heads, 8, dtype=DOUBLE)
    common[:, 1 : 1 + heads] = torch.linalg.cholesky(gram)
    weight = torch.stack([common + u / 2, common - u / 2], 1)
    assert orthogonality_penalty(weight).item() == pytest.approx(0, abs=1e-14)
    assert orthogonality_penalty(weight, center_classes=True).item() == pytest.approx(2 * 3 * 0.25)
    differences = weight[:, 0] - weight[:, 1]
    assert torch.allclose(differences, u.expand(heads, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centered", [False, True])
def test_derivatives_of_the_penalty(kind, centered):
    _, weight, *_ = inputs("single_label", H=3, C=2, D=4)
    active = torch.tensor([True, True, False])

    def function(weight):
        return orthogonality_penalty(
            weight, kind=kind, huber_width=0.7, active=active, center_classes=centered
        )

    assert gradcheck(function, weight.requires_grad_())
    assert gradgradcheck(function, weight)


def test_its_names():
    assert reference.multihead_loss is multihead_loss
    assert reference.MultiheadLoss._fields == ("loss", "correct", "count")
