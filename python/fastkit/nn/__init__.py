"""Drop-in torch.nn modules over fastkit.ops."""

# As a whole, and first: a thread that begins with a part of it, and one that begins with the whole, may
# wait for each other.
import fastkit.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from fastkit.nn.adaptive_iir import AdaptiveIIR
from fastkit.nn.focus_layer import FocusLayer
from fastkit.nn.global_conv import GlobalConv
from fastkit.nn.multiverse_head import MultiverseHead
from fastkit.nn.prilora_linear import PRILoRALinear
from fastkit.nn.tied_embedding import TiedEmbedding

__all__ = [
    "AdaptiveIIR",
    "FocusLayer",
    "GlobalConv",
    "MultiverseHead",
    "PRILoRALinear",
    "TiedEmbedding",
]
