"""PRILoRA: low-rank adapters whose rank grows from block to block, and whose A is pruned in training."""

from fastkit.methods.prilora.attach import AttachedPRILoRA, attach_prilora
from fastkit.methods.prilora.config import PRILoRAConfig
from fastkit.methods.prilora.files import load_prilora
from fastkit.methods.prilora.model import PRILoRA, apply_prilora

__all__ = [
    "AttachedPRILoRA",
    "PRILoRA",
    "PRILoRAConfig",
    "apply_prilora",
    "attach_prilora",
    "load_prilora",
]
