"""The arms of ``run mtadam``: how each steps by the weighted losses of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastkit.optim import MTAdam
from fastkit.recipes._mtadam_models import Losses


class Arm(NamedTuple):
    how: Literal["mtadam", "adam", "equal_norm"]
    weighted: bool = True  # False: all weights are 1
    power: int = 0  # the learning rate is times L to the power, of L terms


ARMS: Mapping[str, Arm] = {
    "mtadam": Arm("mtadam"),
    "adam_unbalanced": Arm("adam"),
    "adam_balanced": Arm("adam", weighted=False),
    "equal_norm": Arm("equal_norm"),
    "mtadam_xL": Arm("mtadam", power=1),
    "adam_unbalanced_xL": Arm("adam", power=1),
    "adam_balanced_xL": Arm("adam", weighted=False, power=1),
    "equal_norm_xL": Arm("equal_norm", power=1),
    "mtadam_byL": Arm("mtadam", power=-1),
}


class Stepper:
    """Steps a model by an arm; the optimizer is the state.

    Args:
        weights: of each term; the arm may leave them out.
        lr: of an arm without a factor.
        ranks: of MTAdam; None: all 1.
    """

    def __init__(
        self,
        arm: Arm,
        model: nn.Module,
        weights: Mapping[str, float],
        *,
        lr: float,
        ranks: Sequence[float] | None = None,
    ) -> None:
        self.arm = arm
        self.weights: dict[str, float] = dict(weights) if arm.weighted else dict.fromkeys(weights, 1.0)
        self.lr: float = lr * len(weights) ** arm.power
        self.params: list[nn.Parameter] = list(model.parameters())
        self.optimizer: torch.optim.Optimizer
        if arm.how == "mtadam":
            self.optimizer = MTAdam(self.params, self.lr, terms=list(weights), ranks=ranks)
        else:
            self.optimizer = torch.optim.Adam(self.params, self.lr)

    def step(self, losses: Losses) -> None:
        weighted = {
            term: None if loss is None else self.weights[term] * loss for term, loss in losses.items()
        }
        if isinstance(self.optimizer, MTAdam):
            self.optimizer.step(weighted)
            return
        self.optimizer.zero_grad()
        if self.arm.how == "equal_norm":
            for param, grad in zip(self.params, equal_norm(weighted, self.params), strict=True):
                param.grad = grad
        else:
            torch.stack([loss for loss in weighted.values() if loss is not None]).sum().backward()
        self.optimizer.step()


def equal_norm(losses: Losses, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Of each parameter: its gradients by all terms, scaled to the norm of the first term's, and added up.

    Norms are those of this batch alone. Where the first term does not reach a parameter, the next one that
    does takes its place; where it has no sample in the batch its norm is zero, and so is all that is scaled.
    """
    first = next(iter(losses.values()))
    if first is None:
        return [torch.zeros_like(param) for param in params]
    present = [loss for loss in losses.values() if loss is not None]
    grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in present]
    return [_scaled([grad for grad in of_param if grad is not None]) for of_param in zip(*grads, strict=True)]


def _scaled(grads: Sequence[Tensor]) -> Tensor | None:
    if not grads:
        return None
    norms = [grad.norm() for grad in grads]
    scales = [torch.where(norm > 0, norms[0] / norm, 0.0) for norm in norms]
    return torch.stack([scale * grad for scale, grad in zip(scales, grads, strict=True)]).sum(0)
