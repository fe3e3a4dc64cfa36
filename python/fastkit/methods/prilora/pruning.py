"""When and how A is pruned: steps of optimizers are counted, and some of them are events."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastkit import ops
from fastkit.methods.prilora.config import PRILoRAConfig
from fastkit.methods.prilora.statistic import Counted, Statistic


class Adapter(Counted, Protocol):
    """A layer whose A is pruned."""

    mask: Tensor

    @property
    def lora_a(self) -> nn.Parameter: ...

    @property
    def lora_b(self) -> nn.Parameter: ...

    @property
    def scale(self) -> float: ...


class PrunedAdapters:
    """Adapters by name, pruned after steps of whatever optimizer holds them.

    A step of an optimizer counts for the layers whose A it holds (whose B, where A is frozen), each of which
    has a count of its own. So of two optimizers that each hold some of the layers, one after the other, each
    prunes its own after its own step, and a step of both is one step; ``steps`` is the greatest count.

    A step with an ``optimizer.found_inf`` that is not zero was none: an optimizer that looks at that tensor
    itself, as fused AdamW under a GradScaler, changed nothing. Without a GradScaler there is no such tensor,
    and nothing is waited for.
    """

    OP = "PrunedAdapters"

    def __init__(self, layers: Mapping[str, Adapter], config: PRILoRAConfig, automatic: bool) -> None:
        self.config = config
        self.layers: dict[str, Adapter] = dict(layers)
        self.events: list[int] = []
        self._counts = dict.fromkeys(self.layers, 0)
        self._statistic = Statistic(self.layers, config.ratio > 0 and config.importance == "input")
        self._serial = 0
        if automatic:
            self._watch()

    @property
    def steps(self) -> int:
        """How many steps of the optimizer were seen."""
        return max(self._counts.values(), default=0)

    @property
    def automatic(self) -> bool:
        """Whether steps of optimizers are seen by themselves; else ``step()`` is to be called after each."""
        return _watching.get(self._serial) is self

    @property
    def counts(self) -> dict[str, int]:
        """How many steps were seen of each layer."""
        return dict(self._counts)

    @property
    def owners(self) -> dict[str, str]:
        """For each layer the one whose sum of squares is its own; empty until a step has decided it."""
        return dict(self._statistic.owners)

    def _go_on(self, counts: Mapping[str, int], events: Sequence[int], owners: Mapping[str, str]) -> None:
        """From where others have come to, as ``load_state_dict`` does."""
        self._counts = {name: int(counts[name]) for name in self.layers}
        self.events = [int(step) for step in events]
        self._statistic.share(owners)

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Count a step of the optimizer by hand, after it, and prune if it is an event.

        Args:
            optimizer: needed for ``reset_state`` alone, to zero its state; then only layers that it holds
                count.

        Raises:
            RuntimeError: steps are seen by themselves, so that this one would count twice.
        """
        if self.automatic:
            raise RuntimeError(
                f"{self.OP}: step() must not be called while steps of optimizers are seen by themselves, for"
                " each would count twice; leave it out, or pass automatic=False, or call close() first"
            )
        if optimizer is None and self.config.reset_state is not None:
            raise RuntimeError(
                f"{self.OP}: step() must be given the optimizer with reset_state={self.config.reset_state!r};"
                " call step(optimizer)"
            )
        names = list(self.layers) if optimizer is None else self._held(optimizer)
        self._count(names, optimizer)

    def close(self) -> None:
        """See no more steps of optimizers; nothing else changes. It may be called again."""
        _watching.pop(self._serial, None)

    @torch.no_grad()
    def finalize(self) -> None:
        """Prune once more, so that what is saved is sparse; with mode hard or final it stays so.

        Raises:
            RuntimeError: no layer has a statistic to be pruned by.
        """
        pruned = self._prune(list(self.layers), self.steps, None, hard=self.config.mode != "soft")
        if not pruned and self.config.ratio > 0:
            raise RuntimeError(
                f"{self.OP}: finalize() needs a statistic, and no layer has one; step the optimizer in"
                " training mode first"
            )

    def _watch(self) -> None:
        global _hook
        self._serial = next(_serials)
        _watching[self._serial] = self
        if _hook is None:  # disabled, so that a compiled step of an optimizer does not take it into its graph
            hook: Any = torch.compiler.disable(_after_step)
            _hook = register_optimizer_step_post_hook(hook)

    def _after(self, optimizer: Optimizer) -> None:
        names = self._held(optimizer)
        if not names:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self._count(names, optimizer)

    def _held(self, optimizer: Optimizer) -> list[str]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [
            name
            for name, layer in self.layers.items()
            if id(layer.lora_a if layer.lora_a.requires_grad else layer.lora_b) in held
        ]

    @torch.no_grad()
    def _count(self, names: list[str], optimizer: Optimizer | None) -> None:
        self._statistic.fold_(names)
        if self.config.mode != "soft":
            for name in names:  # an optimizer with momentum moves what has no gradient
                layer = self.layers[name]
                layer.lora_a.masked_fill_(~layer.mask, 0.0)
        due: dict[int, list[str]] = {}
        for name in names:
            self._counts[name] += 1
            if self.config.is_event(self._counts[name]):
                due.setdefault(self._counts[name], []).append(name)
        for step, of_step in sorted(due.items()):
            hard = self.config.mode == "hard" or (
                self.config.mode == "final" and step == self.config.last_event
            )
            if self._prune(of_step, step, optimizer, hard) and step not in self.events:
                self.events.append(step)

    def _prune(self, names: list[str], step: int, optimizer: Optimizer | None, hard: bool) -> bool:
        """Returns whether any was pruned, the same on all ranks, as ``folds`` is."""
        if self.config.ratio == 0:
            return False
        layers = [self.layers[name] for name in names]
        if self.config.importance == "input":  # what has seen nothing is not judged
            seen = torch.stack([layer.folds.to(layers[0].folds.device) for layer in layers]).tolist()
            layers = [layer for layer, folds in zip(layers, seen, strict=True) if folds > 0]
        if not layers:
            return False
        kept = self._random(names, step) if self.config.importance == "random" else self._least(layers)
        for layer, mask in zip(layers, kept, strict=True):
            layer.mask.copy_(mask if hard else torch.ones_like(mask))
        if optimizer is not None and self.config.reset_state is not None:
            self._reset(optimizer, layers, kept)
        return True

    def _least(self, layers: Sequence[Adapter]) -> list[Tensor]:
        """Zeroes what scores least; in one call for each device."""
        by_input = self.config.importance == "input"
        matrices, norms = [], []
        for layer in layers:
            norm = layer.input_square.sqrt() if by_input else torch.ones_like(layer.input_square)
            a = layer.lora_a.detach()
            if self.config.group == "matrix":
                norm, a = norm.repeat(a.shape[0]), a.reshape(1, -1)
            matrices.append(a)
            norms.append(norm)
        kept: list[Tensor] = [torch.empty(0)] * len(layers)
        for device in {a.device for a in matrices}:
            here = [i for i, a in enumerate(matrices) if a.device == device]
            masks = ops.prune_rows_grouped_(
                [matrices[i] for i in here], [norms[i] for i in here], self.config.ratio
            )
            for i, mask in zip(here, masks, strict=True):
                kept[i] = mask.view(layers[i].lora_a.shape)
                if not layers[i].lora_a.is_contiguous():  # then what was pruned may be a copy
                    layers[i].lora_a.masked_fill_(~kept[i], 0.0)
        return kept

    def _random(self, names: Sequence[str], step: int) -> list[Tensor]:
        """As many entries, at random but for those that a hard mask has; the same on any device and rank."""
        order, kept = {name: i for i, name in enumerate(self.layers)}, []
        for name in names:
            layer, a = self.layers[name], self.layers[name].lora_a
            generator = torch.Generator().manual_seed(
                (self.config.seed * 1_000_003 + step) * 1_000_003 + order[name] & 0xFFFF_FFFF_FFFF
            )
            scores = torch.rand(a.shape, generator=generator).to(a.device) + 1.0
            scores.masked_fill_(~layer.mask, 0.0)
            if self.config.group == "matrix":
                scores = scores.view(1, -1)
            mask = ops.prune_rows_(scores, torch.ones(scores.shape[1], device=a.device), self.config.ratio)
            kept.append(mask.view(a.shape))
            a.masked_fill_(~kept[-1], 0.0)
        return kept

    def _reset(self, optimizer: Optimizer, layers: Sequence[Adapter], kept: Sequence[Tensor]) -> None:
        first, second = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "max_exp_avg_sq")
        for layer, mask in zip(layers, kept, strict=True):
            for key, value in optimizer.state.get(layer.lora_a, {}).items():
                is_moment = key in first or (
                    self.config.reset_state == "mv" and str(key).split(".")[0] in second
                )
                if is_moment and isinstance(value, Tensor) and value.shape == mask.shape:
                    value.masked_fill_(~mask, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_serial": 0, "_automatic": self.automatic}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy sees steps if its origin did: those of optimizers that hold its own layers."""
        automatic = state.pop("_automatic")
        self.__dict__.update(state)
        if automatic:
            self._watch()


# One hook for all: were each to have its own, one that is freed during a step would change the hooks in use.
_watching: weakref.WeakValueDictionary[int, PrunedAdapters] = weakref.WeakValueDictionary()
_serials: Iterator[int] = itertools.count(1)
_hook: Any = None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for serial in sorted(_watching.keys()):  # in the order of creation, alike on all ranks
        adapters = _watching.get(serial)
        if adapters is not None:
            adapters._after(optimizer)  # pyright: ignore[reportPrivateUsage]
