"""PRILoRA: low-rank adapters whose rank grows from block to block, and whose A is pruned in training."""

from fastkit.methods.prilora.attach import AttachedPRILoRA as AttachedPRILoRA
from fastkit.methods.prilora.attach import attach_prilora as attach_prilora
from fastkit.methods.prilora.config import PRILoRAConfig as PRILoRAConfig
from fastkit.methods.prilora.files import load_prilora as load_prilora
from fastkit.methods.prilora.model import PRILoRA as PRILoRA
from fastkit.methods.prilora.model import apply_prilora as apply_prilora
