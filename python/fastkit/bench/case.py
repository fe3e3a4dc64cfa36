"""What a benchmark is about: one shape of one op, and who competes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Call = Callable[[], Any]


class Skip(Exception):
    """Why a contestant has no ratio."""

    @property
    def note(self) -> str:
        return f"skipped: {self}"


class Fault(Skip):
    """A contestant that raised, or whose process ended or did not end in time."""

    @property
    def note(self) -> str:
        return f"failed: {self}"


class Contest(Protocol):
    """The contestants of a case, on inputs that are drawn when the first of them is made."""

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        """Label -> what makes a call that is ready to be timed, or raises Skip. Ours comes first."""
        ...

    def error(self, result: Any) -> float:
        """How far a call's result is from float64, relative to its size."""
        ...


@dataclass(frozen=True)
class Case:
    """One shape of one op, in one direction. It travels to child processes: ``contest`` must pickle."""

    op: str
    shape: str
    direction: Literal["fwd", "fwd+bwd"]
    floor_bytes: int  # the least to read and write
    contest: Callable[[], Contest]
    warm: bool = False  # the shape fits the caches, and is timed from warm ones
    tolerance: float = 1e-4  # of the error
    yardsticks: frozenset[str] = frozenset()  # contestants that do something else: ours is not called faster
    floor: str = ""  # the yardstick whose time is the floor, instead of that of copying ``floor_bytes``
    device: Literal["cpu", "cuda"] = "cpu"  # a GPU's calls are timed from a cold L2: none is ``warm``
    peers: tuple[str, ...] = ()  # packages whose versions belong to a result, besides fastkit's and torch's

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"
