"""What PRILoRA is told: ranks, scale, targets, and when and how A is pruned."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from fastkit.methods._options import check_integer, check_number, check_one_of, check_positive

Rounding = Literal["nearest", "floor", "budget"]
Scaling = Literal["lora", "constant", "rslora"]
Mode = Literal["soft", "hard", "final"]
Group = Literal["row", "matrix"]
Importance = Literal["input", "magnitude", "random"]
ResetState = Literal["m", "mv"]
_OP = "PRILoRAConfig"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRILoRAConfig:
    """The options of PRILoRA, all with a default; those that cannot be are refused when it is made.

    ::

        r_l = rank_start + (rank_final - rank_start) l / (L - 1)          of block l of a stack of L, rounded
        y = x W^T + bias + s_l dropout(x) A^T B^T
        score_ij = |A_ij| sqrt(q_j),    q = beta q + (1 - beta) sum of x_ij^2 over the tokens of a step

    Every ``interval`` steps of the optimizer the share ``ratio`` of A with the least scores is zeroed.

    Args:
        rank_start, rank_final: the ranks of the first and the last block (of the last where there is one).
        rounding: ``"nearest"`` (half upwards), ``"floor"``, or ``"budget"``: each up or down by its remainder
            so that the ranks of a stack sum to L times their mean.
        alpha: the addition's size, see ``scaling``.
        scaling: s_l is ``alpha / r_l`` (``"lora"``), ``alpha`` over the mean of rank_start and rank_final
            (``"constant"``, the same in all blocks), or ``alpha / sqrt(r_l)`` (``"rslora"``).
        dropout: of x in front of A.
        beta: the weight of the past in the average of squares.
        target_modules: which linear layers are adapted: names or their ends (``["query", "value"]``), a
            regular expression that matches a whole name, or None: each one inside the blocks.
        ranks: the rank of modules by name or its end, instead of that of the ramp; the longest that fits
            counts.
        modules_to_save: what is trained in full beside the adapters, by name or its end. None: each module
            with a linear layer outside the blocks, without embeddings and output embeddings: classifiers,
            poolers, score heads.
        ratio: the share that an event zeroes, in [0, 1); 0 never prunes, and no squares are summed.
        interval: an event every so many steps of the optimizer, at multiples of it.
        start, stop: no event before step ``start`` (None: ``interval``), nor after step ``stop`` (None: no
            end).
        mode: ``"soft"``: what is zeroed may grow again; ``"hard"``: it stays zero, being the least in each
            event after; ``"final"``: soft, but what the last event zeroes stays zero, for which ``stop`` is
            needed.
        group: what scores are compared with: those of the same ``"row"``, or of the whole ``"matrix"``.
        importance: ``"input"``, the score above; as controls ``"magnitude"``, ``|A_ij|``, and ``"random"``.
        seed: of ``importance="random"``: the same seed, step and model are the same entries.
        reset_state: what an event zeroes in the optimizer's state under pruned entries: nothing (None), the
            first moment (``"m"``), or both (``"mv"``).

    Raises:
        ValueError: a value is not as above.
        TypeError: one is of another type.

    Source: Benedek, Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", Findings of EACL 2024: a
    rank that grows from block to block, and the repeated pruning of A by its magnitude and the statistics of
    its input. Our choice are all defaults, and what the options are about beside these two ideas.

    Example:
        >>> from fastkit.methods.prilora import PRILoRAConfig
        >>> PRILoRAConfig(rank_final=16, target_modules=["query", "value"]).ratio
        0.5
    """

    rank_start: int = 4
    rank_final: int = 12
    rounding: Rounding = "nearest"
    alpha: float = 16.0
    scaling: Scaling = "lora"
    dropout: float = 0.0
    beta: float = 0.9
    target_modules: str | Sequence[str] | None = None
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    ratio: float = 0.5
    interval: int = 40
    start: int | None = None
    stop: int | None = None
    mode: Mode = "soft"
    group: Group = "row"
    importance: Importance = "input"
    seed: int = 0
    reset_state: ResetState | None = None

    def __post_init__(self) -> None:
        for name in ("rank_start", "rank_final", "interval", "start", "stop"):
            value = getattr(self, name)
            if value is not None or name not in ("start", "stop"):
                check_integer(_OP, name, value, 1)
        check_integer(_OP, "seed", self.seed, 0)
        check_positive(_OP, "alpha", self.alpha)
        for name in ("dropout", "beta", "ratio"):
            if not 0.0 <= check_number(_OP, name, getattr(self, name)) < 1.0:
                raise ValueError(f"PRILoRAConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        for name, options in (
            ("rounding", Rounding), ("scaling", Scaling), ("mode", Mode), ("group", Group),
            ("importance", Importance),
        ):  # fmt: skip
            check_one_of(_OP, name, getattr(self, name), get_args(options))
        check_one_of(_OP, "reset_state", self.reset_state, (None, *get_args(ResetState)))
        object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules, True))
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save, False))
        if not isinstance(self.ranks, Mapping):
            raise TypeError(
                f"PRILoRAConfig: ranks must be a mapping of names to ranks, got {type(self.ranks).__name__}"
            )
        object.__setattr__(self, "ranks", dict(self.ranks))
        for name, rank in self.ranks.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"PRILoRAConfig: ranks must have names of modules as keys, got {type(name).__name__}"
                )
            check_integer(_OP, f"ranks[{name!r}]", rank, 1)
        if self.ratio > 0 and self.stop is not None and self.last_event is None:
            raise ValueError(
                f"PRILoRAConfig: stop must leave an event, got stop={self.stop} with"
                f" start={self.first_step} and interval={self.interval}; raise it, or pass ratio=0"
            )
        if self.mode == "final" and self.ratio > 0 and self.stop is None:
            raise ValueError(
                'PRILoRAConfig: stop must be given with mode="final", which keeps what the last event zeroed'
                " at zero; pass the number of steps up to which there are events"
            )

    @property
    def first_step(self) -> int:
        """The step before which there is no event: ``start``, or ``interval``."""
        return self.interval if self.start is None else self.start

    @property
    def last_event(self) -> int | None:
        """The step of the last event; None where there is no end, or no event."""
        if self.stop is None or self.ratio == 0:
            return None
        last = self.stop // self.interval * self.interval
        return last if last >= self.first_step else None

    @property
    def mean_rank(self) -> float:
        return (self.rank_start + self.rank_final) / 2

    def is_event(self, step: int) -> bool:
        """Whether A is pruned after this step of the optimizer, the first of which is 1."""
        return (
            self.ratio > 0
            and step % self.interval == 0
            and step >= self.first_step
            and (self.stop is None or step <= self.stop)
        )

    def alpha_of(self, rank: int) -> float:
        """What ``PRILoRALinear``, which divides it by its rank, is to be given for this ``scaling``."""
        if self.scaling == "constant":
            return self.alpha * rank / self.mean_rank
        return self.alpha * math.sqrt(rank) if self.scaling == "rslora" else self.alpha

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; ``from_dict`` makes the same of it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["ranks"] = dict(self.ranks)
        for name in ("target_modules", "modules_to_save"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PRILoRAConfig:
        """From what ``to_dict`` gave; a name that is no option is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"PRILoRAConfig: options must be among {', '.join(known)}, got"
                f" {', '.join(map(str, unknown))}; is it of a later version?"
            )
        return cls(**values)


def check_config(op: str, config: PRILoRAConfig | None) -> PRILoRAConfig:
    """The options; the default ones for None."""
    if config is None:
        return PRILoRAConfig()
    if not isinstance(config, PRILoRAConfig):
        raise TypeError(f"{op}: config must be a PRILoRAConfig, got {type(config).__name__}")
    return config


def _names(name: str, value: object, may_be_regex: bool) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not may_be_regex:
            raise TypeError(f"PRILoRAConfig: {name} must be a list of names, got a str; pass [{value!r}]")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"PRILoRAConfig: {name} must be a regular expression or a list of names, got {value!r}"
                f" ({error}); pass a list for names"
            ) from None
        return value
    if not isinstance(value, Sequence) or not all(isinstance(item, str) and item for item in value):
        raise TypeError(f"PRILoRAConfig: {name} must be a list of names, got {value!r}")
    return tuple(value)
