"""What training goes on from, in one safetensors file: tensors, and beside them steps, events and options."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastkit.methods._folder import parse_json
from fastkit.methods._safetensors import read_tensors, write_tensors

STATE = "prilora_state.safetensors"  # its name, beside an adapter or a checkpoint of a Trainer
_KEY = "fastkit.prilora"  # of the metadata, in which safetensors has strings alone


def write_state(path: Path, state: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
    """``state_dict()`` of a handle, and what else is to be kept with it."""
    plain = {key: value for key, value in state.items() if key != "tensors"}
    text = json.dumps({"state": plain, "facts": dict(facts or {})}, allow_nan=False)
    write_tensors(path, state["tensors"], {_KEY: text})


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the facts; ValueError for a file that is not what ``write_state`` makes.

    Whether it is of this model ``load_state_dict`` says.
    """
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise ValueError(f"{path} must be a state of PRILoRA, got a safetensors file without one")
    parsed = parse_json(metadata[_KEY], f"the state in {path}")
    state, facts = (parsed.get(key) if isinstance(parsed, dict) else None for key in ("state", "facts"))
    if not isinstance(state, dict) or not isinstance(facts, dict):
        raise ValueError(f"{path} must have a state and facts, got others")
    ranks = state.get("ranks")
    layers = set(ranks) if isinstance(ranks, dict) else set()
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("config", lambda v: isinstance(v, dict), "an object"),
        ("ranks", lambda v: _is_of(v, layers, _counts), "ranks of layers"),
        ("scales", lambda v: _is_of(v, layers, _scales), "scales of the same layers"),
        ("counts", lambda v: _is_of(v, layers, _counts), "steps of the same layers"),
        ("owners", lambda v: isinstance(v, dict) and {*v, *v.values()} <= layers, "names of these layers"),
        ("events", lambda v: isinstance(v, list) and all(map(_counts, v)), "a list of steps"),
        ("steps", _counts, "a number of steps"),
    )
    for key, is_right, what in checks:
        try:
            right = is_right(state.get(key))
        except TypeError:  # values that cannot be in a set
            right = False
        if not right:
            raise ValueError(f"{path}: {key} must be {what}, got {str(state.get(key))[:80]}")
    for name, owner in state["owners"].items():
        own, of = (tensors.get(f"{layer}.input_square") for layer in (name, owner))
        if own is None or of is None or own.shape != of.shape:
            raise ValueError(f"{path}: owners must read the same input, got {owner} for {name}")
    return {**state, "tensors": tensors}, facts


def _is_of(value: Any, layers: set[str], is_right: Any) -> bool:
    return isinstance(value, dict) and set(value) == layers and all(map(is_right, value.values()))


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _scales(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
