"""PRILoRACallback: PRILoRA in a Trainer."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastkit._sync import replace_file
from fastkit.integrations.transformers._arguments import checkpoints_reentrantly
from fastkit.methods.prilora import AttachedPRILoRA, PRILoRA, PRILoRAConfig, apply_prilora, attach_prilora
from fastkit.methods.prilora.handle import handle_of
from fastkit.methods.prilora.state_file import STATE, read_state, write_state


class PRILoRACallback(TrainerCallback):
    """PRILoRA in a Trainer, without a call of its own.

    ::

        Trainer(model=model, args=args, ..., callbacks=[PRILoRACallback(PRILoRAConfig())])

    The model that is given to the Trainer is adapted before the optimizer is made (a PEFT model: by
    ``attach_prilora``), and pruned as it is trained. Beside each checkpoint of the Trainer is the state that
    training goes on from, ``prilora_state.safetensors``; ``train(resume_from_checkpoint=...)`` takes it up
    again, and with ``load_best_model_at_end`` that of the best checkpoint is taken in the end. Where A should
    have been pruned, and was not for one interval more, there is a warning.

    Args:
        prilora: the options, or the handle of a model that is adapted already. Default: that of the model, or
            ``PRILoRAConfig()`` if it has none.
        resume_from: the checkpoint, if ``train`` resumes from a folder that is not in ``args.output_dir``: a
            callback is not told of it.

    Attributes:
        prilora: the handle, once there is a Trainer.

    Raises:
        ValueError: in ``Trainer(...)``: the handle is of another model, or as ``apply_prilora`` and
            ``attach_prilora``. In ``train()``: the model is none that was adapted, as one that ``model_init``
            makes anew; the optimizer holds no adapter; the checkpoint has no state, or that of another.
        TypeError: ``prilora`` is neither.

    Gradient accumulation and checkpointing are the Trainer's. With ``use_reentrant`` checkpoints, the model's
    ``enable_input_require_grads()`` is called, without which adapters in them would get no gradient.
    """

    def __init__(
        self,
        prilora: PRILoRAConfig | PRILoRA | AttachedPRILoRA | None = None,
        *,
        resume_from: str | Path | None = None,
    ) -> None:
        if prilora is not None and not isinstance(prilora, (PRILoRAConfig, PRILoRA, AttachedPRILoRA)):
            raise TypeError(
                "PRILoRACallback: prilora must be a PRILoRAConfig or the handle of an adapted model, got"
                f" {type(prilora).__name__}"
            )
        given = None if isinstance(prilora, PRILoRAConfig) else prilora
        self.config: PRILoRAConfig | None = prilora if isinstance(prilora, PRILoRAConfig) else None
        self.prilora: PRILoRA | AttachedPRILoRA | None = given
        self.resume_from: Path | None = None if resume_from is None else Path(resume_from)
        self._staged: int | None = None  # the step of which a state waits for its checkpoint
        self._steps = 0  # of the optimizer, as the Trainer counts them
        self._warned = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        prilora = self.prilora
        if prilora is None and self.config is None:
            prilora = handle_of(model)
        if prilora is None:
            is_peft = any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)
            prilora = (attach_prilora if is_peft else apply_prilora)(model, self.config)
        if prilora.model is not model:
            raise ValueError(
                "PRILoRACallback: prilora must be the handle of the Trainer's model, got that of another"
                f" {type(prilora.model).__name__}; pass model=prilora.model"
            )
        self.prilora = prilora
        if checkpoints_reentrantly(args):
            model.enable_input_require_grads()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        prilora = self._handle(kwargs["model"])
        held = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        if not any(id(p) in held for layer in prilora.layers.values() for p in (layer.lora_a, layer.lora_b)):
            raise ValueError(
                "PRILoRACallback: the optimizer must hold parameters of the adapters, got none of them; let"
                " the Trainer make it, or make it after the adapters; DeepSpeed, and FSDP with flat"
                " parameters, are not supported"
            )
        if state.global_step > 0:
            self._resume(prilora, args, state)
        self._steps = prilora.steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps += 1
        if state.is_world_process_zero:
            self._warn()
        if control.should_save:
            self._stage(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._stage(args, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            warnings.warn(
                "PRILoRACallback: the state of PRILoRA is not saved, for the Trainer has saved elsewhere than"
                f" to {folder}; a run cannot be resumed from there",
                stacklevel=2,
            )
            return
        if self._staged != state.global_step:
            self._stage(args, state)
        _waiting(args, state.global_step).replace(folder / STATE)
        self._staged = None
        for path in folder.parent.glob(_waiting(args, "*").name):  # of processes that were stopped
            path.unlink()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / STATE).is_file():
            found, _ = read_state(Path(best) / STATE)
            prilora = self._handle(kwargs["model"])
            if _is_loaded(prilora, found):
                prilora.load_state_dict(found)

    def _handle(self, model: nn.Module) -> PRILoRA | AttachedPRILoRA:
        if self.prilora is None or self.prilora.model is not model:
            raise ValueError(
                "PRILoRACallback: the Trainer's model must be the one that was adapted, got another; pass the"
                " callback to Trainer(callbacks=...), with model=, not model_init="
            )
        return self.prilora

    def _warn(self) -> None:
        assert self.prilora is not None
        config = self.prilora.config
        first = -(-config.first_step // config.interval) * config.interval
        if self._warned or config.ratio == 0 or self.prilora.events or self._steps < first + config.interval:
            return
        self._warned = True
        warnings.warn(
            f"PRILoRACallback: A must have been pruned after step {first} of the optimizer, got no such event"
            f" in {self._steps} steps, of which PRILoRA has seen {self.prilora.steps}; see that the"
            " optimizer is a torch.optim.Optimizer that holds the adapters, close() was not called, and the"
            " layers are in training mode",
            stacklevel=2,
        )

    def _stage(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the state before the Trainer's checkpoint, which may be the end of the one before.

        Were it written after, a process that is stopped in between would leave no checkpoint with a state.
        """
        if not args.should_save or self.prilora is None:
            return
        path = _waiting(args, state.global_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = self.prilora.state_dict()
        replace_file(path, lambda temporary: write_state(temporary, own, {"step": state.global_step}))
        self._staged = state.global_step

    def _resume(
        self, prilora: PRILoRA | AttachedPRILoRA, args: TrainingArguments, state: TrainerState
    ) -> None:
        """Take up the state of the checkpoint from which the Trainer has loaded the adapters."""
        if self.resume_from is not None:
            folders = [self.resume_from]
        else:
            folders = [Path(f) for f in (args.resume_from_checkpoint,) if isinstance(f, str)]
            folders.append(_checkpoint(args, state))
        paths = [*(folder / STATE for folder in folders), _waiting(args, state.global_step)]
        there = [path for path in paths if path.is_file()]
        for path in there:
            found, facts = read_state(path)
            if facts.get("step") == state.global_step and _is_loaded(prilora, found):
                prilora.load_state_dict(found)
                folder = _checkpoint(args, state)  # what waits for one ends with the next
                if path == _waiting(args, state.global_step) and folder.is_dir() and args.should_save:
                    replace_file(folder / STATE, partial(shutil.copyfile, path))
                return
        what = f"that of other adapters, {there[0]}" if there else f"none of {', '.join(map(str, paths))}"
        raise ValueError(
            f"PRILoRACallback: the checkpoint of step {state.global_step} must have a state of PRILoRA, got"
            f" {what}; if it is not in {args.output_dir}, pass PRILoRACallback(resume_from=...); if it was"
            " not saved whole, resume from one before"
        )


def _is_loaded(prilora: PRILoRA | AttachedPRILoRA, state: dict[str, Any]) -> bool:
    """Whether A and B are those of the state, to the bit."""
    tensors = state["tensors"]
    for name, layer in prilora.layers.items():
        for part in ("lora_a", "lora_b"):
            own, saved = getattr(layer, part).detach().cpu(), tensors.get(f"{name}.{part}")
            if saved is None or saved.dtype != own.dtype or not torch.equal(saved, own):
                return False
    return True


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _waiting(args: TrainingArguments, step: int | str) -> Path:
    return Path(str(args.output_dir)) / f"prilora_state-{step}.safetensors"
