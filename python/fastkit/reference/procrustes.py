"""The orthogonal factor of a matrix, and the orthogonal map between two tables; written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = 3  # of derivatives


def polar(m: Tensor) -> Tensor:  # (..., D, D) -> (..., D, D)
    """The orthogonal matrix next to m: ``U V^T``, of the singular value decomposition ``m = U S V^T``.

    In float64, rounded to the dtype of m. Derivatives of a singular m are NaN.
    """
    return _factor(m.double(), m.dtype).to(m.dtype)


def procrustes(source: Tensor, target: Tensor) -> Tensor:  # (N, D), (N, E) -> (E, D)
    """The W with orthonormal columns (rows, if E < D) for which ``source W^T`` is next to ``target``.

    It has the largest ``trace(W^T target^T source)``. In float64, rounded to the dtype of the tables.
    """
    w = _factor(cross_product(source, target), source.dtype)
    return (w if target.shape[1] >= source.shape[1] else w.mT).to(source.dtype)


def cross_product(source: Tensor, target: Tensor) -> Tensor:  # (N, D), (N, E) -> (P, Q), P >= Q
    """``target^T source`` in float64 but for scale, transposed if E < D.

    Tables are scaled beforehand: of any scale their product neither overflows nor vanishes.
    """
    source, target = (table / power_of_two(table) for table in (source.double(), target.double()))
    m = target.mT @ source
    return m if m.shape[0] >= m.shape[1] else m.mT


def decomposed(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (..., P, Q) float64, P >= Q
    """U, S and V^T of m divided by its ``power_of_two``.

    Its rounding is as large as what is singular in float64: op and reference both ask this one.
    """
    return torch.linalg.svd(m.detach() / power_of_two(m), full_matrices=False)


def is_singular(s: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:  # (..., Q) -> (...)
    """Whether a matrix with these singular values may be singular but for the rounding of its entries.

    They are those of ``decomposed``, whose squares neither overflow nor vanish.
    ``shape`` and ``dtype`` are those of the matrix. Entries err by up to eps/2 of themselves, and so they
    together by that part of their norm; eps is that of the arithmetic, for half precision float32's.
    """
    if 0 in shape:
        return s.new_zeros(s.shape[:-1], dtype=torch.bool)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return s[..., -1] <= eps * s.square().sum(-1).sqrt()


def power_of_two(m: Tensor) -> Tensor:  # (..., P, Q) -> (..., 1, 1)
    """Next to the largest entry of each matrix, or 1 where all are 0.

    What is divided by it has the same factor, and singular values whose squares neither overflow nor vanish.
    """
    if 0 in m.shape:
        return m.new_ones(*m.shape[:-2], 1, 1)
    largest = m.detach().abs().amax((-2, -1), keepdim=True)
    return largest.masked_fill(largest == 0, 1.0).log2().floor().exp2()


def _factor(m: Tensor, dtype: torch.dtype) -> Tensor:  # (..., P, Q), P >= Q, whose entries are of a dtype
    """``U V^T``, differentiable also where singular values are equal, which U and V are not.

    It is ``m V y V^T``, where y is the inverse root of ``b = (m V)^T (m V)``: y b y = 1. With V held fixed y
    is ``1 / S``, and each step below has one more order of its derivatives right: E in y + E solves, to first
    order, E S + S E = 1 - y b y.
    """
    u, s, vh = decomposed(m)
    m = m / power_of_two(m)
    singular = is_singular(s, m.shape, dtype).unsqueeze(-1)
    mv = m @ vh.mT
    b = mv.mT @ mv
    y = torch.diag_embed(torch.where(singular, torch.nan, 1 / s))
    for _ in range(ORDERS):
        y = y + (torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) - y @ b @ y) / (
            s.unsqueeze(-1) + s.unsqueeze(-2)
        )
    w = mv @ y @ vh
    return u @ vh + torch.where(singular.unsqueeze(-1), 0.0, w - w.detach())
