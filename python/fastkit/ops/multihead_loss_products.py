"""multihead_loss in its arithmetic: which heads, which dtype, and memory for the kernels.

They give, with the losses, ``dz``, the gradient of each head's loss to its logits; backward is two products
of it. 6 B K C D operations in all.
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

if _native.REASON is None:

    @torch.library.register_fake("fastkit::multihead_loss_fwd_")
    def _(*_: Any) -> None:
        pass

    @torch.library.register_fake("fastkit::multihead_loss_bwd_")
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
        rows, place = _rows(x), places_of(active)
        weight, bias = (_dense(t if place is None else t[place], rows.dtype) for t in (weight, bias))
        room = rows.new_empty(heads * classes * len(rows))
        z = room[: bias.numel() * len(rows)]
        if place is not None:
            room[z.numel() :].zero_()
        loss, correct = rows.new_empty(len(bias)), rows.new_empty(len(bias), dtype=torch.int64)
        count = rows.new_empty((), dtype=torch.int64)
        labels = wanted = None
        if problem == "single_label":
            labels = _dense(target, torch.int64)
        else:
            wanted = _dense(target if problem == "regression" else target.T, rows.dtype)
        of_classes = None if class_weight is None else _dense(class_weight, rows.dtype)
        torch.ops.fastkit.multihead_loss_fwd_.default(
            rows, weight, bias, labels, wanted, of_classes, problem, label_smoothing, ignore_index, gradient,
            z, loss, correct, count,
        )  # fmt: skip
        if place is not None:
            loss, correct = _among(loss, place, heads), _among(correct, place, heads)
        return loss, correct, count, room if gradient else room[:0]


def backward(
    g_loss: Tensor, dz: Tensor, x: Tensor, weight: Tensor, target: Tensor, active: Tensor | None,
    problem: str, ignore_index: int, needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients to x, weight and bias, in the arithmetic's dtype; empty unless needed."""
    if impl == "triton":
        return triton_kernels().backward(g_loss, dz, x, weight, target, active, problem, ignore_index, needs)
    with torch.no_grad(), without_autocast(x):
        heads, rows, place = len(weight), _rows(x), places_of(active)
        if place is not None:
            g_loss, weight = g_loss[place], weight[place]
        weight, g_loss = _dense(weight, rows.dtype), _dense(g_loss, rows.dtype)
        of_x, of_weight, of_bias = (
            rows.new_empty(shape) if need else None
            for shape, need in zip((x.shape, weight.shape, weight.shape[:2]), needs, strict=True)
        )
        labels = _dense(target, torch.int64) if problem == "single_label" else None
        dz = dz[: weight.shape[0] * weight.shape[1] * len(rows)]
        torch.ops.fastkit.multihead_loss_bwd_.default(
            g_loss, dz, rows, weight, labels, ignore_index, of_x, of_weight, of_bias
        )
        if place is not None:
            of_weight, of_bias = (
                None if t is None else _among(t, place, heads) for t in (of_weight, of_bias)
            )
        return tuple(rows.new_empty(0) if t is None else t for t in (of_x, of_weight, of_bias))


def triton_kernels() -> Any:
    return importlib.import_module("fastkit.triton.multihead_loss")


def _rows(x: Tensor) -> Tensor:
    """x in the arithmetic's dtype, the features of a row side by side."""
    rows = x.to(arithmetic(x))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous()


def _among(values: Tensor, place: Tensor, heads: int) -> Tensor:
    """Of all heads, where those that are not active have 0."""
    return values.new_zeros((heads, *values.shape[1:])).index_copy_(0, place, values)


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
