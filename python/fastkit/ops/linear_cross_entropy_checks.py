"""What linear_cross_entropy refuses, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit._autograd import transforms
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

_REDUCTIONS = ("none", "sum", "mean")
_CURE = "cast it with {name}.to(input.dtype), or run under torch.autocast"


def check_loss(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    token_weight: Tensor | None,
    check: bool,
) -> None:
    check_floating(op, "input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"{op}: input must have shape (..., D) with D >= 1, got {shape(input)}")
    check_like(op, "linear_weight", linear_weight, input, "input", cure=_CURE)
    columns = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0 or linear_weight.shape[1] != columns:
        raise ValueError(
            f"{op}: linear_weight must have shape (V, D) with V >= 1 and D = {columns}, as input has,"
            f" got {shape(linear_weight)}; for an embedding of another width project the input first"
        )
    vocabulary = linear_weight.shape[0]
    if linear_bias is not None:
        check_like_or_widened(op, "linear_bias", linear_bias, input, "input", cure=_CURE)
        _check_shape(op, "linear_bias", linear_bias, "(V,)", (vocabulary,))
    check_device(op, "target", target, input, "input")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{op}: target must be int64 or int32, the index of a class, got {target.dtype};"
            " probabilities of classes are not taken, use torch.nn.functional.cross_entropy for them"
        )
    _check_shape(op, "target", target, "(...)", tuple(input.shape[:-1]))
    if weight is not None:
        _check_weight(op, "weight", weight, input)
        _check_shape(op, "weight", weight, "(V,)", (vocabulary,))
        check_not_negative(op, "weight", weight, "they are weights of the classes")
    if token_weight is not None:
        _check_weight(op, "token_weight", token_weight, input)
        _check_shape(op, "token_weight", token_weight, "(...)", tuple(input.shape[:-1]))
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    check_int(op, "ignore_index", ignore_index)
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"{op}: ignore_index must be a number that int64 has, got one of {ignore_index.bit_length()} bits"
        )
    check_number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    check_number(op, "z_loss", z_loss)
    if not 0 <= z_loss <= MOST:
        raise ValueError(f"{op}: z_loss must be finite and not negative, got {z_loss}")
    if softcap is not None:
        check_number(op, "softcap", softcap)
        if not 0 < softcap <= MOST:
            raise ValueError(f"{op}: softcap must be positive and finite, or None, got {softcap}")
        limits = torch.finfo(arithmetic(input))
        if not limits.tiny <= softcap <= limits.max:
            raise ValueError(
                f"{op}: softcap must be between {limits.tiny:g} and {limits.max:g}, as logits of"
                f" {arithmetic(input)} are, got {softcap}"
            )
    if not isinstance(check, bool):
        raise TypeError(f"{op}: check must be True or False, got {type(check).__name__}")


def check_targets(op: str, target: Tensor, vocabulary: int, ignore_index: int, asked: bool) -> None:
    """That each is a class or ``ignore_index``: looks at values, of a GPU only where that is asked for."""
    if not may_look_at(target):
        if not asked:
            return
        if torch.compiler.is_compiling() or transforms():
            raise RuntimeError(
                f"{op}: check=True reads values, and cannot be compiled or transformed; leave it False"
            )
        if target.device.type == "meta":
            raise RuntimeError(f"{op}: check=True reads values, got target on the meta device")
    refuse_targets(op, target, vocabulary, ignore_index)


def refuse_targets(op: str, target: Tensor, vocabulary: int, ignore_index: int) -> None:
    if target.numel() == 0:
        return
    least, most = target.aminmax()
    if int(least) >= 0 and int(most) < vocabulary:
        return
    target = target.long()  # beside int32 an ignore_index would wrap
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        value = int(target[tuple(place)])
        raise RuntimeError(
            f"{op}: target must be in [0, {vocabulary}) or ignore_index = {ignore_index}, got {value} at"
            f" index {place[0] if len(place) == 1 else tuple(place)}; give a token without one ignore_index"
        )


def _check_weight(op: str, name: str, weight: Tensor, input: Tensor) -> None:
    check_like_or_widened(op, name, weight, input, "input", cure="cast it")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} must not require grad, no gradient is formed for it; pass {name}.detach(), or"
            ' weigh the losses of reduction="none"'
        )


def _check_shape(op: str, name: str, tensor: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        of = ", as input has before its last dimension" if letters == "(...)" else ""
        raise ValueError(f"{op}: {name} must have shape {letters} = {expected}{of}, got {shape(tensor)}")
