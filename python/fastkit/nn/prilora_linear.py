"""A linear layer with a low-rank adapter whose A is pruned by what the layer sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fastkit import ops
from fastkit._autograd import transforms
from fastkit.nn.prilora_linear_base import device_of, features, is_conv1d, is_product
from fastkit.nn.prilora_linear_count import count_
from fastkit.ops.lora_linear import low_rank


class PRILoRALinear(nn.Module):
    """A frozen linear layer and a trained low-rank addition, in the place of the layer.

    ::

        y = x W^T + bias + alpha / rank (dropout(x) (mask * A)^T) B^T

    In training it also sums the squares of each column of x, before dropout, in the read of x that A makes
    anyway. ``fold_()``, to be called once after each step of the optimizer, moves that sum into an average
    over steps; ``prune_(ratio)`` zeroes the entries of each row of A with the least
    ``|A_ij| sqrt(average_j)``. So it makes no difference into how many batches a step is cut.

    Args:
        base_layer: what is adapted: an ``nn.Linear``, a transformers ``Conv1D``, or any other module from
            ``(..., D)`` to ``(..., O)`` that has ``in_features`` and ``out_features``, as quantised layers
            do: then it is called, and the addition is made apart and added to what it returns. Its
            parameters are frozen, also where another module shares them.
        rank: R, the rows of A; at most min(D, O).
        alpha: the addition is scaled by ``alpha / rank`` (16: our choice).
        dropout: the probability with which an entry of x is dropped in front of A.
        beta: the weight of the past in the average (0.9: our choice).
        statistic: whether squares are summed at all; False where nothing will be pruned.

    Shape:
        x ``(..., D)``, y ``(..., O)``. Parameters: ``lora_a`` (R, D), ``lora_b`` (O, R), in the dtype of the
        base layer's weight, float32 for half precision. Buffers: ``mask`` (R, D), bool, True where A is kept;
        ``input_square`` (D,), float32, the average; ``folds``, how often it was folded. The base layer's
        parameters are under ``base_layer``. ``square_sum`` (D,), float32, the sum since the last fold, is no
        state: a load drops it. ``enabled = False`` makes it the base layer, which counts nothing.

    Raises:
        ValueError: an option, or the base layer, are not as above. The ``out_proj`` of
            ``nn.MultiheadAttention`` is refused: its weight is read past the layer.
        TypeError, RuntimeError: as ``fastkit.ops.lora_linear``; RuntimeError also for what ``merge`` and
            ``unmerge`` refuse, for training, saving or loading a merged layer, and for pruning before the
            first fold.

    Initialisation: ``reset_parameters()``: A uniform in +-1 / sqrt(D), B zero (as in PEFT), so that at first
    y is the base layer's; all of A is kept, and nothing was counted.

    Numerics: those of ``fastkit.ops.lora_linear``. The average is ``q = beta q + (1 - beta) s``, from q = s
    at the first fold; a sum s with a NaN or inf is left out whole. ``half()`` and ``bfloat16()`` leave the
    average in float32.

    Support: ``torch.compile(fullgraph=True)``, autocast. What gradient checkpointing computes again in
    backward is not counted again, of either kind, compiled or not. In eval, and under ``torch.func``
    transforms, nothing is summed; padding is, as any token. ``nn.TransformerEncoderLayer`` reads weights past
    its layers in eval, unless ``torch.backends.mha.set_fastpath_enabled(False)``.

    Source: Benedek, Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", Findings of EACL 2024:
    pruning A by the magnitude of its entries and the statistics of its input. The average of squares, beta,
    rows as groups and the seed of the average are our choice. LoRA: Hu et al., ICLR 2022.

    Example:
        >>> import torch, fastkit.nn
        >>> layer = fastkit.nn.PRILoRALinear(torch.nn.Linear(64, 32), rank=4)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 32])
        >>> layer.fold_()
        >>> int((~layer.prune_(0.5)).sum())  # half of 4 rows of 64
        128
    """

    in_features: int
    out_features: int
    base_layer: nn.Module
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    square_sum: Tensor
    mask: Tensor
    input_square: Tensor
    folds: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        beta: float = 0.9,
        statistic: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base_layer)
        largest = min(self.in_features, self.out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"PRILoRALinear: rank must be in [1, {largest}], the least of in_features and out_features,"
                f" got {rank}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"PRILoRALinear: dropout must be in [0, 1), got {dropout}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"PRILoRALinear: beta must be in [0, 1), got {beta}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"PRILoRALinear: alpha must be positive and finite, got {alpha}")
        self.base_layer = base_layer.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.beta = beta
        self.statistic = statistic
        weight = getattr(base_layer, "weight", None)
        dtype = (
            torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32
        )
        device = device_of(base_layer)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.register_buffer("mask", torch.ones(rank, self.in_features, dtype=torch.bool, device=device))
        self.register_buffer("input_square", torch.zeros(self.in_features, device=device))
        self.register_buffer("folds", torch.zeros((), dtype=torch.int64, device=device))
        # Not a buffer: DistributedDataParallel would overwrite each rank's sum with that of the first.
        self.square_sum = torch.zeros(self.in_features, device=device)
        self.enabled = True
        self._unmerged: Tensor | None = None
        self._merged = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All but the base layer as at the start, the statistic too."""
        bound = 1 / math.sqrt(self.in_features)
        self.lora_a.uniform_(-bound, bound)
        self.mask.fill_(True)
        for zeros in (self.lora_b, self.input_square, self.folds, self.square_sum):
            zeros.zero_()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base layer's."""
        return self.base_layer.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return getattr(self.base_layer, "bias", None)

    @property
    def merged(self) -> bool:
        return self._merged

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self._merged and self.training:
            raise RuntimeError(
                "PRILoRALinear: a merged layer cannot be trained; call unmerge(), or eval() for inference"
            )
        if self._merged or not self.enabled:
            return self.base_layer(x)
        lora_x = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        adapter = (self.lora_a, self.lora_b, self.scale)
        counts = self.statistic and self.training and not transforms()
        if self._is_plain():
            weight = self.weight.T if is_conv1d(self.base_layer) else self.weight
            if not counts:
                return ops.lora_linear(x, weight, self.bias, *adapter, mask=self.mask, lora_x=lora_x)
            y, square_sum = ops.lora_linear_with_stats(
                x, weight, self.bias, *adapter, mask=self.mask, lora_x=lora_x
            )
        else:
            y = self.base_layer(x)
            delta, square_sum = low_rank(x, *adapter, mask=self.mask, lora_x=lora_x, stats=counts)
            y = y + delta.to(y.dtype)
        if counts:
            count_(self.square_sum, square_sum)
        return y

    @torch.no_grad()
    def fold_(self) -> None:
        """Moves the sum of squares since the last call into the average; call it once per optimizer step.

        Without a training forward since then, with nothing but zeros, or with a NaN or inf in the sum, the
        average stays as it is. What a hard mask has pruned is zeroed again: an optimizer with momentum moves
        it without a gradient. Nothing is read back from a GPU.
        """
        self.lora_a.masked_fill_(~self.mask, 0.0)
        sums = self.square_sum
        counts = sums.isfinite().all() & (sums > 0).any()
        average = torch.where(self.folds > 0, self.beta * self.input_square + (1 - self.beta) * sums, sums)
        self.input_square.copy_(torch.where(counts, average, self.input_square))
        self.folds.add_(counts)
        sums.zero_()

    @property
    def input_norm(self) -> Tensor:
        """``sqrt(input_square)``, by which the columns of A are weighed in pruning."""
        return self.input_square.sqrt()

    @torch.no_grad()
    def prune_(self, ratio: float, *, hard: bool = False) -> Tensor:
        """Zero the ``floor(ratio D)`` least important entries of each row of A; returns what is kept (R, D).

        ``hard``: the mask stays, so that pruned entries count as zero and get no gradient, and are zero after
        each ``fold_``; being the least, they are the first to be pruned again. Else they may grow.
        """
        if not bool(self.folds > 0):
            raise RuntimeError(
                "PRILoRALinear: prune_ needs a statistic, and none was folded; train, and call fold_() after"
                " each optimizer step"
            )
        kept = ops.prune_rows_(self.lora_a, self.input_norm, ratio)
        self.mask.copy_(kept if hard else torch.ones_like(kept))
        return kept

    def delta_weight(self) -> Tensor:
        """``alpha / rank B (mask * A)``, (O, D), in float32, or float64 for a float64 layer."""
        dtype = torch.float64 if self.lora_a.dtype == torch.float64 else torch.float32
        a = self.lora_a.detach().to(dtype).masked_fill(~self.mask, 0.0)
        return self.scale * (self.lora_b.detach().to(dtype) @ a)

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> Self:
        """Add the low-rank part to the base layer's weight, for inference without it.

        The sum is made in float32 (float64) and rounded to the weight's dtype once. ``reversible`` keeps the
        weight as it was: a subtraction would not give its bits back. Refused for a base layer whose weight is
        not a plain floating-point tensor, as a quantised one.
        """
        if self._merged:
            raise RuntimeError("PRILoRALinear: merge: the layer is merged already; call unmerge() first")
        if not is_product(self.base_layer):
            raise RuntimeError(
                f"PRILoRALinear: merge: the weight of {type(self.base_layer).__name__} is not a plain"
                " floating-point tensor; dequantise the layer first, or keep the adapter apart"
            )
        weight, delta = self.weight, self.delta_weight()
        self._unmerged = weight.detach().clone() if reversible else None
        delta = delta.T if is_conv1d(self.base_layer) else delta
        weight.copy_(weight.to(delta.dtype) + delta)
        self._merged = True
        return self

    @torch.no_grad()
    def unmerge(self) -> Self:
        """Put the base layer's weight back, bit for bit; refused after ``merge(reversible=False)``."""
        if not self._merged:
            raise RuntimeError("PRILoRALinear: unmerge: the layer is not merged; call merge() first")
        if self._unmerged is None:
            raise RuntimeError(
                "PRILoRALinear: unmerge: the weight was merged with reversible=False, and is not known any"
                " more; load it from its checkpoint"
            )
        if self._unmerged.dtype != self.weight.dtype:
            raise RuntimeError(
                f"PRILoRALinear: unmerge: the weight was {self._unmerged.dtype} when it was merged, and is"
                f" {self.weight.dtype} now; load it from its checkpoint"
            )
        self.weight.copy_(self._unmerged)
        self._unmerged, self._merged = None, False
        return self

    def extra_repr(self) -> str:
        parts = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, beta={self.beta:g}"
        return f"{parts}{', merged' if self._merged else ''}"

    def _is_plain(self) -> bool:
        """Whether calling the base layer is a product with its weight and nothing else."""
        base = self.base_layer
        hooks = (
            base._forward_hooks,
            base._forward_pre_hooks,
            base._backward_hooks,
            base._backward_pre_hooks,
            "forward" in vars(base),
        )
        return is_product(base) and not any(hooks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        average = self.input_square
        super()._apply(fn, recurse)
        device = self.input_square.device
        if self.input_square.dtype != torch.float32:  # fn is half() or the like
            self.input_square = average if average.device == device else average.to(device)
        if self.square_sum.device != device:
            fresh = device.type == "meta" or self.square_sum.device.type == "meta"
            self.square_sum = (
                self.input_square.new_zeros(self.in_features) if fresh else self.square_sum.to(device)
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._merged:
            raise RuntimeError(
                "PRILoRALinear: a merged layer is not saved, for its adapter would be added twice; unmerge()"
                " it, or save base_layer"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._merged:
            raise RuntimeError(
                "PRILoRALinear: a merged layer is not loaded into, for its weight is another; unmerge() it"
                " first"
            )
        super()._load_from_state_dict(*args, **kwargs)
        self.square_sum = torch.zeros_like(self.input_square)
