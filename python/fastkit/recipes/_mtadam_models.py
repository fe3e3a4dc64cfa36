"""The models of ``run mtadam``: each has several losses, its terms, of which the first is the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit.recipes._experiment import read_model, write_checkpoint

TaskName = Literal["classes", "mixed", "ratio"]
Losses = dict[str, Tensor | None]  # of each term; None: it has no sample in the batch


class Model(nn.Module):
    """Of grey images ``(B, H, W)`` with classes ``(B,)``."""

    terms: tuple[str, ...]

    def __init__(self, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.config: dict[str, int] = {"height": height, "width": width, "classes": classes}

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        """The terms of a batch, without weights."""
        raise NotImplementedError

    def judged(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Figures of a part of the data."""
        raise NotImplementedError


class Classifier(Model):
    """A term for each class: the sum of its samples' losses, by the size of the batch."""

    def __init__(self, height: int, width: int, classes: int) -> None:
        super().__init__(height, width, classes)
        self.terms = tuple(f"class_{k}" for k in range(classes))
        self.layers = _layers(height * width, 128, 64, classes)

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        loss = cross_entropy(self.layers(x.flatten(1)), y, reduction="none")
        counts = torch.bincount(y, minlength=len(self.terms)).tolist()
        return {
            term: (loss * (y == k)).sum() / len(y) if counts[k] else None for k, term in enumerate(self.terms)
        }

    def judged(self, x: Tensor, y: Tensor) -> dict[str, float]:
        logits = self.layers(x.flatten(1))
        hit = (logits.argmax(1) == y).double()
        of_class = [hit[y == k].mean() for k in y.unique().tolist()]
        return {
            "accuracy": hit.mean().item(),
            "worst_class": torch.stack(of_class).min().item(),
            "loss": cross_entropy(logits, y).item(),
        }


class Autoencoder(Model):
    """A class, the image again, and little activity: from one code, by terms of three kinds."""

    terms = ("classification", "reconstruction", "activity")

    def __init__(self, height: int, width: int, classes: int) -> None:
        super().__init__(height, width, classes)
        self.encoder = nn.Sequential(_layers(height * width, 128, 64), nn.ReLU())
        self.decoder = _layers(64, 128, height * width)
        self.head = nn.Linear(64, classes)

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        x = x.flatten(1)
        code = self.encoder(x)
        return {
            "classification": cross_entropy(self.head(code), y),
            "reconstruction": (self.decoder(code) - x).square().mean(),
            "activity": code.mean(),  # of what is not negative: the L1 norm by its size
        }

    def judged(self, x: Tensor, y: Tensor) -> dict[str, float]:
        logits = self.head(self.encoder(x.flatten(1)))
        accuracy = (logits.argmax(1) == y).double().mean().item()
        return {"accuracy": accuracy, **_values(self.losses(x, y))}


class Halves(Model):
    """The upper and the lower half of the image again, from 4 numbers: too few for both."""

    terms = ("upper", "lower")

    def __init__(self, height: int, width: int, classes: int) -> None:
        super().__init__(height, width, classes)
        self.encoder = _layers(height * width, 128, 4)
        self.decoder = _layers(4, 128, height * width)

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        error = (self.decoder(self.encoder(x.flatten(1))).view_as(x) - x).square()
        half = x.shape[1] // 2
        return {"upper": error[:, :half].mean(), "lower": error[:, half:].mean()}

    def judged(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return _values(self.losses(x, y))


MODELS: Mapping[TaskName, type[Model]] = {"classes": Classifier, "mixed": Autoencoder, "ratio": Halves}


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _values(losses: Losses) -> dict[str, float]:
    return {term: loss.item() for term, loss in losses.items() if loss is not None}


def save_model(path: Path, task: TaskName, model: Model) -> None:
    """What ``load_model`` reads back."""
    write_checkpoint(path, {"task": task, "config": model.config, "state_dict": model.state_dict()})


def load_model(path: Path) -> Model:
    """A model from the folder ``models`` of a run, in eval.

    Raises:
        Refusal: the file is not one of ``run mtadam``.
    """

    def build(state: dict[str, Any]) -> Model:
        model = MODELS[state["task"]](**state["config"])
        model.load_state_dict(state["state_dict"])
        return model.eval()

    return read_model(path, "mtadam", build)
