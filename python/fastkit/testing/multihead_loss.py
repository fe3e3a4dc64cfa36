"""multihead_loss and orthogonality_penalty against float64: inputs, and budgets that their arithmetic gives.

Values are those of ``fastkit.reference`` on the same numbers in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.reference.multihead_loss_penalty import LEAST_NORM
from fastkit.testing import Expected, assert_matches_reference


class Inputs(NamedTuple):
    """The tensors of a call of multihead_loss, and a cotangent of the losses."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    active: Tensor | None
    class_weight: Tensor | None
    g_loss: Tensor


def make_inputs(
    B: int,
    H: int,
    C: int,
    D: int,
    *,
    problem: str = "single_label",
    dtype: torch.dtype = torch.float32,
    class_weight: bool = False,
    ignored: bool = False,
    inactive: bool = False,
    seed: int = 0,
) -> Inputs:
    """Noise; logits deviate by about 2 from 0.

    Of several labels the targets are shares in [0, 1]. ``ignored``: a third of the rows is, and holds NaN;
    ``inactive``: a third of the heads is not active, and holds NaN.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    arithmetic = torch.promote_types(dtype, torch.float32)
    x, weight, bias = randn(B, D), 2 / D**0.5 * randn(H, C, D), randn(H, C)
    active = None
    if problem == "single_label":
        target = torch.randint(C, (B,), generator=generator)
    elif problem == "multi_label":
        target = torch.rand(B, C, generator=generator).to(arithmetic)
    else:
        target = randn(B).to(arithmetic)
    if ignored:
        target[1::3] = -100
        x[1::3] = torch.nan
    if inactive:
        active = torch.arange(H) % 3 != 1
        weight[1::3], bias[1::3] = torch.nan, torch.nan
    return Inputs(
        x.to(dtype),
        weight.to(dtype),
        bias.to(dtype),
        target,
        active,
        torch.rand(C, generator=generator).to(arithmetic) if class_weight else None,
        randn(H).to(arithmetic),
    )


def expected_results(inputs: Inputs, options: dict[str, Any]) -> dict[str, Expected]:
    """``loss``, ``correct``, ``count``, and for the cotangent of the losses ``gx``, ``gweight``, ``gbias``.

    The budgets follow the errors of the logits, each a sum of D products, through losses and dz to the two
    products after. A row of which rounding may decide whether it is right is a budget of one for ``correct``.
    """
    stored, of_bias = inputs.x.dtype, inputs.bias.dtype
    x, weight, bias, target, active, class_weight, g_loss = (
        None if t is None else t.cpu().double() if t.is_floating_point() else t.cpu() for t in inputs
    )
    assert x is not None and weight is not None and bias is not None
    assert target is not None and g_loss is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = reference.multihead_loss(
        x, weight, bias, target, active=active, class_weight=class_weight, **options
    )
    gradients = torch.autograd.grad(found.loss, leaves, g_loss)

    on = x.new_ones(len(weight), dtype=torch.bool) if active is None else active
    w, b, g = weight.detach()[on], bias.detach()[on], g_loss[on]
    cw = x.new_ones(weight.shape[1]) if class_weight is None else class_weight
    u = torch.finfo(torch.promote_types(stored, torch.float32)).eps / 2
    problem = options.get("problem", "single_label")
    if problem == "single_label":
        taken = target != options.get("ignore_index", -100)
        of = _of_single_label(x.detach()[taken], w, b, target[taken], cw, options, u)
    else:
        taken = x.new_ones(len(x), dtype=torch.bool)
        of_problem = _of_multi_label if problem == "multi_label" else _of_regression
        of = of_problem(x.detach(), w, b, target, cw, u)

    rows = x.detach()[taken]
    B, (K, C) = len(rows), b.shape
    tiny = torch.finfo(torch.promote_types(stored, torch.float32)).tiny
    dz = (g[:, None, None] * of.dz).abs()  # (K, B, C)
    error_dz = g.abs()[:, None, None] * (of.error_dz + 2 * u * of.dz.abs() + 2 * tiny)
    error_x = torch.einsum("kbc,kcd->bd", error_dz + u * (K * C + 2) * dz, w.abs()) + K * C * tiny
    error_w = torch.einsum("kbc,bd->kcd", error_dz + u * (B + 2) * dz, rows.abs()) + B * tiny
    error_b = (error_dz + u * B * dz).sum(1)

    def among(values: Tensor, places: Tensor) -> Tensor:
        return values.new_zeros((len(places), *values.shape[1:])).index_put((places,), values)

    budgets = among(error_x, taken), among(error_w, on), among(error_b, on)
    results = {
        "loss": _rounded(found.loss.detach(), among(of.error_loss, on), g_loss.dtype, stored),
        "correct": Expected(found.correct, among(of.undecided.double(), on)),
        "count": Expected(found.count, found.count.new_zeros(())),
    }
    for name, value, budget in zip(("x", "weight", "bias"), gradients, budgets, strict=True):
        results[f"g{name}"] = _rounded(value, budget, of_bias if name == "bias" else stored, stored)
    return results


class _Errors(NamedTuple):
    """Of K heads and B rows: the losses' errors (K,), dz and its errors (K, B, C), rows in doubt (K,)."""

    error_loss: Tensor
    dz: Tensor
    error_dz: Tensor
    undecided: Tensor


def _logits(x: Tensor, w: Tensor, b: Tensor, u: float) -> tuple[Tensor, Tensor]:
    """Those of each head, (K, B, C), and how far rounding takes them."""
    size = torch.einsum("bd,kcd->kbc", x.abs(), w.abs()) + b.abs().unsqueeze(1)
    return torch.einsum("bd,kcd->kbc", x, w) + b.unsqueeze(1), u * (x.shape[1] + 2) * size


def _of_single_label(
    x: Tensor, w: Tensor, b: Tensor, target: Tensor, cw: Tensor, options: dict[str, Any], u: float
) -> _Errors:
    z, error = _logits(x, w, b, u)
    _, B, C = z.shape
    smoothing = options.get("label_smoothing", 0.0)
    of_rows = cw[target]
    divisor = of_rows.sum()
    share = 1 / torch.where(divisor > 0, divisor, 1.0)
    # The loss of a row is a lse - h z[target] - e sum w z.
    h, e = (1 - smoothing) * share * of_rows, smoothing / C * share
    a = h + cw.sum() * e
    of_coefficients = u * (B + C + 8)
    hit = z.new_zeros(B, C).scatter_(1, target[:, None], 1.0)
    lse = z.logsumexp(2)
    p = (z - lse.unsqueeze(2)).exp()
    most = z.amax(2) if B else lse
    # e^x errs by some units, and by the rounding of its argument; C of them are summed, one after another.
    far = (p * (most.unsqueeze(2) - z)).sum(2)
    error_lse = (p * error).sum(2) + u * (C + 8 + far + 2 * (lse - most).abs() + lse.abs())
    error_target = (hit * error).sum(2)
    sums = (cw * z.abs()).sum(2)
    sizes = a * lse.abs() + h * (hit * z).sum(2).abs() + e * sums
    errors = a * error_lse + h * error_target + e * ((cw * error).sum(2) + u * C * sums)
    errors = errors + (of_coefficients + 4 * u + B * u) * sizes

    error_p = p * (error + error_lse.unsqueeze(2) + u * (16 + (z - lse.unsqueeze(2)).abs()))
    parts = h[:, None] * hit + e * cw
    error_dz = a[:, None] * error_p + (of_coefficients + 4 * u) * (a[:, None] * p + parts)
    others = z.masked_fill(hit.bool(), -torch.inf).amax(2) if B else lse
    gap = (hit * z).sum(2) - others
    undecided = gap.abs() <= error_target + (error.amax(2) if B else lse)
    return _Errors(errors.sum(1), a[:, None] * p - parts, error_dz, undecided.sum(1))


def _of_multi_label(x: Tensor, w: Tensor, b: Tensor, target: Tensor, cw: Tensor, u: float) -> _Errors:
    z, error = _logits(x, w, b, u)
    _, B, C = z.shape
    sigmoid = z.sigmoid()
    logarithm = torch.log1p((-z.abs()).exp())
    losses = cw * (z.clamp(min=0) - target * z + logarithm)
    errors = (sigmoid - target).abs() * error + error.square() / 8
    errors = cw * (errors + 8 * u * ((1 + target.abs()) * z.abs() + logarithm))
    # Sums run over as few as two lanes.
    of_sums = u * (B * C / 2 + 8) * losses.sum((1, 2))
    error_dz = cw / (B * C) * (sigmoid * (1 - sigmoid) * error + 16 * u * (sigmoid + target.abs()))
    dz = cw / (B * C) * (sigmoid - target)
    undecided = (z.abs() <= error).sum((1, 2))
    return _Errors((errors.sum((1, 2)) + of_sums) / (B * C), dz, error_dz, undecided)


def _of_regression(x: Tensor, w: Tensor, b: Tensor, target: Tensor, _: Tensor, u: float) -> _Errors:
    z, error = _logits(x, w, b, u)
    B = len(target)
    far = z - target[:, None]
    error = error + u * far.abs()
    errors = 2 * far.abs() * error + error.square() + u * (B / 2 + 8) * far.square()
    dz, error_dz = 2 / B * far, 2 / B * (error + 4 * u * far.abs())
    return _Errors(errors.sum((1, 2)) / B, dz, error_dz, w.new_zeros(len(w)))


def _rounded(value: Tensor, budget: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Expected:
    """A result that is stored in a dtype, subnormal where the arithmetic is not."""
    finfo = torch.finfo(dtype)
    budget = budget + finfo.eps * value.abs() + (finfo.tiny if dtype.itemsize > 2 else finfo.tiny * finfo.eps)
    # The oracle errs itself.
    return Expected(value, 2 * budget if stored == torch.float64 else budget)


def check(inputs: Inputs, options: dict[str, Any], *, impl: Impl | None = None) -> dict[str, Tensor]:
    """Runs multihead_loss and its gradients, and returns them.

    Raises AssertionError unless each is within its budget of what it is in float64.
    """
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("x", "weight", "bias")}
    found = ops.multihead_loss(
        leaves["x"], leaves["weight"], leaves["bias"], inputs.target, active=inputs.active,
        class_weight=inputs.class_weight, impl=impl, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(found.loss, list(leaves.values()), inputs.g_loss)
    results = {"loss": found.loss.detach(), "correct": found.correct, "count": found.count}
    results |= {f"g{name}": g for name, g in zip(leaves, gradients, strict=True)}
    arithmetic = torch.promote_types(inputs.x.dtype, torch.float32)
    dtypes = [arithmetic, torch.int64, torch.int64, *(leaf.dtype for leaf in leaves.values())]
    assert [t.dtype for t in results.values()] == dtypes
    for name, (value, budget) in expected_results(inputs, options).items():
        assert_matches_reference(results[name], value, budget, name=name)
    return results


# The penalty


class Heads(NamedTuple):
    """The tensors of a call of orthogonality_penalty, and a cotangent of the penalty."""

    weight: Tensor
    active: Tensor | None
    g: Tensor


def make_heads(
    H: int, C: int, D: int, *, dtype: torch.dtype = torch.float32, inactive: bool = False, seed: int = 0
) -> Heads:
    """Noise. ``inactive``: a third of the heads is not active, and holds NaN."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    weight = torch.randn(H, C, D, generator=generator)
    g = torch.randn((), generator=generator).to(torch.promote_types(dtype, torch.float32))
    active = None
    if inactive:
        active = torch.arange(H) % 3 != 1
        weight[1::3] = torch.nan
    return Heads(weight.to(dtype), active, g)


def expected_penalty(heads: Heads, options: dict[str, Any]) -> tuple[dict[str, Expected], float]:
    """``penalty`` and ``gweight``, and the share of the gradient's rows that rounding decides.

    The budgets follow the errors of the rows, centered and divided by their norms, to those of the products
    of pairs, each a sum of D, and of what the slope is at them. Where a product is no further from 0 than its
    error, rounding decides its sign: there the slope of ``"abs"`` may err by 2, that of ``"huber"`` by the
    error over the width, and the budget of either row by that many times the other.
    """
    stored = heads.weight.dtype
    kind, width = options.get("kind", "abs"), options.get("huber_width", 1e-2)
    centers = options.get("center_classes", False)
    weight = heads.weight.detach().cpu().double().requires_grad_()
    active = None if heads.active is None else heads.active.cpu()
    penalty = reference.orthogonality_penalty(weight, active=active, **options)
    (gradient,) = torch.autograd.grad(penalty, weight, heads.g.cpu().double())

    u = torch.finfo(torch.promote_types(stored, torch.float32)).eps / 2
    w = weight.detach() if active is None else weight.detach()[active]
    K, C, D = w.shape
    w = w.transpose(0, 1)  # (C, K, D)
    error = torch.zeros_like(w)
    if centers:
        mean = w.mean(0)
        error = u * ((C + 1) * w.abs().mean(0) + (w - mean).abs())
        w = w - mean
    norm, of_norm, held = None, w.new_zeros(()), w.new_zeros((), dtype=torch.bool)
    if kind.startswith("cos_"):
        norm = torch.linalg.vector_norm(w, dim=2, keepdim=True)
        held = norm <= LEAST_NORM
        of_norm = u * (D / 2 + 2) + torch.linalg.vector_norm(error, dim=2, keepdim=True) / norm
        of_norm = of_norm.masked_fill(held, u)
        norm = norm.clamp_min(LEAST_NORM)
        w = w / norm
        error = error / norm + (of_norm + u) * w.abs()

    gram = w @ w.transpose(1, 2)  # (C, K, K)
    size = w.abs() @ w.abs().transpose(1, 2)
    error_gram = error @ w.abs().transpose(1, 2)
    error_gram = u * (D + 1) * size + error_gram + error_gram.transpose(1, 2)
    away = gram.abs()
    if kind.endswith("squared"):
        rho, error_rho = gram.square(), 2 * away * error_gram + error_gram.square()
        slope, error_slope = 2 * away, 2 * error_gram
    else:
        in_doubt = (away <= error_gram) & (error_gram > 0)
        if kind == "huber":
            rho = torch.where(away <= width, gram.square() / (2 * width), away - width / 2)
            slope = (away / width).clamp(max=1.0)
            error_rho = ((away + error_gram) / width).clamp(max=1.0) * error_gram
            error_slope = torch.where(
                away - error_gram > width, 0.0, (error_gram / width + 4 * u * slope).clamp(max=2.0)
            )
        else:
            rho, error_rho, slope, error_slope = away, error_gram, (away > 0).double(), 2.0 * in_doubt
    apart = 1 - torch.eye(K, dtype=torch.float64, device=w.device)
    slope, error_slope = slope * apart, error_slope * apart
    tiny = torch.finfo(torch.promote_types(stored, torch.float32)).tiny
    pairs = ((error_rho + 4 * u * rho + tiny) * apart).sum() / 2  # what is subnormal may be 0
    # A row's sum runs over as few as two lanes, that of C K rows over parts of at most 64.
    of_sums = u * (K / 2 + 256) * (rho * apart).sum() / 2

    of_rows = slope @ w.abs()  # at most
    error_rows = error_slope @ w.abs() + slope @ error + u * (K + 8) * of_rows + K * tiny
    doubts = (error_slope >= 1).any(2)  # (C, K)
    if norm is not None:
        along = (of_rows * w.abs()).sum(2, keepdim=True)
        error_along = (error_rows * w.abs() + of_rows * error).sum(2, keepdim=True) + u * D * along
        along, error_along = (t.masked_fill(held, 0.0) for t in (along, error_along))
        total = of_rows + along * w.abs()
        error_rows = error_rows + error_along * w.abs() + along * error + (of_norm + 4 * u) * total
        of_rows, error_rows = total / norm, error_rows / norm
    if centers:
        error_rows = error_rows + error_rows.mean(0) + u * (C + 2) * (of_rows.mean(0) + of_rows)
        of_rows = of_rows + of_rows.mean(0)
        doubts = doubts.any(0, keepdim=True).expand(C, -1)
    budget = heads.g.cpu().double().abs() * (error_rows + 2 * u * of_rows).transpose(0, 1)
    if active is not None:
        budget = torch.zeros_like(gradient).index_put((active,), budget)
    results = {
        "penalty": _rounded(penalty.detach(), pairs + of_sums, heads.g.dtype, stored),
        "gweight": _rounded(gradient, budget, stored, stored),
    }
    return results, float(doubts.double().mean()) if doubts.numel() else 0.0


def check_penalty(
    heads: Heads, options: dict[str, Any], *, impl: Impl | None = None, most: float = 0.05
) -> dict[str, Tensor]:
    """Runs orthogonality_penalty and its gradient, and returns them.

    Raises AssertionError unless each is within its budget of what it is in float64, and rounding decides at
    most a share of ``most`` of the gradient's rows.
    """
    weight = heads.weight.detach().requires_grad_()
    penalty = ops.orthogonality_penalty(weight, active=heads.active, impl=impl, **options)
    (gradient,) = torch.autograd.grad(penalty, weight, heads.g)
    assert penalty.dtype == heads.g.dtype and gradient.dtype == weight.dtype
    results = {"penalty": penalty.detach(), "gweight": gradient}
    expected, share = expected_penalty(heads, options)
    if share > most:
        raise AssertionError(f"gweight: rounding decides {share:.3g} of the rows, more than {most:g}")
    for name, (value, budget) in expected.items():
        assert_matches_reference(results[name], value, budget, name=name)
    return results
