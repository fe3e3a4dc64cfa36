"""Layers that PRILoRALinear takes the place of: their sizes, and whether they are more than a product."""

from __future__ import annotations

import torch
from torch import nn

from fastkit.ops._checks import FLOATING


def features(base: nn.Module) -> tuple[int, int]:
    """D and O of a layer that may be adapted; ValueError for another."""
    if is_conv1d(base):
        return base.nx, base.nf  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise ValueError(
            "PRILoRALinear: base_layer must not be the out_proj of nn.MultiheadAttention, which reads its"
            " weight past the layer; adapt other layers"
        )
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(
            "PRILoRALinear: base_layer must be a linear layer with in_features and out_features, or a"
            f" transformers Conv1D, got {type(base).__name__}"
        )
    return sizes  # pyright: ignore[reportReturnType]


def is_conv1d(base: nn.Module) -> bool:
    """By name: transformers is not imported for it."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nx") and hasattr(base, "nf")


def is_product(base: nn.Module) -> bool:
    """Whether the layer is one of those that are a product with the weight that is its parameter."""
    weight = base._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATING:
        return False
    return type(base) is nn.Linear or is_conv1d(base)


def device_of(base: nn.Module) -> torch.device | None:
    """Where the layer is; a layer that is loaded when it is called leaves its weight on the meta device."""
    devices = [t.device for t in (*base.parameters(), *base.buffers())]
    return next((device for device in devices if device.type != "meta"), devices[0] if devices else None)
