"""The orthogonal factor by matrix products, and by an SVD where these do not reach it.

An odd function of a matrix, ``X q(X^T X)``, changes its singular values alone. A schedule is a list of such
functions that takes every singular value in [LOWEST, 1] to 1; docs/ops/procrustes.md derives them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastkit.ops.procrustes_checks import check_finite
from fastkit.reference.procrustes import is_singular


class Rational(NamedTuple):
    """``x (a + b x^2) / (1 + c x^2)``: three products, two of them by a Cholesky factor's inverse."""

    a: float
    b: float
    c: float


class Quintic(NamedTuple):
    """``x (c0 + c1 x^2 + c2 x^4)``: three products."""

    c0: float
    c1: float
    c2: float


Step = Rational | Quintic

LAST = Quintic(1.875, -1.25, 0.375)  # of an error e it leaves 5/2 e^3

WITH_INVERSES: tuple[Step, ...] = (  # on the CPU
    Rational(56.0, 756.25, 811.25),
    Rational(28.0, 182.25, 209.25),
    Quintic(2.312733213, -2.269700003, 0.9623634899),
    Quintic(1.875030767, -1.250034095, 0.3750033285),
)
PRODUCTS: tuple[Step, ...] = (  # on a GPU, where a Cholesky factor costs more than many products
    Quintic(5.493818144, -13.08291138, 8.815851697),
    *[Quintic(3.855145879, -4.520682548, 1.500019695)] * 5,
    Quintic(3.220405973, -3.372190137, 1.073815295),
    Quintic(1.971594707, -1.353533644, 0.3854504401),
    Quintic(1.875273806, -1.250301510, 0.3750277374),
    LAST,
)
AGAIN = {WITH_INVERSES: WITH_INVERSES[2:], PRODUCTS: ()}
"""What follows a schedule, once, where that has not made a matrix orthogonal."""
LOWEST = {WITH_INVERSES: 1.2e-4, PRODUCTS: 5e-5}

_CHOLESKY = 128  # up to here a Cholesky factor and its inverse are LAPACK's, above they are made of products
_BLOCK = 256  # on the CPU, of products known to be symmetric or triangular, blocks of columns are computed
_SMALL = 64  # up to here float32 is iterated in float64: calls, not products, are what it costs
_PROBES = 4
_POWERS = 6
_MARGIN = 1.2  # by which the largest singular value may exceed what is found of it


def factor(m: Tensor, op: str) -> tuple[Tensor, Tensor]:  # (B, P, Q) -> (B, P, Q), (B,)
    """The factor of each matrix, P >= Q, and whether the matrix is singular.

    There is one look at values, after all steps. A factor that is not orthogonal then is computed again, by
    an SVD in float64.
    """
    if m.numel() == 0:
        return torch.empty_like(m, memory_format=torch.contiguous_format), m.new_zeros(
            len(m), dtype=torch.bool
        )
    with ieee_products(m):
        precise = m.double() if m.shape[-1] <= _SMALL else m
        w, orthogonal = iterate(precise, PRODUCTS if m.is_cuda else WITH_INVERSES)
        w = w.to(m.dtype)
    singular = torch.zeros_like(orthogonal)
    if bool(orthogonal.all()):
        return w, singular
    rest = (~orthogonal).nonzero().squeeze(1)
    ms = m[rest].double()
    check_finite(op, ms, len(m))
    u, s, vh = torch.linalg.svd(ms, full_matrices=False)
    w[rest] = (u @ vh).to(w.dtype)
    singular[rest] = is_singular(s, m.shape, m.dtype)
    warn_of_singular(op, singular)
    return w, singular


def warn_of_singular(op: str, singular: Tensor) -> None:
    count = int(singular.sum())
    if count:
        warnings.warn(
            f"{op}: {count} of {singular.numel()} matrices are singular to the precision of their dtype;"
            " their factor is not unique, the SVD's is taken",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def ieee_products(x: Tensor) -> Iterator[None]:
    """Products of float32 in float32, whatever is allowed elsewhere (TF32, bfloat16)."""
    backend = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # pyright: ignore
    before = backend.fp32_precision
    if before not in ("tf32", "bf16"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def iterate(m: Tensor, schedule: tuple[Step, ...]) -> tuple[Tensor, Tensor]:  # (B, P, Q) -> (B, P, Q), (B,)
    """What a schedule makes of each matrix, and whether that is orthogonal."""
    polish = (LAST,) if m.dtype == torch.float64 else ()
    x = scaled(m)
    if len(x) == 1:
        x = x[0]  # PyTorch's product of two matrices is faster than that of a batch of one
    room = torch.empty_like(x)
    gram, square = (x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1])) for _ in range(2))
    _symmetric_product(x.mT, x, out=gram)
    bound = _MARGIN * _largest_eigenvalue(gram).sqrt()
    gram.div_(bound.square())
    x.div_(bound)
    steps = schedule
    while True:
        for step in (*steps, *polish):
            if isinstance(step, Rational):
                _rational_step(step, x, gram, square, room)
            else:
                _symmetric_product(gram, gram, out=square, plus=gram, beta=step.c1, alpha=step.c2)
                _product(x, square, out=room, plus=x, beta=step.c0)
                x, room = room, x
            _symmetric_product(x.mT, x, out=gram)
        square.copy_(gram).diagonal(dim1=-2, dim2=-1).sub_(1.0)
        orthogonal = square.abs_().amax((-2, -1)) <= 64 * torch.finfo(m.dtype).eps  # not where it is NaN
        if steps is not schedule or not AGAIN[schedule] or bool(orthogonal.all()):
            return x.reshape(m.shape), orthogonal.reshape(len(m))
        steps = AGAIN[schedule]


def _rational_step(step: Rational, x: Tensor, gram: Tensor, square: Tensor, room: Tensor) -> None:
    """``x = b / c x + (a - b / c) x (1 + c gram)^-1``, with the inverse ``J^T J``."""
    a, b, c = step
    gram.mul_(c).diagonal(dim1=-2, dim2=-1).add_(1.0)
    inverse = _inverse_of_factor(gram, out=square.zero_())
    for columns in _columns(x):
        end = columns.stop
        _product(x[..., :end], inverse[..., columns, :end].mT, out=room[..., columns])
    for columns in _columns(x):
        start, of_x = columns.start, x[..., columns]
        _product(
            room[..., start:],
            inverse[..., start:, columns],
            out=of_x, plus=of_x, beta=b / c, alpha=a - b / c,
        )  # fmt: skip


def _inverse_of_factor(a: Tensor, *, out: Tensor) -> Tensor:
    """The inverse of the Cholesky factor of a, in the lower triangle of ``out``."""
    size = a.shape[-1]
    if size <= _CHOLESKY:
        eye = torch.eye(size, dtype=a.dtype, device=a.device).expand_as(a)
        return out.copy_(torch.linalg.solve_triangular(torch.linalg.cholesky_ex(a).L, eye, upper=False))
    first, second = slice(0, size // 2), slice(size // 2, size)
    of_first = _inverse_of_factor(a[..., first, first], out=out[..., first, first])
    across = a[..., second, first] @ of_first.mT
    rest = a[..., second, second] - across @ across.mT
    of_second = _inverse_of_factor(rest, out=out[..., second, second])
    torch.matmul(-of_second, across @ of_first, out=out[..., second, first])
    return out


def scaled(x: Tensor) -> Tensor:
    """A dense copy whose largest entry of each matrix is in [1, 2), by powers of two, or zero."""
    largest = x.detach().abs().amax((-2, -1), keepdim=True)
    mantissa, _ = torch.frexp(largest)
    return (x / torch.where(largest == 0, 1.0, largest / (2 * mantissa))).contiguous()


def _largest_eigenvalue(gram: Tensor) -> Tensor:  # (..., Q, Q) -> (..., 1, 1)
    """A little less than it: of a power of the matrix, met by random vectors."""
    generator = torch.Generator(gram.device).manual_seed(0)
    shape = (gram.shape[-1], _PROBES)
    y = torch.randn(shape, generator=generator, device=gram.device, dtype=gram.dtype)
    y = y.expand(*gram.shape[:-2], *shape)
    length = y
    for _ in range(_POWERS):
        y = gram @ y
        length = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
        y = y / length
    return length


def _product(
    a: Tensor, b: Tensor, *, out: Tensor, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """``out = beta plus + alpha a b``."""
    base = out if plus is None else plus
    if out.dim() == 2:
        torch.addmm(base, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.baddbmm(base, a, b, beta=beta, alpha=alpha, out=out)


def _symmetric_product(
    a: Tensor, b: Tensor, *, out: Tensor, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """``_product`` of which it is known that it is symmetric."""
    for columns in _columns(out):
        start, end = columns.start, columns.stop
        _product(
            a[..., :end, :],
            b[..., columns],
            out=out[..., :end, columns],
            plus=None if plus is None else plus[..., :end, columns],
            beta=beta,
            alpha=alpha,
        )
        out[..., columns, :start].copy_(out[..., :start, columns].mT)


def _columns(x: Tensor) -> list[slice]:
    """The blocks in which a product is computed that is symmetric or has a triangular factor."""
    size = x.shape[-1]
    blocks = 1 if x.dim() > 2 or x.is_cuda else max(1, size // _BLOCK)
    return [slice(k * size // blocks, (k + 1) * size // blocks) for k in range(blocks)]
