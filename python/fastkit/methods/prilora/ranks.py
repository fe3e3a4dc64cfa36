"""Which modules of a model are adapted and with what rank, and which are trained beside them."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from torch import Tensor, nn

from fastkit.methods.prilora.config import PRILoRAConfig, Rounding
from fastkit.nn.prilora_linear import features

# The first such part of a name is the block: T5 has block.3.layer.0 and ALBERT-like groups are no blocks.
_BLOCK = re.compile(r"^(?:(?P<of>.*?)\.)?(?P<kind>layers|layer|h|blocks|block)\.(?P<index>\d+)(?:\.|$)")


def ranks(layers: int, start: int, final: int, rounding: Rounding = "nearest") -> list[int]:
    """The ranks of a stack of blocks, from ``start`` in the first to ``final`` in the last.

    ::

        rho_l = start + (final - start) l / (layers - 1),    a single block has final

    Args:
        layers: how many blocks there are.
        rounding: ``"nearest"`` rounds halves upwards; ``"floor"`` rounds down; ``"budget"`` rounds all down,
            and then up the blocks with the largest remainders (of equal ones the last), until the sum is that
            of the rho_l, rounded.

    Example:
        >>> from fastkit.methods.prilora.ranks import ranks
        >>> ranks(12, 4, 12), sum(ranks(12, 4, 12))
        ([4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12], 96)
    """
    exact = [start + Fraction((final - start) * block, layers - 1) for block in range(layers - 1)]
    exact += [Fraction(final)] * (layers > 0)
    if rounding == "nearest":
        return [_nearest(rank) for rank in exact]
    rounded = [rank.numerator // rank.denominator for rank in exact]
    if rounding == "budget":
        missing = _nearest(sum(exact, Fraction(0))) - sum(rounded)
        by_remainder = sorted(range(layers), key=lambda l: (exact[l] - rounded[l], l))  # noqa: E741
        for block in by_remainder[layers - missing :]:
            rounded[block] += 1
    return rounded


def _nearest(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def block_of(name: str) -> tuple[str, int] | None:
    """The stack and the index of the block that a module is in, as its name has it."""
    found = _BLOCK.match(name)
    if found is None:
        return None
    return ".".join(filter(None, (found["of"], found["kind"]))), int(found["index"])


def is_linear(module: nn.Module) -> bool:
    """Whether it may be adapted: nn.Linear, Conv1D of transformers, and what is quantised like them."""
    try:
        features(module)
    except ValueError:
        return False
    return isinstance(getattr(module, "weight", None), Tensor)


def is_named(name: str, key: str) -> bool:
    """Whether ``key`` is the module's name or its end, from a dot on."""
    return name == key or name.endswith(f".{key}")


def nearest(key: str, names: Iterable[str]) -> str:
    """A sentence with the ends of names that are most like ``key``, or with some if none is like it."""
    names = list(dict.fromkeys(names))
    parts = key.count(".") + 1
    ends = [".".join(name.split(".")[-parts:]) for name in names]
    close = difflib.get_close_matches(key, list(dict.fromkeys(ends)), n=3)
    if close and key not in close:
        return f"the nearest are {', '.join(close)}"
    ends = list(dict.fromkeys(_end(name) for name in names))
    if not ends:
        return "it has no linear layer"
    return f"it has {', '.join(ends[:8])}{', ...' if len(ends) > 8 else ''}"


def _end(name: str) -> str:
    """What tells a module from others of its block."""
    found = _BLOCK.match(name)
    return name[found.end() :] or name if found else name


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


def plan(op: str, model: nn.Module, config: PRILoRAConfig, names: Sequence[str]) -> dict[str, int]:
    """The rank of each of these modules: its own, or its block's in the ramp of its stack.

    A ramp is clamped to what the module can have, a rank by name is refused beyond it. Modules outside the
    blocks have the mean rank, rounded.
    """
    blocks: dict[str, set[int]] = defaultdict(set)
    for name, _ in model.named_modules():
        block = block_of(name)
        if block is not None:
            blocks[block[0]].add(block[1])
    ramp: dict[tuple[str, int], int] = {}
    for stack, indices in blocks.items():
        of_stack = ranks(len(indices), config.rank_start, config.rank_final, config.rounding)
        ramp.update({(stack, i): rank for i, rank in zip(sorted(indices), of_stack, strict=True)})
    outside = _nearest(Fraction(config.rank_start + config.rank_final, 2))
    for key in config.ranks:
        if not any(is_named(name, key) for name in names):
            raise ValueError(
                f"{op}: ranks must be of modules that are adapted, got {key}, which matches none;"
                f" {nearest(key, names)}"
            )
    planned = {}
    for name in names:
        largest = min(features(model.get_submodule(name)))
        keys = [key for key in config.ranks if is_named(name, key)]
        if keys:
            rank = config.ranks[max(keys, key=len)]
            if rank > largest:
                raise ValueError(
                    f"{op}: ranks must be at most {largest} for {name}, the least of its in_features and"
                    f" out_features, got {rank}"
                )
        else:
            block = block_of(name)
            rank = max(1, min(ramp[block] if block else outside, largest))
        planned[name] = rank
    return planned


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
