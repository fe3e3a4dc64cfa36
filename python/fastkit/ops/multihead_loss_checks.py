"""What multihead_loss and orthogonality_penalty refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import (
    MOST,
    arithmetic,
    check_device,
    check_floating,
    check_int,
    check_like,
    check_like_or_widened,
    check_not_negative,
    check_number,
    may_look_at,
    shape,
)
from fastkit.ops.linear_cross_entropy_checks import refuse_targets

PROBLEMS = ("single_label", "multi_label", "regression")
KINDS = ("abs", "squared", "cos_abs", "cos_squared", "huber")
_CURE = "cast it with {name}.to(x.dtype), or run under torch.autocast"


def check_heads(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    problem: str,
    active: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    check_floating(op, "x", x)
    if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must have shape (B, D) with a row at least, got {shape(x)}")
    check_like(op, "weight", weight, x, cure=_CURE)
    _check_weight_shape(op, weight)
    if weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"{op}: weight must have shape (H, C, D) with D = {x.shape[1]}, as x has, got {shape(weight)}"
        )
    check_like_or_widened(op, "bias", bias, x, cure=_CURE)
    heads, classes = weight.shape[:2]
    if tuple(bias.shape) != (heads, classes):
        raise ValueError(
            f"{op}: bias must have shape (H, C) = {(heads, classes)}, as weight has, got {shape(bias)}"
        )
    if problem not in PROBLEMS:
        raise ValueError(f"{op}: problem must be one of {', '.join(PROBLEMS)}, got {problem!r}")
    _check_target(op, target, x, classes, problem)
    check_active(op, active, weight)
    if class_weight is not None:
        _check_class_weight(op, class_weight, x, classes, problem)
    check_number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and problem != "single_label":
        raise ValueError(
            f"{op}: label_smoothing must be 0 with problem={problem!r}, got {label_smoothing}; smooth the"
            " target"
        )
    check_int(op, "ignore_index", ignore_index)
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"{op}: ignore_index must be a number that int64 has, got one of {ignore_index.bit_length()} bits"
        )
    if problem == "single_label" and may_look_at(target):
        refuse_targets(op, target, classes, ignore_index)


def check_penalty(
    op: str, weight: Tensor, kind: str, huber_width: float, active: Tensor | None, center_classes: bool
) -> None:
    check_floating(op, "weight", weight)
    _check_weight_shape(op, weight)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_number(op, "huber_width", huber_width)
    if not 0 < huber_width <= MOST:
        raise ValueError(f"{op}: huber_width must be positive and finite, got {huber_width}")
    least = torch.finfo(arithmetic(weight)).tiny
    if huber_width < least:  # by which the kernel, which has no subnormal numbers, cannot divide
        raise ValueError(
            f"{op}: huber_width must be {least:g} at least for {arithmetic(weight)}, got {huber_width}; take"
            ' kind="abs"'
        )
    check_active(op, active, weight)
    if not isinstance(center_classes, bool):
        raise TypeError(f"{op}: center_classes must be True or False, got {type(center_classes).__name__}")
    if center_classes and weight.shape[1] == 1:
        raise ValueError(
            f"{op}: center_classes must be False for one class, whose mean is itself, got weight of shape"
            f" {shape(weight)}"
        )


def check_active(op: str, active: Tensor | None, weight: Tensor) -> None:
    if active is None:
        return
    check_device(op, "active", active, weight, "weight")
    if active.dtype != torch.bool:
        raise TypeError(
            f"{op}: active must be bool, True for a head that takes part, got {active.dtype}; pass"
            " active.bool()"
        )
    if tuple(active.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: active must have shape (H,) = {(weight.shape[0],)}, as weight has, got {shape(active)}"
        )


def _check_weight_shape(op: str, weight: Tensor) -> None:
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must have shape (H, C, D), with a head, a class and a feature at least, got"
            f" {shape(weight)}"
        )


def _check_target(op: str, target: Tensor, x: Tensor, classes: int, problem: str) -> None:
    check_device(op, "target", target, x)
    if problem == "single_label":
        if classes == 1:
            raise ValueError(
                f'{op}: weight must have two classes at least with problem="single_label", got one; take'
                ' problem="multi_label" or "regression"'
            )
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f'{op}: target must be int64 or int32 with problem="single_label", got {target.dtype}'
            )
    elif not target.dtype.is_floating_point:
        raise TypeError(
            f"{op}: target must be floating point with problem={problem!r}, got {target.dtype}; pass"
            " target.to(x.dtype)"
        )
    elif target.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: target must not require grad, no gradient is formed for it; pass target.detach()"
        )
    if problem == "regression" and classes != 1:
        raise ValueError(f'{op}: weight must have one class with problem="regression", got {classes}')
    letters, expected = ("(B, C)", (len(x), classes)) if problem == "multi_label" else ("(B,)", (len(x),))
    if tuple(target.shape) != expected:
        raise ValueError(
            f"{op}: target must have shape {letters} = {expected} with problem={problem!r}, got"
            f" {shape(target)}"
        )


def _check_class_weight(op: str, class_weight: Tensor, x: Tensor, classes: int, problem: str) -> None:
    check_like_or_widened(op, "class_weight", class_weight, x, cure="cast it")
    if problem == "regression":
        raise ValueError(f'{op}: class_weight must be None with problem="regression", which has no classes')
    if tuple(class_weight.shape) != (classes,):
        raise ValueError(
            f"{op}: class_weight must have shape (C,) = {(classes,)}, as weight has, got"
            f" {shape(class_weight)}"
        )
    if class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: class_weight must not require grad, no gradient is formed for it; pass"
            " class_weight.detach()"
        )
    check_not_negative(op, "class_weight", class_weight, "they are weights of the classes")
