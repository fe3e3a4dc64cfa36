"""Drop-in torch.nn modules over fastkit.ops."""

from fastkit.nn.adaptive_iir import AdaptiveIIR
from fastkit.nn.prilora_linear import PRILoRALinear

__all__ = [
    "AdaptiveIIR",
    "PRILoRALinear",
]
