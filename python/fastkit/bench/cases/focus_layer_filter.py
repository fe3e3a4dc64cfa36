"""The filters of FocusLayer in training, alone: with the global convolution that sets them, and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkit.bench.case import Call, Case
from fastkit.bench.cases.iir_scan_forms import steps
from fastkit.bench.contest import DeviceType
from fastkit.nn import AdaptiveIIR, GlobalConv
from fastkit.reference import pooled_conv


def case(B: int, T: int, C: int, *, bin_length: int, taps: int | None, device: DeviceType = "cpu") -> Case:
    """Its floor reads x and writes the result, and reads and writes their gradients."""
    conv = f"taps {taps}" if taps else "no convolution"
    return Case(
        op="AdaptiveIIR",
        shape=f"{B}x{T}x{C} bin {bin_length} {conv}",
        direction="fwd+bwd",
        floor_bytes=4 * 4 * B * T * C,
        contest=partial(_Filter, (B, T, C), bin_length, taps, device),
        tolerance=1e-3,
        device=device,
    )


def eager(filter: AdaptiveIIR, x: Tensor) -> Tensor:
    """The same in PyTorch's operations: FFTs in blocks, and the filters of all bins at once, step by step."""
    conv, maxima = filter.global_conv, None
    if isinstance(conv, GlobalConv):
        maxima = pooled_conv.pooled_conv(x, conv.taps(x.dtype), conv.block, filter.pool)
    a1, a2 = filter.coefficients(x, maxima)[:, :, :, 0].permute(3, 0, 2, 1).unbind()  # (B, K, C)
    u = x.unflatten(1, (-1, filter.chunk)).movedim(2, 0)
    return torch.stack(steps(u, torch.zeros_like(u[0]), torch.zeros_like(u[0]), a1, a2), 2).flatten(1, 2)


class _EagerIIR(AdaptiveIIR):
    def forward(self, x: Tensor, maxima: Tensor | None = None) -> Tensor:
        return eager(self, x)


def train(module: nn.Module, x: Tensor, go: Tensor) -> tuple[Tensor, ...]:
    """What it gives, and the gradients to x and to all parameters."""
    o = module(x)
    return o.detach(), *torch.autograd.grad(o, (x, *module.parameters()), go)


def error(expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
    """The largest in any result, relative to its largest value."""
    errors = [
        (actual.detach().cpu().double() - want).abs().amax() / want.abs().amax()
        for want, actual in zip(expected, result, strict=True)
    ]
    return float(torch.stack(errors).amax())


class _Filter:
    """The filtered x, and the gradients to x and to all parameters."""

    def __init__(
        self, size: tuple[int, int, int], bin_length: int, taps: int | None, device: DeviceType
    ) -> None:
        self.size = size
        self.bin_length = bin_length
        self.taps = taps
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        x, go = torch.randn(2, *self.size, generator=generator, device=self.device).unbind()
        return x.clone().requires_grad_(), go.clone()

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        return {"fastkit": lambda: self.call(AdaptiveIIR), "eager": lambda: self.call(_EagerIIR)}

    def filter(self, kind: type[AdaptiveIIR]) -> AdaptiveIIR:
        torch.manual_seed(0)
        C, R = self.size[2], self.bin_length
        conv = GlobalConv(C, self.taps, block=R) if self.taps else None
        return kind(C, chunk=R, global_conv=conv).to(self.device)

    def call(self, kind: type[AdaptiveIIR]) -> Call:
        return partial(train, self.filter(kind), *self.inputs)

    def error(self, result: Any) -> float:
        return error(self.expected, result)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        x, go = (t.detach().cpu().double() for t in self.inputs)
        return train(self.filter(_EagerIIR).cpu().double(), x.requires_grad_(), go)
