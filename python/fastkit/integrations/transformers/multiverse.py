"""EliminationCallback: weak heads are dropped in a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fastkit.methods.multiverse import HeadEliminator

if TYPE_CHECKING:
    from fastkit.methods.multiverse import MultiverseForSequenceClassification

_OP = "EliminationCallback"
_TENSORS = {"active": torch.bool, "average": torch.float64, "pending": torch.float64}


class EliminationCallback(TrainerCallback, ExportableState):
    """Drops the weak heads of a ``MultiverseForSequenceClassification`` while a Trainer trains it.

    ::

        Trainer(model=model, args=args, ..., callbacks=[EliminationCallback(margin=0.1)])

    After each step of the optimizer what the heads lost goes to a ``HeadEliminator`` of as many steps as the
    run has, and the heads that it drops are taken out of the model and of the optimizer. Its state is in the
    Trainer's own of each checkpoint, ``trainer_state.json``: ``train(resume_from_checkpoint=...)`` goes on to
    the same heads. The mask is a part of the model, and ``load_best_model_at_end`` brings back that of the
    best checkpoint. Gradient accumulation weighs micro-batches by their rows, and the rows of all processes
    count. A model under PEFT is looked into.

    Args:
        options: those of ``HeadEliminator``, but ``num_heads`` and ``total_steps``. With ``score="dev"`` a
            callback of your own gives ``callback.eliminator.add_dev_scores`` what it evaluates. A Trainer
            evaluates after the check of the same step: pass a ``start`` beyond the first evaluation.

    Attributes:
        eliminator: the ``HeadEliminator``, once training has begun.
        events: ``(step, heads)`` of each check that dropped some.

    Raises:
        ValueError: in ``train()``: the model has no heads, or is not given labels; the checkpoint has no
            state of this callback, as if it was given by ``add_callback``, after the Trainer was made; or the
            model's mask is another than the state's.
        What ``HeadEliminator`` raises.
    """

    def __init__(self, **options: Any) -> None:
        for name in ("num_heads", "total_steps"):
            if name in options:
                raise TypeError(f"{_OP}: {name} is that of the model and the run, got one more; leave it out")
        _refuse_in_time(options)
        self.options: dict[str, Any] = options
        self.eliminator: HeadEliminator | None = None
        self.events: list[tuple[int, list[int]]] = []
        self.saved: dict[str, Any] | None = None  # what a Trainer that restores its callbacks puts here

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        saved = None if self.eliminator is None else _plain(self.eliminator.state_dict())
        own = {name: value for name, value in self.options.items() if name != "process_group"}
        return {"args": own, "attributes": {"saved": saved, "events": self.events}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = model_of(kwargs["model"])
        head = model.head
        self.eliminator = HeadEliminator(head.num_heads, total_steps=state.max_steps, **self.options)
        if state.global_step:
            self._resume(state, head.active.cpu())
        else:
            self.events = []
            begun = {**self.eliminator.state_dict(), "active": head.active.cpu()}
            self.eliminator.load_state_dict(begun)
        model.take_sums()  # of what was done before

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.eliminator is not None
        model = model_of(kwargs["model"])
        found = model.take_sums()
        if found is None:  # else nobody would notice that the heads are trained by their mean alone
            raise ValueError(
                f"{_OP}: forward must get labels in each step, got none in step {state.global_step}; leave"
                " out label_smoothing_factor and compute_loss_func, which keep them from the model (it has a"
                " label_smoothing of its own)"
            )
        self.eliminator.add(*found)
        dropped = self.eliminator.step()
        if dropped:
            model.head.eliminate(dropped, kwargs["optimizer"])
            self.events.append((state.global_step, dropped))
        model.head.scores.copy_(self.eliminator.scores())

    def _resume(self, state: TrainerState, active: Tensor) -> None:
        assert self.eliminator is not None
        saved, events = self.saved, self.events
        if saved is None:
            callbacks: Any = state.stateful_callbacks or {}
            found = callbacks.get(type(self).__name__)
            attributes = found.get("attributes", {}) if isinstance(found, dict) else {}
            saved, events = attributes.get("saved"), attributes.get("events", [])
        if saved is None:
            raise ValueError(
                f"{_OP}: the checkpoint of step {state.global_step} must have a state of this callback, got"
                " none; pass it to Trainer(callbacks=...) when that is made"
            )
        self.eliminator.load_state_dict(_tensors(saved))
        self.events = [(int(step), list(heads)) for step, heads in events]
        self.saved = None
        if not torch.equal(self.eliminator.active, active):
            raise ValueError(
                f"{_OP}: the model must have the {self.eliminator.num_active} heads of the checkpoint's"
                f" state, got {int(active.sum())}; let the Trainer load the model of that checkpoint"
            )


def _refuse_in_time(options: dict[str, Any]) -> None:
    """Before training: what no number of heads and steps would make right."""
    heads = options.get("min_heads", 1)
    enough = heads if isinstance(heads, int) and heads > 0 else 1
    # Where only the end of checks is given, their beginning is the earlier the shorter the run.
    steps = 10**9 if options.get("stop") is None else 1
    HeadEliminator(enough, total_steps=steps, **options)


def model_of(model: nn.Module) -> MultiverseForSequenceClassification:
    """The one with many heads, which PEFT and others may have wrapped."""
    # Here, so that a Trainer without such a model does not import what this one needs.
    from fastkit.methods.multiverse import MultiverseForSequenceClassification

    for module in model.modules():
        if isinstance(module, MultiverseForSequenceClassification):
            return module
    raise ValueError(
        f"{_OP}: the model must be a MultiverseForSequenceClassification, got {type(model).__name__}; make it"
        " by MultiverseForSequenceClassification.from_base(...)"
    )


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.tensor(value, dtype=_TENSORS[name]) if name in _TENSORS else value
        for name, value in state.items()
    }
