"""orthogonality_penalty: the products of all pairs of heads, of which a block of rows at a time is in memory.

The kernels sum rho of each product and put its slope rho' in its place, of which the gradient is one more
product, ``dW = S W``. Here is what comes before and after: which heads, norms, centers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit import _native
from fastkit._autograd import without_autocast
from fastkit.ops._checks import arithmetic
from fastkit.ops._define import define
from fastkit.ops.multihead_loss_products import places_of, triton_kernels
from fastkit.reference.multihead_loss_penalty import LEAST_NORM

_GRAM_BYTES = 64 << 20  # of the products of some heads with all, on a GPU

if _native.REASON is None:

    @torch.library.register_fake("fastkit::multihead_loss_penalty_")
    def _(*_: Any) -> None:
        pass


def forward(
    weight: Tensor, kind: str, huber_width: float, active: Tensor | None, center_classes: bool,
    gradient: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The penalty, and its gradient in the arithmetic's dtype; empty unless asked for."""
    with torch.no_grad(), without_autocast(weight):
        # On a GPU how many heads are active is not asked: it would wait. They are 0, and so is their slope.
        place = places_of(active) if impl == "cpu" else None
        w = (weight if place is None else weight[place]).to(arithmetic(weight))
        if impl != "cpu" and active is not None:
            w = w.masked_fill(~active.view(-1, 1, 1), 0.0)
        rows = w - w.mean(1, keepdim=True) if center_classes else w
        norm = None
        if kind.startswith("cos_"):
            norm = torch.linalg.vector_norm(rows, dim=2, keepdim=True).clamp_min_(LEAST_NORM)
            rows = rows / norm
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        sums = rows.new_empty(rows.shape[1], rows.shape[0])
        of_rows = rows.new_empty(rows.shape) if gradient else None
        kind = kind.removeprefix("cos_")
        if impl == "triton":
            triton_kernels().penalty(rows, kind, huber_width, sums, of_rows, _GRAM_BYTES)
        else:
            torch.ops.fastkit.multihead_loss_penalty_.default(rows, kind, huber_width, sums, of_rows)
        penalty = sums.sum()
        if of_rows is None:
            return penalty, rows.new_empty(0)
        if norm is not None:  # of u = w / |w|; where the norm is held, u moves as w does
            held = norm <= LEAST_NORM
            along = (of_rows * rows).sum(2, keepdim=True).masked_fill_(held, 0.0)
            of_rows = of_rows.addcmul_(along, rows, value=-1).div_(norm)
        if center_classes:
            of_rows = of_rows - of_rows.mean(1, keepdim=True)
        if place is None:
            return penalty, of_rows
        return penalty, of_rows.new_zeros(weight.shape).index_copy_(0, place, of_rows)


def _fake_forward(
    weight: Tensor, kind: str, huber_width: float, active: Tensor | None, center_classes: bool,
    gradient: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = arithmetic(weight)
    return weight.new_empty((), dtype=dtype), weight.new_empty(weight.shape if gradient else 0, dtype=dtype)


run_forward: Callable[..., Any] = define(
    "fastkit_products",
    "orthogonality_penalty_fwd(Tensor weight, str kind, float huber_width, Tensor? active,"
    " bool center_classes, bool gradient, str impl) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
)
