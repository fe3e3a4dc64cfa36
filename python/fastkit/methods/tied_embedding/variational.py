"""Variational dropout of a language model: masks that stay for a whole sequence, also between its steps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fastkit.methods._options import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariationalDropout:
    """Gal's dropout of LSTMs: one mask for all steps of a sequence, drawn anew in each call.

    Each is a share that is zeroed; what is kept is divided by 1 minus it.

    Args:
        word: of the words of a row: a word is there or not, wherever it occurs in the row.
        input: of what goes into a layer.
        hidden: of what a step gives to the next step of its layer: the hidden state, and not the weight. The
            state that a call returns is not masked.
        output: of what the last layer gives.
        per_gate: whether the four gates of a layer have ``input`` and ``hidden`` masks of their own, as in
            the paper's code; else they share one.

    Raises:
        ValueError: a share is not in [0, 1).
        TypeError: one is no number, or ``per_gate`` no bool.

    The defaults are those of the paper's large model with Bayesian dropout.

    Source: Gal, Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    NeurIPS 2016; Press, Wolf, EACL 2017, and the code published with it.
    """

    word: float = 0.3
    input: float = 0.5
    hidden: float = 0.3
    output: float = 0.5
    per_gate: bool = True

    def __post_init__(self) -> None:
        for name in ("word", "input", "hidden", "output"):
            check_share("VariationalDropout", name, getattr(self, name))
        if not isinstance(self.per_gate, bool):
            raise TypeError(f"VariationalDropout: per_gate must be True or False, got {self.per_gate!r}")


def check_share(op: str, name: str, value: object) -> None:
    if not 0 <= check_number(op, name, value) < 1:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")


def mask(like: Tensor, shape: tuple[int, ...], share: float) -> Tensor | None:
    """0 with the probability ``share``, else 1 / (1 - share); None where nothing is dropped."""
    if share == 0:
        return None
    return like.new_empty(shape).bernoulli_(1 - share).div_(1 - share)


def word_mask(ids: Tensor, like: Tensor, share: float) -> Tensor | None:  # (B, T) -> (B, T, 1)
    """One draw for each word of a row: that of its first place in the row when sorted."""
    drawn = mask(like, tuple(ids.shape), share)
    if drawn is None:
        return None
    ids = ids.contiguous()
    return drawn.gather(1, torch.searchsorted(ids.sort(1).values, ids)).unsqueeze(-1)


def masked_lstm(
    lstm: nn.LSTM,
    x: Tensor,  # (B, T, E)
    state: tuple[Tensor, Tensor],  # (L, B, H) each
    dropout: VariationalDropout,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layers of ``lstm``, with masks of ``input`` and ``hidden``.

    Step by step: no fused kernel of ``nn.LSTM`` masks the hidden state between steps. The products of the
    inputs are one for all steps.
    """
    x = x.transpose(0, 1)
    gates = 4 if dropout.per_gate else 1
    batch = x.shape[1]
    h_last: list[Tensor] = []
    c_last: list[Tensor] = []
    for layer, (h, c) in enumerate(zip(*(each.unbind(0) for each in state), strict=True)):
        of_input, of_hidden, bias, bias_hidden = (
            getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        input_mask = mask(x, (gates, batch, x.shape[-1]), dropout.input)
        hidden_mask = mask(x, (gates, batch, h.shape[-1]), dropout.hidden)
        if input_mask is not None:
            input_mask = input_mask.unsqueeze(1)
        products = _by_gates(x, of_input, input_mask) + (bias + bias_hidden)
        outputs: list[Tensor] = []
        for of_step in products.unbind(0):
            i, f, g, o = (of_step + _by_gates(h, of_hidden, hidden_mask)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        h_last.append(h)
        c_last.append(c)
    return x.transpose(0, 1), (torch.stack(h_last), torch.stack(c_last))


def _by_gates(x: Tensor, weight: Tensor, masks: Tensor | None) -> Tensor:  # (..., E), (4 H, E) -> (..., 4 H)
    """``x weight^T``, each share of the weight's rows with x under its own mask, (G, ..., E)."""
    if masks is None:
        return x @ weight.T
    if len(masks) == 1:
        return (x * masks[0]) @ weight.T
    masked = (x * masks).flatten(1, -2)  # (G, N, E)
    products = torch.bmm(masked, weight.unflatten(0, (len(masks), -1)).transpose(1, 2))
    return products.transpose(0, 1).reshape(*x.shape[:-1], -1)
