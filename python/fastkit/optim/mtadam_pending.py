"""The gradients that wait for MTAdam's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkit.optim.mtadam_processes import Gradients, local


class Pending:
    """What has been given of the terms of one step."""

    def __init__(self) -> None:
        self.times: dict[str, int] = {}  # that each term has been given
        self.gradients: dict[str, Gradients] = {}  # batched mode: their sums
        self.folded: list[int] = []  # streaming mode: of each parameter, the terms that are in its moments
        self.ended = 0  # streaming mode, on several processes: the terms that all have folded
        self._owned: dict[str, set[int]] = {}  # of each term, the gradients that are nobody else's memory
        self._scales: dict[str, Tensor] = {}  # what a GradScaler has multiplied a term's loss with
        self._common: dict[str, Tensor] | None = None  # the same, of the means of several processes
        self._found_inf: Tensor | None = None  # of all processes
        self._bad_loss: Tensor | None = None

    def count(self, term: str) -> None:
        self.times[term] = self.times.get(term, 0) + 1

    def add(self, term: str, grads: Gradients) -> None:
        """To what the term has so far."""
        before = self.gradients.get(term)
        if before is None:
            self.gradients[term] = grads
            return
        pairs = [
            (i, a, b)
            for i, (a, b) in enumerate(zip(before, grads, strict=True))
            if a is not None and b is not None
        ]
        totals: Gradients = [b if a is None else a for a, b in zip(before, grads, strict=True)]
        owned = self._owned.setdefault(term, set())
        for i, old, new in pairs:  # what autograd gives may be another gradient's memory too
            totals[i] = old.add_(new) if i in owned else old + new
            owned.add(i)
        self.gradients[term] = totals

    def check_order(self, term: str, terms: Sequence[str], scaler: Any) -> None:
        """That streaming mode can take the term now."""
        op = "MTAdam.backward_term"
        if scaler is not None:
            raise RuntimeError(f"{op}: streaming mode takes no GradScaler; use mode='batched'")
        if term in self.times:
            raise RuntimeError(
                f"{op}: streaming mode takes a term once a step, got {term!r} again; add its losses up, or"
                " use mode='batched' to accumulate"
            )
        later = [t for t in terms[terms.index(term) :] if t in self.times]
        if later:
            raise RuntimeError(
                f"{op}: streaming mode takes terms in their order, {', '.join(terms)}, got {term!r} after"
                f" {later[0]!r}"
            )

    def note_loss(self, loss: Tensor) -> None:
        """Whether it is finite; nothing waits for the device."""
        bad = ~local(loss.detach()).isfinite().reshape(())  # of a sharded loss, one part at least is not
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad.to(self._bad_loss.device)

    def take_over(
        self, means: dict[str, Gradients], scales: dict[str, Tensor | None], found_inf: Tensor
    ) -> None:
        """Go on with what all processes have together."""
        self.gradients = means
        self._common = {term: scale for term, scale in scales.items() if scale is not None}
        self.found(found_inf)

    def found(self, found_inf: Tensor | None) -> None:
        """What all processes have found."""
        self._found_inf = None if found_inf is None else found_inf.reshape(())

    # --- GradScaler

    def fits_scaler(self, term: str, scaler: Any) -> bool:
        """Whether what the term has already is scaled, if it is."""
        return term not in self.gradients or (term in self._scales) == (scaler is not None)

    def check_scaled_alike(self, term: str, scaler: Any) -> None:
        if not self.fits_scaler(term, scaler):
            raise RuntimeError(
                f"MTAdam.backward_term: a term must be scaled in all its parts or in none, got {term!r} in"
                " both ways; pass the same scaler= each time"
            )

    def check_scaler(self, losses: object, mode: str) -> None:
        """That ``GradScaler.step`` has found in p.grad what there is to update by."""
        text = None
        if mode == "streaming":
            text = "streaming mode takes no GradScaler; use mode='batched'"
        elif losses is not None:
            text = (
                "losses cannot go through GradScaler.step, whose check for inf comes before; call"
                " backward_term(term, loss, scaler=scaler) for each, then scaler.step(optimizer)"
            )
        elif not self.times:
            text = "no term has been given; call backward_term(term, loss, scaler=scaler) for each first"
        elif self._scales.keys() != self.gradients.keys():
            text = (
                "of GradScaler.step every term must know the scale; call"
                " backward_term(term, loss, scaler=scaler)"
            )
        if text is not None:
            raise RuntimeError(f"MTAdam.step: {text}")

    def scale_of(self, term: str, loss: Tensor, scaler: Any) -> Tensor:
        """What the loss is to be multiplied with: in one step each time alike."""
        if term in self._scales:
            return self._scales[term]
        return scaler.scale(torch.ones((), dtype=torch.float32, device=loss.device))

    def show(self, term: str, scale: Tensor, params: Sequence[Tensor], grads: Gradients) -> None:
        """Add scaled gradients to p.grad, or begin it: a GradScaler looks for inf there."""
        begins = not self._scales
        self._scales[term] = scale
        for param, grad in zip(params, grads, strict=True):
            before = None if begins else param.grad
            if grad is None or before is None:
                param.grad = before if grad is None else grad.clone()
            else:
                before.add_(grad)

    @property
    def shows(self) -> bool:
        """Whether p.grad is ours."""
        return bool(self._scales)

    def scale(self, term: str) -> Tensor | None:
        return self._scales.get(term)

    def scales(self, terms: Sequence[str], device: torch.device) -> Tensor | None:
        """(L,) float32, or None where there are none."""
        scales = self._scales if self._common is None else self._common
        if not scales:
            return None
        one = torch.ones((), dtype=torch.float32, device=device)
        return torch.stack([scales.get(term, one).to(device).reshape(()) for term in terms])

    def found_inf(self, of_scaler: Tensor | None, device: torch.device) -> Tensor | None:
        """Not 0 where a loss was not finite, or a GradScaler has found inf."""
        if self._found_inf is not None:
            return self._found_inf.to(device)
        found = [f for f in (self._bad_loss, of_scaler) if isinstance(f, Tensor)]
        if not found:
            return None
        return torch.stack([f.to(device, torch.float32).reshape(()) for f in found]).sum()
