"""How well phrases tell the images of a set apart, and a choice of some that do."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import differentiates, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops import phrase_scores_kernels
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.phrase_scores_autograd import PhraseScoresFunction, by_reference, dense, run
from fastkit.ops.phrase_scores_checks import check_selection, check_sets, check_weights
from fastkit.reference import PhraseScores, PhraseSelection

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}
Orthogonality = Literal["penalty", "deflate"]


def phrase_scores(
    candidates: Tensor,  # ([G,] m, D)
    centroid: Tensor,  # ([G,] D)
    scatter: Tensor,  # ([G,] D, D)
    chosen: Tensor | None = None,  # ([G,] S, D)
    *,
    variance_weight: float = 10.0,
    orthogonality_weight: float = 80.0,
    prior: Tensor | None = None,  # ([G,] m)
    prior_weight: float = 8.0,
    impl: Impl | None = None,
) -> PhraseScores:  # each ([G,] m)
    """How much of the spread of an image set each candidate phrase tells, beside those already chosen.

    ::

        t = candidate / |candidate|,    a = centroid / |centroid|,    u = (t - a) / |t - a|
        variance  = u^T scatter u
        increment = |F' F'^T - I| - |F F^T - I| = sqrt(O^2 + 2 sum_s (t . f_s)^2) - O,    O = |F F^T - I|
        score     = prior_weight prior + variance_weight variance - orthogonality_weight increment

    F are the rows of chosen, of unit length, and F' those and t; norms are of all elements. With the scatter
    of the images' vectors, as of ``fastkit.ops.moments``, the variance is the sum over images of the squares
    of their centred products with u: what is paid for a candidate does not depend on how many images there
    are. It is 0 where ``|t - a| <= 1e-3``: a candidate next to the centroid has no direction (our choice).

    Args:
        candidates: ``(m, D)``, embeddings of the phrases, of any length but 0; float32, float64, bfloat16 or
            float16; any strides.
        centroid: ``(D,)``, that of the phrase for the whole set.
        scatter: ``(D, D)``, symmetric and positive semidefinite, which is not checked; in the dtype of
            candidates, or float32 for half precision, as the others.
        chosen: ``(S, D)``, embeddings of the phrases before. Default: none, and every increment is 0.
        variance_weight, orthogonality_weight: not negative; by default those of the published code, whose
            scatter is of 500 images.
        prior: ``(m,)``, as the logits of a language model. Default: 0.
        prior_weight: its factor.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that or raises; gradients are always
            those of the reference. Default: the kernel where one covers the device and dtype (Triton has no
            float64), else the reference.

    Each tensor may have a dimension of G image sets in front; those without are all sets'.

    Returns:
        ``PhraseScores(score, variance, increment)``, each ``(m,)``, or ``(G, m)``; float32 for half
        precision, else in the dtype of candidates.

    Raises:
        ValueError: a shape, a weight or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, or on a CPU, eagerly, a
            vector is all zeros or not finite, or scatter or prior are not finite.

    Numerics: in float32 for half precision, else in the dtype of candidates; O in float64; increments by
    ``2 x / (sqrt(O^2 + 2 x) + O)``, without a difference. Deterministic: on a CPU whatever the number of
    threads.

    Support: all derivatives to all tensors, by those of the reference; ``torch.compile(fullgraph=True)``;
    ``torch.func``, ``torch.vmap`` and forward mode run the reference; autocast changes nothing.

    Memory and work: ``m D (2 D + 2 S)`` operations, and two copies of the candidates.

    Source: Hupert, Schwartz, Wolf, "Describing Sets of Images with Textual-PCA", Findings of EMNLP 2022,
    arXiv:2210.12112, and the code that its authors published.

    Example:
        >>> import torch, fastkit.ops
        >>> phrases, centroid = torch.eye(3)[:2], torch.eye(3)[2]
        >>> fastkit.ops.phrase_scores(phrases, centroid, torch.diag(torch.tensor([4.0, 2, 0]))).variance
        tensor([2., 1.])
    """
    op = "phrase_scores"
    check_tensors(op, candidates=candidates, centroid=centroid, scatter=scatter, chosen_=chosen, prior_=prior)
    check_sets(op, candidates, centroid, scatter, chosen, prior)
    weights = variance_weight, orthogonality_weight, prior_weight
    check_weights(
        op, variance_weight=variance_weight, orthogonality_weight=orthogonality_weight,
        prior_weight=prior_weight,
    )  # fmt: skip
    tensors = candidates, centroid, scatter, chosen, prior
    kernel = choose(op, impl, candidates, KERNELS)
    if kernel == "reference" or transforms():
        return by_reference(tensors, weights)
    if torch.is_grad_enabled() and differentiates(*tensors):
        return PhraseScores(*PhraseScoresFunction.apply(*tensors, weights, kernel))
    return PhraseScores(*run(tensors, weights, kernel))


def select_phrases(
    candidates: Tensor,  # ([G,] m, D)
    scatter: Tensor,  # ([G,] D, D)
    k: int,
    *,
    centroid: Tensor,  # ([G,] D)
    prior: Tensor | None = None,  # ([G,] m)
    orthogonality: Orthogonality = "penalty",
    variance_weight: float = 10.0,
    orthogonality_weight: float = 80.0,
    prior_weight: float = 8.0,
    impl: Impl | None = None,
) -> PhraseSelection:  # each ([G,] k)
    """k phrases, one after the other: each time the one with the best ``phrase_scores`` beside those before.

    With ``orthogonality="deflate"`` there is no increment; a candidate's variance is that along what of its
    direction u is orthogonal to those that were chosen, taken to unit length, and 0 where 1e-3 of u is left
    at most: the variances add up to what the chosen directions explain together. The published form is the
    penalty, which is soft, and weakens with each phrase.

    Args:
        candidates, scatter, centroid, prior: as of ``phrase_scores``, with image sets in front or without.
        k: how many, between 1 and m; none twice. Of equal scores the lower index.
        orthogonality: ``"penalty"`` or ``"deflate"``.
        variance_weight, orthogonality_weight, prior_weight: as of ``phrase_scores``.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that or raises. Default: the kernel
            where one covers the device and dtype (Triton has no float64), else the reference.

    Returns:
        ``PhraseSelection(indices, scores, variances)``, each ``(k,)``, or ``(G, k)``, in the order of choice:
        rows of candidates, int64, and what made them the best, without a gradient. For one, give
        ``phrase_scores`` what was chosen.

    Raises:
        ValueError, TypeError, RuntimeError: as of ``phrase_scores``, and for ``k`` and ``orthogonality``.

    Numerics: those of ``phrase_scores``; where two scores differ by less than their rounding, either may be
    chosen.

    Support: ``torch.compile(fullgraph=True)``; ``torch.func`` and ``torch.vmap`` run the reference.

    Memory and work: ``2 m D^2`` operations, then ``2 m D`` a phrase; with deflation ``2 m D^2`` a phrase.

    Source: as of ``phrase_scores``; the choice from a list is that of the authors' code for texts.

    Example:
        >>> import torch, fastkit.ops
        >>> scatter = torch.diag(torch.tensor([4.0, 2, 1, 0]))
        >>> fastkit.ops.select_phrases(torch.eye(4)[:3], scatter, 2, centroid=torch.eye(4)[3]).indices
        tensor([0, 1])
    """
    op = "select_phrases"
    check_tensors(op, candidates=candidates, centroid=centroid, scatter=scatter, prior_=prior)
    check_sets(op, candidates, centroid, scatter, None, prior)
    check_selection(op, candidates, k, orthogonality)
    check_weights(
        op, variance_weight=variance_weight, orthogonality_weight=orthogonality_weight,
        prior_weight=prior_weight,
    )  # fmt: skip
    options: dict[str, Any] = {
        "variance_weight": variance_weight, "orthogonality_weight": orthogonality_weight,
        "prior_weight": prior_weight,
    }  # fmt: skip
    detached = (None if t is None else t.detach() for t in (candidates, scatter, centroid, prior))
    candidates, scatter, centroid, prior = detached  # pyright: ignore[reportAssignmentType]
    kernel = choose(op, impl, candidates, KERNELS)
    if kernel == "reference" or transforms():
        with without_autocast(candidates):
            return reference.select_phrases(
                candidates, scatter, k, centroid=centroid, prior=prior, orthogonality=orthogonality, **options
            )
    sets, tensors = dense((candidates, centroid, scatter, prior))
    select = phrase_scores_kernels.select[kernel]
    found = select(*tensors, k, orthogonality == "deflate", *map(float, options.values()))
    return PhraseSelection(*(t if sets else t[0] for t in found))
