"""What the contests of iir_scan share: inputs, calls of a form on them, the error of a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import reference
from fastkit._dispatch import Impl
from fastkit.bench.case import Call
from fastkit.bench.cases import iir_scan_forms as forms
from fastkit.bench.cases import iir_scan_peers as peers
from fastkit.bench.contest import DeviceType, Yardstick, compiler, makers_of_ours
from fastkit.ops.iir_scan import KERNELS


class Inputs(NamedTuple):
    x: Tensor  # (B, C, T)
    a: Tensor  # (B, C, K, 2)
    b: Tensor  # (B, C, K, 3)
    gy: Tensor  # in the layout of x


class ScanContest:
    """Calls of a scan's forms, on inputs of their own, and their error; other modes override what differs."""

    def __init__(
        self,
        size: tuple[int, int, int],
        chunk: int,
        view: bool,
        backward: bool,
        device: DeviceType = "cpu",
    ) -> None:
        self.size = size
        self.chunk = chunk
        self.view = view
        self.backward = backward
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> Inputs:
        B, C, T = self.size
        generator = torch.Generator(self.device).manual_seed(0)
        a, b = self.coefficients(generator)
        randn = partial(torch.randn, generator=generator, device=self.device)
        x, gy = (randn(B, T, C).transpose(1, 2) if self.view else randn(B, C, T) for _ in range(2))
        for leaf in (x, a, b):
            leaf.requires_grad_(self.backward)
        return Inputs(x, a, b, gy)

    def coefficients(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, C, T = self.size
        return draw_filters((B, C, T // self.chunk), generator)

    def call(self, form: forms.Form) -> Call:
        x, a, b, gy = self.inputs

        def forward() -> tuple[Tensor, ...]:
            return (form(x, a, b, self.chunk),)

        def forward_backward() -> tuple[Tensor, ...]:
            y = form(x, a, b, self.chunk)
            return y.detach(), *torch.autograd.grad(y, (x, a, b), gy)

        return forward_backward if self.backward else forward

    def makers_of_ours(self, form: Callable[..., Tensor]) -> dict[str, Callable[[], Call]]:
        def make(impl: Impl | None) -> Call:
            return self.call(partial(form, impl=impl))

        return makers_of_ours(self.device, KERNELS, make)

    def make_compiled(self, form: Callable[..., Tensor]) -> Call:
        """A chunk-parallel form, its steps compiled; the whole of it takes minutes to compile."""
        compile = compiler(self.device)
        steps, last_steps = compile(forms.steps), compile(forms.last_steps)
        call = self.call(partial(form, steps=steps, last_steps=last_steps))
        call()
        return call

    def makers_of_packages(self) -> dict[str, Callable[[], Call]]:
        """Packages that take a denominator for each sample."""
        return {
            "torchlpc + FIR": lambda: self.call(peers.torchlpc_form()),
            "philtorch": lambda: self.call(peers.philtorch_form("ssm")),
            "philtorch lpc": lambda: self.call(peers.philtorch_form("torchlpc")),
        }

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return self.error_from(self.expected, result)

    def error_from(self, expected: Sequence[tuple[Tensor, Tensor]], result: Sequence[Any]) -> float:
        """The largest error in any result, in a sample of rows, relative to its row's largest value."""
        errors = [
            ((self.sample(torch.as_tensor(actual)).cpu() - row).abs() / size).amax()
            for actual, (row, size) in zip(result, expected, strict=True)
        ]
        return float(torch.stack(errors).amax())  # NaN if any is

    def sample(self, t: Tensor) -> Tensor:
        """Some rows of an input or a result, as (1, rows, ...)."""
        B, C, _ = self.size
        return t[torch.unravel_index(torch.linspace(0, B * C - 1, 16).long(), (B, C))].unsqueeze(0)

    @cached_property
    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Of each result, those rows in float64, and their largest values."""
        x, a, b, gy = (self.sample(t.detach()).to("cpu", torch.float64) for t in self.inputs)
        for leaf in (x, a, b):
            leaf.requires_grad_(self.backward)
        y = self.exact(x, a, b)
        gradients = torch.autograd.grad(y, (x, a, b), gy) if self.backward else ()
        results = [t.detach() for t in (y, *gradients)]
        return [(t, t.abs().amax(tuple(range(2, t.dim())), keepdim=True)) for t in results]

    def exact(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What ``call`` computes, on sampled inputs in float64."""
        return reference.iir_scan(x, a, b, chunk=self.chunk)


def draw_filters(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pole pairs with radii up to 0.999, most of them near it, and numerators: (shape, 2), (shape, 3)."""
    rand = partial(torch.rand, generator=generator, device=generator.device)
    radius = 0.999 * rand(shape) ** 0.1
    angle = math.pi * (0.05 + 0.9 * rand(shape))  # double poles: ill-conditioned
    a = torch.stack([-2 * radius * angle.cos(), radius**2], -1)
    return a, torch.randn(*shape, 3, generator=generator, device=generator.device)
