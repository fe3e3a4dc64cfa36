"""MTAdam on several processes: means of their gradients, and parameters of which each has a part."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Gradients = list[Tensor | None]
"""Of one term, for each parameter of the optimizer; None where the term does not reach it."""
Group = Any  # torch.distributed.ProcessGroup, where PyTorch has it
_WHOLE = (Tensor, torch.nn.Parameter)


def as_sharded(tensor: Any) -> Any:
    """A DTensor, or None for any other: where its module is not imported, which takes long, there is none."""
    if type(tensor) in _WHOLE or "torch.distributed.tensor" not in sys.modules:
        return None
    return tensor if isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """The part that this process has, the same memory; a plain tensor is all of itself."""
    sharded = as_sharded(tensor)
    if sharded is None:
        return tensor
    with torch.no_grad():
        return sharded.to_local()


def layout_of(param: Tensor) -> tuple[Any, ...] | None:
    """What a sharded parameter's parts have in common with those of others."""
    sharded = as_sharded(param)
    return None if sharded is None else (sharded.device_mesh, *sharded.placements)


def _like(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient in the parts of its parameter."""
    sharded, of_param = as_sharded(grad), as_sharded(param)
    if sharded is None or of_param is None:
        return grad
    return sharded.redistribute(of_param.device_mesh, of_param.placements)


def sum_over_parts(sums: Tensor, param: Tensor) -> Tensor:
    """Add up, in place, what each process has of its part of a parameter, and of others laid out alike."""
    sharded = as_sharded(param)
    if sharded is None:
        return sums
    for axis, placement in enumerate(sharded.placements):
        if placement.is_shard() and sharded.device_mesh.size(axis) > 1:
            dist.all_reduce(sums, group=sharded.device_mesh.get_group(axis))
    return sums


def by_backward(loss: Tensor, params: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """What ``autograd.grad`` gives, of parameters that it knows nothing of: FSDP2 writes to p.grad alone."""
    before = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        loss.backward(retain_graph=retain_graph)
        return [_like(param, param.grad) for param in params]
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad


class Processes:
    """Those that step the same parameters, each by gradients of its own."""

    def __init__(self, given: Group | Literal["default"] | None) -> None:
        """``"default"``: the default group, as soon as there is one."""
        known = given is None or (isinstance(given, str) and given == "default")
        if not known and not (dist.is_available() and isinstance(given, dist.ProcessGroup)):
            raise TypeError(
                "MTAdam: process_group must be a torch.distributed.ProcessGroup, 'default' or None, got"
                f" {type(given).__name__}"
            )
        self.given = given
        self._alike = False  # parameters and terms have been compared

    @property
    def group(self) -> Group | None:
        """None where there is one process alone, or gradients are not to be reduced."""
        if self.given is None or not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if isinstance(self.given, str) else self.given
        return group if group is not None and dist.get_world_size(group) > 1 else None

    def mean(
        self,
        op: str,
        params: Sequence[Tensor],
        terms: Sequence[str],
        given: Sequence[Gradients],
        scales: Sequence[Tensor | None],
        found_inf: Tensor | None,
    ) -> tuple[list[Gradients], Tensor]:
        """Of the gradients of ``group``, unscaled, term by term; and whether a process has found inf.

        A gradient that is lacking on some processes is zeros there, and one that all lack is lacking. Of
        sharded parameters it is the mean already.
        """
        group = self.group
        self._compare(op, params, terms, group)
        plain = [i for i, param in enumerate(params) if as_sharded(param) is None]
        present, found_inf = _anywhere(
            [[grads[i] is not None for i in plain] for grads in given], found_inf, params[0].device, group
        )
        means: list[Gradients] = [list(grads) for grads in given]
        for grads, scale in zip(given, scales, strict=True):
            if scale is not None:
                _unscale([grad for grad in grads if grad is not None and as_sharded(grad) is not None], scale)
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
        for term, of_params in enumerate(present):
            for i, there in zip(plain, of_params, strict=True):
                if there:
                    kinds.setdefault((params[i].device, params[i].dtype), []).append((term, i))
        for pairs in kinds.values():
            flat, views = _flat([params[i] for _, i in pairs])
            for (term, i), view in zip(pairs, views, strict=True):
                means[term][i] = view
            for term, scale in enumerate(scales):  # each process has its own
                own = [
                    (view, grad)
                    for (t, i), view in zip(pairs, views, strict=True)
                    if t == term and (grad := given[term][i]) is not None
                ]
                for view, grad in own:
                    view.copy_(grad)
                if scale is not None:
                    _unscale([view for view, _ in own], scale)
            flat.div_(dist.get_world_size(group))
            dist.all_reduce(flat, group=group)
        return means, found_inf

    def _compare(self, op: str, params: Sequence[Tensor], terms: Sequence[str], group: Group) -> None:
        """Once, that all processes step the same: else sums of different things would be returned."""
        if self._alike:
            return
        facts = repr((list(terms), [(tuple(p.shape), p.dtype) for p in params]))
        number = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
        extremes = torch.tensor([number, -number], device=params[0].device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if extremes.tolist() != [number, -number]:
            raise RuntimeError(
                f"{op}: all processes must have the same terms and the same parameters in the same order, got"
                " others here; pass process_group=, the group of those that train one model, or None"
            )
        self._alike = True


def _anywhere(
    present: list[list[bool]], found_inf: Tensor | None, device: torch.device, group: Group
) -> tuple[list[list[bool]], Tensor]:
    """What any process has, and whether any has found inf."""
    flags = torch.tensor([there for of_params in present for there in of_params], dtype=torch.float32)
    found = torch.zeros(1) if found_inf is None else found_inf.detach().reshape(1)
    shared = torch.cat([flags.to(device), found.to(device, torch.float32)])
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    there = iter(shared[:-1].tolist())
    return [[next(there) > 0 for _ in of_params] for of_params in present], shared[-1]


def _unscale(grads: Sequence[Tensor], scale: Tensor) -> None:
    for grad in map(local, grads):
        grad.mul_(scale.to(grad.device).double().reciprocal().to(grad.dtype))


def _flat(params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Zeros, and views of them as gradients of these parameters."""
    flat = params[0].new_zeros(sum(param.numel() for param in params))
    views, begin = [], 0
    for param in params:
        strides = torch.empty_like(param, device="meta").stride()  # without gaps, in the parameter's order
        views.append(flat.as_strided(param.shape, strides, begin))
        begin += param.numel()
    return flat, views
