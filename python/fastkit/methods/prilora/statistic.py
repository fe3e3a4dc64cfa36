"""The average of squares that several layers may share, over the ranks of torch.distributed.

Layers that read the same input have the same sum. Which do is decided once, from what a whole step of the
optimizer has summed: layers of one parent module, as query, key and value, whose sums are equal bit for bit
on every rank got the same tensors, whatever was compiled or checkpointed. From then on the first of them
sums, and the others take its average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist


class Counted(Protocol):
    """What is known of a layer here: ``nn.PRILoRALinear``, or what stands for a layer of PEFT."""

    beta: float
    statistic: bool
    input_square: Tensor
    folds: Tensor
    square_sum: Tensor


class Statistic:
    """Moves the sums of layers into their averages.

    ``owners`` has, for each layer of which it is decided, the layer whose sum is its own.
    """

    def __init__(self, layers: Mapping[str, Counted], enabled: bool) -> None:
        self.layers = layers
        self.enabled = enabled
        self.owners: dict[str, str] = {}
        self._segments: dict[tuple[Any, ...], Tensor] = {}
        self.share({})

    def share(self, owners: Mapping[str, str]) -> None:
        """Let one layer sum for others; what is not in ``owners`` sums for itself until it is decided."""
        self.owners = dict(owners)
        for name, layer in self.layers.items():
            layer.statistic = self.enabled and owners.get(name, name) == name
            if not layer.statistic:
                layer.square_sum.zero_()

    @torch.no_grad()
    def fold_(self, names: Iterable[str]) -> None:
        """Once per step of an optimizer, of the layers that it holds: as ``PRILoRALinear.fold_`` of each.

        What is summed on all ranks is added up first, by one collective for each device. It is a few kernels
        for all layers; nothing is read back from a GPU, but at the step at which owners are decided.
        """
        if not self.enabled:
            return
        names = list(names)
        undecided = [name for name in names if name not in self.owners]
        if undecided:
            self._decide(undecided)
        owner = {name: self.owners.get(name, name) for name in names}
        by_device: dict[torch.device, list[Counted]] = defaultdict(list)
        for name in dict.fromkeys(owner.values()):
            by_device[self.layers[name].square_sum.device].append(self.layers[name])
        for device, layers in by_device.items():
            sums = torch.cat([layer.square_sum for layer in layers])
            if self._ranks() > 1:
                dist.all_reduce(sums)
            _fold_(layers, sums, self._segments_of(layers, device))
        others = [(self.layers[name], self.layers[of]) for name, of in owner.items() if of != name]
        if others:
            _copy_([own.input_square for own, _ in others], [of.input_square for _, of in others])
            _copy_([own.folds for own, _ in others], [of.folds for _, of in others])

    def _ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def _segments_of(self, layers: list[Counted], device: torch.device) -> Tensor:
        """For each entry of their sums, one after the other, which layer's it is; kept, being one copy."""
        sizes = tuple(layer.square_sum.numel() for layer in layers)
        if (sizes, device) not in self._segments:
            segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            self._segments[sizes, device] = segments.to(device)
        return self._segments[sizes, device]

    def _decide(self, names: list[str]) -> None:
        """Layers without a finite sum that is not 0 sum for themselves; with no other, nothing is decided."""
        sums = {name: self.layers[name].square_sum for name in names}
        known = [bool(s.isfinite().all() & (s > 0).any()) for s in sums.values()]
        siblings: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        owner = {name: name for name in names}
        for name, is_known in zip(names, known, strict=True):
            if not is_known:
                continue
            first = siblings[name.rpartition(".")[0], sums[name].shape, sums[name].device]
            owner[name] = next((other for other in first if torch.equal(sums[name], sums[other])), name)
            if owner[name] == name:
                first.append(name)
        if self._ranks() > 1:  # what is not so on each rank is not so
            numbers = {name: i for i, name in enumerate(names)}
            mine = [*(numbers[owner[name]] for name in names), *known]
            least = torch.tensor(mine, dtype=torch.int64, device=sums[names[0]].device)
            most = least.clone()
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            same, of_all = (least == most).tolist(), least.tolist()
            owner = {name: owner[name] if same[i] else name for name, i in numbers.items()}
            known = of_all[len(names) :]
        if any(known):
            self.share({**self.owners, **owner})


def _fold_(layers: list[Counted], sums: Tensor, segments: Tensor) -> None:
    """``q = beta q + (1 - beta) s`` of each layer, q = s at first, but for a sum that is 0 or not finite."""
    sizes = [layer.square_sum.numel() for layer in layers]
    total = sums.new_zeros(len(layers)).index_add_(0, segments, sums)
    counts = total.isfinite() & (total > 0)
    folds = torch.stack([layer.folds for layer in layers])
    past = torch.cat([layer.input_square for layer in layers])
    beta = layers[0].beta
    average = torch.where((folds == 0)[segments], sums, beta * past + (1 - beta) * sums)
    average = torch.where(counts[segments], average, past)
    _copy_([layer.input_square for layer in layers], average.split(sizes))
    _copy_([layer.folds for layer in layers], (folds + counts).unbind())
    _copy_([layer.square_sum for layer in layers], torch.zeros_like(sums).split(sizes))


def _copy_(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(to), list(of))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
