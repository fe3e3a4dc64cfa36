"""Public functions on tensors: check, choose an implementation, differentiate."""

from fastkit.ops.icp import icp_epoch
from fastkit.ops.iir_scan import iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_lse
from fastkit.ops.lora_linear import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear_prune import column_norms, prune_rows_, prune_rows_grouped_
from fastkit.ops.moments import merge_moments, moments
from fastkit.ops.mtadam import mtadam_square_sums, mtadam_update_
from fastkit.ops.multihead_loss import multihead_loss
from fastkit.ops.multihead_loss_penalty import orthogonality_penalty
from fastkit.ops.phrase_scores import phrase_scores, select_phrases
from fastkit.ops.procrustes import polar, procrustes
from fastkit.ops.topk_similarity import csls_topk, topk_similarity
from fastkit.reference import (
    ICPEpoch,
    IIRState,
    LinearCrossEntropy,
    LinearWithStats,
    Moments,
    MultiheadLoss,
    PhraseScores,
    PhraseSelection,
    TopK,
)

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
