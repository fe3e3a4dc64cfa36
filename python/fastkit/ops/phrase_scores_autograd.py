"""phrase_scores by the kernel, with the derivatives of the reference.

With ``create_graph`` these have a graph of their own. Else they are formed within one op, which is opaque to
compilers: what they trace may not ask for gradients itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import Function, without_autocast
from fastkit._dispatch import Impl
from fastkit.ops import phrase_scores_kernels
from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define
from fastkit.reference import PhraseScores

Weights = tuple[float, float, float]
"""Of variance, orthogonality and prior."""


class PhraseScoresFunction(Function):
    @staticmethod
    def forward(
        candidates: Tensor, centroid: Tensor, scatter: Tensor, chosen: Tensor | None, prior: Tensor | None,
        weights: Weights, kernel: Impl,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return run((candidates, centroid, scatter, chosen, prior), weights, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.weights, _ = inputs
        if tensors[3] is None:
            ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        needs, tensors = list(ctx.needs_input_grad[:5]), ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph
            # Views, for one argument may come from another, as chosen rows do from candidates.
            leaves = [None if t is None else t.view_as(t) for t in tensors]
            return *_gradients(grad_outputs, leaves, ctx.weights, needs, create_graph=True), None, None
        found = _BACKWARD(*grad_outputs, *tensors, *map(float, ctx.weights), needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def by_reference(tensors: Any, weights: Weights) -> PhraseScores:
    candidates, centroid, scatter, chosen, prior = tensors
    with without_autocast(candidates):
        return reference.phrase_scores(
            candidates, centroid, scatter, chosen, prior=prior, variance_weight=weights[0],
            orthogonality_weight=weights[1], prior_weight=weights[2],
        )  # fmt: skip


def _gradients(
    cotangents: Any, leaves: list[Tensor | None], weights: Weights, needs: list[bool], *, create_graph: bool
) -> list[Tensor | None]:
    first = leaves[0]
    assert first is not None
    with torch.enable_grad(), without_autocast(first):
        results = by_reference(leaves, weights)
        both = zip(results, cotangents, strict=True)
        pairs = [(y, g) for y, g in both if g is not None and y.requires_grad]
        wanted: Any = [t for t, need in zip(leaves, needs, strict=True) if need]
        if not pairs:
            return [None] * 5
        outputs, of_outputs = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(outputs, wanted, of_outputs, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if need else None for need in needs]


def _backward(
    g_score: Tensor | None, g_variance: Tensor | None, g_increment: Tensor | None, candidates: Tensor,
    centroid: Tensor, scatter: Tensor, chosen: Tensor | None, prior: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients to the five tensors; empty unless needed."""
    *weights, needs = options
    tensors = candidates, centroid, scatter, chosen, prior
    leaves = [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
    ]
    found = _gradients(
        (g_score, g_variance, g_increment), leaves, (weights[0], weights[1], weights[2]), needs,
        create_graph=False,
    )  # fmt: skip
    return tuple(
        candidates.new_empty(0) if t is None or not need
        else torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None
        else g.contiguous()
        for t, g, need in zip(tensors, found, needs, strict=True)
    )  # fmt: skip


def _fake_backward(
    g_score: Tensor | None, g_variance: Tensor | None, g_increment: Tensor | None, candidates: Tensor,
    centroid: Tensor, scatter: Tensor, chosen: Tensor | None, prior: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_one_device("phrase_scores", candidates, centroid, scatter, chosen, prior)
    tensors = candidates, centroid, scatter, chosen, prior
    return tuple(
        t.new_empty(t.shape) if t is not None and need else candidates.new_empty(0)
        for t, need in zip(tensors, options[-1], strict=True)
    )


_BACKWARD = define(
    "fastkit_products",
    "phrase_scores_bwd(Tensor? g_score, Tensor? g_variance, Tensor? g_increment, Tensor candidates,"
    " Tensor centroid, Tensor scatter, Tensor? chosen, Tensor? prior, float variance_weight,"
    " float orthogonality_weight, float prior_weight, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def run(tensors: Any, weights: Weights, kernel: Impl) -> tuple[Tensor, ...]:
    sets, tensors = dense(tensors)
    found = phrase_scores_kernels.score[kernel](*tensors, *map(float, weights))
    return tuple(t if sets else t[0] for t in found)


def dense(tensors: Any) -> tuple[bool, list[Tensor | None]]:
    """In the dtype of the arithmetic, with image sets in front; and whether an argument has any."""
    dims = (2, 1, 2, 2, 1) if len(tensors) == 5 else (2, 1, 2, 1)
    dtype, sets, found = arithmetic(tensors[0]), False, []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is not None:
            sets = sets or tensor.dim() > dim
            tensor = (tensor if tensor.dim() > dim else tensor.unsqueeze(0)).to(dtype).contiguous()
            if not torch.compiler.is_compiling() and tensor._is_zerotensor():  # which has no memory
                tensor = tensor.clone()
        found.append(tensor)
    return sets, found
