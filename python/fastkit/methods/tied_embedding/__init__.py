"""Tied embeddings: one matrix at both ends of a model, kept so, and its loss without the logits in memory."""

from fastkit.methods.tied_embedding.causal_lm import patch_causal_lm, unpatch_causal_lm
from fastkit.methods.tied_embedding.language_model import LSTMState, TiedLanguageModel, bptt_batches
from fastkit.methods.tied_embedding.projection import Projection, projection_penalty
from fastkit.methods.tied_embedding.three_way import tie_three_way
from fastkit.methods.tied_embedding.tying import (
    HalfGradientError,
    UntiedError,
    assert_tied,
    retie,
    tie_embeddings,
)
from fastkit.methods.tied_embedding.variational import VariationalDropout

__all__ = [
    "HalfGradientError",
    "LSTMState",
    "Projection",
    "TiedLanguageModel",
    "UntiedError",
    "VariationalDropout",
    "assert_tied",
    "bptt_batches",
    "patch_causal_lm",
    "projection_penalty",
    "retie",
    "tie_embeddings",
    "tie_three_way",
    "unpatch_causal_lm",
]
