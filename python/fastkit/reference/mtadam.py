"""One step of MTAdam, Adam for several losses; written for reading."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mtadam_square_sums(grads: Sequence[Tensor | None], n: int) -> Tensor:  # (n, L) float64
    """The square sum of each gradient, of n tensors under L terms, term-major; 0 where there is none."""
    device = next((g.device for g in grads if g is not None), None)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = [zero if g is None else _widened(g.detach()).square().sum(dtype=torch.float64) for g in grads]
    return torch.stack(sums).view(-1, n).T.contiguous() if sums else zero.new_zeros(n, 0)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def mtadam_update_(
    params: Sequence[Tensor],  # n of any shapes
    grads: Sequence[Tensor | None],  # grads[l * n + i] of term l and tensor i; None: the term misses it
    exp_avgs: Sequence[Tensor],  # n, each shaped like its parameter
    exp_avg_sqs: Sequence[Tensor],  # L n, term-major
    grad_norms: Tensor,  # (n, L)
    steps: Tensor,  # (n,)
    *,
    square_sums: Tensor | None = None,  # (n, L) float64
    max_exp_avg_sqs: Sequence[Tensor] | None = None,  # n, amsgrad
    lr: float | Tensor,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ranks: Sequence[float] | None = None,  # (L,)
    anchor: int = 0,
    alive_eps: float = 1e-10,
    max_scale: float | None = None,
    nonfinite: str = "skip",
    grad_scales: Tensor | None = None,  # (L,)
    found_inf: Tensor | None = None,
    first: int = 0,
    applies: bool = True,
) -> None:
    """One step of MTAdam on n tensors under L terms, in place; all that tensors hold is written to.

    Gradients of the terms from ``first`` on alone are given where a step is done term by term: their moments
    are folded in, and parameters move where ``applies``.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    if isinstance(lr, Tensor):
        lr = lr.detach().double().reshape(())
    n = len(params)
    if square_sums is None:
        square_sums = mtadam_square_sums(grads, n)
    for i, param in enumerate(params):
        of_tensor = grads[i::n]
        if first == 0 and all(g is None for g in of_tensor):
            continue  # no term reaches it: it does not take part
        factors = _balance(
            square_sums[i].to(grad_norms.device),
            grad_norms[i],
            first,
            betas[2],
            ranks,
            anchor,
            alive_eps,
            max_scale,
            nonfinite,
            grad_scales,
        )
        if factors is None:
            continue
        dtype = exp_avgs[i].dtype
        value = param.to(dtype)
        total = torch.zeros_like(exp_avgs[i])
        for k, (grad, factor) in enumerate(zip(of_tensor, factors, strict=True)):
            exp_avg_sq = exp_avg_sqs[(first + k) * n + i]
            h = torch.zeros_like(total)
            if grad is not None and (factor != 0 or nonfinite == "propagate"):
                h = factor.to(dtype) * grad.to(dtype)
            if weight_decay != 0 and not decoupled:
                h = h + weight_decay * value
            total = total + h
            exp_avg_sq.mul_(betas[1]).add_((1 - betas[1]) * h.square())
        exp_avgs[i].mul_(betas[0] if first == 0 else 1.0).add_((1 - betas[0]) * total)
        if not applies:
            continue

        steps[i] += 1
        step = steps[i].double()
        most = torch.stack(list(exp_avg_sqs[i::n])).amax(0)
        if max_exp_avg_sqs is not None:
            most = max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], most))
        denominator = most.sqrt() / (1 - betas[1] ** step).sqrt().to(dtype) + eps
        if weight_decay != 0 and decoupled:
            value = value * (1 - lr * weight_decay)
        param.copy_(value - (lr / (1 - betas[0] ** step)).to(dtype) * exp_avgs[i] / denominator)


def _balance(
    square_sums: Tensor,  # (F,) float64, of the terms from `first` on
    grad_norms: Tensor,  # (L,), updated
    first: int,
    beta3: float,
    ranks: Sequence[float] | None,
    anchor: int,
    alive_eps: float,
    max_scale: float | None,
    nonfinite: str,
    grad_scales: Tensor | None,
) -> list[Tensor] | None:
    """The factors of one tensor's gradients, 0 for one that is left out; None: the tensor stays as it is."""
    end = first + len(square_sums)
    scales = torch.ones_like(square_sums) if grad_scales is None else grad_scales[first:end].double()
    raws = square_sums.sqrt() / scales.to(square_sums.device)
    finite = raws.isfinite()
    if nonfinite == "skip" and not finite.all():
        return None
    left_out = ~finite if nonfinite == "skip_term" else torch.zeros_like(finite)
    raws = raws.masked_fill(left_out, 0.0)
    before = grad_norms[first:end].double()
    grad_norms[first:end] = torch.where(before > alive_eps, beta3 * before + (1 - beta3) * raws, raws)

    norms = grad_norms[:end].double()
    alive = [j for j in (anchor, *range(end)) if j < end and norms[j] > alive_eps]
    factors = []
    for k in range(end - first):
        factor = torch.ones_like(raws[k])
        if norms[first + k] > alive_eps:
            ratio = norms[alive[0]] / norms[first + k]
            factor = (1.0 if ranks is None else ranks[first + k]) * ratio.clamp(
                max=math.inf if max_scale is None else max_scale
            )
        factors.append(torch.zeros_like(factor) if left_out[k] else factor / scales[k])
    return factors
