"""linear_cross_entropy against its float64 oracle: inputs, and budgets derived from its arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.testing import Expected, assert_matches_reference


class Inputs(NamedTuple):
    """The tensors of a call, and cotangents of the loss and of lse."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    token_weight: Tensor | None
    g_loss: Tensor
    g_lse: Tensor


def make_inputs(
    N: int,
    V: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    reduction: str = "mean",
    linear_bias: bool = False,
    weight: bool = False,
    token_weight: bool = False,
    ignored: bool = False,
    seed: int = 0,
) -> Inputs:
    """Noise; logits deviate by about 2 from 0. ``ignored``: a third of the tokens is."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    arithmetic = torch.promote_types(dtype, torch.float32)
    target = torch.randint(V, (N,), generator=generator)
    if ignored:
        target[1::3] = -100
    return Inputs(
        randn(N, D).to(dtype),
        (2 / D**0.5 * randn(V, D)).to(dtype),
        target,
        randn(V).to(dtype) if linear_bias else None,
        rand(V).to(arithmetic) if weight else None,
        randn(N).to(arithmetic) if token_weight else None,
        randn(*([N] if reduction == "none" else [])).to(arithmetic),
        randn(N).to(arithmetic),
    )


def expected_results(inputs: Inputs, options: dict[str, Any], *, with_lse: bool) -> dict[str, Expected]:
    """``loss``, ``lse``, ``ginput``, ``glinear_weight`` and, where there is one, ``glinear_bias``.

    Gradients are for the cotangent of the loss, and ``with_lse`` for that of lse too. The budgets follow the
    errors of the logits, each a sum of D products, through lse, the losses and dz to the two products after.
    """
    stored, arithmetic = inputs.input.dtype, torch.promote_types(inputs.input.dtype, torch.float32)
    device = inputs.input.device
    u = torch.finfo(arithmetic).eps / 2
    # On a GPU dz is rounded to half precision before its products.
    u_dz = torch.finfo(stored).eps if device.type == "cuda" else 0.0
    h, w, target, c, cw, tw, g_loss, g_lse = (
        None if t is None else t.cpu() if t.dtype == torch.int64 else t.cpu().double() for t in inputs
    )
    assert h is not None and w is not None and target is not None and g_loss is not None and g_lse is not None
    reduction, smoothing = options.get("reduction", "mean"), options.get("label_smoothing", 0.0)
    softcap, zeta = options.get("softcap"), options.get("z_loss", 0.0)
    taken = target != options.get("ignore_index", -100)
    h, target, g_lse = h[taken], target[taken], g_lse[taken]
    (N, D), V = h.shape, len(w)
    cw = torch.ones(V, dtype=torch.float64) if cw is None else cw
    tw = torch.ones(N, dtype=torch.float64) if tw is None else tw[taken]

    z, size = h @ w.T, h.abs() @ w.abs().T
    if c is not None:
        z, size = z + c, size + c.abs()
    error = u * (D + 2) * size
    slope = torch.ones_like(z)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap).square()
        error = error + 16 * u * z.abs()
    error_slope = 32 * u + 2 * error / (softcap or torch.inf)
    lse = z.logsumexp(1)
    # A sum runs over as few as 8 lanes; arguments of e^x are rounded, and it errs by some units.
    error_lse = error.amax(1) + u * (V / 8 + 32 + 2 * (z.amax(1).abs() + lse.abs()) + z.abs().amax(1))
    hit = torch.zeros_like(z).scatter_(1, target[:, None], 1.0)
    of_target = (hit * z).sum(1)
    error_target = (hit * error).sum(1)

    def sums(values: Tensor) -> Tensor:
        return (cw * values).sum(1)

    part = smoothing / V
    losses = (1 - smoothing) * cw[target] * (lse - of_target) + zeta * lse.square()
    sizes = (1 - smoothing) * cw[target] * (lse.abs() + of_target.abs()) + zeta * lse.square()
    errors = (1 - smoothing) * cw[target] * (error_lse + error_target) + 2 * zeta * lse.abs() * error_lse
    if smoothing:
        losses = losses + part * (cw.sum() * lse - sums(z))
        sizes = sizes + part * (cw.sum() * lse.abs() + sums(z.abs()))
        errors = errors + part * (cw.sum() * error_lse + sums(error) + u * V * sums(z.abs()))
    losses, errors = tw * losses, tw.abs() * (errors + 8 * u * (sizes + part * V * sums(z.abs())))
    divisor = cw[target].sum() if reduction == "mean" else torch.ones(())
    scale = tw * (g_loss[taken] if reduction == "none" else g_loss) / divisor

    p = (z - lse[:, None]).exp()
    error_p = p * (error + error_lse[:, None] + u * (16 + (z - lse[:, None]).abs()))
    of_target_dz, of_each = (1 - smoothing) * cw[target], part * cw
    of_p = of_target_dz + part * cw.sum() + 2 * zeta * lse
    error_of_p = u * (V * part * cw.sum() + 8 * of_p.abs()) + 2 * zeta * error_lse
    a, error_a = scale * of_p, scale.abs() * error_of_p
    if with_lse:
        a, error_a = a + g_lse, error_a + 2 * u * g_lse.abs()
    direct = scale[:, None] * (of_target_dz[:, None] * hit + of_each)
    dz = a[:, None] * p - direct
    bound = a.abs()[:, None] * p + direct.abs()
    error_dz = a.abs()[:, None] * error_p + error_a[:, None] * p + (8 + N) * u * bound
    error_dz = error_dz * slope.abs() + bound * error_slope + u_dz * bound
    dz = dz * slope

    def everywhere(values: Tensor) -> Tensor:
        return values.new_zeros((len(taken), *values.shape[1:])).index_put((taken.nonzero()[:, 0],), values)

    def result(value: Tensor, budget: Tensor, dtype: torch.dtype) -> Expected:
        finfo = torch.finfo(dtype)
        budget = budget + finfo.eps * value.abs() + finfo.tiny
        # The oracle errs itself.
        budget = 2 * budget if arithmetic == torch.float64 else budget
        return Expected(value.to(device), budget.to(device))

    if reduction == "none":
        loss = result(everywhere(losses), everywhere(errors), arithmetic)
    else:
        value = losses.sum() / divisor
        loss = result(value, (errors.sum() + N * u * losses.abs().sum()) / divisor, arithmetic)
    sums_dz = error_dz.T @ h.abs() + u * N * dz.abs().T @ h.abs()
    tiny = V * torch.finfo(arithmetic).tiny
    results = {
        "loss": loss,
        "lse": result(everywhere(lse), everywhere(error_lse), arithmetic),
        "ginput": result(
            everywhere(dz @ w), everywhere(error_dz @ w.abs() + u * V * dz.abs() @ w.abs() + tiny), stored
        ),
        "glinear_weight": result(dz.T @ h, sums_dz + tiny, stored),
    }
    if c is not None:
        budget = error_dz.sum(0) + u * N * dz.abs().sum(0) + tiny
        results["glinear_bias"] = result(dz.sum(0), budget, stored)
    return results


def check(
    inputs: Inputs, options: dict[str, Any], *, with_lse: bool = False, impl: Impl | None = None
) -> dict[str, Tensor]:
    """Runs the op and its gradients, and returns them.

    Raises AssertionError unless each is within its budget of what it is in float64. Without the cotangent of
    lse the gradients are those of ``linear_cross_entropy``.
    """
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in ("input", "linear_weight", "linear_bias")
        if (tensor := getattr(inputs, name)) is not None
    }
    args = (leaves["input"], leaves["linear_weight"], inputs.target)
    others = {
        "linear_bias": leaves.get("linear_bias"), "weight": inputs.weight,
        "token_weight": inputs.token_weight, "impl": impl, **options,
    }  # fmt: skip
    loss, lse = ops.linear_cross_entropy_with_lse(*args, **others)
    outputs, cotangents = (loss, lse), (inputs.g_loss, inputs.g_lse)
    if not with_lse:
        outputs, cotangents = (ops.linear_cross_entropy(*args, **others),), (inputs.g_loss,)
        if not torch.equal(outputs[0].nan_to_num(), loss.nan_to_num()):
            raise AssertionError("loss: linear_cross_entropy gives other bits than with lse")
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {"loss": loss.detach(), "lse": lse.detach()}
    results |= {f"g{name}": g for name, g in zip(leaves, gradients, strict=True)}
    for name, (value, budget) in expected_results(inputs, options, with_lse=with_lse).items():
        assert_matches_reference(results[name], value, budget, name=name)
    return results
