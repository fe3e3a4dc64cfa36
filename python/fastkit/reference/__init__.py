"""Every op in plain PyTorch: the specification, against which tests hold kernels and their own oracles."""

from fastkit.reference.icp import ICPEpoch, icp_epoch
from fastkit.reference.iir_scan import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.reference.linear_cross_entropy import (
    LinearCrossEntropy,
    linear_cross_entropy,
    linear_cross_entropy_with_lse,
)
from fastkit.reference.lora_linear import (
    LinearWithStats,
    column_norms,
    lora_linear,
    lora_linear_with_stats,
    prune_rows_,
    prune_rows_grouped_,
)
from fastkit.reference.moments import Moments, merge_moments, moments
from fastkit.reference.mtadam import mtadam_square_sums, mtadam_update_
from fastkit.reference.multihead_loss import MultiheadLoss, multihead_loss
from fastkit.reference.multihead_loss_penalty import orthogonality_penalty
from fastkit.reference.phrase_scores import (
    PhraseScores,
    PhraseSelection,
    phrase_scores,
    select_phrases,
)
from fastkit.reference.procrustes import polar, procrustes
from fastkit.reference.topk_similarity import TopK, csls_topk, topk_similarity

__all__ = [
    "ICPEpoch",
    "IIRState",
    "LinearCrossEntropy",
    "LinearWithStats",
    "Moments",
    "MultiheadLoss",
    "PhraseScores",
    "PhraseSelection",
    "TopK",
    "column_norms",
    "csls_topk",
    "icp_epoch",
    "iir_scan",
    "iir_scan_with_state",
    "iir_step",
    "linear_cross_entropy",
    "linear_cross_entropy_with_lse",
    "lora_linear",
    "lora_linear_with_stats",
    "merge_moments",
    "moments",
    "mtadam_square_sums",
    "mtadam_update_",
    "multihead_loss",
    "orthogonality_penalty",
    "phrase_scores",
    "polar",
    "procrustes",
    "prune_rows_",
    "prune_rows_grouped_",
    "select_phrases",
    "sosfilt",
    "topk_similarity",
]
