"""The Triton kernels of topk_similarity as a PyTorch op. Triton is imported when it first runs.

It has the signature of the native op in csrc/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST = 128
"""Of how many keys the kernels can keep a list for each query."""

_library = torch.library.Library("fastkit_triton", "FRAGMENT")
_library.define(
    "topk_similarity_fwd(Tensor queries, Tensor keys, Tensor? key_bias, int k, bool l2) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool
) -> tuple[Tensor, Tensor]:
    from fastkit.triton import topk_similarity

    return topk_similarity.forward(queries, keys, key_bias, k, l2)


for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _library.impl("topk_similarity_fwd", _forward, _device)


@torch.library.register_fake("fastkit_triton::topk_similarity_fwd", lib=_library)
def _(queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


forward: Callable[..., Any] = torch.ops.fastkit_triton.topk_similarity_fwd.default


def absent(k: int) -> str | None:
    """What of a call the kernels do not have, or None where they cover it."""
    return f"lists of more than {MOST}" if k > MOST else None
