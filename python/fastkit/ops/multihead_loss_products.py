"""multihead_loss on a CPU: one product for the logits of all active heads, and two for their gradient.

``z (K C, B) = weight (K C, D) x^T``: a head's rows of the batch are neighbours, over which the kernel goes
with vectors. It forms ``dz``, the gradient of each head's loss to its logits, in their place; backward
multiplies it by the gradients to the losses. 6 B K C D operations in all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit import _native
from fastkit._autograd import without_autocast
from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define

_IGNORED = -(2**63)  # for the kernel: the target of a row that does not count

if _native.REASON is None:

    @torch.library.register_fake("fastkit::multihead_loss_rows_")
    def _(*_: Any) -> None:
        pass


def places_of(active: Tensor | None) -> Tensor | None:
    """Of the active heads; None where all are."""
    return None if active is None or bool(active.all()) else active.nonzero()[:, 0]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, active: Tensor | None,
    class_weight: Tensor | None, problem: str, label_smoothing: float, ignore_index: int, gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and correct (H,), count, and dz of the K active heads: K C B of H C B numbers, the others 0."""
    if impl == "triton":
        return triton_kernels().forward(
            x, weight, bias, target, active, class_weight, problem, label_smoothing, ignore_index, gradient
        )
    with torch.no_grad(), without_autocast(x):
        heads, classes, _ = weight.shape
        rows, _ = _rows(x, target, problem, ignore_index)
        dtype, batch, place = rows.dtype, len(rows), places_of(active)
        chosen, of_chosen = (t if place is None else t[place] for t in (weight, bias))
        room = rows.new_empty(heads * classes * batch)
        z = room[: len(chosen) * classes * batch].view(-1, batch)
        if place is not None:
            room[z.numel() :].zero_()
        torch.addmm(of_chosen.reshape(-1, 1).to(dtype), _matrix(chosen, dtype), rows.T, out=z)
        of_classes = None if class_weight is None else class_weight.to(dtype).contiguous()
        loss, correct = z.new_empty(len(chosen)), target.new_empty(len(chosen), dtype=torch.int64)
        coefficients, scale = None, 1.0
        if problem == "single_label":
            target = target.long().contiguous()
            counts = target != ignore_index
            coefficients, count = _coefficients(target, counts, classes, of_classes, label_smoothing, dtype)
            target = target.clamp(-1, classes).masked_fill(~counts, _IGNORED)  # -1 and C are no class
        else:
            wanted = target if problem == "regression" else target.T
            target = wanted.to(dtype).contiguous()
            scale = 1 / target.numel()
            count = torch.tensor(target.numel())
        _kernel(
            z.view(-1, classes, batch), target, coefficients, of_classes, scale, problem, gradient, loss,
            correct,
        )  # fmt: skip
        return (
            _among(loss, place, heads),
            _among(correct, place, heads),
            count,
            room if gradient else room[:0],
        )


def backward(
    g_loss: Tensor, dz: Tensor, x: Tensor, weight: Tensor, target: Tensor, active: Tensor | None,
    problem: str, ignore_index: int, needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients to x, weight and bias, in the arithmetic's dtype; empty unless needed."""
    if impl == "triton":
        return triton_kernels().backward(g_loss, dz, x, weight, target, active, problem, ignore_index, needs)
    with torch.no_grad(), without_autocast(x):
        heads, classes, columns = weight.shape
        rows, ignored = _rows(x, target, problem, ignore_index)
        batch, place = len(rows), places_of(active)
        if place is not None:
            g_loss, weight = g_loss[place], weight[place]
        of_heads = dz[: len(weight) * classes * batch].view(len(weight), classes * batch)
        g_z = (of_heads * g_loss.to(dz.dtype).unsqueeze(1)).view(-1, batch)
        of_x, of_weight, of_bias = (rows.new_empty(0) for _ in range(3))
        if needs[0]:
            of_x = g_z.T @ _matrix(weight, rows.dtype)
            if ignored is not None:
                of_x = of_x.masked_fill_(ignored, 0.0)
        if needs[1]:
            of_weight = _among((g_z @ rows).view(-1, classes, columns), place, heads)
        if needs[2]:
            of_bias = _among(g_z.view(-1, classes, batch).sum(2), place, heads)
        return of_x, of_weight, of_bias


def triton_kernels() -> Any:
    return importlib.import_module("fastkit.triton.multihead_loss")


def _kernel(*args: Any) -> None:
    torch.ops.fastkit.multihead_loss_rows_.default(*args)


def _rows(x: Tensor, target: Tensor, problem: str, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """x in the arithmetic's dtype, with zeros in rows that do not count, and which (B, 1) those are."""
    rows = x.to(arithmetic(x))
    if problem == "single_label":
        ignored = (target.long() == ignore_index).unsqueeze(1)
        if bool(ignored.any()):
            return rows.masked_fill(ignored, 0.0), ignored
    return rows, None


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:  # (K, C, D) -> (K C, D)
    return weight.reshape(-1, weight.shape[2]).to(dtype)


def _among(values: Tensor, place: Tensor | None, heads: int) -> Tensor:
    """Of all heads, where those that are not active have 0."""
    if place is None:
        return values
    return values.new_zeros((heads, *values.shape[1:])).index_copy_(0, place, values)


def _coefficients(
    target: Tensor, counts: Tensor, classes: int, class_weight: Tensor | None, label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(3, B): a, b, c of each row's loss, ``a lse - b z[target] - c sum w z``; and how many rows count."""
    ones = counts.to(dtype)
    total = float(classes)
    if class_weight is not None:
        ones = ones * class_weight[target.clamp(0, classes - 1)]
        total = class_weight.sum()
    divisor = ones.sum()
    share = 1 / torch.where(divisor > 0, divisor, 1.0)
    of_target = (1 - label_smoothing) * share * ones
    of_each = label_smoothing / classes * share * counts
    return torch.stack([of_target + total * of_each, of_target, of_each]), counts.sum()


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, active: Tensor | None,
    class_weight: Tensor | None, problem: str, label_smoothing: float, ignore_index: int, gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_one_device("multihead_loss", x, weight, bias, target, active, class_weight)
    heads, classes, _ = weight.shape
    dtype = arithmetic(x)
    return (
        x.new_empty(heads, dtype=dtype),
        x.new_empty(heads, dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(heads * classes * x.shape[0] if gradient else 0, dtype=dtype),
    )


def _fake_backward(
    g_loss: Tensor, dz: Tensor, x: Tensor, weight: Tensor, target: Tensor, active: Tensor | None,
    problem: str, ignore_index: int, needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_x, of_weight, of_bias = needs
    return (
        dz.new_empty(x.shape if of_x else 0),
        dz.new_empty(weight.shape if of_weight else 0),
        dz.new_empty(weight.shape[:2] if of_bias else 0),
    )


run_forward: Callable[..., Any] = define(
    "fastkit_products",
    "multihead_loss_fwd(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? active,"
    " Tensor? class_weight, str problem, float label_smoothing, int ignore_index, bool gradient, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
)
run_backward: Callable[..., Any] = define(
    "fastkit_products",
    "multihead_loss_bwd(Tensor g_loss, Tensor dz, Tensor x, Tensor weight, Tensor target, Tensor? active,"
    " str problem, int ignore_index, bool[] needs, str impl) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)
