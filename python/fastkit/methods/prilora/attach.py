"""PRILoRA on the LoRA of a PEFT model: its ranks ramped and its A pruned, in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkit import ops
from fastkit._autograd import transforms
from fastkit.methods.prilora.attach_checks import (
    adapter_of,
    base_model,
    check_fresh,
    check_options,
    check_scales,
    lora_layers,
    rank_of,
)
from fastkit.methods.prilora.config import PRILoRAConfig, check_config
from fastkit.methods.prilora.handle import Handle, copied
from fastkit.methods.prilora.ranks import plan
from fastkit.nn.prilora_linear_count import count_

if TYPE_CHECKING:
    from peft import LoraConfig

_PARTS = ("r", "lora_alpha", "scaling")  # of a layer of PEFT, for each adapter


def attach_prilora(
    peft_model: nn.Module, config: PRILoRAConfig | None = None, *, automatic: bool = True
) -> AttachedPRILoRA:
    """Ramp the ranks of a PEFT LoRA, and prune its A as it is trained; its layers stay those of PEFT.

    Layers whose rank the ramp changes get new A and B, initialised as PEFT does. The model gets a
    ``LoraConfig`` with their ``rank_pattern`` (and, with ``scaling="constant"``, ``alpha_pattern``), so that
    PEFT saves and loads it. What fails changes nothing.

    Args:
        peft_model: with one adapter, a plain LoRA of linear layers, not merged.
        config: the options; default ``PRILoRAConfig()``. What is adapted, what is trained beside it, dropout
            and alpha are those of PEFT; ``scaling`` is ``"rslora"`` where ``use_rslora`` is set, and only
            there.
        automatic: whether steps of optimizers are seen by a hook; else call ``step()`` after each.

    Returns:
        The handle, which the model keeps too.

    Raises:
        ValueError: several adapters, another kind than plain LoRA (DoRA), options that are PEFT's, a rank by
            name beyond what its module can have; ranks or a scale that would change once B is not zero; an
            ``alpha_pattern`` of other alphas than those of ``scaling="constant"``.
        RuntimeError: ranks that would change when an optimizer holds their A or B, which it would go on with.
        TypeError: the model has no adapter of PEFT, or config is of another type.

    With mode hard or final, PEFT's forward has no mask: what is pruned is zeroed after each step, and counts
    in the norm of a gradient.

    Source: see ``PRILoRAConfig``.
    """
    op = "attach_prilora"
    config = check_config(op, config)
    adapter, lora = adapter_of(op, peft_model)
    base = base_model(peft_model)
    modules = dict(lora_layers(op, base, adapter))
    check_options(op, config, lora)
    ranks = plan(op, base, config, list(modules))
    changed = [name for name, module in modules.items() if rank_of(module, adapter) != ranks[name]]
    check_fresh(op, modules, changed, adapter, lora)
    scaled = {name: _scaled(module, adapter, ranks[name], config, lora) for name, module in modules.items()}
    check_scales(op, config, modules, scaled, adapter, lora)
    return AttachedPRILoRA(peft_model, config, modules, adapter, lora, ranks, automatic=automatic)


class AttachedLayer:
    """What PRILoRA keeps of a LoRA layer of PEFT; its A and B are PEFT's."""

    def __init__(self, module: Any, adapter: str, beta: float) -> None:
        self.module = module
        self.adapter = adapter
        self.beta = beta
        self.statistic = True
        a = self.lora_a
        self.mask: Tensor = torch.ones_like(a, dtype=torch.bool)
        self.input_square: Tensor = torch.zeros(a.shape[1], device=a.device)
        self.square_sum: Tensor = torch.zeros(a.shape[1], device=a.device)
        self.folds: Tensor = torch.zeros((), dtype=torch.int64, device=a.device)
        self.handle: RemovableHandle = module.register_forward_pre_hook(self.count, with_kwargs=True)

    @property
    def lora_a(self) -> nn.Parameter:
        return self.module.lora_A[self.adapter].weight

    @property
    def lora_b(self) -> nn.Parameter:
        return self.module.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        return self.module.scaling[self.adapter]

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of each forward; before dropout, as of ``nn.PRILoRALinear``."""
        if not (self.statistic and module.training) or module.disable_adapters or module.merged:
            return
        if self.adapter not in module.active_adapters or transforms():
            return
        x: Tensor = args[0] if args else kwargs["x"]
        if self.square_sum.device != x.device:  # the model was moved
            self.to(x.device)
        count_(self.square_sum, ops.column_norms(x.detach()).square())

    def to(self, device: torch.device) -> None:
        for name in ("mask", "input_square", "square_sum", "folds"):
            setattr(self, name, getattr(self, name).to(device))


class AttachedPRILoRA(Handle):
    """A PEFT model whose LoRA is ramped and pruned: what ``attach_prilora`` returns.

    Attributes:
        model: the PEFT model.
        config: the options.
        layers: what is kept of each LoRA layer, by its name in the base model: ``lora_a``, ``lora_b`` and
            ``scale``, which are PEFT's, ``rank``, ``mask``, ``input_square``.
        steps, events, automatic: as of ``PRILoRA``, and so are ``step``, ``close`` and ``finalize``.
    """

    OP, MADE_BY = "AttachedPRILoRA", "attach_prilora"

    layers: dict[str, AttachedLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: nn.Module,
        config: PRILoRAConfig,
        modules: Mapping[str, Any],
        adapter: str,
        lora: LoraConfig,
        ranks: Mapping[str, int],
        *,
        automatic: bool = True,
    ) -> None:
        self.adapter = adapter
        self._lora = lora
        self._originals = {name: _kept(module, adapter) for name, module in modules.items()}
        fresh = {
            name: _resized(module, adapter, ranks[name], lora.init_lora_weights)
            for name, module in modules.items()
            if rank_of(module, adapter) != ranks[name]
        }
        for name, (a, b) in fresh.items():
            modules[name].lora_A[adapter], modules[name].lora_B[adapter] = a, b
        for name, module in modules.items():
            module.r[adapter] = ranks[name]
            alpha, scale = _scaled(module, adapter, ranks[name], config, lora)
            module.lora_alpha[adapter], module.scaling[adapter] = alpha, scale
        # PEFT takes the first pattern that a name ends with: the longest first, each finds its own.
        ordered = sorted(modules, key=len, reverse=True)
        ramped = copy.copy(lora)  # other models may be of the same configuration
        ramped.rank_pattern = {name: ranks[name] for name in ordered}
        if config.scaling == "constant":
            ramped.alpha_pattern = {name: modules[name].lora_alpha[adapter] for name in ordered}
        _configs(model)[adapter] = ramped
        layers = {name: AttachedLayer(module, adapter, config.beta) for name, module in modules.items()}
        super().__init__(model, layers, config, automatic)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: all that PEFT left to be."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def undo(self) -> nn.Module:
        """The PEFT model as it was: its ranks, A and B, and its LoraConfig; steps are not seen any more."""
        self._check_kept("undo")
        for name, layer in self.layers.items():
            layer.handle.remove()
            parts, a, b, values = self._originals[name]
            for part, value in parts.items():
                getattr(layer.module, part)[self.adapter] = value
            with torch.no_grad():
                for linear, state in ((a, values[0]), (b, values[1])):
                    for key, parameter in linear.named_parameters():
                        parameter.copy_(state[key])
            layer.module.lora_A[self.adapter], layer.module.lora_B[self.adapter] = a, b
        _configs(self.model)[self.adapter] = self._lora
        self._forget()
        return self.model


def _configs(peft_model: Any) -> dict[str, LoraConfig]:
    return peft_model.peft_config


def _scaled(
    module: Any, adapter: str, rank: int, config: PRILoRAConfig, lora: LoraConfig
) -> tuple[float, float]:
    """Alpha and scale of a layer once it has this rank."""
    is_constant = config.scaling == "constant"
    alpha = lora.lora_alpha * rank / config.mean_rank if is_constant else module.lora_alpha[adapter]
    return alpha, alpha / (math.sqrt(rank) if config.scaling == "rslora" else rank)


def _kept(module: Any, adapter: str) -> tuple[Any, ...]:
    """What ``undo`` puts back."""
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    parts = {part: getattr(module, part)[adapter] for part in _PARTS}
    return parts, a, b, tuple(copied(dict(linear.named_parameters())) for linear in (a, b))


def _resized(module: Any, adapter: str, rank: int, init: bool | str) -> tuple[nn.Linear, nn.Linear]:
    """A and B of another rank, initialised as PEFT does."""
    old_a, old_b = module.lora_A[adapter], module.lora_B[adapter]
    options = {"device": old_a.weight.device, "dtype": old_a.weight.dtype}
    a = nn.Linear(module.in_features, rank, bias=False, **options)
    b = nn.Linear(rank, module.out_features, bias=old_b.bias is not None, **options)
    if init == "gaussian":
        nn.init.normal_(a.weight, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    for parameter in b.parameters():
        nn.init.zeros_(parameter)
    for new, old in ((a, old_a), (b, old_b)):
        new.train(old.training).requires_grad_(old.weight.requires_grad)
    return a, b
