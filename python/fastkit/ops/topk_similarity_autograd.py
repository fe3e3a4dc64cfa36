"""The raw ops of topk_similarity, their values made differentiable, to any order.

The choice is piecewise constant, so a value has the gradient of its pair's score: for a product that of
``q . k_j + b_j``, for a squared distance that of ``|q - k_j|^2``. Backward gathers the chosen keys again and
scatters to their rows, in blocks of queries; it is written in PyTorch's ops, which differentiate it in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import _native, reference
from fastkit._autograd import Function, added, differentiates, without_autocast
from fastkit._dispatch import Impl
from fastkit.ops import topk_similarity_triton
from fastkit.ops._checks import arithmetic
from fastkit.reference import TopK
from fastkit.reference.topk_similarity import unit_rows as reference_unit_rows

_NUMBERS = 2**20
"""Of the chosen keys, and of the gradients to them, about so many numbers exist at a time."""

if _native.REASON is None:
    _fwd = torch.ops.fastkit.topk_similarity_fwd.default
    _both_fwd = torch.ops.fastkit.topk_similarity_both_fwd.default
    _unit_rows = torch.ops.fastkit.unit_rows.default
    torch.library.register_fake("fastkit::topk_similarity_fwd", topk_similarity_triton.fake)

    @torch.library.register_fake("fastkit::topk_similarity_both_fwd")
    def _(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fake = topk_similarity_triton.fake
        return *fake(queries, keys, None, k, False), *fake(keys, queries, None, k, False)

    @torch.library.register_fake("fastkit::unit_rows")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape, dtype=arithmetic(x))


def unit_rows(x: Tensor, chosen: Impl) -> Tensor:  # (n, D)
    """Each row over its norm, in the dtype of the arithmetic."""
    if chosen == "reference":
        return reference_unit_rows(x.to(arithmetic(x)))
    return _UnitRows.apply(x, chosen) if differentiates(x) else _run_unit_rows(x, chosen)


def nearest(queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool, chosen: Impl) -> TopK:
    """The k keys with the greatest products, bias added, or the least squared distances."""
    args = (queries, keys, key_bias, k, l2, chosen)
    if differentiates(queries, keys, key_bias):
        return TopK(*_Nearest.apply(*args))
    return TopK(*_run(*args))


def both_nearest(queries: Tensor, keys: Tensor, k: int, chosen: Impl) -> tuple[TopK, TopK]:
    """The k keys with the greatest products with each query, and the k queries for each key."""
    args = (queries, keys, k, chosen)
    values, indices, key_values, key_indices = (
        _BothNearest.apply(*args) if differentiates(queries, keys) else _run_both(*args)
    )
    return TopK(values, indices), TopK(key_values, key_indices)


def _run(
    queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool, chosen: Impl
) -> tuple[Tensor, Tensor]:
    if chosen == "cpu":
        return _fwd(queries, keys, key_bias, k, l2)
    if chosen == "triton":
        return topk_similarity_triton.forward(queries, keys, key_bias, k, l2)
    return reference.topk_similarity(queries, keys, k, metric="l2" if l2 else "dot", key_bias=key_bias)


def _run_both(queries: Tensor, keys: Tensor, k: int, chosen: Impl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if chosen == "cpu":
        return _both_fwd(queries, keys, k)
    return *_run(queries, keys, None, k, False, chosen), *_run(keys, queries, None, k, False, chosen)


def _run_unit_rows(x: Tensor, chosen: Impl) -> Tensor:
    if chosen == "cpu":
        return _unit_rows(x)
    regular, largest, scaled = _scaled_rows(x)
    squares = scaled.square()
    while squares.shape[1] > 1:  # in an order that the number of columns alone decides
        half = (squares.shape[1] + 1) // 2
        rest = squares[:, half:]
        squares = squares[:, :half].clone()
        squares[:, : rest.shape[1]] += rest
    return torch.where(regular, scaled / squares.sqrt(), 0.0 * largest)


def _scaled_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a row has a direction; its largest element; the row over it, and ones where it has none."""
    x = x.to(arithmetic(x))
    largest = x.detach().abs().amax(1, keepdim=True)
    regular = (largest > 0) & largest.isfinite()
    return regular, largest, torch.where(regular, x, 1.0) / torch.where(regular, largest, 1.0)


class _UnitRows(Function):
    """The gradient is ``(g - u (u . g)) / |x|``, and 0 of rows of zeros, inf or NaN."""

    @staticmethod
    def forward(x: Tensor, chosen: Impl) -> Tensor:
        return _run_unit_rows(x, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        (g,) = grad_outputs
        (x,) = ctx.saved_tensors
        with without_autocast(x):
            regular, largest, scaled = _scaled_rows(x)
            norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
            unit = scaled / norm
            gx = (g - unit * (unit * g).sum(1, keepdim=True)) / norm / torch.where(regular, largest, 1.0)
            return torch.where(regular, gx, 0.0).to(x.dtype), None


class _Nearest(Function):
    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool, chosen: Impl
    ) -> tuple[Tensor, Tensor]:
        return _run(queries, keys, key_bias, k, l2, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        queries, keys, key_bias, _, ctx.l2, _ = inputs
        _, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.of_bias = None if key_bias is None else key_bias.dtype
        ctx.save_for_backward(queries, keys, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g = grad_outputs[0]
        if g is None:
            return (None,) * 6
        queries, keys, indices = ctx.saved_tensors
        with without_autocast(g):
            gradients = _gradients(g, queries, keys, indices, ctx.l2, ctx.needs_input_grad, ctx.of_bias)
        return *gradients, None, None, None


class _BothNearest(Function):
    @staticmethod
    def forward(queries: Tensor, keys: Tensor, k: int, chosen: Impl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _run_both(queries, keys, k, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        queries, keys, _, _ = inputs
        _, indices, _, key_indices = output
        ctx.mark_non_differentiable(indices, key_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, keys, indices, key_indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g, _, key_g, _ = grad_outputs
        queries, keys, indices, key_indices = ctx.saved_tensors
        of_queries, of_keys = ctx.needs_input_grad[:2]
        gqueries = gkeys = None
        if g is not None:
            with without_autocast(g):
                gqueries, gkeys, _ = _gradients(
                    g, queries, keys, indices, False, (of_queries, of_keys, False), None
                )
        if key_g is not None:
            with without_autocast(key_g):
                to_keys, to_queries, _ = _gradients(
                    key_g, keys, queries, key_indices, False, (of_keys, of_queries, False), None
                )
                gqueries, gkeys = added(gqueries, to_queries), added(gkeys, to_keys)
        return gqueries, gkeys, None, None


def _gradients(
    g: Tensor,  # (n, k)
    queries: Tensor,  # (n, D)
    keys: Tensor,  # (m, D)
    indices: Tensor,  # (n, k)
    l2: bool,
    needs: tuple[bool, ...],
    of_bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    none = indices < 0
    g, indices = g.masked_fill(none, 0.0), indices.clamp_min(0)
    gbias = None
    if needs[2] and of_bias is not None:
        gbias = g.new_zeros(len(keys))
        _add_rows_(gbias, indices.flatten(), g.flatten())
        gbias = gbias.to(of_bias)
    if not needs[0] and not needs[1]:
        return None, None, gbias

    of_queries = []
    gkeys = g.new_zeros(keys.shape) if needs[1] else None
    rows = max(1, _NUMBERS // (indices.shape[1] * keys.shape[1]))
    blocks = (t.split(rows) for t in (queries, indices, g.unsqueeze(2), none.unsqueeze(2)))
    for block, at, weight, absent in zip(*blocks, strict=True):
        q = block.to(arithmetic(queries)).unsqueeze(1).masked_fill(absent, 0.0)  # no NaN reaches key 0
        chosen = keys[at].to(arithmetic(queries)).masked_fill(absent, 0.0)
        if l2:
            to_q = 2 * weight * (q - chosen)
            to_k = -to_q
        else:
            to_q, to_k = weight * chosen, weight * q
        if needs[0]:
            of_queries.append(to_q.sum(1))
        if gkeys is not None:
            _add_rows_(gkeys, at.flatten(), to_k.flatten(0, 1))
    gqueries = torch.cat(of_queries).to(queries.dtype) if needs[0] else None
    return gqueries, None if gkeys is None else gkeys.to(keys.dtype), gbias


def _add_rows_(total: Tensor, at: Tensor, rows: Tensor) -> None:
    """In the order of rows on a CPU, in a fixed order on a GPU: the other op has float atomics there."""
    if total.device.type == "cuda":
        total.index_put_((at,), rows, accumulate=True)
    else:
        total.index_add_(0, at, rows)
