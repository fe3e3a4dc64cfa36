"""What MTAdam is given: options, the names of its terms, their losses and gradients."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._checks import FLOATING
from fastkit.ops.mtadam_checks import check_betas, check_max_scale, check_number, check_ranks
from fastkit.optim.mtadam_processes import any_sharded, as_sharded, layout_of

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


def names_of(terms: int | Sequence[str]) -> list[str]:
    """Of a count, or of names."""
    if isinstance(terms, int) and not isinstance(terms, bool) and terms >= 1:
        return [str(i) for i in range(terms)]
    if isinstance(terms, str) or not isinstance(terms, Sequence):
        raise ValueError(f"MTAdam: terms must be how many there are or a list of their names, got {terms!r}")
    names = list(terms)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"MTAdam: terms must be one or more different names, got {names!r}")
    return names


def named(op: str, given: Any, terms: Sequence[str] | None) -> dict[str, Any]:
    """What is given for each term, a list or a dict, by the term's name and in the order of the terms."""
    if isinstance(given, Tensor):
        raise TypeError(
            f"{op}: losses must be a list of scalars, or a dict of them, got a tensor; pass [loss] or"
            " list(losses)"
        )
    if not isinstance(given, (Mapping, Sequence)) or isinstance(given, str):
        raise TypeError(
            f"{op}: losses must be a list of scalars, or a dict of them, got {type(given).__name__}"
        )
    if isinstance(given, Mapping):
        if terms is None:
            terms = names_of(list(given))
        if set(given) != set(terms):
            raise ValueError(
                f"{op}: the terms must be {', '.join(terms)}, got {', '.join(map(str, given)) or 'none'};"
                " pass None for one that has no gradient in this step, and add_term or drop_term to change"
                " them"
            )
        return {term: given[term] for term in terms}
    if terms is None:
        terms = names_of(len(given) or [])
    if len(given) != len(terms):
        raise ValueError(
            f"{op}: there must be one for each of the {len(terms)} terms, {', '.join(terms)}, got"
            f" {len(given)}; pass None for one that has no gradient in this step, and add_term or drop_term"
            " to change them"
        )
    return dict(zip(terms, given, strict=True))


def check_group(group: dict[str, Any], mode: str) -> None:
    op = "MTAdam"
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{op}: lr must be a number or a tensor of one, got shape {tuple(lr.shape)}")
        if lr.device.type == "cpu":
            check_number(op, "lr", float(lr))
    else:
        check_number(op, "lr", lr)
    check_betas(op, group["betas"])
    for name in ("eps", "weight_decay", "alive_eps"):
        check_number(op, name, group[name])
    check_max_scale(op, group["max_scale"])
    anchor, terms = group["anchor"], group["terms"]
    if (
        isinstance(anchor, bool)
        or not isinstance(anchor, (int, str))
        or (isinstance(anchor, int) and anchor < 0)
    ):
        raise ValueError(f"{op}: anchor must be the index or the name of a term, got {anchor!r}")
    if terms is not None:
        if group["ranks"] is not None:
            check_ranks(op, group["ranks"], len(terms))
        if anchor not in terms if isinstance(anchor, str) else anchor >= len(terms):
            raise ValueError(f"{op}: anchor must be one of the terms {', '.join(terms)}, got {anchor!r}")
        if mode == "streaming" and anchor not in (0, terms[0]):
            raise ValueError(
                f"{op}: streaming mode takes the first term as the anchor, got {anchor!r}; list that first"
            )
    for i, param in enumerate(group["params"]):
        _check_dense(op, f"parameter {i} of the group", param)
        sharded = as_sharded(param)
        if sharded is not None and any(placement.is_partial() for placement in sharded.placements):
            raise TypeError(
                f"{op}: parameter {i} of the group must be sharded or replicated, got the placements"
                f" {sharded.placements}; redistribute it"
            )
        if param.dtype not in FLOATING:
            raise TypeError(
                f"{op}: parameter {i} of the group must be floating point and real, got {param.dtype}"
            )


def check_loss(op: str, term: str, loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: the loss of term {term!r} must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"{op}: the loss of term {term!r} must be a scalar, got shape {tuple(loss.shape)}; take its mean"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{op}: the loss of term {term!r} has no graph; compute it from the parameters with gradients"
            " enabled, or pass None for a term that has no gradient in this step"
        )


_FACTS = operator.attrgetter("shape", "dtype", "device", "layout")


def check_gradients(
    op: str, of_terms: Mapping[str, Sequence[Tensor | None]], params: Sequence[Tensor]
) -> None:
    """Those of some terms: dense, and like their parameters."""
    facts = None if any_sharded(params) else list(map(_FACTS, params))
    for term, grads in of_terms.items():
        if len(grads) != len(params):
            raise ValueError(
                f"{op}: grads of term {term!r} must be one for each of the {len(params)} parameters, got"
                f" {len(grads)}"
            )
        if facts is not None and _fit(grads, facts):
            continue
        for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if grad is not None:
                _check_gradient(op, f"the gradient of parameter {i} under term {term!r}", grad, param)


def _fit(grads: Sequence[Tensor | None], facts: Sequence[Any]) -> bool:
    """At a glance: there may be thousands."""
    kinds = set(map(type, grads))
    if NoneType in kinds:
        facts = [fact for fact, grad in zip(facts, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    return kinds <= {Tensor, NoneType} and list(map(_FACTS, grads)) == facts


def _check_gradient(op: str, name: str, grad: Tensor, param: Tensor) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(grad).__name__}")
    _check_dense(op, name, grad)
    if grad.shape != param.shape:
        raise ValueError(f"{op}: {name} must have its shape, {tuple(param.shape)}, got {tuple(grad.shape)}")
    if layout_of(grad) != layout_of(param):
        raise TypeError(
            f"{op}: {name} must be laid out over processes as it is, {_layout(param)}, got {_layout(grad)};"
            " redistribute it"
        )
    if grad.dtype != param.dtype:
        raise TypeError(f"{op}: {name} must have its dtype, {param.dtype}, got {grad.dtype}; cast it")
    if grad.device != param.device:
        raise RuntimeError(f"{op}: {name} must be on its device, {param.device}, got {grad.device}; move it")


def _check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be dense, got {tensor.layout}; of torch.nn.Embedding, leave sparse=True out"
        )


def _layout(tensor: Tensor) -> str:
    sharded = as_sharded(tensor)
    return "a plain tensor" if sharded is None else f"a DTensor with the placements {sharded.placements}"
