"""Every op in plain PyTorch: the specification, against which tests hold kernels and their own oracles."""

from fastkit.reference.icp import ICPEpoch as ICPEpoch
from fastkit.reference.icp import icp_epoch as icp_epoch
from fastkit.reference.iir_scan import IIRState as IIRState
from fastkit.reference.iir_scan import iir_scan as iir_scan
from fastkit.reference.iir_scan import iir_scan_with_state as iir_scan_with_state
from fastkit.reference.iir_scan import iir_step as iir_step
from fastkit.reference.iir_scan import sosfilt as sosfilt
from fastkit.reference.lora_linear import LinearWithStats as LinearWithStats
from fastkit.reference.lora_linear import column_norms as column_norms
from fastkit.reference.lora_linear import lora_linear as lora_linear
from fastkit.reference.lora_linear import lora_linear_with_stats as lora_linear_with_stats
from fastkit.reference.lora_linear import prune_rows_ as prune_rows_
from fastkit.reference.lora_linear import prune_rows_grouped_ as prune_rows_grouped_
from fastkit.reference.moments import Moments as Moments
from fastkit.reference.moments import merge_moments as merge_moments
from fastkit.reference.moments import moments as moments
from fastkit.reference.mtadam import mtadam_square_sums as mtadam_square_sums
from fastkit.reference.mtadam import mtadam_update_ as mtadam_update_
from fastkit.reference.procrustes import polar as polar
from fastkit.reference.procrustes import procrustes as procrustes
from fastkit.reference.topk_similarity import TopK as TopK
from fastkit.reference.topk_similarity import csls_topk as csls_topk
from fastkit.reference.topk_similarity import topk_similarity as topk_similarity
