"""The orthogonal factor by matrix products, and by an SVD where these do not reach it.

An odd function of a matrix, ``X q(X^T X)``, changes its singular values alone. A schedule is a list of such
functions that takes every singular value between some lowest one and 1 to 1; docs/ops/procrustes.md derives
them. On the CPU they are applied by csrc/cpu/procrustes.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastkit.ops.procrustes_checks import check_finite
from fastkit.reference.procrustes import cross_product, decomposed, is_singular


class Rational(NamedTuple):
    """``x (a + b x^2) / (1 + c x^2)``"""

    a: float
    b: float
    c: float


class Quintic(NamedTuple):
    """``x (c0 + c1 x^2 + c2 x^4)``: three products."""

    c0: float
    c1: float
    c2: float


LAST = Quintic(1.875, -1.25, 0.375)  # of an error e it leaves 5/2 e^3

RATIONALS = (Rational(56.0, 756.25, 811.25), Rational(28.0, 182.25, 209.25))  # first on the CPU,
QUINTICS = (  # then these, and once more where they have not made a matrix orthogonal
    Quintic(2.312733213, -2.269700003, 0.9623634899),
    Quintic(1.875030767, -1.250034095, 0.3750033285),
)
LOWEST_ON_CPU = 1.2e-4
PRODUCTS = (  # on a GPU, where a Cholesky factor costs more than many products
    Quintic(5.493818144, -13.08291138, 8.815851697),
    *[Quintic(3.855145879, -4.520682548, 1.500019695)] * 5,
    Quintic(3.220405973, -3.372190137, 1.073815295),
    Quintic(1.971594707, -1.353533644, 0.3854504401),
    Quintic(1.875273806, -1.250301510, 0.3750277374),
    LAST,
)
LOWEST_ON_GPU = 5e-5

_SMALL = 64  # up to here float32 is iterated in float64: products are the least of what it costs
_PROBES = 4
_POWERS = 6
_MARGIN = 1.2  # by which the largest singular value may exceed what is found of it


def factor(  # (B, P, Q) -> (B, P, Q), (B,)
    m: Tensor, op: str, source: Tensor | None = None, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factor of each matrix, P >= Q, and whether the matrix is singular.

    There is one look at values, after all steps. A factor that is not orthogonal then is computed again, by
    an SVD in float64: where m is the product of tables, of these, for m's own rounding may hide that they
    have columns that depend on each other.
    """
    if m.numel() == 0:
        return torch.empty_like(m, memory_format=torch.contiguous_format), m.new_zeros(
            len(m), dtype=torch.bool
        )
    precise = m.double() if m.shape[-1] <= _SMALL else m
    if m.is_cuda:
        with ieee_products(m):
            w, orthogonal = by_products(precise)
    else:
        w, orthogonal = on_cpu(precise)
    w = w.to(m.dtype)
    singular = torch.zeros_like(orthogonal)
    if bool(orthogonal.all()):
        return w, singular
    rest = (~orthogonal).nonzero().squeeze(1)
    ms = m[rest].double()
    if source is not None and target is not None:
        ms = cross_product(source, target).unsqueeze(0)
    check_finite(op, ms, len(m))
    u, s, vh = decomposed(ms)
    found = u @ vh
    if m.is_cuda:  # by Jacobi's method, which leaves it less orthogonal than rounding would
        gram = found.mT @ found
        found = LAST.c0 * found + found @ (LAST.c1 * gram + LAST.c2 * gram @ gram)
    w[rest] = found.to(w.dtype)
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
def ieee_products(x: Tensor) -> Generator[None]:
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
        inherited = torch.backends.fp32_precision == before  # pyright: ignore
        backend.fp32_precision = "none" if inherited else before


def on_cpu(m: Tensor) -> tuple[Tensor, Tensor]:  # (B, P, Q) -> (B, P, Q), (B,)
    """What rational steps and products make of each matrix, and whether that is orthogonal."""
    quintics = (*QUINTICS, LAST) if m.dtype == torch.float64 else QUINTICS
    flat = [[c for step in steps for c in step] for steps in (RATIONALS, quintics)]
    return torch.ops.fastkit.polar_fwd(m, *flat)


def by_products(m: Tensor) -> tuple[Tensor, Tensor]:  # (B, P, Q) -> (B, P, Q), (B,)
    """What products alone make of each matrix, and whether that is orthogonal."""
    x = scaled(m)
    if len(x) == 1:
        x = x[0]  # PyTorch's product of two matrices is faster than that of a batch of one
    y = torch.empty_like(x)
    gram, square = (x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1])) for _ in range(2))
    _product(x.mT, x, out=gram)
    bound = _MARGIN * _largest_eigenvalue(gram).sqrt()
    gram.div_(bound.square())
    x.div_(bound)
    for step in (*PRODUCTS, LAST) if m.dtype == torch.float64 else PRODUCTS:
        _product(gram, gram, out=square, plus=gram, beta=step.c1, alpha=step.c2)
        _product(x, square, out=y, plus=x, beta=step.c0)
        x, y = y, x
        _product(x.mT, x, out=gram)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    orthogonal = gram.abs().amax((-2, -1)) <= 64 * torch.finfo(m.dtype).eps  # not where it is NaN
    return x.reshape(m.shape), orthogonal.reshape(len(m))


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
