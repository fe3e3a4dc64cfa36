"""iir_scan with its own second-order filter in every chunk, against the ways to write it today."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkit import ops, reference
from fastkit._dispatch import Impl, unavailable
from fastkit.bench.case import Call, Case, Skip
from fastkit.ops.iir_scan import KERNELS

DeviceType = Literal["cpu", "cuda"]
Form = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (x, a, b, chunk) -> y


def cases(*, time: int = 16384, quick: bool = False) -> list[Case]:
    """Both layouts, beyond the caches and within them, forward and with backward.

    ``time`` is the T of those beyond the caches; ``quick`` leaves them out, and what compiles.
    """
    return [
        case(*size, view=view, backward=backward, warm=warm, compile=not quick)
        for size, view, warm in (
            ((8, 256, time), False, False),
            ((8, 256, time), True, False),
            ((1, 64, 16384), False, True),
            ((4, 512, 1024), True, True),
        )
        for backward in (False, True)
        if warm or not quick
    ]


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
    device: DeviceType = "cpu",
) -> Case:
    """``chunk`` is a power of two and divides T.

    ``view``: x is the transposed view of a (B, T, C) tensor, which is how layers have it.
    """
    return Case(
        op="iir_scan",
        shape=f"{B}x{T}x{C} view" if view else f"{B}x{C}x{T}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=(24 if backward else 8) * B * C * T,
        contest=partial(_Contest, (B, C, T), chunk, view, backward, compile, device),
        warm=warm,
        yardsticks=our_others(device),
        device=device,
    )


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

    def call(self, form: Form) -> Call:
        x, a, b, gy = self.inputs

        def forward() -> tuple[Tensor, ...]:
            return (form(x, a, b, self.chunk),)

        def forward_backward() -> tuple[Tensor, ...]:
            y = form(x, a, b, self.chunk)
            return y.detach(), *torch.autograd.grad(y, (x, a, b), gy)

        return forward_backward if self.backward else forward

    def makers_of_ours(self, form: Callable[..., Tensor]) -> dict[str, Callable[[], Call]]:
        """fastkit; on a GPU, each implementation that there is for one."""
        if self.device == "cpu":
            return {"fastkit": partial(self.call, form)}
        return {f"fastkit {impl}": partial(self.make_impl, form, impl) for impl in _GPU_IMPLS}

    def make_compiled(self, form: Callable[..., Tensor]) -> Call:
        """A chunk-parallel form, its steps compiled; the whole of it takes minutes to compile."""
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise Skip("torch.compile needs the headers of Python (Python.h)")
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise Skip("torch.compile needs a C++ compiler")
        if self.device == "cuda" and find_spec("triton") is None:
            raise Skip("torch.compile needs triton")
        torch.compiler.reset()  # the compiled steps of other shapes count against a limit
        compile = partial(torch.compile, fullgraph=True, dynamic=False)
        steps, last_steps = compile(_steps), compile(_last_steps)
        call = self.call(partial(form, steps=steps, last_steps=last_steps))
        call()
        return call

    def make_impl(self, form: Callable[..., Tensor], impl: Impl) -> Call:
        reason = unavailable(impl, KERNELS)
        if reason is not None:
            raise Skip(reason)
        return self.call(partial(form, impl=impl))

    def error(self, result: Any) -> float:
        """The largest error in any result, in a sample of rows, relative to its row's largest value."""
        errors = [
            ((self.sample(torch.as_tensor(actual)).cpu() - row).abs() / size).amax()
            for actual, (row, size) in zip(result, self.expected, strict=True)
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


_GPU_IMPLS: tuple[Impl, ...] = ("cuda", "triton")


def our_others(device: DeviceType) -> frozenset[str]:
    """The implementations that ours, the first, is not called faster than."""
    return frozenset() if device == "cpu" else frozenset(f"fastkit {impl}" for impl in _GPU_IMPLS[1:])


def draw_filters(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pole pairs with radii up to 0.999, most of them near it, and numerators: (shape, 2), (shape, 3)."""
    rand = partial(torch.rand, generator=generator, device=generator.device)
    radius = 0.999 * rand(shape) ** 0.1
    angle = math.pi * (0.05 + 0.9 * rand(shape))  # double poles: ill-conditioned
    a = torch.stack([-2 * radius * angle.cos(), radius**2], -1)
    return a, torch.randn(*shape, 3, generator=generator, device=generator.device)


class _Contest(ScanContest):
    def __init__(
        self,
        size: tuple[int, int, int],
        chunk: int,
        view: bool,
        backward: bool,
        compile: bool,
        device: DeviceType,
    ) -> None:
        super().__init__(size, chunk, view, backward, device)
        self.compile = compile

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers = {**self.makers_of_ours(ours), "chunk-parallel": partial(self.call, chunk_parallel)}
        if self.device == "cpu":
            makers["loop"] = partial(self.call, loop)
            if not self.backward:
                makers["scipy"] = self.make_scipy
        if self.compile:
            makers["compiled"] = partial(self.make_compiled, chunk_parallel)
        return makers

    def make_scipy(self) -> Call:
        """``lfilter``, a row and a chunk at a time."""
        try:
            from scipy.signal import lfilter
        except ImportError:
            raise Skip("scipy is not installed") from None
        x, a, b = (t.numpy() for t in self.inputs[:3])
        return partial(_scipy, lfilter, x, np.insert(a, 0, 1, axis=-1), b, self.chunk)


def ours(x: Tensor, a: Tensor, b: Tensor, chunk: int, *, impl: Impl | None = None) -> Tensor:
    return ops.iir_scan(x, a, b, chunk=chunk, impl=impl)


def _steps(u: Tensor, y1: Tensor, y2: Tensor, a1: Tensor, a2: Tensor) -> list[Tensor]:
    """``y[t] = u[t] - a1 y[t-1] - a2 y[t-2]`` along the first axis of u."""
    ys = [y2, y1]
    for u_t in u.unbind():
        ys.append(u_t.addcmul(a2, ys[-2], value=-1).addcmul(a1, ys[-1], value=-1))
    return ys[2:]


def _last_steps(u: Tensor, y1: Tensor, y2: Tensor, a1: Tensor, a2: Tensor) -> list[Tensor]:
    return _steps(u, y1, y2, a1, a2)[-2:]


def loop(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """Sample by sample: the numerator for all of time at once, then two operations a sample."""
    axis = _time_axis(x)
    u = _numerator(x, b, chunk).flatten(axis, axis + 1).movedim(axis, 0)
    ys = [torch.zeros_like(u[0])] * 2
    coefficients = a.permute(2, 3, 0, 1).contiguous()
    for u_k, (a1, a2) in zip(u.split(chunk), coefficients.unbind(), strict=True):
        ys += _steps(u_k, ys[-1], ys[-2], a1, a2)
    return torch.stack(ys[2:], axis).movedim(axis, -1)


def chunk_parallel(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    chunk: int,
    *,
    steps: Callable[..., list[Tensor]] = _steps,
    last_steps: Callable[..., list[Tensor]] = _last_steps,
) -> Tensor:
    """All chunks at once, sample by sample: from zero to see how each ends, then from its true start.

    With A a chunk's state transition, its true end is the end from zero plus ``A**chunk`` times its start:
    the one loop over chunks carries two numbers a row.
    """
    axis = _time_axis(x)
    u = _numerator(x, b, chunk).movedim(axis + 1, 0)
    if axis == 2:
        u = u.contiguous()  # one transposition now, not a strided read in every step
    a1, a2 = _coefficients(a, axis)

    y1 = y2 = 0 * a1  # not zeros: a state that depends on a, as later ones do, is compiled with them
    for block in u.split(_BLOCK):
        y2, y1 = last_steps(block, y1, y2, a1, a2)
    y1, y2 = _starts(y1, y2, _power(a1, a2, chunk), axis)
    ys: list[Tensor] = []
    for block in u.split(_BLOCK):
        ys += steps(block, y1, y2, a1, a2)
        y2, y1 = ys[-2:]
    return torch.stack(ys, axis + 1).flatten(axis, axis + 1).movedim(axis, -1)


_BLOCK = 8  # steps compiled together; backward takes 6 s to compile at 8 and 95 s at 16


def _time_axis(x: Tensor) -> int:
    """Where time is in the memory of x: the forms work in the order (B, C, T) or (B, T, C) that x has."""
    return 2 if x.stride(-1) == 1 else 1


def _coefficients(c: Tensor, axis: int) -> tuple[Tensor, ...]:
    """(B, C, K, n) -> n of (B, C, K) or (B, K, C)."""
    return c.permute(3, 0, 1, 2).movedim(3, 1 + axis).contiguous().unbind()


def _numerator(x: Tensor, b: Tensor, chunk: int) -> Tensor:
    """``b0 x[t] + b1 x[t-1] + b2 x[t-2]`` as (B, C, K, chunk) or (B, K, chunk, C)."""
    axis = _time_axis(x)
    x = x.movedim(2, axis)
    u0, u1, u2 = (pad(x, (0, 0) * (2 - axis) + (lag, -lag)).unflatten(axis, (-1, chunk)) for lag in range(3))
    b0, b1, b2 = (t.unsqueeze(axis + 1) for t in _coefficients(b, axis))
    return (b0 * u0).addcmul(b1, u1).addcmul(b2, u2)


def _power(a1: Tensor, a2: Tensor, n: int) -> list[Tensor]:
    """((-a1, -a2), (1, 0)) to the n-th, n a power of two; squared in float64, or errors would grow with n."""
    p, q = -a1.double(), -a2.double()
    r, s = torch.ones_like(p), torch.zeros_like(p)
    while n > 1:
        p, q, r, s = p * p + q * r, q * (p + s), r * (p + s), s * s + q * r
        n //= 2
    return [t.to(a1.dtype) for t in (p, q, r, s)]


def _starts(z1: Tensor, z2: Tensor, transition: list[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, from the zero-state ends (z1, z2) and the chunks' transitions."""
    starts: list[tuple[Tensor, Tensor]] = []
    y1 = y2 = torch.zeros_like(z1.select(axis, 0))
    chunks = (t.unbind(axis) for t in (z1, z2, *transition))
    for u1, u2, p, q, r, s in zip(*chunks, strict=True):
        starts.append((y1, y2))
        y1, y2 = u1.addcmul(p, y1).addcmul(q, y2), u2.addcmul(r, y1).addcmul(s, y2)
    first, second = zip(*starts, strict=True)
    return torch.stack(first, axis), torch.stack(second, axis)


def _scipy(
    lfilter: Callable[..., tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    a: np.ndarray,  # (B, C, K, 3), with the leading 1
    b: np.ndarray,
    chunk: int,
) -> tuple[np.ndarray]:
    y = np.empty_like(x)
    x1 = x2 = y1 = y2 = np.zeros_like(x[..., 0])
    for k in range(x.shape[-1] // chunk):
        end = (k + 1) * chunk
        span = slice(end - chunk, end)
        b1, b2 = b[..., k, 1], b[..., k, 2]
        a1, a2 = a[..., k, 1], a[..., k, 2]
        # lfilter's state: what the samples before this chunk add to its first two
        state = np.stack([b1 * x1 + b2 * x2 - a1 * y1 - a2 * y2, b2 * x1 - a2 * y1], -1)
        for row in np.ndindex(x.shape[:2]):
            y[row][span], _ = lfilter(b[row][k], a[row][k], x[row][span], zi=state[row])
        x1, x2, y1, y2 = (t[..., end - lag] for t in (x, y) for lag in (1, 2))
    return (y,)
