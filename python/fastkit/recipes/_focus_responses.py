"""What the filters of a Focus model let through, bin by bin: the figure that the paper draws of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkit.nn import AdaptiveIIR

FREQUENCIES = 513  # of a drawn response, from 0 to half the sampling rate


@torch.no_grad()
def coefficients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Of each layer, those (N, C, K, F, 2) with which it filters these rows; N is 1 if they are constant."""
    found: list[Tensor] = []

    def note(filter: AdaptiveIIR, args: tuple[Any, ...]) -> None:
        found.append(filter.coefficients(*args).double())

    filters = [module for module in model.modules() if isinstance(module, AdaptiveIIR)]
    handles = [filter.register_forward_pre_hook(note) for filter in filters]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def responses(a: Tensor, w: Tensor) -> Tensor:  # (..., F, 2), (..., N) -> (..., N)
    """``|sum over F of 1 / (1 + a1 z + a2 z^2)|`` at ``z = exp(-i w)``."""
    z = torch.polar(torch.ones_like(w), -w).unsqueeze(-2)
    return (1 / (1 + a[..., :1] * z + a[..., 1:] * z.square())).sum(-2).abs()


def peaks(a: Tensor) -> Tensor:  # (..., F, 2) -> (...)
    """The largest response: at one of the two ends, or where a filter with complex poles has its own.

    That is where ``cos w = -a1 (1 + a2) / (4 a2)``; exact for one filter.
    """
    a1, a2 = a.unbind(-1)
    inside = (-a1 * (1 + a2) / (4 * a2)).where(a2 > 0, 0).clamp(-1, 1).acos()
    ends = torch.tensor([0, math.pi], dtype=a.dtype).expand(*inside.shape[:-1], 2)
    return responses(a, torch.cat([inside, ends], -1)).amax(-1)


def peak_gains(model: nn.Module, tokens: Tensor) -> list[list[float]]:
    """Of each layer and bin the largest response over frequencies; the median over rows and channels."""
    return [
        peaks(a).transpose(0, 1).flatten(0, 1).median(0).values.tolist() for a in coefficients(model, tokens)
    ]


def draw(
    path: Path, model: nn.Module, rows: Sequence[Tensor], gains: Sequence[Sequence[Sequence[float]]]
) -> None:
    """A line of panels for each layer.

    ``rows[p]`` (1, T): tokens of which what is looked for is in bin p. A panel for each, or for three of
    them: responses of the layer's bins, the mean over channels. In the last panel ``gains[p]``, as
    ``peak_gains`` gives them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = range(len(rows)) if len(rows) <= 3 else (0, len(rows) // 2, len(rows) - 1)
    found = {place: coefficients(model, rows[place]) for place in shown}
    layers, columns = len(found[0]), len(found) + 1
    figure = Figure(figsize=(4 * columns, 3.2 * layers), layout="constrained")
    axes = figure.subplots(layers, columns, squeeze=False)
    w = torch.linspace(0, math.pi, FREQUENCIES, dtype=torch.float64)
    frequency = (w / (2 * math.pi)).numpy()
    for layer in range(layers):
        for panel, (place, of_row) in zip(axes[layer], found.items(), strict=False):
            for number, response in enumerate(responses(of_row[layer], w)[0].mean(0)):
                set_by_key = number == place + 1
                label = f"bin {number}" + ", set by the key's" * set_by_key
                panel.semilogy(frequency, response.numpy(), lw=2 if set_by_key else 1, label=label)
            panel.set(title=f"layer {layer + 1}, the key in bin {place}", xlabel="cycles a sample")
            panel.legend(fontsize="small")
        panel = axes[layer][-1]
        for place, gain in enumerate(gains):
            panel.semilogy(gain[layer], "o-", label=f"the key in bin {place}")
        panel.set(title=f"layer {layer + 1}, median of peak gains", xlabel="bin")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(fontsize="small")
        axes[layer][0].set_ylabel("gain")
    figure.savefig(path, format="png", dpi=80)
