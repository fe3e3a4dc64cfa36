"""The arms of ``run prilora``: what each trains of a model, and how it is saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastkit._command import Refusal
from fastkit.methods.prilora import PRILoRA, PRILoRAConfig, apply_prilora
from fastkit.recipes._encoder import Encoder, encoder, quiet
from fastkit.recipes._experiment import FORMAT, Stateful, replace_folder, seeded, write_json


class Arm(NamedTuple):
    how: Literal["peft", "prilora", "full"]
    ranks: tuple[int, int] = (8, 8)  # of the first and the last block
    importance: Literal["input", "magnitude", "random"] | None = None  # None: nothing is pruned


ARMS: Mapping[str, Arm] = {
    "uniform": Arm("peft"),
    "4-12": Arm("prilora", (4, 12)),
    "12-4": Arm("prilora", (12, 4)),
    "uniform+prune": Arm("prilora", (8, 8), "input"),
    "prilora": Arm("prilora", (4, 12), "input"),
    "magnitude": Arm("prilora", (4, 12), "magnitude"),
    "random": Arm("prilora", (4, 12), "random"),
    "full": Arm("full"),
}


def prilora_config(arm: Arm, seed: int, options: Mapping[str, Any]) -> PRILoRAConfig:
    """Of an arm with adapters; ``options`` are alpha, scaling, ratio, interval and mode."""
    return PRILoRAConfig(
        rank_start=arm.ranks[0],
        rank_final=arm.ranks[1],
        rounding="budget",  # the same number of parameters, whatever the number of blocks
        alpha=options["alpha"],
        scaling=options["scaling"],
        ratio=0.0 if arm.importance is None else options["ratio"],
        interval=options["interval"],
        mode=options["mode"],
        importance=arm.importance or "input",
        seed=seed,
    )


class Adapted:
    """A model as an arm trains it."""

    def __init__(self, name: str, model: nn.Module, config: PRILoRAConfig) -> None:
        arm = ARMS[name]
        self.name = name
        self.handle: PRILoRA | None = None
        self.model: nn.Module = model
        if arm.how == "peft":
            self.model = with_peft(model, config)
        elif arm.how == "prilora":
            self.handle = apply_prilora(model, config)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def state(self) -> Stateful:
        """All that training changes."""
        return self.handle or _Trained(self.model)

    def facts(self) -> dict[str, float]:
        a = list(self._matrices("a"))
        size = sum(matrix.numel() for matrix in a)
        zeros = sum(int((matrix == 0).sum()) for matrix in a)
        return {
            "adapter_parameters": size + sum(matrix.numel() for matrix in self._matrices("b")),
            "trained_parameters": sum(parameter.numel() for parameter in self.trained),
            "prunings": len(self.handle.events) if self.handle else 0,
            "sparsity": zeros / size if size else 0.0,
        }

    def _matrices(self, which: Literal["a", "b"]) -> Iterator[Tensor]:
        """A, with what a mask keeps at zero, or B, of each adapter."""
        if self.handle is not None:
            for layer in self.handle.layers.values():
                yield layer.lora_a.masked_fill(~layer.mask, 0.0) if which == "a" else layer.lora_b
            return
        for name, parameter in self.model.named_parameters():
            if f".lora_{which.upper()}." in name:
                yield parameter

    def save(self, path: Path, *, source: str | None, classes: Sequence[str]) -> None:
        """A folder for ``load_classifier``; ``source`` None: the encoder is the run's own."""
        facts = {"format": FORMAT, "arm": self.name, "model": source, "classes": list(classes)}

        def write(folder: Path) -> None:
            saved: Any = self.handle or self.model
            with quiet():
                saved.save_pretrained(folder)
            write_json(folder / "recipe.json", facts)

        replace_folder(path, write)

    def close(self) -> None:
        """No hook on optimizers is left."""
        if self.handle is not None:
            self.handle.close()


class _Trained:
    """The parameters that are trained, as a part of a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(state_dict[name])


def with_peft(model: nn.Module, config: PRILoRAConfig) -> nn.Module:
    """peft's own LoRA of one rank: adapters where PRILoRA has them, and trained in full what it trains so."""
    from peft import LoraConfig, TaskType, get_peft_model

    with seeded(0):
        handle = apply_prilora(model, config)
        targets, beside = list(handle.layers), list(handle.modules_to_save)
        handle.undo()
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.rank_start,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=config.scaling == "rslora",
        fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets),
        target_modules=targets,
        modules_to_save=beside,
    )
    with quiet():
        return get_peft_model(model, lora)  # pyright: ignore[reportArgumentType]


def load_classifier(folder: Path, *, model: str | None = None) -> tuple[nn.Module, Any, list[str]]:
    """A model from the folder ``models`` of a run, in eval, its tokenizer, and the names of its classes.

    Adapters, of whichever arm, are read by peft.

    Args:
        model: the encoder, if it is not where it was.

    Raises:
        Refusal: the folder is not one of ``run prilora``, or the encoder cannot be read.
    """
    from peft import PeftModel

    try:
        facts = json.loads((folder / "recipe.json").read_bytes())
        arm, classes, source = ARMS[facts["arm"]], facts["classes"], facts["model"]
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{folder} must be a model of run prilora, got another ({error!r})") from error
    base = encoder(model or source or str(folder.resolve().parent.parent / "encoder"))
    if arm.how == "full":
        return Encoder(str(folder), base.tokenizer).classifier(classes).eval(), base.tokenizer, classes
    classifier = base.classifier(classes)
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(classifier, str(folder))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # of half a dozen kinds, from peft and safetensors
        raise Refusal(
            f"{folder} must hold an adapter that fits the encoder, got another ({error})"
        ) from error
    return adapted.eval(), base.tokenizer, classes
