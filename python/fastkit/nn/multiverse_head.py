"""Many orthogonal classifier heads on one input, of which the weak ones are eliminated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastkit import ops
from fastkit._autograd import autocasts
from fastkit.ops._checks import FLOATING, MOST, check_device, check_int, check_number, may_look_at
from fastkit.reference.multihead_loss import Problem
from fastkit.reference.multihead_loss_penalty import PenaltyKind

HeadReduction = Literal["mean", "sum"]
Inference = Literal["mean_logits", "mean_probs", "best"]
HeadInit = Literal["normal", "orthogonal"]
_OP = "MultiverseHead"
_STD = 0.02  # of a weight at first


class MultiverseLoss(NamedTuple):
    """What ``MultiverseHead.loss`` returns. Gradients flow through ``loss``."""

    loss: Tensor  # ()
    head_losses: Tensor  # (H,), 0 where a head is eliminated
    correct: Tensor  # (H,) int64
    count: Tensor  # () int64  # pyright: ignore[reportIncompatibleMethodOverride]
    penalty: Tensor  # ()


class MultiverseHead(nn.Module):
    """Where a classifier has one linear layer: H of them, pushed to be orthogonal to each other.

    With K the active heads, z_h the logits of head h, and ``CE_h`` its mean loss::

        z_h = x weight[h]^T + bias[h]
        loss = 1 / K (sum over active h of CE_h + ortho_weight penalty(weight)),  or without 1 / K ("sum")
        forward(x) = mean over active h of z_h

    The mean of the logits is that of one linear layer, the mean of the heads: ``fold()`` gives it, and a
    finished model costs no more than one with a single head. Which heads are weak is not decided here, but by
    ``fastkit.methods.multiverse.HeadEliminator``; ``eliminate`` takes them out for good.

    Args:
        in_features: D, the width of x.
        num_classes: C; 1 in regression.
        num_heads: H.
        problem: ``"single_label"``, ``"multi_label"`` or ``"regression"``, as of
            ``fastkit.ops.multihead_loss``.
        ortho: the kind of the penalty, as of ``fastkit.ops.orthogonality_penalty``; None for none.
        ortho_weight: its factor, not negative.
        huber_width, center_classes: as of ``fastkit.ops.orthogonality_penalty``.
        head_reduction: ``"mean"`` keeps loss and gradients at the size of a single head's, and they do not
            jump where heads go; ``"sum"`` has the same minimum.
        inference: what ``forward`` gives: ``"mean_logits"``; ``"mean_probs"``, the logarithm of the heads'
            mean probability (of each class, with several labels); or ``"best"``, the logits of the active
            head with the least score (see ``scores``).
        init: ``"normal"``, or ``"orthogonal"``: of each class rows that are orthogonal, and as long as normal
            ones. Biases begin at 0.
        allow_overcomplete: let H exceed D, where H rows cannot be orthogonal.
        label_smoothing, ignore_index: of a single label.
        device, dtype: of the parameters.

    The number of heads, the kind of the penalty and its factor, the mean over heads, and inference are our
    choice: the paper's text beyond its abstract was not at hand.

    Shape:
        x ``(B, D)``, in the dtype of ``weight`` or under autocast; forward ``(B, C)``; target as of
        ``fastkit.ops.multihead_loss``. Parameters: ``weight`` (H, C, D), ``bias`` (H, C). Buffers:
        ``active`` (H,) bool; ``scores`` (H,) float32, a loss of each head, which ``"best"`` goes by: whoever
        has estimates writes them there.

    Raises:
        ValueError: an option, or a shape, is not as above; the last head would be eliminated.
        TypeError: an option is of another type; x is of another dtype.
        RuntimeError: a state with no active head is loaded; x is on another device.
        What ``fastkit.ops.multihead_loss`` raises, by ``loss``.

    Numerics: those of the ops, in float32 for half precision. The mean of the heads is taken in the dtype of
    the arithmetic; ``fold()`` rounds it to that of ``weight``, and is ``forward`` up to that rounding.

    Support: ``torch.compile(fullgraph=True)``; autocast; double backward; ``torch.func``, in which the ops
    run their reference. The mask is a buffer: it is saved, loaded and moved with the model.

    Source: Malkiel, Wolf, "Maximal Multiverse Learning for Promoting Cross-Task Generalization of Fine-Tuned
    Language Models", EACL 2021; Littwin, Wolf, "The Multiverse Loss for Robust Transfer Learning", CVPR 2016.

    Example:
        >>> import torch, fastkit.nn
        >>> head = fastkit.nn.MultiverseHead(16, 3, 8)
        >>> x, target = torch.randn(4, 16), torch.tensor([0, 2, 1, 1])
        >>> head.loss(x, target).loss.backward()
        >>> head(x).shape
        torch.Size([4, 3])
    """

    weight: nn.Parameter
    bias: nn.Parameter
    active: Tensor
    scores: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_heads: int = 128,
        *,
        problem: Problem = "single_label",
        ortho: PenaltyKind | None = "abs",
        ortho_weight: float = 0.005,
        huber_width: float = 1e-2,
        center_classes: bool = False,
        head_reduction: HeadReduction = "mean",
        inference: Inference = "mean_logits",
        init: HeadInit = "normal",
        allow_overcomplete: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("in_features", in_features),
            ("num_classes", num_classes),
            ("num_heads", num_heads),
        ):
            check_int(_OP, name, size)
            if size < 1:
                raise ValueError(f"{_OP}: {name} must be at least 1, got {size}")
        if num_heads > in_features and not allow_overcomplete:
            raise ValueError(
                f"{_OP}: num_heads must be at most in_features = {in_features}, or their rows cannot be"
                f" orthogonal, got {num_heads}; pass allow_overcomplete=True for more"
            )
        for name, value, choices in (
            ("problem", problem, get_args(Problem)),
            ("ortho", ortho, (*get_args(PenaltyKind), None)),
            ("head_reduction", head_reduction, get_args(HeadReduction)),
            ("inference", inference, get_args(Inference)),
            ("init", init, get_args(HeadInit)),
        ):
            if value not in choices:
                raise ValueError(
                    f"{_OP}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}"
                )
        if problem == "single_label" and num_classes == 1:
            raise ValueError(
                f'{_OP}: num_classes must be at least 2 with problem="single_label", got 1; take'
                ' problem="multi_label" or "regression"'
            )
        if problem == "regression" and num_classes != 1:
            raise ValueError(f'{_OP}: num_classes must be 1 with problem="regression", got {num_classes}')
        if problem == "regression" and inference == "mean_probs":
            raise ValueError(
                f'{_OP}: inference must be "mean_logits" or "best" with problem="regression", got'
                f" {inference!r}; there are no probabilities"
            )
        check_number(_OP, "ortho_weight", ortho_weight)
        if not 0 <= ortho_weight <= MOST:
            raise ValueError(f"{_OP}: ortho_weight must be finite and not negative, got {ortho_weight}")
        check_number(_OP, "huber_width", huber_width)
        if not 0 < huber_width <= MOST:
            raise ValueError(f"{_OP}: huber_width must be positive and finite, got {huber_width}")
        if not isinstance(center_classes, bool):
            raise TypeError(f"{_OP}: center_classes must be True or False, got {center_classes!r}")
        if center_classes and num_classes == 1:
            raise ValueError(f"{_OP}: center_classes must be False for one class, whose mean is itself")
        check_number(_OP, "label_smoothing", label_smoothing)
        if not 0 <= label_smoothing < 1 or (label_smoothing and problem != "single_label"):
            raise ValueError(
                f"{_OP}: label_smoothing must be in [0, 1), and 0 but for a single label, got"
                f" {label_smoothing} with problem={problem!r}"
            )
        check_int(_OP, "ignore_index", ignore_index)
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"{_OP}: dtype must be floating point and real, got {dtype}")
        self.in_features: int = in_features
        self.num_classes: int = num_classes
        self.num_heads: int = num_heads
        self.problem: Problem = problem
        self.ortho: PenaltyKind | None = ortho
        self.ortho_weight: float = ortho_weight
        self.huber_width: float = huber_width
        self.center_classes: bool = center_classes
        self.head_reduction: HeadReduction = head_reduction
        self.inference: Inference = inference
        self.init: HeadInit = init
        self.label_smoothing: float = label_smoothing
        self.ignore_index: int = ignore_index
        self.weight = nn.Parameter(
            torch.empty(num_heads, num_classes, in_features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(num_heads, num_classes, device=device, dtype=dtype))
        self.register_buffer("active", torch.ones(num_heads, dtype=torch.bool, device=device))
        self.register_buffer("scores", torch.zeros(num_heads, dtype=torch.float32, device=device))
        self.register_load_state_dict_pre_hook(_check_loaded)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All heads anew, and all of them active."""
        nn.init.normal_(self.weight, std=_STD)
        if self.init == "orthogonal" and not self.weight.is_meta:
            for c in range(self.num_classes):
                rows = torch.empty(self.num_heads, self.in_features, device=self.weight.device)
                self.weight[:, c] = nn.init.orthogonal_(rows) * (_STD * math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)
        self.active.fill_(True)
        self.scores.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (B, D) -> (B, C)
        """What the heads say together, by ``inference``."""
        self._check(x)
        if self.inference == "mean_logits":
            return linear(x, *self._mean())
        if self.inference == "best":
            scores = self.scores.masked_fill(~self.active, torch.inf)
            best = scores.nan_to_num(torch.inf).argmin()
            weight, bias = (t.index_select(0, best.view(1))[0] for t in (self.weight, self.bias))
            return linear(x, weight, bias)
        z = self.head_logits(x)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        share = self.active.to(z.dtype) / self.active.sum()
        if self.problem == "multi_label":
            p = torch.einsum("bhc,h->bc", z.sigmoid(), share)
            return torch.logit(p)
        return torch.einsum("bhc,h->bc", z.softmax(2), share).log()

    def head_logits(self, x: Tensor) -> Tensor:  # (B, D) -> (B, H, C)
        """Of each head, those that are eliminated too, whose weight is 0."""
        self._check(x)
        return linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(
            1, (self.num_heads, self.num_classes)
        )

    def loss(self, x: Tensor, target: Tensor, *, class_weight: Tensor | None = None) -> MultiverseLoss:
        """The loss of training; of each head its own, and how much it has right, for ``HeadEliminator``.

        Where all rows are ignored, the penalty is what is left of it.
        """
        self._check(x)
        found = ops.multihead_loss(
            x, self.weight, self.bias, target, problem=self.problem, active=self.active,
            class_weight=class_weight, label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
        )  # fmt: skip
        penalty = self.penalty()
        total = found.loss.sum() + self.ortho_weight * penalty
        if self.head_reduction == "mean":
            total = total / self.active.sum()
        return MultiverseLoss(total, found.loss, found.correct, found.count, penalty)

    def penalty(self) -> Tensor:  # ()
        """``orthogonality_penalty`` of the active heads, without its factor; 0 where there is none."""
        if self.ortho is None or self.ortho_weight == 0:
            return self.weight.new_zeros((), dtype=torch.promote_types(self.weight.dtype, torch.float32))
        return ops.orthogonality_penalty(
            self.weight, kind=self.ortho, huber_width=self.huber_width, active=self.active,
            center_classes=self.center_classes,
        )  # fmt: skip

    @property
    def num_active(self) -> int:
        return int(self.active.sum())

    @torch.no_grad()
    def eliminate(self, heads: Iterable[int], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Takes heads out, for good: rows, their gradients, and what ``optimizer`` keeps of them become 0.

        With all of that 0 neither momentum nor weight decay moves them again, in any optimizer of PyTorch
        that keeps its state by parameter: all but LBFGS.
        """
        chosen = sorted(set(heads))
        for head in chosen:
            check_int(_OP, "heads", head)
            if not 0 <= head < self.num_heads:
                raise ValueError(f"{_OP}: heads must be in [0, {self.num_heads}), got {head}")
        if not chosen:
            return
        places = torch.tensor(chosen, device=self.active.device)
        active = self.active.index_fill(0, places, False)
        if not bool(active.any()):
            raise ValueError(f"{_OP}: heads must leave one that is active, got all {self.num_active} of them")
        self.active.copy_(active)
        for parameter in (self.weight, self.bias):
            parameter[places] = 0
            if parameter.grad is not None:
                parameter.grad[places] = 0
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            for value in kept.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[places] = 0

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The linear layer whose logits are the heads' mean."""
        weight, bias = self._mean()
        folded = nn.Linear(
            self.in_features, self.num_classes, device=self.weight.device, dtype=self.weight.dtype
        )
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        return folded

    @torch.no_grad()
    def agreement(self, x: Tensor) -> Tensor:  # (B, D) -> ()
        """The share of rows of which all active heads say the same class; of regression there is none."""
        if self.problem == "regression":
            raise ValueError(f'{_OP}: agreement is of classes, and problem="regression" has none')
        z = self.head_logits(x)[:, self.active]
        said = z.argmax(2, keepdim=True) if self.problem == "single_label" else z > 0
        return (said == said[:, :1]).flatten(1).all(1).double().mean()

    @torch.no_grad()
    def mean_abs_cosine(self) -> Tensor:  # ()
        """Of all pairs of active heads' rows of the same class; 0 for one head."""
        kept = self.num_active
        total = ops.orthogonality_penalty(self.weight, kind="cos_abs", active=self.active)
        return total / max(self.num_classes * kept * (kept - 1) // 2, 1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, num_heads={self.num_heads},"
            f" problem={self.problem!r}, ortho={self.ortho!r}, ortho_weight={self.ortho_weight:g}"
        )

    def _mean(self) -> tuple[Tensor, Tensor]:
        """Of the active heads, weight (C, D) and bias (C,)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        share = self.active.to(dtype) / self.active.sum()
        weight = (share @ self.weight.flatten(1).to(dtype)).unflatten(0, (self.num_classes, self.in_features))
        return weight.to(self.weight.dtype), (share @ self.bias.to(dtype)).to(self.bias.dtype)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: x must be a tensor, got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"{_OP}: x must have shape (B, {self.in_features}), got {tuple(x.shape)}")
        check_device(_OP, "x", x, self.weight, "weight")
        if x.dtype != self.weight.dtype and not (x.is_floating_point() and autocasts(x)):
            raise TypeError(
                f"{_OP}: x must have the dtype of weight, {self.weight.dtype}, got {x.dtype}; cast it, or run"
                " under torch.autocast"
            )


def _check_loaded(_: nn.Module, state: Mapping[str, Any], prefix: str, *_others: object) -> None:
    """Before anything is changed."""
    active = state.get(f"{prefix}active")
    if isinstance(active, Tensor) and may_look_at(active) and not bool(active.any()):
        raise RuntimeError(f"{_OP}: active must have a head that takes part, got a state without one")
