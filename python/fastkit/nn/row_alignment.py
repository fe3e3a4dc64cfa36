"""Rows of tokens that begin at different places, moved to the beginning, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowAlignment:
    """Gathers rows by ``index``, and back by ``inverse``; None: rows are where they belong."""

    index: Tensor | None = None  # (B, T) or, packed, (S, longest): places in the row, or the only row
    inverse: Tensor | None = None  # (B, T) or (T,): places in the aligned rows, flat if packed

    @staticmethod
    def of(
        name: str, x: Tensor, padding_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> RowAlignment:
        """For x (B, T, ...); ValueError, where the mask has a hole or the offsets do not fit."""
        if padding_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{name}: padding_mask and cu_seqlens exclude each other, got both; give one")
        if padding_mask is not None:
            return _of_mask(name, x, padding_mask)
        if cu_seqlens is not None:
            return _of_sequences(name, x, cu_seqlens)
        return RowAlignment()

    def align(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (B, T, ...) or (S, longest, ...)
        if self.index is None:
            return x
        return x[0, self.index] if self._packed else _gathered(x, self.index)

    def restore(self, x: Tensor) -> Tensor:
        if self.inverse is None:
            return x
        return x.flatten(0, 1)[self.inverse].unsqueeze(0) if self._packed else _gathered(x, self.inverse)

    @property
    def _packed(self) -> bool:
        return self.inverse is not None and self.inverse.dim() == 1


def _gathered(x: Tensor, index: Tensor) -> Tensor:  # (B, T, ...), (B, T)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _of_mask(name: str, x: Tensor, mask: Tensor) -> RowAlignment:
    B, T = x.shape[:2]
    if mask.shape != (B, T):
        raise ValueError(
            f"{name}: the padding mask must have shape (B, T) = ({B}, {T}), got {tuple(mask.shape)}; a mask"
            " of pairs does not go with chunks"
        )
    tokens = mask != 0
    begin = tokens.int().argmax(1)  # of the first; 0 if there is none
    if not torch.compiler.is_compiling():
        runs = tokens[:, :1].sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
        if bool((runs > 1).any()):
            raise ValueError(
                f"{name}: the padding mask must have one run of tokens in each row, got {int(runs.max())} in"
                f" row {int(runs.argmax())}; holes have no place in chunks"
            )
        if not bool(begin.any()):
            return RowAlignment()
    places = torch.arange(T, device=x.device)
    return RowAlignment((places + begin[:, None]) % T, (places - begin[:, None]) % T)


def _of_sequences(name: str, x: Tensor, cu_seqlens: Tensor) -> RowAlignment:
    total = x.shape[1]
    if len(x) != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{name}: cu_seqlens must be (S + 1) offsets into x of shape (1, T, C), got shape"
            f" {tuple(cu_seqlens.shape)} and x of shape {tuple(x.shape)}"
        )
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    if bool((offsets[0] != 0) | (offsets[-1] != total) | (lengths < 0).any()):
        raise ValueError(
            f"{name}: cu_seqlens must go from 0 to T = {total} and never fall, got {offsets.tolist()}"
        )
    longest = int(lengths.max())
    places = torch.arange(longest, device=x.device)
    index = (offsets[:-1, None] + places).clamp(max=total - 1)  # beyond a sequence: any, which nobody sees
    row = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    return RowAlignment(index, row * longest + torch.arange(total, device=x.device) - offsets[row])
