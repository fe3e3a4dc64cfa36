"""The orthogonal factor of a matrix, given or the product of two tables, beside the ways to it of today."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import DeviceType, Yardstick, load, makers_of_ours, our_others
from fastkit.ops.procrustes import KERNELS

SVD = "svd"
_CONDITION = 1e3


def polar_case(*shape: int, warm: bool = False, packages: bool = True, device: DeviceType = "cpu") -> Case:
    """Of (..., D, D), in float32, with singular values from 1 to 1e-3; the floor is PyTorch's SVD."""
    return _case("polar", shape, 8 * math.prod(shape), warm, packages, device)


def procrustes_case(
    N: int, D: int, *, warm: bool = False, packages: bool = True, device: DeviceType = "cpu"
) -> Case:
    """Of two tables (N, D) that differ by a rotation and noise; the floor is their product and its SVD."""
    return _case("procrustes", (N, D), 4 * (2 * N * D + D * D), warm, packages, device)


def _case(
    op: str, shape: tuple[int, ...], floor_bytes: int, warm: bool, packages: bool, device: DeviceType
) -> Case:
    contest = _Procrustes if op == "procrustes" else _Polar
    return Case(
        op=op,
        shape="x".join(map(str, shape)),
        direction="fwd",
        floor_bytes=floor_bytes,
        contest=partial(contest, shape, packages, device),
        warm=warm,
        yardsticks=our_others(device, KERNELS) | {SVD},
        floor=SVD,
        device=device,
        peers=("scipy",),
    )


class _Polar:
    """W, the factor of a matrix."""

    def __init__(self, shape: tuple[int, ...], packages: bool, device: DeviceType) -> None:
        self.shape = shape
        self.packages = packages
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """The matrix, its singular values equally far apart in their logarithms."""
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, v = (torch.linalg.qr(randn(self.shape)).Q for _ in range(2))
        s = torch.logspace(0, -math.log10(_CONDITION), self.shape[-1], dtype=torch.float64)
        return (((u * s) @ v.mT).float().to(self.device),)

    @staticmethod
    def matrix(*inputs: Tensor) -> Tensor:
        """Whose factor is W."""
        return inputs[0]

    @staticmethod
    def ours(*inputs: Tensor, impl: Impl | None) -> Tensor:
        return ops.polar(*inputs, impl=impl)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, self.make_ours),
            SVD: self.make_svd,
            "svd, U Vh": partial(self.call, _by_svd),
            "QDWH": partial(self.call, _qdwh),
            "Newton-Schulz": partial(self.call, _newton_schulz),
        }
        if self.packages and self.device == "cpu":
            makers["scipy"] = self.make_scipy
        return makers

    def call(self, form: Callable[[Tensor], Tensor]) -> Call:
        return lambda: (form(self.matrix(*self.inputs)),)

    def make_ours(self, impl: Impl | None) -> Call:
        return lambda: (self.ours(*self.inputs, impl=impl),)

    def make_svd(self) -> Call:
        """The decomposition alone, without the product of its factors."""

        def call() -> Yardstick:
            parts = torch.linalg.svd(self.matrix(*self.inputs), full_matrices=False)
            return Yardstick(tuple(parts), self.error_of_svd)

        return call

    def make_scipy(self) -> Call:
        polar = load("scipy.linalg").polar
        matrices = self.inputs[0].reshape(-1, *self.shape[-2:]).numpy()
        return lambda: (torch.stack([torch.from_numpy(polar(m)[0]) for m in matrices]).view(self.shape),)

    def error(self, result: Any) -> float:
        """The largest of any entry: of a matrix whose rows are of length 1."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        (w,) = result
        return float((w.cpu().double() - self.expected[0]).abs().amax())

    def error_of_svd(self, result: tuple[Tensor, Tensor, Tensor]) -> float:
        u, s, vh = (t.cpu().double() for t in result)
        w, values = self.expected
        of_values = (s - values) / values.amax()
        return float(torch.cat([(u @ vh - w).flatten(), of_values.flatten()]).abs().amax())

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """The factor and the singular values, in float64."""
        u, s, vh = torch.linalg.svd(self.matrix(*(t.cpu().double() for t in self.inputs)))
        return u @ vh, s


class _Procrustes(_Polar):
    """W, the map from one table to the other."""

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        N, D = self.shape
        source, turn = randn(N, D), torch.linalg.qr(randn(D, D)).Q
        return source, (source @ turn.T).add_(randn(N, D), alpha=0.1)

    @staticmethod
    def matrix(*inputs: Tensor) -> Tensor:
        source, target = inputs
        return target.T @ source

    @staticmethod
    def ours(*inputs: Tensor, impl: Impl | None) -> Tensor:
        return ops.procrustes(*inputs, impl=impl)

    def make_scipy(self) -> Call:
        orthogonal_procrustes = load("scipy.linalg").orthogonal_procrustes
        source, target = (t.numpy() for t in self.inputs)
        return lambda: (torch.from_numpy(orthogonal_procrustes(source, target)[0].T),)


def _by_svd(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh


def _newton_schulz(m: Tensor) -> Tensor:
    """Products alone: 30 steps are enough for this condition."""
    x = m / torch.linalg.matrix_norm(m, keepdim=True)
    for _ in range(30):
        step = (x.mT @ x).mul_(-0.5)
        step.diagonal(dim1=-2, dim2=-1).add_(1.5)
        x = x @ step
    return x


def _qdwh(m: Tensor) -> Tensor:
    """QR-based dynamically weighted Halley iteration (Nakatsukasa, Bai, Gygi 2010).

    It is given a bound of the smallest singular value, which it would else have to find. Weights that are
    large go through a QR decomposition, the others through Cholesky's.
    """
    x = m / torch.linalg.matrix_norm(m, keepdim=True)
    D = m.shape[-1]
    identity = torch.eye(D, dtype=m.dtype, device=m.device).expand(m.shape)
    low = 1 / (_CONDITION * math.sqrt(D))
    while low < 1 - 1e-6:
        d = math.cbrt(4 * (1 - low**2) / low**4)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > 100:
            q = torch.linalg.qr(torch.cat([math.sqrt(c) * x, identity], -2)).Q
            x = b / c * x + (a - b / c) / math.sqrt(c) * (q[..., :D, :] @ q[..., D:, :].mT)
        else:
            lower = torch.linalg.cholesky_ex(identity + c * (x.mT @ x)).L
            x = b / c * x + (a - b / c) * torch.cholesky_solve(x.mT, lower).mT
        low = low * (a + b * low**2) / (1 + c * low**2)
    return x
