"""lora_linear, with mask and statistic, beside the frozen layer and the ways to write it today."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import DeviceType, Yardstick, compiler, load, makers_of_ours, our_others
from fastkit.ops.lora_linear import KERNELS

FROZEN, PEFT = "frozen layer", "peft unmasked"
_SCALE = 0.5


def case(
    N: int,
    D: int,
    O: int,  # noqa: E741
    R: int,
    *,
    backward: bool = False,
    warm: bool = False,
    compile: bool = True,
    packages: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """On a GPU in bfloat16, with A and B in float32; on a CPU all in float32.

    The floor is the frozen layer alone: its product, and with backward the one of its gradient to x.
    """
    element = 2 if device == "cuda" else 4
    return Case(
        op="lora_linear",
        shape=f"{N}x{D}x{O} r{R}{' bf16' if device == 'cuda' else ''}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=element * N * (2 * D + O if backward else D + O),
        contest=partial(_Layer, (N, D, O, R), backward, compile, packages, device),
        warm=warm,
        tolerance=2e-2 if device == "cuda" else 1e-4,
        yardsticks=our_others(device, KERNELS) | {FROZEN} | ({PEFT} if packages else set()),
        floor=FROZEN,
        device=device,
        peers=("peft",),
    )


class _Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    mask: Tensor
    gy: Tensor


class _Layer:
    """y and the gradients to x, A and B; a contestant that has the statistic gives it last."""

    def __init__(
        self,
        size: tuple[int, int, int, int],
        backward: bool,
        compile: bool,
        packages: bool,
        device: DeviceType,
    ) -> None:
        self.size = size
        self.backward = backward
        self.compile = compile
        self.packages = packages
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> _Inputs:
        N, D, O, R = self.size  # noqa: E741
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        mask = torch.rand(R, D, generator=generator, device=self.device) < 0.5
        inputs = _Inputs(
            randn(N, D).to(dtype),
            (randn(O, D) / D**0.5).to(dtype),
            randn(O).to(dtype),
            randn(R, D) / D**0.5,
            randn(O, R),
            mask,
            randn(N, O).to(dtype),
        )
        for leaf in (inputs.x, inputs.a, inputs.b):
            leaf.requires_grad_(self.backward)
        return inputs

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, lambda impl: self.call(partial(_ours, impl=impl))),
            FROZEN: self.make_frozen,
            "autograd by hand": partial(self.call, _by_hand),
            "eager": partial(self.call, _eager),
        }
        if self.packages:
            makers[PEFT] = self.make_peft
        if self.compile:
            makers["compiled"] = self.make_compiled
        return makers

    def call(self, form: Callable[..., tuple[Tensor, ...]]) -> Call:
        x, weight, bias, a, b, mask, gy = self.inputs

        def call() -> tuple[Tensor, ...]:
            y, *stats = form(x, weight, bias, a, b, mask)
            gradients = torch.autograd.grad(y, (x, a, b), gy) if self.backward else ()
            return y.detach(), *gradients, *stats

        return call

    def make_compiled(self) -> Call:
        call = self.call(compiler(self.device)(_eager))
        call()
        return call

    def make_frozen(self) -> Call:
        x, weight, bias, _, _, _, gy = self.inputs

        def call() -> Yardstick:
            y = linear(x, weight, bias)
            gradients = torch.autograd.grad(y, x, gy) if self.backward else ()
            return Yardstick((y.detach(), *gradients), self.error_of_frozen)

        return call

    def make_peft(self) -> Call:
        """PEFT's own layer, which has neither mask nor statistic."""
        lora = load("peft.tuners.lora.layer")
        x, weight, bias, a, b, mask, gy = self.inputs
        O, D = weight.shape  # noqa: E741
        base = nn.Linear(D, O, device=self.device, dtype=weight.dtype).requires_grad_(False)
        base.weight.data, base.bias.data = weight, bias
        config = load("peft").LoraConfig(r=len(a), lora_alpha=_SCALE * len(a))
        layer = lora.Linear(base, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
        low_a, low_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            low_a.copy_(a.masked_fill(~mask, 0.0))
            low_b.copy_(b)

        def call() -> tuple[Tensor, ...]:
            y = layer(x)
            gradients = torch.autograd.grad(y, (x, low_a, low_b), gy) if self.backward else ()
            return y.detach(), *gradients

        def masked() -> Yardstick:
            return Yardstick(call(), self.error_of_peft)

        return masked

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return self.error_from(self.expected, result)

    def error_from(self, expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
        """The largest in any result, relative to its largest value; of y and gx in some rows."""
        errors = []
        for i, (want, actual) in enumerate(zip(expected, result, strict=True)):
            of_rows = actual[self.rows] if i == 0 or (i == 1 and self.backward) else actual
            errors.append((of_rows.detach().cpu().double() - want).abs().amax() / want.abs().amax())
        return float(torch.stack(errors).amax())

    def error_of_frozen(self, result: Sequence[Tensor]) -> float:
        x, weight, bias, _, _, _, gy = (t.detach().cpu().double() for t in self.inputs)
        rows = self.rows
        expected = [linear(x[rows], weight, bias), *([gy[rows] @ weight] if self.backward else [])]
        return self.error_from(expected, result)

    def error_of_peft(self, result: Sequence[Tensor]) -> float:
        """It has no statistic, and its gradient of A is not masked."""
        masked = [g.masked_fill(~self.inputs.mask, 0.0) if i == 2 else g for i, g in enumerate(result)]
        return self.error_from(self.expected[:-1], masked)

    @property
    def rows(self) -> Tensor:
        return torch.linspace(0, self.size[0] - 1, 16).long()

    @cached_property
    def expected(self) -> list[Tensor]:
        """In float64; of the large products the rows that are looked at."""
        x, weight, bias, a, b, mask, gy = (t.detach().cpu() for t in self.inputs)
        x, weight, bias, a, b, gy = (t.double() for t in (x, weight, bias, a, b, gy))
        rows, kept = self.rows, a.masked_fill(~mask, 0.0)
        h, square_sum = x @ kept.T, x.square().sum(0)
        y = linear(x[rows], weight, bias) + _SCALE * (h[rows] @ b.T)
        if not self.backward:
            return [y, square_sum]
        gh = _SCALE * (gy @ b)
        gx = gy[rows] @ weight + gh[rows] @ kept
        return [y, gx, (gh.T @ x).masked_fill(~mask, 0.0), _SCALE * (gy.T @ h), square_sum]


def _ours(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, mask: Tensor, *, impl: Impl | None = None
) -> tuple[Tensor, ...]:
    return ops.lora_linear_with_stats(x, weight, bias, a, b, _SCALE, mask=mask, impl=impl)


def _eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    a, b = (torch.where(mask, a, 0.0)).to(x.dtype), b.to(x.dtype)
    y = linear(x, weight, bias) + _SCALE * linear(linear(x, a), b)
    return y, x.detach().float().square().sum(0)


def _by_hand(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    return _ByHand.apply(x, weight, bias, a, b, mask)


class _ByHand(torch.autograd.Function):
    """The fewest passes that products of PyTorch's allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Any:
        kept, b = torch.where(mask, a, 0.0).to(x.dtype), b.to(x.dtype)
        h = x @ kept.T
        y = linear(x, weight, bias).addmm_(h, b.T, alpha=_SCALE)
        norm = torch.linalg.vector_norm(x.detach(), dim=0, dtype=torch.float32)
        ctx.save_for_backward(x, weight, kept, b, mask, h)
        square_sum = norm.square()
        ctx.mark_non_differentiable(square_sum)
        return y, square_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gy = grad_outputs[0]
        x, weight, kept, b, mask, h = ctx.saved_tensors
        gh = _SCALE * (gy @ b)
        gx = (gy @ weight).addmm_(gh, kept)
        ga = torch.where(mask, gh.T @ x, 0.0).float()
        gb = (_SCALE * (gy.T @ h)).float()
        return gx, None, None, ga, gb, None
