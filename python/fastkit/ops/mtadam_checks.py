"""What mtadam's ops refuse, in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._checks import FLOATING, MOST, arithmetic, check_not_expanded, check_tensors, shape

MOST_TERMS = 1024  # whose pointers fit the parameters of a CUDA kernel


def check_lists(op: str, **lists: object) -> None:
    for name, value in lists.items():
        if isinstance(value, Tensor) or not isinstance(value, Iterable):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(value).__name__}")


def check_gradients(op: str, grads: list[Tensor | None], n: int) -> Tensor:
    """Returns the first that is there."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or not grads or len(grads) % n:
        raise ValueError(f"{op}: grads must be n for each term, n >= 1, got {len(grads)} of n = {n!r}")
    _check_terms(op, len(grads) // n)
    like: Tensor | None = None
    shapes: list[torch.Size | None] = [None] * n
    for j, grad in enumerate(grads):
        if grad is None:
            continue
        name = f"grads[{j}]"
        check_tensors(op, **{name: grad})
        if like is None:
            check_dtype(op, name, grad)
        else:
            _check_like(op, name, grad, like, "the others", like.dtype)
        like = grad if like is None else like
        known = shapes[j % n]
        if known is not None and grad.shape != known:
            raise ValueError(
                f"{op}: {name} must have the shape of the tensor's other gradients, {tuple(known)},"
                f" got {shape(grad)}"
            )
        shapes[j % n] = grad.shape
    if like is None:
        raise ValueError(f"{op}: grads must have a tensor among them, got None alone; leave the step out")
    return like


def check_state(
    op: str,
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_norms: Tensor,
    steps: Tensor,
) -> None:
    """The tensors of a step, against the first parameter and each its own."""
    n = len(params)
    check_tensors(op, **{"params[0]": params[0]}, grad_norms=grad_norms, steps=steps)
    like = params[0]
    check_dtype(op, "params[0]", like)
    if like.device.type == "meta":
        raise RuntimeError(f"{op}: params must have values, got tensors on the meta device")
    state = arithmetic(like)
    if grad_norms.dim() != 2 or grad_norms.shape[0] != n or not grad_norms.is_contiguous():
        raise ValueError(
            f"{op}: grad_norms must be dense, of shape (n, L) with n = {n}, got {shape(grad_norms)}"
        )
    if steps.shape != (n,) or not steps.is_contiguous():
        raise ValueError(f"{op}: steps must be dense, of shape (n,) = ({n},), got {shape(steps)}")
    for name, tensor in (("grad_norms", grad_norms), ("steps", steps)):
        _check_like(op, name, tensor, like, "the parameters", state)
    terms = grad_norms.shape[1]
    _check_terms(op, terms)
    for name, values, count, of in (
        ("grads", grads, terms * n, "L n"),
        ("exp_avgs", exp_avgs, n, "n"),
        ("exp_avg_sqs", exp_avg_sqs, terms * n, "L n"),
        ("max_exp_avg_sqs", max_exp_avg_sqs, n if max_exp_avg_sqs else 0, "n"),
    ):
        if len(values) != count:
            raise ValueError(
                f"{op}: {name} must be {of} = {count} tensors (n = {n}, L = {terms}), got {len(values)}"
            )
    if _fit(params, params, like, like.dtype) and (
        _fit(grads, params, like, like.dtype, optional=True)
        and all(_fit(moments, params, like, state) for moments in (exp_avgs, exp_avg_sqs, max_exp_avg_sqs))
        and all(moment.is_contiguous() for moment in (*exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs))
        and all(param.is_contiguous() for param in params)
        and (torch.compiler.is_compiling() or len({p.data_ptr() for p in params if p.numel()}) == n)
    ):
        return  # the usual, at a glance: a model may have thousands
    _check_params(op, params, like)
    for name, values, dtype in (
        ("grads", grads, like.dtype),
        ("exp_avgs", exp_avgs, state),
        ("exp_avg_sqs", exp_avg_sqs, state),
        ("max_exp_avg_sqs", max_exp_avg_sqs, state),
    ):
        for j, tensor in enumerate(values):
            if tensor is None and name == "grads":
                continue
            _check_of_parameter(op, f"{name}[{j}]", tensor, params[j % n], like, dtype)
    for j, moment in enumerate((*exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs)):
        own = exp_avgs[j % n]
        if not _is_dense(moment) or moment.stride() != own.stride():
            raise ValueError(
                f"{op}: the moments of params[{j % n}] must be dense and have strides in common, got"
                f" {moment.stride()} and {own.stride()}; make them by torch.zeros_like"
            )


def _fit(
    tensors: Sequence[Tensor | None],
    params: list[Tensor],
    like: Tensor,
    dtype: torch.dtype,
    *,
    optional: bool = False,
) -> bool:
    """Whether they are dense tensors of a dtype, shaped like their parameters."""
    return all(
        (optional and tensor is None)
        or (
            isinstance(tensor, Tensor)
            and type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.dtype is dtype
            and tensor.shape == param.shape
            and tensor.device == like.device
        )
        for tensor, param in zip(tensors, itertools.cycle(params), strict=False)
    )


def _check_params(op: str, params: list[Tensor], like: Tensor) -> None:
    addresses: dict[int, int] = {}
    for i, param in enumerate(params):
        _check_of_parameter(op, f"params[{i}]", param, param, like, like.dtype)
        check_not_expanded(op, f"params[{i}]", param)
        if param.numel() and not torch.compiler.is_compiling():
            j = addresses.setdefault(param.data_ptr(), i)
            if j != i:
                raise ValueError(
                    f"{op}: params must not share memory, got params[{i}] at the address of params[{j}];"
                    " list each once"
                )


def check_options(
    op: str,
    lr: object,
    betas: object,
    eps: object,
    weight_decay: object,
    decoupled: object,
    ranks: object,
    terms: int,
    anchor: object,
    alive_eps: object,
    max_scale: object,
    nonfinite: object,
) -> None:
    if isinstance(lr, Tensor):
        check_tensors(op, lr=lr)
        if lr.device.type == "meta":
            raise RuntimeError(f"{op}: lr must have a value, got a tensor on the meta device")
        if lr.numel() != 1:
            raise ValueError(f"{op}: lr must be a number or a tensor of one, got shape {shape(lr)}")
        if not lr.is_floating_point():
            raise TypeError(f"{op}: lr must be floating point and real, got {lr.dtype}")
    else:
        check_number(op, "lr", lr)
    check_betas(op, betas)
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("alive_eps", alive_eps)):
        check_number(op, name, value)
    if not isinstance(decoupled, bool):
        raise TypeError(f"{op}: decoupled must be True or False, got {decoupled!r}")
    if ranks is not None:
        check_ranks(op, ranks, terms)
    if isinstance(anchor, bool) or not isinstance(anchor, int) or not 0 <= anchor < terms:
        raise ValueError(f"{op}: anchor must be the index of one of the {terms} terms, got {anchor!r}")
    check_max_scale(op, max_scale)
    if nonfinite not in ("skip", "skip_term", "propagate"):
        raise ValueError(f"{op}: nonfinite must be skip, skip_term or propagate, got {nonfinite!r}")


def check_numbers(
    op: str,
    like: Tensor,
    square_sums: Tensor | None,
    sums_shape: tuple[int, int],
    grad_scales: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    for name, tensor, dtype, want in (
        ("square_sums", square_sums, torch.float64, sums_shape),
        ("grad_scales", grad_scales, torch.float32, sums_shape[1:]),
        ("found_inf", found_inf, torch.float32, None),
    ):
        if tensor is None:
            continue
        check_tensors(op, **{name: tensor})
        _check_like(op, name, tensor, like, "the parameters", dtype)
        if (tensor.numel() != 1 if want is None else tensor.shape != want) or not tensor.is_contiguous():
            text = "of one element" if want is None else f"dense, of shape {want}"
            raise ValueError(f"{op}: {name} must be {text}, got {shape(tensor)}")


def check_number(op: str, name: str, value: object) -> None:
    """Finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= MOST:
        raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")


def check_betas(op: str, betas: object) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 3:
        raise ValueError(
            f"{op}: betas must be three numbers: of the two moments, and of the norms, got {betas!r}"
        )
    for i, beta in enumerate(betas):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
            raise ValueError(f"{op}: betas[{i}] must be in [0, 1), got {beta!r}")


def check_ranks(op: str, ranks: object, terms: int) -> None:
    if isinstance(ranks, Tensor) or not isinstance(ranks, Sequence):
        raise TypeError(
            f"{op}: ranks must be a list of numbers, got {type(ranks).__name__}; pass ranks.tolist()"
        )
    if len(ranks) != terms:
        raise ValueError(f"{op}: ranks must be one for each of the {terms} terms, got {len(ranks)}")
    for i, rank in enumerate(ranks):
        check_number(op, f"ranks[{i}]", rank)


def check_max_scale(op: str, max_scale: object) -> None:
    if max_scale is None:
        return
    check_number(op, "max_scale", max_scale)
    if max_scale == 0:
        raise ValueError(f"{op}: max_scale must be positive or None, got 0")


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be floating point and real, got {tensor.dtype}")


def _check_terms(op: str, terms: int) -> None:
    if not 1 <= terms <= MOST_TERMS:
        raise ValueError(f"{op}: there must be 1 to {MOST_TERMS} terms, got {terms}")


def _check_like(op: str, name: str, tensor: Tensor, like: Tensor, others: str, dtype: torch.dtype) -> None:
    if tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of {others}, {like.device}, got {tensor.device}; tensors of"
            " each device are for a call of their own"
        )
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}; cast it")


def _check_of_parameter(
    op: str, name: str, tensor: Any, param: Tensor, like: Tensor, dtype: torch.dtype
) -> None:
    check_tensors(op, **{name: tensor})
    _check_like(op, name, tensor, like, "the parameters", dtype)
    if tensor.shape != param.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of its parameter, {shape(param)}, got {shape(tensor)}"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Without gaps, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
