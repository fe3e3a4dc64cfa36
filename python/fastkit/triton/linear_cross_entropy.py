"""What linear_cross_entropy makes of a block of logits in Triton: sums of its rows, and their gradient.

Products with the weight are PyTorch's. A block of logits is (N, c) float32, of the classes from first on.
With z the logits, or ``softcap tanh(logit / softcap)``, t a row's target and cw the weights of the classes::

    state = [m = max z,  s = sum of e^(z - m),  z[t],  sum of cw z]
    dz = (a p - b [v = t] - c cw) (1 - (z / softcap)^2),  p = e^(z - lse)

Decomposition. ``linear_cross_entropy_sums`` owns a row of a block, and passes through it a tile at a time.
Each lane has a maximum and a sum of its own, so that nothing is reduced before the row ends, and a logit
takes one exponential; the row's are then merged with the state of the blocks before. A row is not cut among
programs, however few rows there are: reading the weight takes longer than one program takes for a row, and
to merge parts would be another launch. ``linear_cross_entropy_gradient`` owns a tile of a row.

Bytes a logit: 4 in sums; in gradient 4 and what dz has, 8 in float32, or that alone where the coefficients
of the row are zero. What fits the second-level cache is read from there, as are class weights, 4 a logit.
The rest is 44 a row in sums, and 24 a tile in gradient.

Numerics. No number is wider than float32, and a row's sums have the same order in every call. A sum errs by
a rounding (2^-24) a tile and block, 6 whenever a maximum changes, and 20. A capped logit errs by 11, small
ones included, and the derivative by 12 + 7 |logit / softcap|, where tanh is close to 1 too. What the target
takes from p it takes before dz is rounded to its dtype.

What is no number. Of excluded classes the logit is -inf: p = 0, and where all were so far, m = -inf and
s = 0. After +inf, m is +inf and s how often it was there, so that lse is +inf as torch.logsumexp's; after
NaN, s is NaN. Both stay in their row.
"""

# Triton's annotations know nothing of launches, nor of what is constant while a kernel is compiled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite numbers


@triton.jit
def _capped(logit, softcap, inverse):
    # softcap tanh(x), x = logit inverse = logit / softcap, and its derivative. With r = 2 / (e^2|x| + 1) that
    # is r (2 - r), and |tanh(x)| is 1 - r. Where this would lose digits there is a polynomial, of the least
    # relative error for |x| <= 0.625, which is 2^-27.
    x = logit * inverse
    size = tl.abs(x)
    rest = 2.0 / (tl.exp(2.0 * size) + 1.0)
    square = x * x
    series = square * -0.0057049855 + 0.020639086
    series = series * square - 0.053739715
    series = series * square + 0.13331442
    series = series * square - 0.3333328
    near = x + x * (square * series)
    far = tl.where(x < 0.0, rest - 1.0, 1.0 - rest)
    return softcap * tl.where(size < 0.625, near, far), rest * (2.0 - rest)


@triton.jit
def _scale(m, to):
    # e^(m - to), of a part's maximum and that of the whole: 1 where both are the same infinity.
    return tl.where(m == to, 1.0, tl.exp(m - to))


@triton.jit
def linear_cross_entropy_sums(
    state, logits, target, class_weight, first, c, softcap, state_row, logits_row,
    CAPS: tl.constexpr, SMOOTHS: tl.constexpr, WEIGHTED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # state (N, 4) is merged with that of a block, whose columns are the classes from `first` on.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    class_weight += first
    lane = tl.arange(0, BC)
    # Lanes that have seen no number have LEAST and 0: what -inf - LEAST gives is no NaN.
    m = tl.full([BC], LEAST, tl.float32)
    s = tl.zeros([BC], tl.float32)
    weighted = tl.zeros([BC], tl.float32)
    if CAPS:
        inverse = tl.div_rn(1.0, softcap)
    for begin in range(0, c, BC):
        inside = lane < c - begin
        z = tl.load(logits + begin + lane, mask=inside, other=0.0 if CAPS else -float("inf"))
        if CAPS:
            z = tl.where(inside, _capped(z, softcap, inverse)[0], -float("inf"))
        if SMOOTHS:
            if WEIGHTED:
                cw = tl.load(class_weight + begin + lane, mask=inside, other=0.0)
                weighted += cw * tl.where(inside, z, 0.0)
            else:
                weighted += tl.where(inside, z, 0.0)
        above = z - m
        e = tl.where(z == m, 1.0, tl.exp(-tl.abs(above)))
        s = tl.where(above > 0.0, s * e + 1.0, s + e)
        m = tl.where(above > 0.0, z, m)

    most = tl.max(m, axis=0)
    total = tl.sum(s * _scale(m, most), axis=0)
    most = tl.where(total == 0.0, -float("inf"), most)
    state += row * state_row
    m_before = tl.load(state)
    s_before = tl.load(state + 1)
    m_after = tl.where(m_before > most, m_before, most)
    tl.store(state, m_after)
    tl.store(state + 1, s_before * _scale(m_before, m_after) + total * _scale(most, m_after))
    if SMOOTHS:
        tl.store(state + 3, tl.load(state + 3) + tl.sum(weighted, axis=0))
    t = tl.load(target + row)
    here = (t >= first) & (t < first + c)
    of_target = tl.load(logits + (t - first), mask=here, other=0.0)
    if CAPS:
        of_target = _capped(of_target, softcap, inverse)[0]
    tl.store(state + 2, of_target, mask=here)


@triton.jit
def linear_cross_entropy_gradient(
    dz, logits, target, lse, coefficients, class_weight, first, c, softcap, dz_row, logits_row,
    CAPS: tl.constexpr, WEIGHTED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # coefficients (N, 3) = [a, b, c] of the rows; where all are zero, dz is, whatever the logits are.
    tiles = tl.cdiv(c, BC)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * BC
    lane = tl.arange(0, BC)
    of_p = tl.load(coefficients + row * 3)
    of_target = tl.load(coefficients + row * 3 + 1)
    of_all = tl.load(coefficients + row * 3 + 2)
    used = (of_p != 0.0) | (of_target != 0.0) | (of_all != 0.0)
    inside = lane < c - begin
    needed = lane < tl.where(used, c - begin, 0)
    at = tl.load(target + row) - first - begin  # no lane, if it is not of the tile

    z = tl.load(logits + row * logits_row + begin + lane, mask=needed, other=0.0)
    if CAPS:
        inverse = tl.div_rn(1.0, softcap)
        z, derivative = _capped(z, softcap, inverse)
    value = of_p * tl.exp(z - tl.load(lse + row)) - tl.where(lane == at, of_target, 0.0)
    if WEIGHTED:
        value -= of_all * tl.load(class_weight + first + begin + lane, mask=needed, other=0.0)
    else:
        value -= of_all
    if CAPS:
        value *= derivative
    value = tl.where(used, value, 0.0)
    tl.store(dz + row * dz_row + begin + lane, value.to(dz.dtype.element_ty), mask=inside)


def sums_(
    state: Tensor, logits: Tensor, target: Tensor, first: int, softcap: float, class_weight: Tensor | None,
    smooths: bool,
) -> None:  # fmt: skip
    """Merges the sums of a block of ``logits`` (N, c) into ``state`` (N, 4).

    That is [-inf, 0, NaN, 0] before the first block. Rows of both are dense. ``target`` (N,) is int64, of any
    values: its logit is written where it is among the classes of the block. ``softcap`` is 0.0 where there is
    none. Column 3, of ``class_weight`` (V,) float32 or of ones, stays as it is unless ``smooths``.
    """
    tokens, columns = logits.shape
    if not tokens:
        return
    with torch.cuda.device_of(logits):
        linear_cross_entropy_sums[(tokens,)](
            state, logits, target.contiguous(), _weights(class_weight, logits), first, columns, softcap,
            state.stride(0), logits.stride(0), CAPS=softcap != 0.0, SMOOTHS=smooths,
            WEIGHTED=smooths and class_weight is not None, **sums_options(),
        )  # fmt: skip


def gradient_(
    dz: Tensor, logits: Tensor, target: Tensor, lse: Tensor, coefficients: Tensor, first: int, softcap: float,
    class_weight: Tensor | None,
) -> None:  # fmt: skip
    """Writes ``dz`` (N, c), in float32 or half precision, of a block of ``logits`` (N, c).

    ``lse`` (N,) and ``coefficients`` (N, 3) = [a, b, c] are float32; the rest is as for ``sums_``.
    """
    tokens, columns = logits.shape
    if not tokens:
        return
    options = gradient_options()
    with torch.cuda.device_of(logits):
        linear_cross_entropy_gradient[(tokens * triton.cdiv(columns, options["BC"]),)](
            dz, logits, target.contiguous(), lse.contiguous(), coefficients.contiguous(),
            _weights(class_weight, logits), first, columns, softcap, dz.stride(0), logits.stride(0),
            CAPS=softcap != 0.0, WEIGHTED=class_weight is not None, **options,
        )  # fmt: skip


def sums_options() -> dict[str, Any]:
    return {"BC": 2048, "num_warps": 4}


def gradient_options() -> dict[str, Any]:
    return {"BC": 2048, "num_warps": 4}


def _weights(class_weight: Tensor | None, logits: Tensor) -> Tensor:
    """Weights that are not there are read nowhere."""
    return logits if class_weight is None else class_weight.contiguous()
