"""What a FocusLayer keeps of the past when it goes on token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FocusState:
    """Of each row; nothing here grows with the tokens that it has had.

    The token at place t of a row is at index ``t % size`` of a ring, where it stays until that of
    ``t + size`` takes its place.
    """

    coefficients: Tensor  # (B, C, F, 2): of the row's bin
    ends: Tensor  # (B, C, F, 2): each filter's results one and two tokens ago, in this bin
    keys: Tensor  # (B, attn_chunk, qk_size): a ring, in which a chunk begins at index 0
    values: Tensor  # (B, attn_chunk, C)
    history: Tensor | None  # (B, H, C): a ring of what sets the next bin's filter; None: maxima are given


def ring(x: Tensor, lengths: Tensor, size: int) -> Tensor:  # (B, T, D), (B,) -> (B, size, D)
    """The last ``size`` of each row's first ``lengths[b]`` tokens; where there are not as many, zeros."""
    last = lengths[:, None] - 1
    places = last - (last - torch.arange(size, device=x.device)) % size
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, places.clamp(min=0)].where(places.unsqueeze(-1) >= 0, 0)


def put_(ring: Tensor, x: Tensor, places: Tensor) -> None:  # (B, size, D), (B, D), (B,)
    ring[torch.arange(len(x), device=x.device), places % ring.shape[1]] = x.to(ring.dtype)


def unrolled(ring: Tensor, places: Tensor) -> Tensor:  # (B, size, D), (B,): places of the next tokens
    """The ring from its oldest token on."""
    index = (places[:, None] + torch.arange(ring.shape[1], device=ring.device)) % ring.shape[1]
    return ring[torch.arange(len(ring), device=ring.device)[:, None], index]
