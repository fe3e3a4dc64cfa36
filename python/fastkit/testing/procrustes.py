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


def expected_factor(m: Tensor) -> Expected:  # (P, Q), P >= Q
    """U V^T, and what rounding may change of each element.

    The steps together return the factor of a matrix next to m, as an SVD does. A change of m by E changes the
    factor by at most 2 |E| / (the sum of the two least singular values) in norm; |E| is some eps of the
    largest singular value. It is spread over all elements.
    """
    u, s, vh = torch.linalg.svd(m.detach().cpu().double(), full_matrices=False)  # CUDA's is less precise
    eps = torch.finfo(torch.promote_types(m.dtype, torch.float32)).eps
    least = s[-2:].sum() / 2
    budget = eps * (48 + s[0] / least / 4) if least > 0 else s.new_tensor(torch.inf)
    return Expected((u @ vh).to(m.device), budget.to(m.device).expand_as(m))
