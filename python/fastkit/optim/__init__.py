"""Drop-in ``torch.optim.Optimizer`` classes; ordinary state_dicts."""

# As a whole, and first: a thread that begins with a part of it, and one that begins with the whole, may
# wait for each other.
import fastkit.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from fastkit.optim.mtadam import MTAdam

__all__ = [
    "MTAdam",
]
