"""The Triton kernels of moments as a PyTorch op. Triton is imported when it first runs.

It has the signature of the native op in csrc/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastkit_triton", "FRAGMENT")
_library.define(
    "moments_fwd(Tensor x, Tensor? weights) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from fastkit.triton import moments

    return moments.forward(x, weights)


for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _library.impl("moments_fwd", _forward, _device)


@torch.library.register_fake("fastkit_triton::moments_fwd", lib=_library)
def _(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    columns = x.shape[1]
    return (
        x.new_empty((), dtype=torch.float64),
        x.new_empty(columns, dtype=torch.float32),
        x.new_empty((columns, columns), dtype=torch.float32),
    )


forward: Callable[..., Any] = torch.ops.fastkit_triton.moments_fwd.default
