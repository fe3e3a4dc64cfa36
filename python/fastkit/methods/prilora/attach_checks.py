"""What attach_prilora finds in a PEFT model, and refuses, in words."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fastkit.methods.prilora.config import PRILoRAConfig
from fastkit.methods.prilora.handle import handle_of

if TYPE_CHECKING:
    from peft import LoraConfig


def base_model(peft_model: nn.Module) -> nn.Module:
    from peft import PeftModel

    return peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model


def adapter_of(op: str, peft_model: Any) -> tuple[str, LoraConfig]:
    """The one adapter, and its configuration."""
    configs = getattr(peft_model, "peft_config", None)
    if not isinstance(peft_model, nn.Module) or not isinstance(configs, Mapping):
        raise TypeError(
            f"{op}: peft_model must be a model with an adapter of PEFT, got {type(peft_model).__name__}; use"
            " apply_prilora for a model without"
        )
    if handle_of(peft_model) is not None:
        raise ValueError(f"{op}: peft_model must not be attached to already; call undo() of its handle first")
    if len(configs) != 1:
        raise ValueError(
            f"{op}: peft_model must have one adapter, got {len(configs)} ({', '.join(configs)}); attach"
            " before others are added, or delete them"
        )
    [(adapter, lora)] = configs.items()
    kind = str(getattr(lora.peft_type, "value", lora.peft_type))
    if kind != "LORA":
        raise ValueError(f"{op}: peft_model must have a LoRA, got {kind}; only LoRA has an A to prune")
    if lora.use_dora:
        raise ValueError(
            f"{op}: peft_model must be a plain LoRA, got use_dora=True; make it with use_dora=False"
        )
    return adapter, lora


def lora_layers(op: str, base: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    found, parameters = False, dict[int, str]()
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        found = True
        parts = [
            part for kind in (module.lora_A, module.lora_B) for key, part in kind.items() if key == adapter
        ]
        if [type(part) for part in parts] != [nn.Linear] * 2 or type(module).__name__ == "ParamWrapper":
            raise ValueError(
                f"{op}: peft_model must have LoRA of linear layers alone, got {name}, a"
                f" {type(module).__name__} of PEFT; leave it out of target_modules"
            )
        if adapter in module.lora_variant:
            variant = module.lora_variant[adapter]
            variant = variant if isinstance(variant, type) else type(variant)
            raise ValueError(
                f"{op}: peft_model must be a plain LoRA, got {name}, a {variant.__name__}; make it without"
            )
        if module.merged:
            raise ValueError(f"{op}: peft_model must not be merged, got {name}, which is; unmerge it first")
        for part in parts:
            other = parameters.setdefault(id(part.weight), name)
            if other != name:
                raise ValueError(
                    f"{op}: adapters must not be shared, got {name} with that of {other}; make them apart"
                )
        yield name, module
    if not found:
        raise ValueError(f"{op}: peft_model must have layers with LoRA, got none")


def check_options(op: str, config: PRILoRAConfig, lora: LoraConfig) -> None:
    for name, plain in (("target_modules", None), ("modules_to_save", None), ("dropout", 0.0)):
        if getattr(config, name) != plain:
            raise ValueError(
                f"{op}: {name} must be left to PEFT, got {getattr(config, name)!r}; it is that of the"
                " LoraConfig"
            )
    if config.alpha not in (16.0, lora.lora_alpha):
        raise ValueError(
            f"{op}: alpha must be left to PEFT, got {config.alpha:g} with lora_alpha={lora.lora_alpha}; leave"
            " it out"
        )
    if (config.scaling == "rslora") != bool(lora.use_rslora):
        raise ValueError(
            f'{op}: scaling must be "rslora" with use_rslora=True, and only then, got {config.scaling!r} with'
            f" use_rslora={bool(lora.use_rslora)}"
        )


def check_fresh(
    op: str, modules: Mapping[str, Any], changed: list[str], adapter: str, lora: LoraConfig
) -> None:
    """That nobody knows A and B yet, where they are to be replaced."""
    for name in changed:
        module = modules[name]
        if _is_trained(module, adapter):
            raise ValueError(
                f"{op}: ranks must not change once B is not zero, got {name} with rank"
                f" {rank_of(module, adapter)}; attach before training, or give the ranks that it has"
            )
    if changed and lora.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f'{op}: init_lora_weights must be True or "gaussian" where ranks change, got'
            f" {lora.init_lora_weights!r}; make the LoRA with one of those"
        )
    parts = ((name, part) for name in changed for part in (modules[name].lora_A, modules[name].lora_B))
    replaced = {id(p): name for name, part in parts for p in part[adapter].parameters()}
    if not replaced:
        return
    for optimizer in (found for found in gc.get_objects() if issubclass(type(found), Optimizer)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in replaced:
                    raise RuntimeError(
                        f"{op}: ranks must not change once an optimizer holds A and B, got a"
                        f" {type(optimizer).__name__} with those of {replaced[id(parameter)]}; attach before"
                        " the optimizer is made"
                    )


def check_scales(
    op: str,
    config: PRILoRAConfig,
    modules: Mapping[str, Any],
    scaled: Mapping[str, tuple[float, float]],
    adapter: str,
    lora: LoraConfig,
) -> None:
    """That the alpha and scale to be of each layer change none that is trained or was chosen."""
    is_constant = config.scaling == "constant"
    for name, module in modules.items():
        alpha, scale = scaled[name]
        if is_constant and lora.alpha_pattern and not math.isclose(alpha, module.lora_alpha[adapter]):
            raise ValueError(
                f'{op}: alpha_pattern must be left out with scaling="constant", which sets alpha, got'
                f' {lora.alpha_pattern!r}; make the LoRA without, or use scaling="lora"'
            )
        own = module.scaling[adapter]
        if not math.isclose(scale, own) and _is_trained(module, adapter):
            remedy = 'use scaling="lora"' if is_constant else "call its unscale_layer()"
            raise ValueError(
                f"{op}: {name} must keep its scale once B is not zero, got scale {own:g} for config's"
                f" {scale:g}; {remedy}, or attach before training"
            )


def _is_trained(module: Any, adapter: str) -> bool:
    return any(bool(parameter.count_nonzero()) for parameter in module.lora_B[adapter].parameters())


def rank_of(module: Any, adapter: str) -> int:
    return module.lora_A[adapter].weight.shape[0]
