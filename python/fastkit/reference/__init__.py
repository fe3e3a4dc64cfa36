"""Every op in plain PyTorch: the specification, against which tests hold kernels and their own oracles."""

from fastkit.reference.iir_scan import IIRState as IIRState
from fastkit.reference.iir_scan import iir_scan as iir_scan
from fastkit.reference.iir_scan import iir_scan_with_state as iir_scan_with_state
from fastkit.reference.iir_scan import iir_step as iir_step
from fastkit.reference.iir_scan import sosfilt as sosfilt
