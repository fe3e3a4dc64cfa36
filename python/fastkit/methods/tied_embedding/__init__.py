"""Tied embeddings: one matrix at both ends of a model, kept so, and its loss without the logits in memory."""

from fastkit.methods.tied_embedding.causal_lm import patch_causal_lm, unpatch_causal_lm
from fastkit.methods.tied_embedding.tying import (
    HalfGradientError,
    UntiedError,
    assert_tied,
    retie,
    tie_embeddings,
)

__all__ = [
    "HalfGradientError",
    "UntiedError",
    "assert_tied",
    "patch_causal_lm",
    "retie",
    "tie_embeddings",
    "unpatch_causal_lm",
]
