"""MTAdam on several processes: means of their gradients, and parameters of which each has a part."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Gradients = list[Tensor | None]
"""Of one term, for each parameter of the optimizer; None where the term does not reach it."""
Group = Any  # torch.distributed.ProcessGroup, where PyTorch has it
_WHOLE = frozenset({Tensor, torch.nn.Parameter})


def as_sharded(tensor: Any) -> Any:
    """A DTensor, or None for any other: where its module is not imported, which takes long, there is none."""
    if type(tensor) in _WHOLE or "torch.distributed.tensor" not in sys.modules:
        return None
    return tensor if isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor) else None


def any_sharded(tensors: Sequence[Any]) -> bool:
    return not _WHOLE.issuperset(map(type, tensors)) and any(as_sharded(t) is not None for t in tensors)


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
        if not placement.is_replicate() and sharded.device_mesh.size(axis) > 1:
            dist.all_reduce(sums, group=sharded.device_mesh.get_group(axis))
    return sums


def by_backward(loss: Tensor, params: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """What ``autograd.grad`` gives, of parameters that it knows nothing of: FSDP2 writes to p.grad alone."""
    leaves = {id(leaf): leaf for leaf in (*params, *_leaves(loss))}.values()  # another model's too
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward(retain_graph=retain_graph)
        return [_like(param, param.grad) for param in params]
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors whose gradients a backward adds to."""
    nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(nodes)
    leaves = []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return leaves


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
    ) -> tuple[list[Gradients], list[Tensor | None], Tensor]:
        """Of the gradients of ``group``, term by term; their scales; and whether a process has found inf.

        A gradient that is lacking on some processes is zeros there, and one that all lack is lacking. Of
        sharded parameters it is the mean already. ``given`` is emptied, to make room for the means.
        """
        with torch.no_grad():
            self._compare(op, params, terms)
            plain = [i for i, param in enumerate(params) if as_sharded(param) is None]
            own = [1.0 if scale is None else float(scale) for scale in scales]
            present, common, found_inf = self._shared(
                [[grads[i] is not None for i in plain] for grads in given],
                [
                    scale if any(grad is not None for grad in grads) else None
                    for scale, grads in zip(own, given, strict=True)
                ],
                found_inf,
                params[0].device,
            )
            if len(plain) < len(params) and any(least < most for least, most in common):
                raise RuntimeError(
                    f"{op}: all processes must have the same scale where parameters are sharded, got others"
                    " here; update the scaler on all by the same found_inf"
                )
            means: list[Gradients] = [
                [
                    None if as_sharded(param) is None else grad
                    for param, grad in zip(params, grads, strict=True)
                ]
                for grads in given
            ]
            kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
            for term, of_params in enumerate(present):
                for i, there in zip(plain, of_params, strict=True):
                    if there:
                        kinds.setdefault((params[i].device, params[i].dtype), []).append((term, i))
            for pairs in kinds.values():
                for some in _in_parts(pairs, params):
                    flat, views = _flat([params[i] for _, i in some])
                    for (term, i), view in zip(some, views, strict=True):
                        grad, given[term][i], means[term][i] = given[term][i], None, view
                        if grad is not None:
                            view.copy_(grad)
                            if own[term] != common[term][0]:
                                view.mul_(common[term][0] / own[term])
                    flat.div_(dist.get_world_size(self.group))
                    dist.all_reduce(flat, group=self.group)
            of_terms = [
                None if least == most == 1 else torch.tensor(least, dtype=torch.float32)
                for least, most in common
            ]
            return means, of_terms, found_inf

    def forget(self) -> None:
        """Compare again: the terms or the parameters are others."""
        self._alike = False

    def _compare(self, op: str, params: Sequence[Tensor], terms: Sequence[str]) -> None:
        """Once, that all processes step the same: else sums of different things would be returned."""
        if self._alike:
            return
        strides = [_strides(p) if as_sharded(p) is None else None for p in params]  # parts may differ
        facts = repr((list(terms), [(tuple(p.shape), p.dtype) for p in params], strides))
        number = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
        extremes = torch.tensor([number, -number], device=params[0].device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if extremes.tolist() != [number, -number]:
            raise RuntimeError(
                f"{op}: all processes must have the same terms and the same parameters in the same order, got"
                " others here; pass process_group=, the group of those that train one model, or None"
            )
        ranks = set(dist.get_process_group_ranks(self.group))
        for i, sharded in enumerate(map(as_sharded, params)):
            if sharded is not None and not ranks <= set(sharded.device_mesh.mesh.flatten().tolist()):
                raise RuntimeError(
                    f"{op}: parameter {i} must be laid out over all processes of process_group, got a mesh"
                    " that lacks some, so that gradients there would not be averaged; shard it over them too"
                    " (fully_shard), or average gradients yourself and pass process_group=None"
                )
        self._alike = True

    def _shared(
        self,
        present: list[list[bool]],
        scales: list[float | None],
        found_inf: Tensor | None,
        device: torch.device,
    ) -> tuple[list[list[bool]], list[tuple[float, float]], Tensor]:
        """What any process has; the least and the largest scale of each term; whether any has found inf."""
        flags = [float(there) for of_params in present for there in of_params]
        extremes = [s for scale in scales for s in ((0.0, -math.inf) if scale is None else (scale, -scale))]
        found = torch.zeros(1) if found_inf is None else found_inf.detach().reshape(1)
        shared = torch.cat([torch.tensor(flags + extremes).to(device), found.to(device, torch.float32)])
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        *numbers, _ = shared.tolist()
        there = iter(numbers)
        anywhere = [[next(there) > 0 for _ in of_params] for of_params in present]
        ranges = [(-next(there), most) for most in there]
        return anywhere, [r if r[1] > 0 else (1.0, 1.0) for r in ranges], shared[-1]


def found_by_any(found_inf: Tensor | None, params: Sequence[Tensor]) -> Tensor | None:
    """Of those that have parts of these parameters, whether one has found inf."""
    sharded = [param for param in map(as_sharded, params) if param is not None]
    meshes = {param.device_mesh: param.device for param in sharded}
    for mesh, device in meshes.items():
        found = torch.zeros(1) if found_inf is None else found_inf.detach().reshape(1)
        found_inf = found.to(device, torch.float32, copy=True)
        for axis in range(mesh.ndim):
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return found_inf


def _in_parts(pairs: list[tuple[int, int]], params: Sequence[Tensor]) -> list[list[tuple[int, int]]]:
    """One, or several of 64 MiB or more: gradients and their means are never all there at a time."""
    parts: list[list[tuple[int, int]]] = []
    room = 0
    for term, i in pairs:
        if room <= 0:
            parts.append([])
            room = 2**26
        parts[-1].append((term, i))
        room -= params[i].numel() * params[i].element_size()
    return parts


def _strides(param: Tensor) -> tuple[int, ...]:
    """Of a gradient: without gaps, in the order of the parameter."""
    return torch.empty_like(param, device="meta").stride()


def _flat(params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Zeros, and views of them as gradients of these parameters."""
    flat = params[0].new_zeros(sum(param.numel() for param in params))
    views, begin = [], 0
    for param in params:
        views.append(flat.as_strided(param.shape, _strides(param), begin))
        begin += param.numel()
    return flat, views
