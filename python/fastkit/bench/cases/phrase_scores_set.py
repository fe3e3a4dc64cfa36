"""Candidates scored and chosen for one image set, beside the published procedure and its short form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastkit import ops, reference
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import (
    SAME_WORK,
    DeviceType,
    Yardstick,
    compiler,
    make_product,
    makers_of_ours,
    our_others,
)
from fastkit.ops.phrase_scores import KERNELS, Orthogonality


def scores_case(
    m: int,
    D: int,
    S: int,
    *,
    images: int,
    warm: bool = False,
    compile: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """m candidates of D numbers beside S phrases; the floor is their product with the scatter."""
    return Case(
        op="phrase_scores",
        shape=f"{m}x{D} beside {S}, {images} images",
        direction="fwd",
        floor_bytes=4 * (m * D + D * D + 3 * m),
        contest=partial(_Scores, (m, D, S, images), compile, device),
        warm=warm,
        tolerance=1e-4,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
    )


def selection_case(
    m: int,
    D: int,
    k: int,
    *,
    images: int,
    deflate: bool = False,
    warm: bool = False,
    device: DeviceType = "cpu",
) -> Case:
    """k of m candidates. The floor is a product with the scatter, and one with each pick; or k with it."""
    return Case(
        op="phrase_scores",
        shape=f"{k} of {m}x{D}, {'deflation' if deflate else 'penalty'}, {images} images",
        direction="fwd",
        floor_bytes=4 * (m * D + D * D + 3 * k),
        contest=partial(_Selection, (m, D, k, images), "deflate" if deflate else "penalty", device),
        warm=warm,
        tolerance=1e-4,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
    )


class _Set(NamedTuple):
    """Rows of unit length about a common mean, as encoders give them."""

    images: Tensor
    candidates: Tensor
    centroid: Tensor
    chosen: Tensor
    scatter: Tensor

    @staticmethod
    def of(m: int, D: int, S: int, images: int, device: DeviceType) -> _Set:
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=device)
        mean = randn(D)

        def rows(count: int) -> Tensor:
            return normalize(mean + randn(count, D), dim=1)

        x = rows(images)
        return _Set(x, rows(m), rows(1)[0], rows(S), ops.moments(x).scatter)


class _Scores:
    def __init__(self, size: tuple[int, int, int, int], compile: bool, device: DeviceType) -> None:
        self.size = size
        self.compile = compile
        self.device: DeviceType = device

    @cached_property
    def given(self) -> _Set:
        return _Set.of(*self.size, self.device)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        m, D, S, _ = self.size
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, self.make_ours),
            SAME_WORK: partial(make_product, m * D * (D + S), self.device),
            "quadratic form": lambda: partial(_short_form, *self.given[1:]),
            "a candidate at a time": lambda: partial(_literal, *self.given[:4]),
        }
        if self.compile:
            makers["quadratic form, compiled"] = self.make_compiled
        return makers

    def make_ours(self, impl: Any) -> Call:
        _, candidates, centroid, chosen, scatter = self.given
        return lambda: ops.phrase_scores(candidates, centroid, scatter, chosen, impl=impl)[0]

    def make_compiled(self) -> Call:
        call = partial(compiler(self.device)(_short_form), *self.given[1:])
        call()
        return call

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        far = (result.double() - self.expected).abs()
        return float(far.amax() / self.expected.abs().amax())

    @cached_property
    def expected(self) -> Tensor:
        images, candidates, centroid, chosen, _ = (t.double() for t in self.given)
        scatter = reference.moments(images).scatter
        return reference.phrase_scores(candidates, centroid, scatter, chosen).score


class _Selection:
    def __init__(
        self, size: tuple[int, int, int, int], orthogonality: Orthogonality, device: DeviceType
    ) -> None:
        self.size = size
        self.orthogonality: Orthogonality = orthogonality
        self.device: DeviceType = device

    @cached_property
    def given(self) -> _Set:
        m, D, _, images = self.size
        return _Set.of(m, D, 0, images, self.device)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        m, D, k, _ = self.size
        work = m * D * (D * k if self.orthogonality == "deflate" else D + k - 1)
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, self.make_ours),
            SAME_WORK: partial(make_product, work, self.device),
        }
        if self.orthogonality == "penalty":
            makers["quadratic form"] = self.make_short
            makers["a candidate at a time"] = self.make_literal
        return makers

    def make_ours(self, impl: Any) -> Call:
        _, candidates, centroid, _, scatter = self.given
        rule = self.orthogonality
        return lambda: ops.select_phrases(
            candidates, scatter, self.size[2], centroid=centroid, orthogonality=rule, impl=impl
        )[0]

    def make_short(self) -> Call:
        _, candidates, centroid, _, scatter = self.given
        return partial(_short_selection, candidates, centroid, scatter, self.size[2])

    def make_literal(self) -> Call:
        images, candidates, centroid, *_ = self.given
        return partial(_literal_selection, images, candidates, centroid, self.size[2])

    def error(self, result: Any) -> float:
        """The share of picks that are others."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return float((result != self.expected).double().mean())

    @cached_property
    def expected(self) -> Tensor:
        images, candidates, centroid, *_ = (t.double() for t in self.given)
        scatter = reference.moments(images).scatter
        return reference.select_phrases(
            candidates, scatter, self.size[2], centroid=centroid, orthogonality=self.orthogonality
        ).indices


def _short_form(candidates: Tensor, centroid: Tensor, chosen: Tensor, scatter: Tensor) -> Tensor:
    """The variance by the scatter, and the increment by what the candidate adds to the sum of squares."""
    u = normalize(candidates - centroid, dim=1)
    variance = ((u @ scatter) * u).sum(1)
    before = (chosen @ chosen.T).fill_diagonal_(0).square().sum()
    overlap = (candidates @ chosen.T).square().sum(1)
    return 10 * variance - 80 * ((before + 2 * overlap).sqrt() - before.sqrt())


def _literal(images: Tensor, candidates: Tensor, centroid: Tensor, chosen: Tensor) -> Tensor:
    """All products of images and directions; then the norm of a matrix for each candidate."""
    products = images @ normalize(candidates - centroid, dim=1).T
    variance = (products - products.mean(0)).square().sum(0)
    increments: list[Tensor] = []
    before = _distance(chosen)
    for candidate in candidates:
        rows = torch.vstack([chosen, candidate])
        increments.append(_distance(rows) - before)
    return 10 * variance - 80 * torch.stack(increments)


def _distance(rows: Tensor) -> Tensor:
    return torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device))


def _short_selection(candidates: Tensor, centroid: Tensor, scatter: Tensor, k: int) -> Tensor:
    u = normalize(candidates - centroid, dim=1)
    base = 10 * ((u @ scatter) * u).sum(1)
    before, overlap = base.new_zeros(()), torch.zeros_like(base)
    picks: list[Tensor] = []
    for _ in range(k):
        best = (base - 80 * ((before + 2 * overlap).sqrt() - before.sqrt())).argmax()
        picks.append(best)
        base[best] = -torch.inf
        before = before + 2 * overlap[best]
        overlap = overlap + (candidates @ candidates[best]).square()
    return torch.stack(picks)


def _literal_selection(images: Tensor, candidates: Tensor, centroid: Tensor, k: int) -> Tensor:
    picks: list[int] = []
    for _ in range(k):
        score = _literal(images, candidates, centroid, candidates[picks])
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
    return torch.tensor(picks, device=images.device)
