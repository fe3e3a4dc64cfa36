"""Focus: attention in chunks behind filters that adapt to what came before, as models of transformers."""

from fastkit.methods.focus.cache import FocusCache
from fastkit.methods.focus.config import FocusConfig
from fastkit.methods.focus.model import FocusForCausalLM, FocusForSequenceClassification, FocusModel

__all__ = [
    "FocusCache",
    "FocusConfig",
    "FocusForCausalLM",
    "FocusForSequenceClassification",
    "FocusModel",
]
