"""What a model keeps of its adapters: the handle, and the state that training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkit.methods.prilora.config import PRILoRAConfig
from fastkit.methods.prilora.pruning import Adapter, PrunedAdapters

FORMAT = 1
_KEY = "_fastkit_prilora"  # under which a model keeps its handle: who drops it still has it pruned
_PARTS = ("lora_a", "lora_b", "mask", "input_square", "folds")


def handle_of(model: nn.Module) -> Any:
    """That of the model itself, not of one inside it; None if it has none."""
    return vars(model).get(_KEY)


class Handle(PrunedAdapters):
    """Adapters that are pruned, of a model that keeps them."""

    MADE_BY = ""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Adapter], config: PRILoRAConfig, automatic: bool
    ) -> None:
        self.model = model
        super().__init__(layers, config, automatic)
        object.__setattr__(model, _KEY, self)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, beside the state of the optimizer and of the random numbers.

        Under torch.distributed it is the same on each rank, between steps of the optimizer.

        Returns:
            ``format``, ``config``, ``steps`` and ``counts`` (of each layer), ``events``, ``owners`` (whose
            statistic is whose), ``ranks`` and ``scales``, and ``tensors`` by their names in the model: of the
            adapters with their masks and averages, and of ``modules_to_save``. What PEFT trains beside its
            adapters is not in it.
        """
        self._check_kept("state_dict")
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "steps": self.steps,
            "counts": self.counts,
            "events": list(self.events),
            "owners": self.owners,
            "ranks": {name: layer.lora_a.shape[0] for name, layer in self.layers.items()},
            "scales": {name: layer.scale for name, layer in self.layers.items()},
            "tensors": copied(self._tensors()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; ``config`` stays that of this handle. What is refused changes
        nothing.

        Raises:
            ValueError: it is of another format, or a layer or tensor is missing, unknown, or of another rank,
                scale or shape.
        """
        self._check_kept("load_state_dict")
        tensors = self._tensors()
        self._check_state(tensors, state)
        for name, tensor in tensors.items():
            tensor.copy_(state["tensors"][name])
        for layer in self.layers.values():
            layer.square_sum.zero_()
        self._go_on(state["counts"], state["events"], state["owners"])

    def _tensors(self) -> dict[str, Tensor]:
        """Those of the state, themselves."""
        return {f"{name}.{part}": getattr(self.layers[name], part) for name in self.layers for part in _PARTS}

    def _check_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        op = f"{self.OP}: load_state_dict"
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{op}: format must be {FORMAT}, got {state.get('format')}; is it of another version?"
            )
        lacking = {"ranks", "scales", "counts", "events", "owners", "tensors"} - state.keys()
        if lacking:
            raise ValueError(f"{op}: state must have {min(lacking)}, got none; pass what state_dict() gave")
        for name, layer in self.layers.items():
            for key in ("ranks", "scales", "counts"):
                if name not in state[key]:
                    raise ValueError(f"{op}: {key} must have {name}, got none; is it of another model?")
            for what, expected in (("rank", layer.lora_a.shape[0]), ("scale", layer.scale)):
                found = state[f"{what}s"][name]
                if found != expected:
                    raise ValueError(
                        f"{op}: {name} must have {what} {expected}, got {found}; use the config of the state"
                    )
        for name, tensor in tensors.items():
            if name not in state["tensors"]:
                raise ValueError(f"{op}: tensors must have {name}, got none; is it of another model?")
            found = state["tensors"][name].shape
            if found != tensor.shape:
                raise ValueError(
                    f"{op}: {name} must have shape {tuple(tensor.shape)}, got {tuple(found)};"
                    " is it of another model?"
                )
        for name in state["tensors"]:
            if name not in tensors:
                raise ValueError(f"{op}: tensors must be of this model, got {name}; is it of another model?")

    def _check_kept(self, method: str) -> None:
        if handle_of(self.model) is not self:
            raise RuntimeError(
                f"{self.OP}: {method} needs the model with its adapters, and undo() gave back what was"
                f" before; call {self.MADE_BY} again"
            )

    def _forget(self) -> None:
        """No step is seen any more, and the model keeps no handle."""
        self.close()
        delattr(self.model, _KEY)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
