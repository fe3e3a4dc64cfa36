"""iir_scan with its own second-order filter in every chunk, against the ways to write it today."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.cases import iir_scan_forms as forms
from fastkit.bench.cases import iir_scan_peers as peers
from fastkit.bench.cases.iir_scan_contest import ScanContest
from fastkit.bench.contest import DeviceType, Yardstick, our_others
from fastkit.ops.iir_scan import KERNELS


def case(
    B: int,
    C: int,
    T: int,
    *,
    chunk: int = 128,
    view: bool = False,
    backward: bool = False,
    warm: bool = False,
    compile: bool = True,
    packages: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """``chunk`` is a power of two and divides T.

    ``view``: x is the transposed view of a (B, T, C) tensor, which is how layers have it. ``compile``,
    ``packages``: what torch.compile makes, and packages for this work, are contestants too.
    """
    return Case(
        op="iir_scan",
        shape=f"{B}x{T}x{C} view" if view else f"{B}x{C}x{T}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=(24 if backward else 8) * B * C * T,
        contest=partial(_Chunks, (B, C, T), chunk, view, backward, compile, packages, device),
        warm=warm,
        yardsticks=our_others(device, KERNELS) | ({POLES} if packages and device == "cpu" else set()),
        device=device,
        peers=peers.PACKAGES,
    )


POLES = "torchlpc poles"


class _Chunks(ScanContest):
    def __init__(
        self,
        size: tuple[int, int, int],
        chunk: int,
        view: bool,
        backward: bool,
        compile: bool,
        packages: bool,
        device: DeviceType,
    ) -> None:
        super().__init__(size, chunk, view, backward, device)
        self.compile = compile
        self.packages = packages

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers = {**self.makers_of_ours(ours), "chunk-parallel": partial(self.call, forms.chunk_parallel)}
        if self.device == "cpu":
            makers["loop"] = partial(self.call, forms.loop)
            if not self.backward:
                makers["scipy"] = self.make_scipy
            if self.packages:
                makers |= self.makers_of_packages()
                makers[POLES] = self.make_poles
        if self.compile:
            makers["compiled"] = partial(self.make_compiled, forms.chunk_parallel)
        return makers

    def make_scipy(self) -> Call:
        x, a, b, _ = self.inputs
        return peers.scipy_by_chunks(x, a, b, self.chunk)

    def make_poles(self) -> Call:
        """torchlpc's share of "torchlpc + FIR": given x filtered by the numerators, and a for each sample."""
        recursion = peers.all_pole()
        x, a, b, gy = (t.detach() for t in self.inputs)
        u = forms.numerator(x.contiguous(), b, self.chunk).reshape(-1, x.shape[-1])
        rows = u.requires_grad_(self.backward)
        samples = peers.each_sample(a, self.chunk).requires_grad_(self.backward)
        gy = gy.reshape(rows.shape)

        def call() -> Yardstick:
            y = recursion(rows, samples)
            gradients = torch.autograd.grad(y, (rows, samples), gy)[1:] if self.backward else ()
            return Yardstick((y.detach(), *gradients), self.error_of_poles)

        return call

    def error_of_poles(self, result: tuple[Tensor, ...]) -> float:
        """Of y, and of the gradient of a."""
        B, C, T = self.size
        y, *gradients = result
        summed = [g.view(B, C, T // self.chunk, self.chunk, 2).sum(3) for g in gradients]
        expected = self.expected[: 1 if not summed else 3 : 2]
        return self.error_from(expected, [y.view(B, C, T), *summed])


def ours(x: Tensor, a: Tensor, b: Tensor, chunk: int, *, impl: Impl | None = None) -> Tensor:
    return ops.iir_scan(x, a, b, chunk=chunk, impl=impl)
