"""The Triton kernels of moments as a PyTorch op, with the signature and fake of the native one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define_triton


def fake(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("moments", x, weights)
    columns, dtype = x.shape[1], arithmetic(x)
    count = x.new_empty((), dtype=torch.float64)
    return count, x.new_empty(columns, dtype=dtype), x.new_empty((columns, columns), dtype=dtype)


forward: Callable[..., Any] = define_triton(
    "moments_fwd(Tensor x, Tensor? weights) -> (Tensor, Tensor, Tensor)", "moments.forward", fake
)
