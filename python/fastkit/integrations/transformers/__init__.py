"""What fastkit adds to transformers: for a method that needs one, a callback of its Trainer or a Trainer."""

from fastkit.integrations.transformers.mtadam import MTAdamTrainer
from fastkit.integrations.transformers.multiverse import EliminationCallback
from fastkit.integrations.transformers.prilora import PRILoRACallback

__all__ = [
    "EliminationCallback",
    "MTAdamTrainer",
    "PRILoRACallback",
]
