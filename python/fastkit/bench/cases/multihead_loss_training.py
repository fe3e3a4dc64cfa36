"""The losses of many heads and their penalty in training, beside their products and other forms of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import (
    SAME_WORK,
    DeviceType,
    Yardstick,
    compiler,
    make_product,
    makers_of_ours,
    our_others,
)
from fastkit.ops.multihead_loss import KERNELS

_STRENGTH = 0.005  # of the penalty
_BLOCK = 128  # heads
_FEW = 128  # heads, up to which a loop over their pairs takes part


def case(
    B: int,
    H: int,
    C: int,
    D: int,
    *,
    warm: bool = False,
    compile: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """B rows, H heads of C classes, D features, in float32: losses, penalty, and the gradients to all three.

    The floor is a product of 3 B H C D + 3/2 C H^2 D multiply-adds: three products for the losses; for the
    penalty half of the products of pairs, whose other half is the same, and one of their slopes.
    """
    multiply_adds = 3 * B * H * C * D + 3 * C * H * H * D // 2
    return Case(
        op="multihead_loss",
        shape=f"{B}x{H}x{C}x{D}",
        direction="fwd+bwd",
        floor_bytes=4 * (2 * B * D + 2 * H * C * D),
        contest=partial(_Training, (B, H, C, D), multiply_adds, compile, device),
        warm=warm,
        tolerance=1e-4,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
    )


class _Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor


Result = Sequence[Tensor]  # the loss, and the gradients to x, weight and bias


class _Training:
    """The mean of the losses and of the penalty over heads, and its gradients."""

    def __init__(
        self, size: tuple[int, int, int, int], multiply_adds: int, compile: bool, device: DeviceType
    ) -> None:
        self.size = size
        self.multiply_adds = multiply_adds
        self.compile = compile
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> _Inputs:
        B, H, C, D = self.size
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        target = torch.randint(C, (B,), generator=generator, device=self.device)
        inputs = _Inputs(randn(B, D), randn(H, C, D) * 0.02, randn(H, C) * 0.02, target)
        for leaf in inputs[:3]:
            leaf.requires_grad_()
        return inputs

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(
                self.device, KERNELS, lambda impl: self.differentiated(partial(_ours, impl=impl))
            ),
            SAME_WORK: partial(make_product, self.multiply_adds, self.device),
            "autograd": partial(self.differentiated, _total),
            "closed form": partial(self.closed, _closed_form),
            "closed form, blocks": partial(self.closed, partial(_closed_form, block=_BLOCK)),
        }
        if self.compile:
            makers["compiled"] = self.make_compiled
        if self.size[1] <= _FEW:
            makers["loop over heads and pairs"] = partial(self.differentiated, _by_loops)
        return makers

    def differentiated(self, form: Callable[..., Tensor]) -> Call:
        inputs = self.inputs

        def call() -> Result:
            loss = form(*inputs)
            return loss.detach(), *torch.autograd.grad(loss, inputs[:3])

        return call

    def closed(self, form: Callable[..., Result]) -> Call:
        inputs = _Inputs(*(t.detach() for t in self.inputs))
        return lambda: form(*inputs)

    def make_compiled(self) -> Call:
        call = self.differentiated(compiler(self.device)(_total))
        call()
        return call

    def error(self, result: Any) -> float:
        """The largest in any result, relative to its largest value; of the heads, in the mean.

        The slope of |t| is a sign, which rounding decides of what is 0 but for rounding.
        """
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        errors: list[Tensor] = []
        for name, want, actual in zip(("loss", *_Inputs._fields), self.expected, result, strict=False):
            far = (actual.detach().double() - want).abs()
            errors.append((far.mean() if name == "weight" else far.amax()) / want.abs().amax())
        return float(torch.stack(errors).amax())

    @cached_property
    def expected(self) -> Result:
        x, weight, bias, target = (t.detach() for t in self.inputs)
        return _closed_form(x.double(), weight.double(), bias.double(), target)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, impl: Impl | None = None) -> Tensor:
    losses = ops.multihead_loss(x, weight, bias, target, impl=impl).loss
    penalty = ops.orthogonality_penalty(weight, impl=impl)
    return losses.mean() + _STRENGTH / len(weight) * penalty


def _total(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """One product for all logits, one for all pairs."""
    H, C, _ = weight.shape
    z = linear(x, weight.flatten(0, 1), bias.flatten()).view(-1, C)
    loss = cross_entropy(z, target.repeat_interleave(H))
    by_class = weight.transpose(0, 1)
    gram = torch.bmm(by_class, by_class.transpose(1, 2))
    return loss + _STRENGTH / H * gram.abs().triu(1).sum()


def _by_loops(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """As it is written first."""
    H = len(weight)
    losses = [cross_entropy(linear(x, w, b), target) for w, b in zip(weight, bias, strict=True)]
    pairs = [(one * other).sum(1).abs().sum() for one, other in combinations(weight.unbind(), 2)]
    return torch.stack(losses).mean() + _STRENGTH / H * torch.stack(pairs).sum()


def _closed_form(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, block: int | None = None
) -> Result:
    """The gradients by their formulas; with blocks of heads, each pair of blocks once."""
    H, C, D = weight.shape
    z = torch.addmm(bias.flatten(), x, weight.flatten(0, 1).T).view(-1, H, C)
    p = z.softmax(2)
    of_target = target.view(-1, 1, 1).expand(-1, H, 1)
    loss = -p.gather(2, of_target).log().mean()
    dz = p.scatter_add(2, of_target, -p.new_ones(()).expand_as(of_target)).div_(p.shape[0] * H)
    flat = dz.flatten(1)
    of_x, of_weight = flat @ weight.flatten(0, 1), (flat.T @ x).view(H, C, D)
    by_class = weight.transpose(0, 1)
    total = z.new_zeros(())
    scale = _STRENGTH / H
    gradient = torch.zeros(C, H, D, dtype=x.dtype, device=x.device)
    step = block or H
    for begin in range(0, H, step):
        here, onwards = by_class[:, begin : begin + step], by_class[:, begin:]
        gram = torch.bmm(here, onwards.transpose(1, 2))
        total += gram.abs().triu(1).sum()
        slopes = gram.sign_()
        slopes.diagonal(dim1=1, dim2=2).zero_()
        gradient[:, begin : begin + step].baddbmm_(slopes, onwards)
        if begin + step < H:
            gradient[:, begin + step :].baddbmm_(slopes[:, :, step:].transpose(1, 2), here)
    of_weight.add_(gradient.transpose(0, 1), alpha=scale)
    return loss + scale * total, of_x, of_weight, dz.sum(0)
