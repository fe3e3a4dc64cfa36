"""What a fit is told: the presets, and what of the options cannot be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from fastkit.methods._options import check_integer, check_number, check_one_of, check_positive

OP = "WordTranslator"

Preset = Literal["robust", "release", "paper"]
Step = Literal["unit", "center"]
Transfer = Literal["procrustes", "icp"]
Refine = Literal["none", "reciprocal_icp", "procrustes", "procrustes_csls"]
Retrieval = Literal["csls", "isf", "nn"]
Dictionary = Literal["s2t", "mutual"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All options of a fit, none left open. The defaults are those of the preset "robust".

    They are checked when this is made; ``WordTranslator`` has what each is about.
    """

    words: int = 2000
    components: int = 25
    restarts: int = 256
    epochs: int = 60
    halvings: tuple[int, ...] = (20, 30, 40)
    batch_size: int = 128
    lr: float = 1e-2
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    cycle_weight: float = 1e-2
    candidates: int = 3
    controls: int = 2
    trial_words: int = 5000
    trial_rounds: int = 3
    transfer: Transfer = "procrustes"
    transfer_words: int = 5000
    transfer_epochs: int = 50
    refine: Refine = "procrustes_csls"
    refine_words: int = 15000
    refine_epochs: int = 50
    refine_rounds: int = 5
    dictionary: Dictionary = "s2t"
    criterion_words: int = 10000
    preprocess: tuple[Step, ...] = ("unit", "center", "unit")
    neighbors: int = 10
    retrieval: Retrieval = "csls"
    isf_beta: float = 30.0
    seed: int = 0
    allow_rect: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("words", 1), ("components", 2), ("restarts", 1), ("epochs", 1), ("batch_size", 1),
            ("candidates", 1), ("controls", 1), ("trial_words", 1), ("trial_rounds", 0),
            ("transfer_words", 1), ("transfer_epochs", 1), ("refine_words", 1), ("refine_epochs", 1),
            ("refine_rounds", 1), ("criterion_words", 1), ("neighbors", 1), ("seed", 0),
        ):  # fmt: skip
            check_integer(OP, name, getattr(self, name), least)
        if self.seed >= 2**63:
            raise ValueError(f"{OP}: seed must be below 2^63, got {self.seed}")
        for name in ("lr", "eps", "isf_beta"):
            check_positive(OP, name, getattr(self, name))
        if not 0 <= check_number(OP, "cycle_weight", self.cycle_weight) < math.inf:
            raise ValueError(f"{OP}: cycle_weight must be finite and not negative, got {self.cycle_weight}")
        self._check_tuples()
        for name, options in (
            ("transfer", Transfer), ("refine", Refine), ("dictionary", Dictionary), ("retrieval", Retrieval),
        ):  # fmt: skip
            check_one_of(OP, name, getattr(self, name), get_args(options))
        if not isinstance(self.allow_rect, bool):
            raise TypeError(f"{OP}: allow_rect must be True or False, got {self.allow_rect!r}")

    def _check_tuples(self) -> None:
        for name in ("halvings", "betas", "preprocess"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (tuple, list)):
                raise TypeError(f"{OP}: {name} must be a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for epoch in self.halvings:
            check_integer(OP, "an epoch of halvings", epoch, 0)
        if list(self.halvings) != sorted(set(self.halvings)):
            raise ValueError(f"{OP}: halvings must be epochs in ascending order, got {self.halvings}")
        for beta in self.betas:
            check_number(OP, "a beta", beta)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{OP}: betas must be two numbers in [0, 1), got {self.betas}")
        for step in self.preprocess:
            check_one_of(OP, "a step of preprocess", step, get_args(Step))

    def facts(self) -> dict[str, Any]:
        """What decides the maps, as plain values."""
        facts = dataclasses.asdict(self)
        del facts["retrieval"], facts["isf_beta"]
        return facts


def resolve(preset: Any, options: Mapping[str, Any]) -> Settings:
    """The preset with the options that are not None."""
    check_one_of(OP, "preset", preset, tuple(PRESETS))
    given = {name: value for name, value in options.items() if value is not None}
    settings = dataclasses.replace(PRESETS[preset], **given)
    if settings.refine == "reciprocal_icp" and "refine_words" not in given:
        settings = dataclasses.replace(settings, refine_words=_WORDS_OF_RECIPROCAL_ICP)
    return settings


_RELEASE = Settings(
    words=5000, restarts=100, epochs=100, halvings=(), candidates=1, transfer="icp", refine="reciprocal_icp",
    refine_rounds=10, preprocess=(),
)  # fmt: skip
PRESETS: Mapping[str, Settings] = {
    "robust": Settings(),
    "release": _RELEASE,
    "paper": dataclasses.replace(_RELEASE, components=50, restarts=500),
}
_WORDS_OF_RECIPROCAL_ICP = 7500
OPTIONS = tuple(field.name for field in dataclasses.fields(Settings))
