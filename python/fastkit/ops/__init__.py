"""Public functions on tensors: check, choose an implementation, differentiate."""

from fastkit.ops.iir_scan import iir_scan as iir_scan
