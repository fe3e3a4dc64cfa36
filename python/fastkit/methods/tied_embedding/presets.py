"""The paper's language models on the Penn Treebank: their sizes, and how they are trained."""

from __future__ import annotations

import dataclasses
from typing import Literal

PresetName = Literal["small", "medium", "large"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Of the code published with the paper, as of Zaremba et al.: two layers, and plain SGD.

    The loss of a step is the sum over its tokens divided by ``batch_size``: that is what ``clip`` and ``lr``
    are for.
    """

    hidden_size: int
    dropout: float
    init_range: float
    steps: int  # of backpropagation through time
    epochs: int
    full_epochs: int  # after the first, with all of lr
    decay: float  # of lr, an epoch
    clip: float  # the largest norm of the gradient of all parameters
    batch_size: int = 20
    lr: float = 1.0
    projection_bias: bool = True  # where there is a projection

    def lr_of(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0, by the code's formula."""
        return self.lr * self.decay ** max(epoch - self.full_epochs, 0)


PRESETS: dict[PresetName, Preset] = {
    "small": Preset(
        hidden_size=200, dropout=0.0, init_range=0.1, steps=20, epochs=13, full_epochs=4, decay=0.5, clip=5.0
    ),
    "medium": Preset(
        hidden_size=650, dropout=0.5, init_range=0.05, steps=35, epochs=39, full_epochs=6, decay=0.8, clip=5.0
    ),
    "large": Preset(
        hidden_size=1500, dropout=0.65, init_range=0.04, steps=35, epochs=55, full_epochs=14, decay=1 / 1.15,
        clip=10.0,
    ),
}  # fmt: skip
