"""The rank of each adapted module: the ramp over the blocks of a stack, or its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from torch import nn

from fastkit.methods.prilora.config import PRILoRAConfig, Rounding
from fastkit.methods.prilora.names import block_of, is_named, nearest
from fastkit.nn.prilora_linear_base import features


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
