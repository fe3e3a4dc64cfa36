"""Public functions on tensors: check, choose an implementation, differentiate."""

from fastkit.ops.iir_scan import iir_scan as iir_scan
from fastkit.ops.iir_scan import iir_scan_with_state as iir_scan_with_state
from fastkit.ops.iir_scan import iir_step as iir_step
from fastkit.ops.iir_scan import sosfilt as sosfilt
from fastkit.reference import IIRState as IIRState
