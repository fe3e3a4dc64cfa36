"""Which modules of a model are adapted, and which are trained in full beside them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fastkit.methods.prilora.config import PRILoRAConfig
from fastkit.methods.prilora.names import block_of, is_named, nearest
from fastkit.nn.prilora_linear_base import features


def is_linear(module: nn.Module) -> bool:
    """Whether it may be adapted: nn.Linear, Conv1D of transformers, and what is quantised like them."""
    try:
        features(module)
    except ValueError:
        return False
    return isinstance(getattr(module, "weight", None), Tensor)


def targets(op: str, model: nn.Module, config: PRILoRAConfig) -> list[str]:
    """The names of the modules to adapt, in the model's order; ValueError where a name matches nothing."""
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if config.target_modules is None:
        chosen = [name for name in linear if block_of(name) is not None]
        if not chosen:
            raise ValueError(
                f"{op}: target_modules must be given for {type(model).__name__}, in which no linear layer is"
                " inside a block by its name (layers.N, layer.N, h.N, blocks.N, block.N);"
                f" {nearest('', linear)}"
            )
        return chosen
    everything = [name for name, _ in model.named_modules() if name]
    if isinstance(config.target_modules, str):
        pattern = re.compile(config.target_modules)
        chosen = [name for name in everything if pattern.fullmatch(name)]
        unmatched = [] if chosen else [config.target_modules]
    else:
        keys = config.target_modules
        chosen = [name for name in everything if any(is_named(name, key) for key in keys)]
        unmatched = [key for key in keys if not any(is_named(name, key) for name in chosen)]
        unmatched = unmatched or ([] if keys else ["[]"])
    if unmatched:
        whole = "whole " if isinstance(config.target_modules, str) else ""
        raise ValueError(
            f"{op}: target_modules must match modules of {type(model).__name__}, got {unmatched[0]}, which"
            f" matches no {whole}name; {nearest(unmatched[0], linear)}"
        )
    return chosen


def check_targets(op: str, model: nn.Module, names: Sequence[str]) -> None:
    """That each is a linear layer, one by itself: no module of two names, no weight that another has too."""
    called: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        called[id(module)].append(name)
    holders: dict[object, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[_place(parameter)].append(name)
    for name in names:
        module = model.get_submodule(name)
        if not is_linear(module):
            raise ValueError(
                f"{op}: target_modules must be linear layers with in_features and out_features, or a"
                f" transformers Conv1D, got {name}, a {type(module).__name__}; name others"
            )
        others = [other for other in called[id(module)] if other != name]
        if others:
            raise ValueError(
                f"{op}: target_modules must not be shared, got {name}, which is the same module as"
                f" {others[0]}; leave it out of target_modules"
            )
        own = {f"{name}.{suffix}" for suffix, _ in module.named_parameters()}
        for parameter in module.parameters():
            others = [other for other in holders[_place(parameter)] if other not in own]
            if others:
                raise ValueError(
                    f"{op}: target_modules must not be tied, got {name}, whose parameter is also {others[0]};"
                    " leave it out of target_modules, or untie it"
                )


def _place(parameter: Tensor) -> object:
    """The same for two parameters that are one, or one memory."""
    if parameter.device.type == "meta" or parameter.numel() == 0:
        return id(parameter)
    try:
        return parameter.device, parameter.data_ptr()
    except RuntimeError:  # a tensor without memory of its own, as of a subclass
        return id(parameter)


def modules_to_save(op: str, model: nn.Module, config: PRILoRAConfig, adapted: Sequence[str]) -> list[str]:
    """The names of the modules trained in full, none inside another."""
    if config.modules_to_save is None:
        return list(_heads(model, "", _embeddings(model), set(adapted)))
    everything = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    chosen: list[str] = []
    for key in config.modules_to_save:
        matched = [name for name in everything if is_named(name, key)]
        if not matched:
            raise ValueError(
                f"{op}: modules_to_save must match modules with parameters of {type(model).__name__}, got"
                f" {key}, which matches nothing; {nearest(key, everything)}"
            )
        chosen += [name for name in matched if name not in chosen]
    for name in chosen:
        inside = [other for other in adapted if other == name or other.startswith(f"{name}.")]
        around = [other for other in adapted if name.startswith(f"{other}.")]
        if inside or around:
            raise ValueError(
                f"{op}: modules_to_save must not be adapted too, got {name} with {(inside + around)[0]} among"
                " target_modules; leave it out of one of them"
            )
    inner = {name for name in chosen if any(name.startswith(f"{other}.") for other in chosen)}
    return [name for name in everything if name in chosen and name not in inner]


def _heads(model: nn.Module, prefix: str, frozen: set[int], adapted: set[str]) -> Iterator[str]:
    """The largest modules with a linear layer, and nothing that is frozen, adapted or a block."""
    for child_name, child in model.named_children():
        name = f"{prefix}{child_name}"
        if "embed" in child_name:  # a projection of embeddings, as of ALBERT and ELECTRA
            continue
        inner = [(f"{name}.{n}" if n else name, m) for n, m in child.named_modules()]
        holds = any(n in adapted or block_of(n) is not None for n, _ in inner)
        if not holds and not any(id(parameter) in frozen for parameter in child.parameters()):
            if any(is_linear(module) for _, module in inner):
                yield name
        elif name not in adapted and block_of(name) is None and not _embeds(child):
            yield from _heads(child, f"{name}.", frozen, adapted)


def _embeds(module: nn.Module) -> bool:
    """Whether it is an embedding, with what is done to its rows: norms and projections are its own."""
    tables = any(isinstance(m, nn.Embedding) for m in module.modules())
    return tables and not any(block_of(name) for name, _ in module.named_modules())


def _embeddings(model: nn.Module) -> set[int]:
    """The parameters of embeddings, of the model's output too, and of what shares one with them."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, getter, lambda: None)()
        except (NotImplementedError, AttributeError):
            found = None
        modules += [found] if isinstance(found, nn.Module) else []
    return {id(parameter) for module in modules for parameter in module.parameters()}
