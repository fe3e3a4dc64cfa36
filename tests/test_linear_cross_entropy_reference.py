"""reference.linear_cross_entropy against PyTorch's cross entropy, and against numbers known in advance."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fastkit import reference
from fastkit.reference import linear_cross_entropy, linear_cross_entropy_with_lse

pytestmark = [pytest.mark.usefixtures("one_thread")]

DOUBLE = torch.float64


def inputs(N=7, V=11, D=5):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=DOUBLE) for n in (N, V))
    bias, of_classes = torch.randn(V, generator=generator, dtype=DOUBLE), torch.rand(V, dtype=DOUBLE)
    return hidden, weight, torch.randint(V, (N,), generator=generator), bias, of_classes


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_is_torchs_where_that_has_the_option(reduction, smoothing, weighted, ignored):
    hidden, weight, target, bias, of_classes = inputs()
    if ignored:
        target[::3] = 4
    options = {
        "weight": of_classes if weighted else None, "reduction": reduction, "label_smoothing": smoothing,
        "ignore_index": 4 if ignored else -100,
    }  # fmt: skip
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options),
        functional.cross_entropy(functional.linear(hidden, weight, bias), target, **options),
    ):
        cotangent = torch.linspace(1, 2, loss.numel(), dtype=DOUBLE).view(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, leaves, cotangent)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_known_numbers():
    hidden, weight = torch.zeros(2, 3, dtype=DOUBLE), torch.zeros(8, 3, dtype=DOUBLE)
    loss, lse = linear_cross_entropy_with_lse(hidden, weight, torch.tensor([0, 7]))
    assert loss.item() == pytest.approx(math.log(8)) and lse.tolist() == pytest.approx([math.log(8)] * 2)
    with_z = linear_cross_entropy(hidden, weight, torch.tensor([0, 7]), z_loss=0.5, reduction="sum")
    assert with_z.item() == pytest.approx(2 * math.log(8) + math.log(8) ** 2)
    weights = torch.tensor([3.0, -1], dtype=DOUBLE)
    losses = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 7]), token_weight=weights, reduction="none"
    )
    assert losses.tolist() == pytest.approx([3 * math.log(8), -math.log(8)])
    mean = linear_cross_entropy(hidden, weight, torch.tensor([0, 7]), token_weight=weights)
    assert mean.item() == pytest.approx(math.log(8))  # divided by 2 tokens, whatever they weigh


def test_the_softcap_is_gemmas():
    hidden, weight, target, bias, _ = inputs()
    logits = 2.0 * torch.tanh(functional.linear(hidden, weight, bias) / 2.0)
    loss, lse = linear_cross_entropy_with_lse(hidden, weight, target, linear_bias=bias, softcap=2.0)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, target), rtol=1e-13, atol=0)
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-13, atol=0)


def test_a_target_that_is_no_class_is_nan():
    hidden, weight, target, *_ = inputs()
    target[2], target[3] = 11, -1
    losses = linear_cross_entropy(hidden, weight, target, reduction="none")
    assert losses.isnan().tolist() == [i in (2, 3) for i in range(7)]


def test_half_precision_is_widened():
    hidden, weight, target, *_ = inputs()
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    wide = linear_cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), target)
    assert half.dtype == torch.float32 and torch.equal(half, wide)


OPTIONS = [
    dict(zip(("label_smoothing", "softcap", "z_loss", "reduction"), values, strict=True))
    for values in itertools.product((0.0, 0.1), (None, 3.0), (0.0, 0.1), ("mean", "none"))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options):
    hidden, weight, target, bias, of_classes = inputs(4, 6, 3)
    target[1] = -100
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))

    def function(hidden, weight, bias):
        return tuple(
            linear_cross_entropy_with_lse(
                hidden, weight, target, linear_bias=bias, weight=of_classes, **options
            )
        )

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_its_names():
    assert reference.linear_cross_entropy is linear_cross_entropy
    assert reference.LinearCrossEntropy._fields == ("loss", "lse")
