"""One matrix that looks tokens up and scores them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from operator import index
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from fastkit import ops
from fastkit._autograd import autocasts, transforms
from fastkit.nn.tied_embedding_gradient import Ends
from fastkit.ops._checks import FLOATING, check_int, check_number, may_look_at
from fastkit.reference.linear_cross_entropy import Reduction

TieGrad = Literal["both", "output", "input"]


class TiedEmbedding(nn.Module):
    """The embedding of a model's tokens, and the softmax at its end, with one matrix for both.

    ::

        embed(ids)      = embed_scale weight[ids]
        logits(h)       = h weight^T + bias,  with a softcap: softcap tanh((h weight^T + bias) / softcap)
        loss(h, target) = cross_entropy(logits(h), target), without the logits in memory

    Its gradient is the sum of those of the two ends: of the lookup, in the rows of tokens that occur, and of
    the softmax, in all rows. Calling the module looks up, so that it stands where an ``nn.Embedding`` stood.

    Args:
        num_embeddings: V, the tokens.
        embedding_dim: H, the width of an embedding and of what ``logits`` and ``loss`` take.
        bias: whether logits have a bias of each token.
        padding_idx: a token whose lookup gives its row no gradient, as in ``nn.Embedding``. The softmax
            pushes that row all the same, as any other, unless it is one of ``exclude_ids`` too.
        embed_scale: what embeddings are multiplied by; sqrt(H) in some Transformers.
        exclude_ids: tokens that are never predicted: their logits are -inf, and the output end gives their
            rows, and their bias, no gradient. Such a target is refused, on a GPU with ``check=True`` alone.
        tie_grad: which end's gradient reaches ``weight``; that of the bias is not concerned.
        softcap: bounds the logits, as in Gemma 2; refused with ``exclude_ids``, whose -inf it would bound.
        fused_accumulate: adds the gradient of the lookup into that of the loss, row by row, in place of a
            second dense (V, H) one. It is the same gradient, for all that autograd does with it; the price is
            that the number of distinct tokens is read back from a GPU in backward.
        device, dtype: of the parameters.

    Shape:
        ids ``(...)``, int64 or int32; embeddings ``(..., H)``; h ``(..., H)``, in the dtype of ``weight`` or
        under autocast; logits ``(..., V)``; target ``(...)``. Parameters: ``weight`` (V, H), ``bias`` (V,).

    Raises:
        ValueError: an option, or a shape, is not as above.
        TypeError: an option is of another type; ids, or an h of ``logits``, are of another dtype; ``weight``
            was replaced by an integer one, or by a DTensor.
        RuntimeError: an id is not in [0, V), or a target is one of ``exclude_ids``, where values may be
            looked at.
        What ``fastkit.ops.linear_cross_entropy`` raises, by ``loss``.

    Initialisation: ``reset_parameters()``: normal, of standard deviation 1 / sqrt(H), so that an h of unit
    variance has logits of unit variance (our choice; ``nn.Embedding`` has 1, with which they would be sqrt(H)
    times as large); zero in the row of ``padding_idx``, and in the bias.

    Numerics: of the loss those of ``fastkit.ops.linear_cross_entropy``. With ``fused_accumulate`` the
    gradients of a token's occurrences are summed in float32 (float64), in the order of tokens, and rounded
    once; the result has the same bits each time.

    Support: ``torch.compile(fullgraph=True)`` and ``torch.func`` transforms, in which ``fused_accumulate``
    changes nothing; autocast; double backward as far as ``fastkit.ops.linear_cross_entropy`` goes. FSDP2
    gathers parameters for ``forward`` alone: where the module is sharded by itself, register the others with
    ``torch.distributed.fsdp.register_fsdp_forward_method(module, "loss")``.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017. ``embed_scale``
    is as in Vaswani et al., "Attention Is All You Need", NeurIPS 2017. ``exclude_ids``, ``tie_grad`` and
    ``fused_accumulate`` are ours.

    Example:
        >>> import torch, fastkit.nn
        >>> tied = fastkit.nn.TiedEmbedding(1000, 64)
        >>> ids = torch.randint(1000, (2, 10))
        >>> h = tied.embed(ids)  # and then the model
        >>> tied.loss(h[:, :-1], ids[:, 1:]).shape
        torch.Size([])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bias: bool = False,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        exclude_ids: Iterable[int] | None = None,
        tie_grad: TieGrad = "both",
        softcap: float | None = None,
        fused_accumulate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings: int = _size("num_embeddings", num_embeddings)
        self.embedding_dim: int = _size("embedding_dim", embedding_dim)
        if padding_idx is not None:
            check_int("TiedEmbedding", "padding_idx", padding_idx)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"TiedEmbedding: padding_idx must be in [-{num_embeddings}, {num_embeddings}), got"
                f" {padding_idx}"
            )
        check_number("TiedEmbedding", "embed_scale", embed_scale)
        if not (embed_scale != 0 and math.isfinite(embed_scale)):
            raise ValueError(f"TiedEmbedding: embed_scale must be finite and not 0, got {embed_scale}")
        if tie_grad not in get_args(TieGrad):
            raise ValueError(
                f"TiedEmbedding: tie_grad must be one of {', '.join(get_args(TieGrad))}, got {tie_grad!r}"
            )
        if softcap is not None:
            check_number("TiedEmbedding", "softcap", softcap)
        if softcap is not None and not 0 < softcap <= sys.float_info.max:
            raise ValueError(f"TiedEmbedding: softcap must be positive and finite, or None, got {softcap}")
        self.padding_idx: int | None = padding_idx % num_embeddings if padding_idx is not None else None
        self.embed_scale: float = embed_scale
        self.exclude_ids: tuple[int, ...] = _exclude(exclude_ids, num_embeddings)
        if self.exclude_ids and softcap is not None:
            raise ValueError(
                f"TiedEmbedding: softcap must be None with exclude_ids, got {softcap}; it would make the -inf"
                " of their logits finite"
            )
        self.tie_grad: TieGrad = tie_grad
        self.softcap: float | None = softcap
        self.fused_accumulate: bool = fused_accumulate
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"TiedEmbedding: dtype must be floating point and real, got {dtype}")
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_embeddings, device=device, dtype=dtype)) if bias else None
        self._kept_excluded: Tensor | None = None
        self._ends = Ends()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        if self.padding_idx is not None:
            self.weight[self.padding_idx].fill_(0)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:  # (...) -> (..., H)
        """``embed(input)``."""
        return self.embed(input)

    def embed(self, ids: Tensor) -> Tensor:  # (...) -> (..., H)
        """The rows of tokens, times ``embed_scale``."""
        weight = self._checked_weight()
        _check_tensor("ids", ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"TiedEmbedding: ids must be int64 or int32, got {ids.dtype}; they are tokens")
        if may_look_at(ids):
            bad = (ids < 0) | (ids >= self.num_embeddings)
            if bool(bad.any()):
                raise RuntimeError(
                    f"TiedEmbedding: ids must be in [0, {self.num_embeddings}), got {int(ids[bad][0])}"
                )
        if self.tie_grad == "output":
            weight = weight.detach()
        if self._fuses(weight):
            rows = self._ends.lookup(ids, weight, self.padding_idx)
        else:
            rows = embedding(ids, weight, self.padding_idx)
        return rows if self.embed_scale == 1 else rows * self.embed_scale

    def logits(self, h: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """The logits of all tokens, in memory; for generation. ``loss`` does not need them."""
        h, matrix = self._checked(h), self._output_weight()
        if h.dtype != matrix.dtype and not autocasts(h):
            raise TypeError(
                f"TiedEmbedding: h must have the dtype of weight, {matrix.dtype}, got {h.dtype}; cast it, or"
                " run under torch.autocast"
            )
        z = linear(h, matrix, self.bias)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.exclude_ids:
            z = z.index_fill_(-1, self._excluded_on(z.device), -math.inf)
        return z

    def loss(
        self,
        h: Tensor,  # (..., H)
        target: Tensor,  # (...)
        *,
        weight: Tensor | None = None,  # (V,)
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        token_weight: Tensor | None = None,  # (...)
        check: bool = False,
    ) -> Tensor:  # () or (...)
        """The cross entropy of ``logits(h)``; the options are those of ``fastkit.ops.linear_cross_entropy``.

        ``weight`` is the weight of the classes there, not the matrix. ``label_smoothing`` is refused with
        ``exclude_ids``: it gives each token a share, and of an excluded one the loss is infinite.
        """
        h, matrix = self._checked(h), self._output_weight()
        bias: Tensor | None = self.bias
        if self.exclude_ids:
            if label_smoothing:
                raise ValueError(
                    f"TiedEmbedding: label_smoothing must be 0 with exclude_ids, got {label_smoothing}; it"
                    " gives each token a share, and excluded ones can have none"
                )
            self._check_targets(target, ignore_index, check)
            bias = matrix.new_zeros(self.num_embeddings) if bias is None else bias
            bias = bias.index_fill(0, self._excluded_on(matrix.device), -math.inf)
        return ops.linear_cross_entropy(
            h, matrix, target, linear_bias=bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=self.softcap, z_loss=z_loss,
            token_weight=token_weight, check=check,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        if self.bias is not None:
            parts.append("bias=True")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.embed_scale != 1:
            parts.append(f"embed_scale={self.embed_scale:g}")
        if self.exclude_ids:
            parts.append(f"exclude_ids=({len(self.exclude_ids)} tokens)")
        if self.tie_grad != "both":
            parts.append(f"tie_grad={self.tie_grad!r}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap:g}")
        if self.fused_accumulate:
            parts.append("fused_accumulate=True")
        return ", ".join(parts)

    def _fuses(self, weight: Tensor) -> bool:
        return (
            self.fused_accumulate
            and weight.requires_grad
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not transforms()
        )

    def _output_weight(self) -> Tensor:
        weight = self._checked_weight()
        if self.tie_grad == "input":
            return weight.detach()
        return self._ends.output(weight) if self._fuses(weight) else weight

    def _checked_weight(self) -> Tensor:
        weight = self.weight
        if type(weight).__name__ == "DTensor":
            raise TypeError(
                "TiedEmbedding: weight is a DTensor, as FSDP2 leaves it outside of forward; call the module"
                " in the forward of the model, or, where it is sharded by itself, name its methods to"
                ' torch.distributed.fsdp.register_fsdp_forward_method(module, "loss") first'
            )
        if weight.dtype not in FLOATING:
            raise TypeError(
                f"TiedEmbedding: weight must be floating point and real, got {weight.dtype}; dequantise it"
            )
        return weight

    def _checked(self, h: Tensor) -> Tensor:
        _check_tensor("h", h)
        if h.dim() == 0 or h.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"TiedEmbedding: h must have shape (..., {self.embedding_dim}), the width of the embeddings,"
                f" got {tuple(h.shape)}; for another width project it first, with an nn.Linear"
            )
        return h

    def _check_targets(self, target: Tensor, ignore_index: int, check: bool) -> None:
        _check_tensor("target", target)
        if not may_look_at(target) and (not check or torch.compiler.is_compiling() or transforms()):
            return  # what check=True cannot have there, the op refuses
        if target.device != self.weight.device or target.device.type == "meta":
            return  # as it does this
        target = target.long()  # beside int32 an ignore_index would wrap
        bad = torch.isin(target, self._excluded_on(target.device)) & (target != ignore_index)
        if bool(bad.any()):
            raise RuntimeError(
                f"TiedEmbedding: target must not be one of exclude_ids, got {int(target[bad][0])}; a token"
                " that has no target gets ignore_index"
            )

    def _excluded_on(self, device: torch.device) -> Tensor:
        """Made of the option where it is used: what loads a model leaves anything in a buffer."""
        kept = self._kept_excluded
        if kept is not None and kept.device == device:
            return kept
        made = torch.tensor(self.exclude_ids, device=device)
        traced = torch.compiler.is_compiling() or transforms() or type(made) is not Tensor
        if not (traced or made.is_inference()):  # those are of this call alone
            self._kept_excluded = made
        return made


def _size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"TiedEmbedding: {name} must be a positive int, got {value!r}")
    return value


def _exclude(ids: Iterable[int] | None, tokens: int) -> tuple[int, ...]:
    try:
        found = sorted({index(i) for i in (ids if ids is not None else ())})
    except TypeError:
        raise TypeError(f"TiedEmbedding: exclude_ids must be ints, got {ids!r}") from None
    outside = next((i for i in found if not 0 <= i < tokens), None)
    if outside is not None:
        raise ValueError(f"TiedEmbedding: exclude_ids must be in [0, {tokens}), got {outside}")
    if len(found) == tokens:
        raise ValueError(f"TiedEmbedding: exclude_ids must leave a token to predict, got all {tokens}")
    return tuple(found)


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"TiedEmbedding: {name} must be a tensor, got {type(value).__name__}")
