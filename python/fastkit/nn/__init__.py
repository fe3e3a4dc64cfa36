"""Drop-in torch.nn modules over fastkit.ops."""

from fastkit.nn.adaptive_iir import AdaptiveIIR as AdaptiveIIR
