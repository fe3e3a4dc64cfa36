"""Drop-in ``torch.optim.Optimizer`` classes; ordinary state_dicts."""

from fastkit.optim.mtadam import MTAdam

__all__ = [
    "MTAdam",
]
