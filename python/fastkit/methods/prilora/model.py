"""A model whose linear layers are replaced by PRILoRA's, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkit.methods.prilora.config import PRILoRAConfig, check_config
from fastkit.methods.prilora.handle import Handle, copied
from fastkit.methods.prilora.ranks import plan
from fastkit.methods.prilora.targets import check_targets, modules_to_save, targets
from fastkit.nn import PRILoRALinear
from fastkit.nn.prilora_linear_base import is_product


def apply_prilora(
    model: nn.Module, config: PRILoRAConfig | None = None, *, automatic: bool = True
) -> PRILoRA:
    """Put low-rank adapters into a model, in place, and prune them as it is trained.

    Linear layers become ``fastkit.nn.PRILoRALinear``; all parameters are frozen but those of the adapters and
    of ``modules_to_save``. With that the model is trained as any other: after each step of an optimizer that
    holds adapters the statistic is taken, and after some of them A is pruned. What fails changes nothing.
    Under torch.distributed the statistic is of all ranks of the default group, which step together.

    Args:
        model: any module; blocks are known by their names (``layers.N``, ``layer.N``, ``h.N``, ``blocks.N``,
            ``block.N``; the name before is the stack, each of which has a ramp of its own).
        config: the options; default ``PRILoRAConfig()``.
        automatic: whether steps of optimizers are seen by a hook; else call ``step()`` after each.

    Returns:
        The handle, which the model keeps too.

    Raises:
        ValueError: names that match nothing (the message has the nearest), a rank by name beyond what its
            module can have, a shared or tied target, a model that has adapters already or is wrapped for
            data-parallel training.
        TypeError: model or config are of another type.

    Source: see ``PRILoRAConfig``.

    Example:
        >>> import torch
        >>> from fastkit.methods.prilora import apply_prilora
        >>> encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(encoder, 3, enable_nested_tensor=False)
        >>> {name: layer.rank for name, layer in apply_prilora(model).layers.items() if "linear1" in name}
        {'layers.0.linear1': 4, 'layers.1.linear1': 8, 'layers.2.linear1': 12}
    """
    op = "apply_prilora"
    check_model(op, model)
    config = check_config(op, config)
    names = targets(op, model, config)
    check_targets(op, model, names)
    ranks = plan(op, model, config, names)
    saved = modules_to_save(op, model, config, names)
    return PRILoRA(model, config, ranks, saved, automatic=automatic)


class PRILoRA(Handle):
    """A model with adapters: what ``apply_prilora`` and ``load_prilora`` return.

    Attributes:
        model: the model, whose modules were replaced in place.
        config: the options.
        layers: the adapted layers, ``fastkit.nn.PRILoRALinear``, by their names in the model.
        modules_to_save: the names of the modules that are trained in full.
        steps: how many steps of the optimizer were seen.
        events: after which of them A was pruned.
        automatic: whether steps are seen by themselves.

    Of several optimizers, each counts for the layers that it holds. See ``step`` for the manual form.
    """

    OP, MADE_BY = "PRILoRA", "apply_prilora"

    layers: dict[str, PRILoRALinear]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: nn.Module,
        config: PRILoRAConfig,
        ranks: Mapping[str, int],
        modules_to_save: list[str],
        *,
        automatic: bool = True,
    ) -> None:
        self.modules_to_save: list[str] = list(modules_to_save)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        layers: dict[str, PRILoRALinear] = {}
        try:
            self._originals = {name: copied(_state(model, name)) for name in modules_to_save}
            for name, rank in ranks.items():
                base = model.get_submodule(name)
                layers[name] = PRILoRALinear(
                    base, rank, alpha=config.alpha_of(rank), dropout=config.dropout, beta=config.beta
                ).train(base.training)
            model.requires_grad_(False)
            for name in modules_to_save:
                model.get_submodule(name).requires_grad_(True)
        except BaseException:  # a layer freezes its base as soon as it is made
            _restore(self._flags)
            raise
        for name, layer in layers.items():
            _replace(model, name, layer)
        super().__init__(model, layers, config, automatic)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: A and B of each layer, and the parameters of ``modules_to_save``."""
        for layer in self.layers.values():
            yield layer.lora_a
            yield layer.lora_b
        for name in self.modules_to_save:
            yield from self.model.get_submodule(name).parameters()

    def merge(self, *, reversible: bool = True) -> PRILoRA:
        """Add each adapter to its weight, for inference without it; if one cannot be, none is."""
        layers = list(self.layers.values())
        for layer in sorted(layers, key=lambda layer: is_product(layer.base_layer) and not layer.merged):
            layer.merge(reversible=reversible)  # first those that refuse
        return self

    def unmerge(self) -> PRILoRA:
        """Take each adapter out again, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()
        return self

    def undo(self) -> nn.Module:
        """The original model, bit for bit: its modules, the values of ``modules_to_save``, what was trained.

        The adapters are in no model then, and steps are not seen any more.
        """
        self._check_kept("undo")
        for layer in self.layers.values():
            if layer.merged:
                layer.unmerge()
        for name, layer in self.layers.items():
            layer.base_layer.train(layer.training)
            _replace(self.model, name, layer.base_layer)
        with torch.no_grad():
            for name, state in self._originals.items():
                for key, value in _state(self.model, name).items():
                    value.copy_(state[key])
        _restore(self._flags)
        self._forget()
        return self.model

    def save_pretrained(self, folder: str | Path, *, uniform: bool = False) -> None:
        """Write a folder that PEFT reads, and that ``load_prilora`` goes on from; see ``files``."""
        from fastkit.methods.prilora.files import save_pretrained

        save_pretrained(self, folder, uniform=uniform)

    def __repr__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        return (
            f"PRILoRA({type(self.model).__name__}: {len(ranks)} layers of ranks {min(ranks)} to {max(ranks)},"
            f" {len(self.modules_to_save)} modules in full, {self.steps} steps, {len(self.events)} events)"
        )

    def _tensors(self) -> dict[str, Tensor]:
        found = super()._tensors()
        for name in self.modules_to_save:
            found |= {f"{name}.{key}": value for key, value in _state(self.model, name).items()}
        return found


def check_model(op: str, model: object) -> None:
    """One adapter a model: neither ours nor those of PEFT; and nobody who would miss the new parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{op}: model must not be wrapped yet, got a {type(model).__name__}; call it with model.module,"
            " and wrap that after"
        )
    for name, module in model.named_modules():
        if isinstance(module, PRILoRALinear):
            raise ValueError(
                f"{op}: model must have no adapters yet, got {name}, a PRILoRALinear; there is one adapter a"
                " model: call undo() of the first, or merge it"
            )
        if any(kind.__name__ in ("BaseTunerLayer", "PeftModel") for kind in type(module).__mro__):
            raise ValueError(
                f"{op}: model must have no adapters yet, got {name or 'a model'}, a {type(module).__name__}"
                " of PEFT; use attach_prilora, or unload() it first"
            )


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    module = model.get_submodule(name)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
