"""A long causal convolution in blocks, and the maxima of cells of what comes out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pooled_conv(x: Tensor, taps: Tensor, block: int, pool: int) -> Tensor:
    """``cell_maxima`` of ``y[t] = sum_n taps[n] x[t-n]``: x (B, T, C), taps (C, n) -> (B, K - 1, C, pool)."""
    y = convolution_in_blocks(_but_last(x, block).mT, taps, block).mT
    return _cell_maxima(y, block, pool)


def cell_maxima(x: Tensor, block: int, pool: int) -> Tensor:  # (B, T, C) -> (B, K - 1, C, pool)
    """Each block cut into ``pool`` cells, the largest of each; of all K blocks but the last."""
    return _cell_maxima(_but_last(x, block), block, pool)


def _but_last(x: Tensor, block: int) -> Tensor:
    """x without the last block, which may be short."""
    return x[:, : (-(-x.shape[1] // block) - 1) * block]


def _cell_maxima(x: Tensor, block: int, pool: int) -> Tensor:
    cells = x.unflatten(1, (x.shape[1] // block, pool, block // pool))
    return cells.max(3).values.transpose(2, 3)


def convolution_in_blocks(x: Tensor, taps: Tensor, block: int) -> Tensor:  # (B, C, T), (C, n) -> (B, C, T)
    """``y[t] = sum_n taps[n] x[t-n]``; samples of a block depend on no bit of later blocks.

    Overlap-save: the window of a block is the block before it and itself. The second half of the product of
    its spectrum with that of as many taps, and zeros, is what those taps make of the window; those of
    earlier windows with later taps come to it.
    """
    B, C, T = x.shape
    if x.numel() == 0:
        return x * taps.sum()
    blocks = -(-T // block)
    parts = min(-(-taps.shape[1] // block), blocks)  # later taps reach nothing
    taps = taps[:, : parts * block]
    taps = pad(taps, (0, parts * block - taps.shape[1])).unflatten(1, (parts, block))
    windows = pad(x, (block, blocks * block - T)).unfold(2, 2 * block, block)  # (B, C, blocks, 2 block)
    spectra, of_taps = torch.fft.rfft(windows), torch.fft.rfft(taps, 2 * block)
    total = spectra * of_taps[:, :1]
    for part in range(1, parts):
        later = spectra[:, :, : blocks - part] * of_taps[:, part : part + 1]
        total = total + pad(later, (0, 0, part, 0))
    return torch.fft.irfft(total, 2 * block)[..., block:].reshape(B, C, blocks * block)[..., :T]
