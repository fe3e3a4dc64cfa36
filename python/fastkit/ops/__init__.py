"""Public functions on tensors: check, choose an implementation, differentiate."""

from fastkit.ops.icp import icp_epoch as icp_epoch
from fastkit.ops.iir_scan import iir_scan as iir_scan
from fastkit.ops.iir_scan import iir_scan_with_state as iir_scan_with_state
from fastkit.ops.iir_scan import iir_step as iir_step
from fastkit.ops.iir_scan import sosfilt as sosfilt
from fastkit.ops.lora_linear import lora_linear as lora_linear
from fastkit.ops.lora_linear import lora_linear_with_stats as lora_linear_with_stats
from fastkit.ops.lora_linear_prune import column_norms as column_norms
from fastkit.ops.lora_linear_prune import prune_rows_ as prune_rows_
from fastkit.ops.lora_linear_prune import prune_rows_grouped_ as prune_rows_grouped_
from fastkit.ops.moments import merge_moments as merge_moments
from fastkit.ops.moments import moments as moments
from fastkit.ops.mtadam import mtadam_square_sums as mtadam_square_sums
from fastkit.ops.mtadam import mtadam_update_ as mtadam_update_
from fastkit.ops.procrustes import polar as polar
from fastkit.ops.procrustes import procrustes as procrustes
from fastkit.ops.topk_similarity import csls_topk as csls_topk
from fastkit.ops.topk_similarity import topk_similarity as topk_similarity
from fastkit.reference import ICPEpoch as ICPEpoch
from fastkit.reference import IIRState as IIRState
from fastkit.reference import LinearWithStats as LinearWithStats
from fastkit.reference import Moments as Moments
from fastkit.reference import TopK as TopK
