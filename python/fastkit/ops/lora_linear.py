"""A linear layer with a masked low-rank addition (LoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.lora_linear_autograd import lora
from fastkit.ops.lora_linear_checks import check_linear
from fastkit.reference import LinearWithStats

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}


def lora_linear(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (O, D)
    bias: Tensor | None,  # (O,)
    lora_a: Tensor,  # (R, D)
    lora_b: Tensor,  # (O, R)
    scale: float,
    *,
    mask: Tensor | None = None,  # (R, D)
    lora_x: Tensor | None = None,  # (..., D)
    impl: Impl | None = None,
) -> Tensor:  # (..., O)
    """A linear layer with a low-rank addition, whose A may be pruned.

    ::

        y = x W^T + bias + scale (lora_x (mask * A)^T) B^T

    Equivalent to ``fastkit.reference.lora_linear``. The two large products, with W forward and backward, are
    the vendor's; everything else is one pass over x and y forward, and one over gy, x and gx backward.

    Args:
        x: activations, ``(..., D)``, float32, float64, bfloat16 or float16; any strides, zero tokens too.
        weight: ``(O, D)``, in the dtype of x. It may be frozen or trained; of a ``Conv1D``, ``weight.T``.
        bias: ``(O,)`` in the dtype of x, or None.
        lora_a: A, ``(R, D)``, R >= 1, in the dtype of x, or float32 for a half-precision x.
        lora_b: B, ``(O, R)``, likewise.
        scale: a number, as ``alpha / R``.
        mask: ``(R, D)`` bool, True where A is kept. It is applied inside: A is not written to, and gets no
            gradient where it is pruned. Default: all of A.
        lora_x: what the low-rank part sees instead of x, such as x after dropout; shaped like x, with a
            gradient of its own. Default: x.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or raises.
            Default: the kernel where one covers the device and dtype, else the reference; where that is for
            want of a kernel that another installation has, one warning says so.

    Returns:
        y, ``(..., O)``, dense, in the dtype of x.

    Raises:
        ValueError: a shape or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: the low-rank part and its gradients are computed in float32 for half precision, else in x's
    dtype; y is the vendor's product plus it, rounded once more. Sums run over all of D and O, and over the
    tokens of a thread, in that arithmetic: another number of threads may change the last bit of the
    gradients of A, B and bias, and of ``square_sum``. Subnormal numbers are flushed to zero on x86.

    Support: gradients of any order to x, weight, bias, lora_a, lora_b and lora_x (``torch.compile`` keeps the
    first only); ``torch.func``, ``torch.vmap`` and forward mode run the reference;
    ``torch.compile(fullgraph=True)``; autocast casts x, weight, bias and lora_x as it does for ``linear``, A
    and B stay in float32.

    Memory and work: beyond the frozen layer, ``N R (D + O)`` multiply-adds forward and twice as many
    backward; h, ``(N, R)``, and copies of A and B, backward one for each thread. Saved for backward: h, and
    the arguments by reference. Nothing else of the size of x or y is allocated, but for a copy of what has
    strides that no ``(N, D)`` view with neighbouring columns has.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; the mask: Benedek,
    Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", Findings of EACL 2024.

    Example:
        >>> import torch, fastkit.ops
        >>> x, w = torch.ones(1, 2), torch.eye(2)
        >>> fastkit.ops.lora_linear(x, w, None, torch.ones(1, 2), torch.ones(2, 1), 0.5)
        tensor([[2., 2.]])
    """
    return _linear("lora_linear", x, weight, bias, lora_a, lora_b, scale, mask, lora_x, impl, stats=False).y


def lora_linear_with_stats(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (O, D)
    bias: Tensor | None,  # (O,)
    lora_a: Tensor,  # (R, D)
    lora_b: Tensor,  # (O, R)
    scale: float,
    *,
    mask: Tensor | None = None,  # (R, D)
    lora_x: Tensor | None = None,  # (..., D)
    impl: Impl | None = None,
) -> LinearWithStats:  # y (..., O), square_sum (D,)
    """``lora_linear``, and the sum of squares of each column of x, from the same read of x.

    Args:
        x, weight, bias, lora_a, lora_b, scale, mask, lora_x, impl: as of ``lora_linear``.

    Returns:
        ``LinearWithStats(y, square_sum)``: square_sum ``(D,)`` float32, over all tokens of x (not of
        ``lora_x``, whose dropout scales at random); no gradient flows through it. With NaN or inf in a column
        of x its sum is not finite.

    Raises, Numerics, Support, Memory and work: as ``lora_linear``; without ``lora_x`` no further read of x.

    Source: PRILoRA (see ``lora_linear``); that the statistic is a sum of squares is our choice.

    Example:
        >>> import torch, fastkit.ops
        >>> x, a, b = torch.tensor([[3.0, 0], [4, 1]]), torch.ones(1, 2), torch.zeros(2, 1)
        >>> fastkit.ops.lora_linear_with_stats(x, torch.eye(2), None, a, b, 1.0).square_sum
        tensor([25.,  1.])
    """
    op = "lora_linear_with_stats"
    return _linear(op, x, weight, bias, lora_a, lora_b, scale, mask, lora_x, impl, stats=True)


def _linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: Tensor | None,
    lora_x: Tensor | None,
    impl: Impl | None,
    *,
    stats: bool,
) -> LinearWithStats:
    check_tensors(
        op, x=x, weight=weight, bias_=bias, lora_a=lora_a, lora_b=lora_b, mask_=mask, lora_x_=lora_x
    )
    x, weight, bias, lora_x, lora_a, lora_b = _autocast(x, weight, bias, lora_x, lora_a, lora_b)
    check_linear(op, x, weight, bias, lora_a, lora_b, scale, mask, lora_x)
    chosen = choose(op, impl, x, KERNELS)
    if chosen == "reference" or transforms():
        return _of_reference(x, weight, bias, lora_a, lora_b, lora_x, mask, scale)
    return _rows(x, weight, bias, lora_a, lora_b, lora_x, mask, scale, stats, chosen)


def low_rank(
    x: Tensor,  # (..., D)
    lora_a: Tensor,  # (R, D)
    lora_b: Tensor,  # (O, R)
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
    stats: bool = False,
) -> LinearWithStats:
    """The addition alone, for layers whose weight is no plain tensor. Without stats there are no sums."""
    op = "lora_linear"
    check_tensors(op, x=x, lora_a=lora_a, lora_b=lora_b, mask_=mask, lora_x_=lora_x)
    x, _, _, lora_x, lora_a, lora_b = _autocast(x, None, None, lora_x, lora_a, lora_b)
    check_linear(op, x, None, None, lora_a, lora_b, scale, mask, lora_x)
    chosen = choose(op, None, x, KERNELS)
    if chosen == "reference" or transforms():
        frozen = x.new_zeros((lora_b.shape[0], x.shape[-1]))
        return _of_reference(x, frozen, None, lora_a, lora_b, lora_x, mask, scale)
    return _rows(x, None, None, lora_a, lora_b, lora_x, mask, scale, stats, chosen)


def _rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    lora_x: Tensor | None, mask: Tensor | None, scale: float, stats: bool, chosen: Impl,
) -> LinearWithStats:  # fmt: skip
    """The call of a kernel on (tokens, features)."""
    rows = x.reshape(-1, x.shape[-1])
    lora_rows = None if lora_x is None else lora_x.reshape(rows.shape)
    y, square_sum = lora(rows, weight, bias, lora_a, lora_b, lora_rows, mask, float(scale), stats, chosen)
    return LinearWithStats(y.view(*x.shape[:-1], y.shape[-1]), square_sum)


def _of_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, lora_x: Tensor | None,
    mask: Tensor | None, scale: float,
) -> LinearWithStats:  # fmt: skip
    with without_autocast(x):
        return reference.lora_linear_with_stats(
            x, weight, bias, lora_a, lora_b, float(scale), mask=mask, lora_x=lora_x
        )


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, x, weight, bias and lora_x in its dtype, A and B in float32; float64 stays."""
    if not autocasts(x):
        return x, *others
    dtypes = (*[torch.get_autocast_dtype(x.device.type)] * 4, torch.float32, torch.float32)
    return tuple(
        t if t is None or t.dtype not in (torch.float32, *HALF) else t.to(dtype)
        for t, dtype in zip((x, *others), dtypes, strict=True)
    )
