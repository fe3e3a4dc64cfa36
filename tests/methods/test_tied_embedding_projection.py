"""Projection regularisation: the two penalties, what they are held to, and a model of somebody else's."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from fastkit.methods.tied_embedding import Projection, TiedLanguageModel, projection_penalty
from fastkit.nn import TiedEmbedding

pytestmark = pytest.mark.native

V, H = 13, 6


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def test_the_formulas():
    p = numbers(H, H)
    square = sum(float(entry) ** 2 for entry in p.flatten())
    for tokens in (1, 20, 400, 2.5):
        found = projection_penalty(p, tokens)
        assert math.isclose(found, square / 2 / 6.5 / tokens, rel_tol=1e-14)
        found = projection_penalty(p, tokens, pr_weight=0.4)
        assert math.isclose(found, 0.4 * square / 2 / tokens, rel_tol=1e-14)
        found = projection_penalty(p, tokens, pr_norm="paper")
        assert math.isclose(found, 0.15 * math.sqrt(square), rel_tol=1e-14)
    assert math.isclose(projection_penalty(torch.eye(2).double(), 20 * 20), 3.85e-4, rel_tol=2e-3)


def test_a_mean_and_the_sum_of_the_papers_code_have_one_minimum():
    """The gradient of [sum of losses + l2_loss(P) / 6.5] / rows is that of the mean's, times the steps."""
    rows, steps = 3, 5
    tied, h = TiedEmbedding(V, H, bias=True).double(), numbers(rows, steps, H)
    target = torch.randint(V, (rows, steps))
    projection = Projection(H).double()
    gradients = []
    for reduction, divisor, tokens in (("mean", 1, rows * steps), ("sum", rows, rows)):
        projection.zero_grad()
        loss = tied.loss(projection(h), target, reduction=reduction) / divisor
        (loss + projection.penalty(tokens)).backward()
        gradients.append(projection.weight.grad.clone())
    torch.testing.assert_close(gradients[0] * steps, gradients[1], rtol=1e-12, atol=1e-14)
    p = projection.weight.detach()
    alone = gradients[1] - p / 6.5 / rows
    projection.zero_grad()
    (tied.loss(projection(h), target, reduction="sum") / rows).backward()
    torch.testing.assert_close(projection.weight.grad, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pr_norm", ["code", "paper"])
def test_gradients_in_float64(pr_norm):
    def of(p, h):
        return projection_penalty(p, 7, pr_norm=pr_norm) + linear(h, p).square().sum()

    inputs = numbers(H, H).requires_grad_(), numbers(2, H).requires_grad_()
    assert torch.autograd.gradcheck(of, inputs)
    assert torch.autograd.gradgradcheck(of, inputs)


def test_at_zero_the_norm_has_a_gradient():
    p = torch.zeros(H, H, requires_grad=True)
    projection_penalty(p, pr_norm="paper").backward()
    assert torch.equal(p.grad, torch.zeros(H, H))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    p = torch.full((200, 200), 10.0, dtype=dtype)  # 4e6 is beyond float16
    found = projection_penalty(p)
    assert found.dtype == torch.float32
    assert math.isclose(found, 4e6 / 13, rel_tol=1e-6)


def test_the_module():
    projection = Projection(H, init_range=0.5).double()
    h = numbers(2, 3, H)
    p, bias = projection.weight.detach(), projection.bias.detach()
    torch.testing.assert_close(projection(h), h @ p.T + bias, rtol=1e-13, atol=1e-13)
    assert [(n, tuple(t.shape)) for n, t in projection.state_dict().items()] == [
        ("weight", (H, H)), ("bias", (H,)),
    ]  # fmt: skip
    without = Projection(H, bias=False, pr_norm="paper", pr_weight=2.0).double()
    assert without.bias is None
    torch.testing.assert_close(without(h), h @ without.weight.T, rtol=1e-13, atol=1e-13)
    assert math.isclose(without.penalty(99).item(), 2 * without.weight.norm().item(), rel_tol=1e-13)
    assert "pr_norm='paper', pr_weight=2, bias=False" in repr(without)
    wide = Projection(300, init_range=0.25).weight
    assert 0.249 < wide.max() <= 0.25 and -0.25 <= wide.min() < -0.249  # uniform


def test_a_language_model_has_both_and_reports_the_loss_alone():
    model = TiedLanguageModel(V, H, tie=True, projection=True).double()
    ids, target = torch.randint(V, (2, 2, 5)).unbind()
    h, _ = model(ids)
    s, c, p, p_b = (
        model.get_parameter(name).detach()
        for name in ("embedding.weight", "embedding.bias", "projection.weight", "projection.bias")
    )
    logits = (h @ p.T + p_b) @ s.T + c
    torch.testing.assert_close(model.logits(h), logits, rtol=1e-12, atol=1e-13)
    loss, _ = model.loss(ids, target)
    expected = cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    assert math.isclose(model.penalty(10).item(), p.square().sum().item() / 13 / 10, rel_tol=1e-12)
    other = TiedLanguageModel(V, H, projection=True, pr_norm="paper", pr_weight=0.3).double()
    assert math.isclose(other.penalty(10).item(), 0.3 * other.projection.weight.norm().item(), rel_tol=1e-12)
    text = torch.arange(9)
    alone = model.loss(text[None, :-1], text[None, 1:])[0].exp().item()
    assert math.isclose(model.perplexity(text), alone, rel_tol=1e-12)
    plain = TiedLanguageModel(V, H, tie=True)
    assert plain.penalty(10) == 0


def test_it_pulls_the_projection_of_a_users_model_to_zero():
    tied, projection = TiedEmbedding(V, H), Projection(H)
    (projection.penalty(20) * 20).backward()
    torch.testing.assert_close(projection.weight.grad, projection.weight.detach() / 6.5)
    assert projection.bias.grad is None  # which the penalty leaves alone
    assert tied.loss(projection(torch.randn(4, H)), torch.arange(4)).isfinite()


def test_refusals():
    op = "projection_penalty"
    square = "it goes from the width of the hidden state to that of the embedding, which are one"
    for shape in ((H, H + 1), (H,), (2, H, H)):
        with refused(ValueError, f"{op}: weight must have shape (H, H), got {shape}; {square}"):
            projection_penalty(torch.zeros(shape))
    replaced = Projection(H)
    replaced.weight = nn.Parameter(torch.zeros(H, 2 * H))
    with refused(ValueError, f"{op}: weight must have shape (H, H), got (6, 12); {square}"):
        replaced.penalty()
    with refused(TypeError, f"{op}: weight must be a floating-point tensor, got torch.int64"):
        projection_penalty(torch.zeros(H, H, dtype=torch.int64))
    with refused(TypeError, f"{op}: weight must be a floating-point tensor, got list"):
        projection_penalty([[1.0]])
    for tokens in (0, -1, math.inf, math.nan):
        with refused(ValueError, f"{op}: tokens must be positive and finite, got {tokens}"):
            projection_penalty(torch.eye(2), tokens)
    with refused(ValueError, f"{op}: pr_norm must be one of 'code', 'paper', got 'l2'"):
        projection_penalty(torch.eye(2), pr_norm="l2")
    with refused(ValueError, "Projection: pr_norm must be one of 'code', 'paper', got 'l2'"):
        Projection(H, pr_norm="l2")
    with refused(ValueError, "Projection: pr_weight must be positive and finite, got 0"):
        Projection(H, pr_weight=0)
    with refused(ValueError, "Projection: hidden_size must be at least 1, got 0"):
        Projection(0)
    with refused(ValueError, "Projection: init_range must not be negative, got -0.1"):
        Projection(H, init_range=-0.1)
    with refused(ValueError, "Projection: h must have shape (..., 6), got (2, 5)"):
        Projection(H)(torch.zeros(2, 5))
