"""What recipes that fine-tune an encoder have in common: the task as tokens, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from fastkit.recipes import _tokens
from fastkit.recipes._encoder import Encoder, encoder, write_random
from fastkit.recipes._experiment import Run
from fastkit.recipes._glue import METRICS, Metric, Part, Task
from fastkit.recipes._tokens import HeldOut, Tokens


class TaskTokens:
    """A task as tokens, made once for all rows.

    ``config`` has ``length`` and ``tokens``: of a sentence or pair, and of a step, at most.
    """

    def __init__(
        self,
        task: Task,
        encoder: Encoder,
        source: str | None,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._tokenizer = encoder.tokenizer
        self._longest: int = min(config["length"], config["tokens"], encoder.longest)
        self._device = device
        self.train: Tokens = _tokens.tokenised(encoder.tokenizer, task.train, self._longest)
        self.held_out: dict[str, HeldOut] = {name: self.part(part) for name, part in task.held_out.items()}
        self.metric: Metric = METRICS[task.kind]
        self.classes: list[str] = task.classes
        self.source = source

    def part(self, part: Part) -> HeldOut:
        """Something to be judged by."""
        limit = max(
            self._longest, 32768 if self._device.type == "cuda" else 4096
        )  # no gradients: more at once
        return _tokens.held_out(_tokens.tokenised(self._tokenizer, part, self._longest), limit, self._device)

    def judged(self, name: str, logits: Tensor, y: Tensor) -> dict[str, float]:
        """Loss and metrics."""
        figures = {"loss": loss_of(logits, y).item(), **self.metric(y.numpy(), logits.numpy())}
        return {f"{name}_{figure}": value for figure, value in figures.items()}


class Count:
    """Steps that are done, as a part of a checkpoint."""

    count: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.count = state_dict["count"]


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return mse_loss(logits[:, 0], y) if y.is_floating_point() else cross_entropy(logits, y)


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Up over a share of the steps, and down to 0 over the others."""
    warm_up = max(1, round(warmup * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up + 1))
    )


def given_or_random(model: str | None, run: Run, task: Task) -> Encoder:
    """The encoder that was named, or a small one with random weights, made once and kept in the folder."""
    if model is not None:
        return encoder(model)
    folder = run.out / "encoder"
    if not folder.exists():
        write_random(folder, task.train.first + (task.train.second or []))
    return encoder(str(folder))
