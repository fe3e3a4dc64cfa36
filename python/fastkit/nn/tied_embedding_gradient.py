"""How the gradients of the two ends of a tied matrix meet, without a second dense one of its size.

The gradient of a lookup has few rows. It travels as a sparse tensor, and autograd adds it into the dense one
of the other end, in place, if it reaches the parameter first. So both ends take the matrix from one node,
which gives their gradients on in that order. Nothing is written past autograd: hooks on the parameter,
``torch.autograd.grad`` and gradient buckets see one dense gradient, that of both ends.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fastkit._autograd import Function
from fastkit.ops._checks import arithmetic


class Ends:
    """The ends of the last lookup, as long as its graph lives.

    Which lookup a loss meets is of no matter to the gradient, only to what is kept in memory.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[_Pair] | None = None

    def __reduce__(self) -> tuple[type[Ends], tuple[()]]:  # a copy has no graph
        return Ends, ()

    def lookup(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        pair = self._pair(weight)
        if pair is None:
            pair = _Pair(weight)
            self._last = weakref.ref(pair)
        return _Lookup.apply(ids, pair.input, -1 if padding_idx is None else padding_idx, pair)  # pyright: ignore[reportReturnType]

    def output(self, weight: Tensor) -> Tensor:
        pair = self._pair(weight)
        return weight if pair is None else pair.output

    def _pair(self, weight: Tensor) -> _Pair | None:
        pair = None if self._last is None else self._last()
        # Once a step has written to the matrix, views of it from before are not to be used again.
        return pair if pair is not None and pair.is_of(weight) else None


class _Pair:
    def __init__(self, weight: Tensor) -> None:
        self.input, self.output = _Ends.apply(weight, weight)  # pyright: ignore[reportGeneralTypeIssues]
        self._of = weight
        self._version = weight._version

    def is_of(self, weight: Tensor) -> bool:
        """Also after ``weight.data = ...``, as ``.half()`` does it, which the version does not tell."""
        here = self.input  # which keeps its memory, so that no other has its address
        return (
            self._of is weight
            and self._version == weight._version
            and here.data_ptr() == weight.data_ptr()
            and (here.dtype, here.device) == (weight.dtype, weight.device)
        )


class _Ends(Function):
    @staticmethod
    def forward(weight: Tensor, _again: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None]:
        input, output = grad_outputs
        if output is None and input is not None and input.is_sparse:
            input = input.to_dense()
        return input, output


class _Lookup(Function):
    """``embedding``, whose gradient is sparse, with each row once."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int, pair: _Pair) -> Tensor:
        return embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight, ctx.padding_idx, ctx.pair = inputs
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, None, None]:
        (gradient,), (ids,) = grad_outputs, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            dense = torch.ops.aten.embedding_dense_backward(gradient, ids, ctx.rows, ctx.padding_idx, False)
            return None, dense, None, None
        return None, _summed(gradient, ids, ctx.rows, ctx.padding_idx), None, None


def _summed(gradient: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """Over the tokens of each id, in float32 (float64) and in the order of the tokens, rounded once."""
    gradient = gradient.reshape(-1, gradient.shape[-1])
    distinct, places = torch.unique(ids.flatten(), return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(
        gradient.to(arithmetic(gradient)), places, len(distinct), -1, False
    )
    sums = sums.masked_fill((distinct == padding_idx)[:, None], 0).to(gradient.dtype)
    return torch.sparse_coo_tensor(
        distinct[None].long(), sums, (rows, sums.shape[1]), is_coalesced=True, check_invariants=False
    )
