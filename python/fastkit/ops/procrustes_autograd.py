"""The orthogonal factor made differentiable, to any order.

With W the factor of M and ``H = W^T M``, symmetric, the tangent of W in a direction G is

    B(G) = W X + (1 - W W^T) G H^-1,    where H X + X H = W^T G - G^T W

(X is skew; the second term is zero for a square M). B is its own transpose, so it is the gradient as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit._autograd import Function, differentiates, without_autocast
from fastkit.ops._define import define
from fastkit.ops.procrustes_iterations import factor, ieee_products
from fastkit.reference.procrustes import power_of_two


def polar_factor(m: Tensor, op: str, tables: tuple[Tensor, ...] = ()) -> Tensor:  # (B, P, Q), P >= Q
    """The factor of each matrix, in float32 or float64; ``tables`` as of ``factor``, without a gradient."""
    return _Polar.apply(m, op, *tables)[0] if differentiates(m) else _polar(m, op, *tables)[0]


def _tangent_of(
    g: Tensor, m: Tensor, w: Tensor, singular: Tensor, op: str
) -> Tensor:  # (B, P, Q), all but the mask
    with without_autocast(g), ieee_products(g):
        if bool(singular.any()):
            refuse_singular(op, singular & (g != 0).flatten(1).any(1))
        size = power_of_two(m)  # of m of any scale nothing overflows
        m = m / size
        h = w.mT @ m
        values, vectors = torch.linalg.eigh((h + h.mT) / 2)
        # The least singular value is larger than what is_singular calls singular, and that is known better.
        norms = torch.linalg.vector_norm(m, dim=(-2, -1)).unsqueeze(-1)
        values = values.maximum(torch.finfo(m.dtype).eps * norms)
        values = values.masked_fill(singular.unsqueeze(-1), torch.inf)
        wv, gv = w @ vectors, g @ vectors
        r = wv.mT @ gv
        result = wv @ ((r - r.mT) / (values.unsqueeze(-1) + values.unsqueeze(-2)))
        if m.shape[-2] != m.shape[-1]:
            result = result + (gv - wv @ r) / values.unsqueeze(-2)
        return (result @ vectors.mT) / size


def refuse_singular(op: str, singular: Tensor) -> None:
    count = int(singular.sum())
    if count:
        raise RuntimeError(
            f"{op}: the gradient needs matrices that are not singular, got {count} of {singular.numel()} that"
            " are; detach them, or add to them a multiple of an orthogonal matrix"
        )


def _fake_polar(m: Tensor, op: str, *tables: Tensor | None) -> tuple[Tensor, Tensor]:
    return m.new_empty(m.shape), m.new_empty(m.shape[0], dtype=torch.bool)


def _fake_tangent(g: Tensor, m: Tensor, w: Tensor, singular: Tensor, op: str) -> Tensor:
    return m.new_empty(m.shape)


_polar = define(
    "fastkit_products",
    "polar(Tensor m, str op, Tensor? source=None, Tensor? target=None) -> (Tensor, Tensor)",
    factor,
    _fake_polar,
)
_polar_tangent = define(
    "fastkit_products",
    "polar_tangent(Tensor g, Tensor m, Tensor w, Tensor singular, str op) -> Tensor",
    _tangent_of,
    _fake_tangent,
)


class _Polar(Function):
    @staticmethod
    def forward(m: Tensor, op: str, *tables: Tensor) -> tuple[Tensor, Tensor]:
        return _polar(m, op, *tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        m, ctx.op, *tables = inputs
        ctx.tables = len(tables)
        w, singular = output
        ctx.mark_non_differentiable(singular)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m, w, singular)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g = grad_outputs[0]
        m, w, singular = ctx.saved_tensors
        return None if g is None else _tangent(g, m, w, singular, ctx.op), None, *[None] * ctx.tables


def _tangent(g: Tensor, m: Tensor, w: Tensor, singular: Tensor, op: str) -> Tensor:
    args = (g, m, w, singular, op)
    return _Tangent.apply(*args) if differentiates(g, m, w) else _polar_tangent(*args)


class _Tangent(Function):
    """B(G) as a function of G and M, with W that of M.

    For a cotangent V let ``B(V) = W 2 Q + Y`` and ``B(G) = W X + Z``, with Y and Z orthogonal to the columns
    of W. Differentiating the equations of X, W and H in <V, B(G)> gives the gradients, of G

        B(V)

    and of M

        W T + B(M T - V X - 2 G Q - (V H^-1 G^T + G H^-1 V^T) W),    T = Q X + X Q - (Z^T Y + Y^T Z) / 2

    where Y, Z and the terms with H^-1 are those of a rectangular M.
    """

    @staticmethod
    def forward(g: Tensor, m: Tensor, w: Tensor, singular: Tensor, op: str) -> Tensor:
        return _polar_tangent(g, m, w, singular, op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, m, w, singular, ctx.op = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, m, w, singular, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (v,) = grad_outputs
        if v is None:
            return (None,) * 5
        g, m, w, singular, bg = ctx.saved_tensors
        with without_autocast(v):
            bv = _tangent(v, m, w, singular, ctx.op)
            if not ctx.needs_input_grad[1]:
                return bv, None, None, None, None
            x, q = w.mT @ bg, w.mT @ bv / 2
            t = q @ x + x @ q
            c = -(v @ x) - 2 * (g @ q)
            if m.shape[-2] != m.shape[-1]:
                y, z = bv - 2 * (w @ q), bg - w @ x
                t = t - (z.mT @ y + y.mT @ z) / 2
                inverse = torch.linalg.inv(w.mT @ m)
                c = c - v @ (inverse @ (g.mT @ w)) - g @ (inverse @ (v.mT @ w))
            return bv, w @ t + _tangent(c + m @ t, m, w, singular, ctx.op), None, None, None
