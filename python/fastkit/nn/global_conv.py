"""A long causal convolution, whose blocks do not see later ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, pad, softshrink

from fastkit._autograd import without_autocast
from fastkit.ops.pooled_conv import pooled_conv
from fastkit.reference.pooled_conv import cell_maxima, convolution_in_blocks


class GlobalConv(nn.Module):
    """Convolves each channel with a learned kernel of many taps, of which the small ones are zero.

    ::

        y[t] = sum_n h[n] x[t-n] + d x[t],    h[n] = w[n] sign(k[n]) max(|k[n]| - squash, 0)

    for n from 0 to ``length - 1``. ``w[n] = exp(-n / tau)``, with ``sum_n w[n]^2 = 1``, is not learned: taus
    go from 1 to ``length``, evenly in logarithms over the channels, so that with noise k, as in the
    beginning, channels remember for different times and y has about the size of x (our choice; the source
    has such a decay in the initial kernel alone, where the threshold would leave most taps without a
    gradient).

    It runs in blocks of ``block`` samples: the sum of a block is over the spectra of the blocks up to it. A
    later block changes no bit of it, as one FFT over all of T would by its rounding. Inside its own block a
    result is not causal to the last bit: what is made of it must not be used there, as nothing in
    ``AdaptiveIIR`` is.

    Args:
        channels: C, the width of x.
        length: taps of the kernel.
        block: samples of a block; ``AdaptiveIIR`` needs its chunk.
        squash: what is taken from the size of each k. 0.1, as in the source.
        glu: whether a GELU and a linear layer to twice the channels with a GLU come after it, as in the
            source; they are no part of the block structure.

    Shape:
        x and the result: ``(B, T, C)``; the result is a transposed view of a dense ``(B, C, T)``, without
        ``glu``. Parameters: ``kernel`` (C, length), ``skip`` (C,), with ``glu`` also ``mix.weight`` (2C, C)
        and ``mix.bias``.

    Raises:
        ValueError: an option or the shape of x is not as above.

    Initialisation: ``kernel`` and ``skip`` N(0, 1).

    Numerics: FFTs run in float32, or float64 for float64; autocast is off for them. The result has the dtype
    of x.

    Complexity: for each channel O(T log block), and T / block times as many products of spectra as the
    kernel has blocks, at most T / block.

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", ICML 2023: the
    threshold, ``skip`` and ``glu``. Its use before the pooling of ``AdaptiveIIR``: Lutati, Zimerman, Wolf,
    EMNLP 2023.
    """

    window: Tensor

    def __init__(
        self, channels: int, length: int = 2048, *, block: int = 128, squash: float = 0.1, glu: bool = False
    ) -> None:
        super().__init__()
        for name, count in {"channels": channels, "length": length, "block": block}.items():
            if count < 1:
                raise ValueError(f"GlobalConv: {name} must be at least 1, got {count}")
        if not 0 <= squash < float("inf"):
            raise ValueError(f"GlobalConv: squash must be finite and not negative, got {squash}")
        self.channels = channels
        self.length = length
        self.block = block
        self.squash = squash
        self.kernel: nn.Parameter = nn.Parameter(torch.empty(channels, length))
        self.skip: nn.Parameter = nn.Parameter(torch.empty(channels))
        self.mix: nn.Linear | None = nn.Linear(channels, 2 * channels) if glu else None
        self.register_buffer("window", torch.empty(channels, length), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Also fills the window, which is in no checkpoint."""
        self.window.copy_(_decays(self.channels, self.length))
        nn.init.normal_(self.kernel)
        nn.init.normal_(self.skip)
        if self.mix is not None:
            self.mix.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        self._check(x)
        with without_autocast(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            y = convolution_in_blocks(x.to(dtype).mT, self.taps(dtype), self.block).to(x.dtype).mT
        return y if self.mix is None else glu(self.mix(gelu(y)), -1)

    def maxima(self, x: Tensor, pool: int) -> Tensor:  # (B, T, C) -> (B, K - 1, C, pool)
        """The largest results of each of ``pool`` equal cells of a block, of all K blocks but the last.

        What comes before the pooling is not kept; without ``glu`` and on a CPU it is not even written.
        """
        self._check(x)
        if self.block % pool != 0:
            raise ValueError(
                f"GlobalConv: pool must divide block, got pool={pool} and block={self.block};"
                f" take block={self.block + -self.block % pool}"
            )
        if self.mix is not None:
            return cell_maxima(self(x), self.block, pool)
        with without_autocast(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return pooled_conv(x.to(dtype), self.taps(dtype), self.block, pool).to(x.dtype)

    def last_maxima(self, x: Tensor, pool: int) -> Tensor:  # (B, length - 1 + block, C) -> (B, C, pool)
        """``maxima`` of the last ``block`` results, of as many samples as these depend on."""
        with without_autocast(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            n = x.shape[1]  # what goes around in a circle meets the first length - 1 results alone
            spectrum = torch.fft.rfft(x.to(dtype).mT) * torch.fft.rfft(self.taps(dtype), n)
            y = torch.fft.irfft(spectrum, n)[..., -self.block :].to(x.dtype).mT
        y = y if self.mix is None else glu(self.mix(gelu(y)), -1)
        return y.unflatten(1, (pool, -1)).amax(2).mT

    def taps(self, dtype: torch.dtype) -> Tensor:  # (C, length)
        """h, with d in its first."""
        taps = softshrink(self.kernel.to(dtype), self.squash) * self.window.to(dtype)
        return taps + pad(self.skip.to(dtype).unsqueeze(1), (0, self.length - 1))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.channels:
            raise ValueError(
                f"GlobalConv: x must have shape (B, T, {self.channels}) with T >= 1, got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.length}, block={self.block}, squash={self.squash:g}"


def _decays(channels: int, length: int) -> Tensor:  # (C, length)
    tau = torch.logspace(0, 1, channels, base=float(length), dtype=torch.float64)
    w = torch.exp(-torch.arange(length, dtype=torch.float64) / tau[:, None])
    return (w / w.norm(dim=1, keepdim=True)).float()
