"""polar against the SVD in float64: matrices of a given spectrum, and how far from it a factor may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkit.testing import Expected


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    """Random matrices with orthonormal columns, float64."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def log_spaced(size: int, condition: float) -> Tensor:
    """Singular values from 1 down to 1 / condition."""
    return torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)


def with_spectrum(
    s: Tensor,  # (Q,)
    rows: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:  # (rows, Q)
    """A matrix with these singular values between random orthogonal factors, rounded to a dtype."""
    left = orthogonal(rows or len(s), len(s), seed=2 * seed)
    return ((left * s) @ orthogonal(len(s), len(s), seed=2 * seed + 1).mT).to(dtype)


def least_divisor(s: Tensor, rows: int) -> Tensor:  # (..., Q) -> (...)
    """By what an error E of a matrix with these singular values is divided, at the least, in its factor W.

    To first order W changes by ``W X + (1 - W W^T) E H^-1``, where ``H X + X H = W^T E - E^T W``. X is skew,
    so that the first term divides by half the sum of two singular values. The second, which a matrix of more
    rows than columns has, divides by each of them. Parts of E go into one or the other.
    """
    return s[..., -1] if rows > s.shape[-1] else s[..., -2:].sum(-1) / 2


def expected_factor(m: Tensor, *, dtype: torch.dtype | None = None) -> Expected:  # (P, Q), P >= Q
    """U V^T, and what rounding may change of each element.

    The steps together return the factor of a matrix next to m, as an SVD does. A change of m by E changes the
    factor by at most ``|E| / least_divisor`` in norm; |E| is some eps of the largest singular value. It is
    spread over all elements. ``dtype`` is that of the arithmetic, by default m's, for half precision float32;
    of float64 the budget is twice as large, for the oracle errs as well.
    """
    u, s, vh = torch.linalg.svd(m.detach().cpu().double(), full_matrices=False)  # CUDA's is less precise
    dtype = torch.promote_types(dtype or m.dtype, torch.float32)
    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)
    least = least_divisor(s, m.shape[0])
    budget = eps * (48 + s[0] / least / 4) if least > 0 else s.new_tensor(torch.inf)
    return Expected((u @ vh).to(m.device), budget.to(m.device).expand_as(m))
