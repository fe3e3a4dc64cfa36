"""What is found out about a model by calling it, with nothing of it changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit._autograd import without_autocast

TOKENS = 4
_EPS = torch.finfo(torch.float32).eps  # losses are computed in it, and TensorFloat-32 has 2**-10


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In eval; the training mode of each module is put back."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was in training:
            module.training = was


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """In eval and without autocast; the random numbers are put back too."""
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices), without_autocast(parameter), evaluating(model):
        yield


class Difference(NamedTuple):
    """Of what a model computes from what it was to compute."""

    what: str
    found: float
    expected: float


def compared(
    model: Any,
    forward: Callable[..., Any],
    fused: Callable[[type], Callable[..., Any]],
    logits_of: Callable[[Tensor], Tensor],
    *,
    counts: bool,
    masks: bool,
) -> tuple[Callable[..., Any], Difference | None]:
    """The fused forward, which returns what a model's own does, and where they differ on a few tokens.

    The model's logits are held to those of its head, which are rounded as they are; its loss to the cross
    entropy of its own logits, in which its dtype has no part; and the fused loss to that, as far as the
    rounding of logits explains. With ``counts`` also for ``num_items_in_batch``, with ``masks`` for labels of
    tokens that ``attention_mask`` masks.
    """
    weight: Tensor = model.get_output_embeddings().weight
    places = torch.arange(TOKENS, device=weight.device)
    ids = (places % len(weight))[None]
    given = {"input_ids": ids, "return_dict": True}
    masked = {"attention_mask": (places < TOKENS // 2).long()[None]}
    calls = [(given, {})]
    if counts:
        calls.append((given, {"num_items_in_batch": torch.tensor(2 * TOKENS)}))
    if masks:
        calls.append((given | masked, {}))
    with torch.no_grad(), undisturbed(model):
        made = fused(type(forward(model, labels=ids, **given)))
        for below, of_loss in calls:
            own, mine = (call(model, labels=ids, **below, **of_loss) for call in (forward, made))
            logits = logits_of(model.base_model(**below).last_hidden_state)
            largest = float(own.logits.abs().max())
            apart = (own.logits.double() - logits.double()).abs()
            # 2**-18: of sums in another order, as experts' are on a GPU.
            if not bool(apart.max() <= max(2 * torch.finfo(weight.dtype).eps, 2**-18) * largest):
                worst = int(apart.argmax())
                return made, Difference("logit", *(float(t.flatten()[worst]) for t in (own.logits, logits)))
            losses = cross_entropy(own.logits[0, :-1].float().double(), ids[0, 1:], reduction="none")
            expected = float(losses.sum() / (2 * TOKENS) if of_loss else losses.mean())
            found = float(own.loss)
            rounding = max(16 * _EPS * (largest + expected), torch.finfo(own.loss.dtype).eps * expected)
            if not abs(found - expected) <= rounding:
                return made, Difference("loss", found, expected)
            eps = max(torch.finfo(weight.dtype).eps, _EPS if weight.device.type == "cpu" else 2**-10)
            if not abs(float(mine.loss) - expected) <= 16 * eps * (largest + expected):
                return made, Difference("loss", found, float(mine.loss))
    return made, None
