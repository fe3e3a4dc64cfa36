"""The gradients of MTAdam's terms as calls of its op: all terms at once, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkit._dispatch import choose
from fastkit.ops.mtadam import KERNELS, NonFinite, mtadam_square_sums, update_
from fastkit.optim.mtadam_pending import Pending
from fastkit.optim.mtadam_processes import Gradients, layout_of, local, sum_over_parts
from fastkit.optim.mtadam_state import Bucket, Buckets, State, rows_of


def anchor_of(group: dict[str, Any]) -> int:
    anchor = group["anchor"]
    return group["terms"].index(anchor) if isinstance(anchor, str) else anchor


def weights_of(group: dict[str, Any], norms: Tensor) -> Tensor:  # (L,), (L,)
    """The factors by which gradients of these running norms are balanced, as in a step."""
    alive = norms > group["alive_eps"]
    anchor = anchor_of(group)
    ratios = norms[torch.where(alive[anchor], anchor, alive.int().argmax())] / norms
    if group["max_scale"] is not None:
        ratios = ratios.clamp(max=group["max_scale"])
    ranks = torch.tensor(group["ranks"] or [1.0] * len(norms), dtype=ratios.dtype, device=ratios.device)
    return torch.where(alive, ranks * ratios, 1.0)


@dataclass
class Update:
    """Of an optimizer's parameters, by what has been given of a step's terms."""

    groups: Sequence[dict[str, Any]]
    states: MutableMapping[Tensor, State]
    buckets: Buckets
    pending: Pending
    nonfinite: NonFinite
    found_inf: Tensor | None  # a GradScaler's

    def at_once(self, ranks: Sequence[float] | None) -> None:
        """One call for the parameters of a group, device, dtype and layout."""
        given = [self.pending.gradients.get(term, []) for term in self.groups[0]["terms"]]
        for group, bucket in self._buckets(lambda i: any(grads and grads[i] is not None for grads in given)):
            grads = [grads[i] if grads else None for grads in given for i in bucket.indices]
            self._call(group, bucket, None, grads, ranks, 0, applies=True)

    def fold(self, term: int, grads: Gradients, ranks: Sequence[float] | None) -> None:
        """One term's gradients into the moments, after zeros for terms that have missed the parameter."""
        if any(anchor_of(group) != 0 for group in self.groups):  # changed in param_groups
            raise ValueError(
                "MTAdam: streaming mode takes the first term as the anchor, got another in param_groups"
            )
        folded = self.pending.folded = self.pending.folded or [0] * len(grads)
        reached = [grad is not None for grad in grads]
        for group, bucket in self._buckets(reached.__getitem__):
            for first, rows in _by_first(
                bucket, [n if there else None for n, there in zip(folded, reached, strict=True)]
            ):
                missed: Gradients = [None] * ((term - first) * len(rows))
                now = [grads[bucket.indices[row]] for row in rows]
                self._call(group, bucket, rows, missed + now, ranks, first, applies=False)
                for row in rows:
                    folded[bucket.indices[row]] = term + 1

    def apply(self) -> None:
        """Zeros for the terms that are lacking, and parameters move that a term has reached."""
        folded = [n or None for n in self.pending.folded]
        for group, bucket in self._buckets(lambda i: False):
            for first, rows in _by_first(bucket, folded):
                missed: Gradients = [None] * ((len(group["terms"]) - first) * len(rows))
                self._call(group, bucket, rows, missed, None, first, applies=True)

    def _buckets(self, reached: Callable[[int], bool]) -> Iterator[tuple[dict[str, Any], Bucket]]:
        return self.buckets.prepared(self.groups, self.states, reached)

    def _call(
        self,
        group: dict[str, Any],
        bucket: Bucket,
        rows: list[int] | None,
        grads: Gradients,
        ranks: Sequence[float] | None,
        first: int,
        *,
        applies: bool,
    ) -> None:
        device = bucket.params[0].device
        impl = choose("MTAdam", None, bucket.params[0], KERNELS)
        square_sums = None
        layout = layout_of(bucket.params[0])
        if layout is not None:
            grads = [None if grad is None else local(grad) for grad in grads]
            if any(grad is not None for grad in grads):
                square_sums = mtadam_square_sums(grads, len(rows or bucket.params), impl=impl)
                square_sums = sum_over_parts(square_sums, bucket.params[0])
        with rows_of(bucket, rows) as part:
            update_(
                part.params if layout is None else [local(param) for param in part.params],
                grads,
                part.exp_avgs,
                part.exp_avg_sqs,
                part.grad_norms,
                part.steps,
                square_sums=square_sums,
                max_exp_avg_sqs=part.max_exp_avg_sqs,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                ranks=group["ranks"] if ranks is None else ranks,
                anchor=anchor_of(group),
                alive_eps=group["alive_eps"],
                max_scale=group["max_scale"],
                nonfinite=self.nonfinite,
                grad_scales=self.pending.scales(group["terms"], device),
                found_inf=self.pending.found_inf(self.found_inf, device),
                impl=impl,
                first=first,
                applies=applies,
            )


def _by_first(bucket: Bucket, folded: Sequence[int | None]) -> list[tuple[int, list[int]]]:
    """The rows of a bucket by how many terms are folded; None: not these."""
    rows: dict[int, list[int]] = {}
    for row, i in enumerate(bucket.indices):
        first = folded[i] if folded else None
        if first is not None:
            rows.setdefault(first, []).append(row)
    return list(rows.items())
