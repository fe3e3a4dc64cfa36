"""Count, mean and scatter of the rows of a matrix, and of two such sets together; written for reading."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What ``moments`` and ``merge_moments`` return: all that means and covariances take of the rows.

    Of no rows, or of weights that sum to zero, count, mean and scatter are zero.
    """

    count: Tensor  # () float64, the sum of the weights  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D), symmetric: the sum of w (x - mean) (x - mean)^T

    def covariance(self, correction: float = 1) -> Tensor:  # (D, D)
        """``scatter / (count - correction)``.

        Args:
            correction: a number, subtracted from the sum of the weights, as ``torch.cov`` has it. 1: the
                rows are a sample, and weights say how often each was seen; 0: they are all there is. For
                weights that say how reliable a row is, pass sum(w^2) / sum(w).

        Raises:
            TypeError: ``correction`` is no number.
            ValueError: count <= correction. That is looked at on a CPU, outside of ``torch.compile`` and of
                function transforms; elsewhere the result is NaN.
        """
        if isinstance(correction, bool) or not isinstance(
            correction, (int, float, torch.SymInt, torch.SymFloat)
        ):
            raise TypeError(
                f"Moments.covariance: correction must be a number, got {type(correction).__name__};"
                " pass float(correction)"
            )
        return _divided(
            self,
            correction,
            f"Moments.covariance: count must be greater than correction, {correction}, got",
            "add rows, or pass correction=0 where they, or their normalized weights, are all there is",
        )

    def second_moment(self) -> Tensor:  # (D, D)
        """``scatter / count + mean mean^T``, the mean of ``x x^T``.

        Raises:
            ValueError: count is 0, where that is looked at (see ``covariance``); elsewhere the result is NaN.
        """
        outer = self.mean.unsqueeze(1) * self.mean
        return outer + _divided(
            self, 0, "Moments.second_moment: count must be greater than 0, got", "add rows"
        )


def _divided(moments: Moments, correction: float, refusal: str, cure: str) -> Tensor:
    count, _, scatter = moments
    exceeds = count > correction
    if _may_look_at(count) and not bool(exceeds):
        raise ValueError(f"{refusal} {float(count):g}; {cure}")
    return scatter / torch.where(exceeds, count - correction, math.nan).to(scatter.dtype)


def _may_look_at(count: Tensor) -> bool:
    """Whether a value can be had, without waiting for a device."""
    return (
        type(count) is Tensor
        and count.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    )


def moments(
    x: Tensor,  # (N, D)
    *,
    weights: Tensor | None = None,  # (N,)
) -> Moments:
    """``count = sum of w``, ``mean = sum of w x / count``, ``scatter = sum of w (x - mean) (x - mean)^T``.

    In float64 for float64 ``x``, else in float32; the count in float64. Rows are centred twice: what the
    first mean errs by is of the size of ``x``, what the second errs by is of the size of the deviations.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    w = x.new_ones(x.shape[0]) if weights is None else weights.to(x.dtype)
    count = w.sum(dtype=torch.float64)
    exists = count != 0  # else there is no mean: it is zero, and nothing has a gradient but the count
    inverse = (exists / count.masked_fill(~exists, 1.0)).to(x.dtype)

    shift = (inverse * (w @ x)).detach()  # constant: no shift changes the result
    shifted = x - shift
    rest = inverse * (w @ shifted)
    centred = exists.to(x.dtype) * (shifted - rest)
    scatter = (w.unsqueeze(1) * centred).T @ centred
    return Moments(count, shift + rest, (scatter + scatter.T) / 2)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both: ``scatter = a.scatter + b.scatter + (a.count b.count / count) d d^T``.

    d is the difference of the means. In float64, stored in the wider dtype of the two. Where one count is
    zero the result is the other side, and no gradient flows through the count into mean and scatter.
    """
    dtype = torch.promote_types(a.mean.dtype, b.mean.dtype)
    count = a.count + b.count
    lacks_a, lacks_b = a.count == 0, b.count == 0
    share = b.count / count.masked_fill(lacks_a | lacks_b, 1.0)
    weight = (a.count * share).masked_fill(lacks_a | lacks_b, 0.0)
    share = share.masked_fill(lacks_a, 1.0).masked_fill(lacks_b, 0.0)
    mean_a = a.mean.double()
    difference = b.mean.double() - mean_a
    outer = difference.unsqueeze(1) * difference
    scatter = a.scatter.double() + b.scatter.double() + weight * outer
    return Moments(count, (mean_a + share * difference).to(dtype), scatter.to(dtype))
