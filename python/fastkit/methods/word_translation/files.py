"""A fitted translator as one safetensors file: its maps and tables, and beside them options and figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastkit import __version__
from fastkit._sync import replace_file
from fastkit.methods._safetensors import read_tensors, write_tensors
from fastkit.methods.word_translation.retrieval import Index
from fastkit.methods.word_translation.settings import OP, Settings
from fastkit.methods.word_translation.trials import Candidate

if TYPE_CHECKING:
    from fastkit.methods.word_translation.translator import WordTranslator

Translator = TypeVar("Translator", bound="WordTranslator")

FORMAT = 1
_KEY = "fastkit.word_translation"  # of the metadata, in which safetensors has strings alone
_SHAPES: dict[str, tuple[str, ...]] = {
    "w_xy_": ("E", "D"), "w_yx_": ("D", "E"), "means_x_": ("steps", "D"), "means_y_": ("steps", "E"),
    "restart_costs_": ("R",), "restart_mutual_": ("R",), "restart_epochs_": ("R",), "restart_seeds_": ("R",),
}  # fmt: skip
_FACTS = ("converged_", "control_score_", "criterion_", "best_restart_", "timings_")


def save(path: Path, translator: WordTranslator, settings: Settings, index: Index | None) -> None:
    """The file is the old one or the whole new one, whenever the process or the machine stops.

    ``index``: the tables; None leaves them out.
    """
    if path.is_dir():
        raise ValueError(
            f"{OP}: path must be a file, got the folder {path}; pass {path / 'words.safetensors'}"
        )
    tensors: dict[str, Tensor] = {name: getattr(translator, name) for name in _SHAPES}
    if translator.penalty_ is not None:
        tensors["penalty_"] = translator.penalty_
    if index is not None:
        tensors |= {"sources": index.sources, "targets": index.targets}
    facts: dict[str, Any] = {name: getattr(translator, name) for name in _FACTS}
    facts["control_score_"] = _or_none(translator.control_score_)
    facts["candidates_"] = [{**c._asdict(), "cost": _or_none(c.cost)} for c in translator.candidates_]
    facts |= {"params": translator.get_params(), "settings": dataclasses.asdict(settings)}
    text = json.dumps({"format": FORMAT, "fastkit": __version__, **facts}, allow_nan=False)
    replace_file(path, lambda temporary: write_tensors(temporary, tensors, {_KEY: text}))


def load(
    path: Path, kind: type[Translator], device: str | torch.device
) -> tuple[Translator, Settings, Index | None]:
    """What ``save`` was given; ValueError for a file that is not what it makes."""
    tensors, facts = _read(path)
    shapes = dict(_SHAPES)
    if "penalty_" in tensors:
        shapes["penalty_"] = ("m",)
    if {"sources", "targets"} & set(tensors):
        shapes |= {"sources": ("n", "E"), "targets": ("m", "E")}
    _check_shapes(path, tensors, shapes)
    try:
        params: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in facts["params"].items()
        }
        translator = kind(**params)
        settings = Settings(**facts["settings"])
        for name in _FACTS:
            setattr(translator, name, facts[name])
        if facts["control_score_"] is None:
            translator.control_score_ = math.nan
        translator.candidates_ = [
            Candidate(**{**c, "cost": math.inf if c["cost"] is None else c["cost"]})
            for c in facts["candidates_"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{OP}: {path} must have options and figures, got others ({error!r})") from error
    if len(settings.preprocess) != len(tensors["means_x_"]) or (
        (settings.retrieval == "nn") != ("penalty_" not in tensors)
    ):
        raise ValueError(f"{OP}: {path} must have tensors of its options, got others")
    tensors = {name: tensors[name].to(device) for name in shapes}
    for name in _SHAPES:
        setattr(translator, name, tensors[name])
    translator.penalty_ = tensors.get("penalty_")
    if "sources" not in tensors:
        return translator, settings, None
    index = Index(tensors["sources"], tensors["targets"], settings)
    index.penalties[settings.retrieval] = translator.penalty_
    return translator, settings, index


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts."""
    if not path.exists():
        raise FileNotFoundError(f"{OP}: path must be a file of save, got {path}, which is not there")
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{OP}: {error}") from error
    try:
        facts = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{OP}: {path} must have facts as JSON, got what is not ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(
            f"{OP}: path must be a file of save, got {path}, a safetensors file of something else"
        )
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{OP}: {path} must be of format {FORMAT}, got {facts.get('format')!r}; is it of a later version?"
        )
    return tensors, facts


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, ...]]) -> None:
    """That the tensors are there, finite where they are floats, and sizes of one letter are equal."""
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{OP}: {path} must have a tensor {name}, got none")
        fits = tensor.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(
                f"{OP}: {name} of {path} must have shape ({expected}), got {tuple(tensor.shape)}"
            )
        if name != "restart_costs_" and not tensor.isfinite().all():
            raise ValueError(f"{OP}: {name} of {path} must be finite, got NaN or inf")
        expected = torch.int64 if name.startswith("restart_") and name != "restart_costs_" else torch.float32
        if tensor.dtype != expected:
            raise ValueError(f"{OP}: {name} of {path} must be {expected}, got {tensor.dtype}")


def _or_none(value: float) -> float | None:
    """JSON has no NaN and no inf."""
    return value if math.isfinite(value) else None
