"""What TrainingArguments say, whichever version of transformers they are of."""

from __future__ import annotations

from typing import Any


def checkpoints_reentrantly(args: Any) -> bool:
    """Whether activations are checkpointed with ``use_reentrant``, under its new name or its old one."""
    on = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(on) and isinstance(options, dict) and bool(options.get("use_reentrant"))
