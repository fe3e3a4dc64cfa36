"""The Triton kernels of topk_similarity as a PyTorch op, with the signature and fake of the native one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define_triton

MOST = 128
"""Of how many keys the kernels can keep a list for each query."""


def fake(queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool) -> tuple[Tensor, Tensor]:
    check_one_device("topk_similarity", queries, keys, key_bias)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=arithmetic(queries)), queries.new_empty(shape, dtype=torch.int64)


forward: Callable[..., Any] = define_triton(
    "topk_similarity_fwd(Tensor queries, Tensor keys, Tensor? key_bias, int k, bool l2) -> (Tensor, Tensor)",
    "topk_similarity.forward",
    fake,
)


def absent(k: int) -> str | None:
    """What of a call the kernels do not have, or None where they cover it."""
    return f"lists of more than {MOST}" if k > MOST else None
