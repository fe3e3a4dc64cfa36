"""fastkit: fast kernels for PyTorch, and the published methods that they serve.

``import fastkit.ops`` for functions on tensors, ``fastkit.nn`` for modules; ``python -m fastkit info``
says what runs on this machine.
"""

__version__ = "0.1.0"
