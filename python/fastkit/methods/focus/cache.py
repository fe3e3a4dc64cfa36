"""What a Focus model keeps of the tokens that it has had: as much after a million as after one bin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from transformers import Cache

from fastkit.nn.focus_state import FocusState


class FocusCache(Cache):
    """The states of a model's layers, and where each row is; made by the model, and gone on with in place.

    For each layer the filters' last results and coefficients, the keys and values of a chunk, and what sets
    the next bin's filter; of a convolution that layers share, its last inputs, once. ``reset`` empties it.
    Beams, repeats and selections move rows, as ``generate()`` asks for them. What it has dropped is gone:
    ``crop`` refuses.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        self.states: list[FocusState] = []
        self.history: Tensor | None = None  # (B, H, C): a ring of what the shared convolution has had
        self.places: Tensor = torch.empty(0, dtype=torch.long)  # (B,): tokens of each row
        self.seen = 0  # tokens and padding of the longest row

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda t: t.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"FocusCache: crop must be by 0 tokens, got {tokens_to_remove}; what came before is not kept"
            )

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        self.places = move(self.places)
        if self.history is not None:
            self.history = move(self.history)
        for state in self.states:
            for field in fields(state):
                value = getattr(state, field.name)
                if value is not None:
                    setattr(state, field.name, move(value))
