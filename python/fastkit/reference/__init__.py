"""Every op in plain PyTorch: the specification, and the oracle of every test."""

from fastkit.reference.iir_scan import iir_scan as iir_scan
