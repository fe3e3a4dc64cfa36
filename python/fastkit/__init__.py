"""fastkit: fast kernels for PyTorch, and the published methods that they serve.

``fastkit.ops``: functions on tensors; ``fastkit.nn`` and ``fastkit.optim``: modules and optimizers above
them; ``fastkit.methods``: published methods, for models that you have. ``python -m fastkit info`` says what
runs on this machine.
"""

__version__ = "0.1.0"
