"""A folder with a LoRA of PEFT, ours or another's: what it says, and whether it is of a model.

Files are untrusted, and nothing is changed here: what is not as it must be is an error that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkit.methods._folder import digest, find_file, read_json
from fastkit.methods._safetensors import read_tensors
from fastkit.methods.prilora import peft_format
from fastkit.methods.prilora.names import nearest
from fastkit.methods.prilora.peft_format import PREFIX, Adapter
from fastkit.methods.prilora.state_file import STATE, read_state
from fastkit.methods.prilora.targets import is_linear
from fastkit.nn.prilora_linear_base import features

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, FORMAT = "prilora.json", 1


class Contents(NamedTuple):
    """What the files say, before any model is looked at."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ours: dict[str, Any] | None
    state: dict[str, Any] | None


class Found(NamedTuple):
    """What of it is in the model: tensors by their names there, as those of a handle.

    Alpha is that of ``nn.PRILoRALinear``: scale = alpha / rank.
    """

    adapters: dict[str, Adapter]
    modules_to_save: list[str]
    tensors: dict[str, Tensor]


def read(folder: Path) -> Contents:
    """The files, each whole and of one piece with the others; ValueError, FileNotFoundError where not."""
    if not folder.is_dir():
        raise FileNotFoundError(f"load_prilora: folder must be one, got {folder}; is the path right?")
    path = _needed(folder, CONFIG)
    try:
        config = peft_format.check(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors_path = find_file(folder, TENSORS)
    if tensors_path is None and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} must have {TENSORS}, got adapter_model.bin, which may run code when it is read; load"
            " it with PEFT, if you trust it, and save it again"
        )
    tensors_path = _needed(folder, TENSORS)
    ours_path, ours, state = find_file(folder, OURS), None, None
    if ours_path is not None:
        ours = _check_ours(folder, read_json(ours_path))
        if not ours["uniform"]:
            state, _ = read_state(_needed(folder, STATE))
    tensors, _ = read_tensors(tensors_path)
    return Contents(folder, config, tensors, ours, state)


def _needed(folder: Path, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        raise FileNotFoundError(
            f"load_prilora: {folder} must have {name}, got none; is it the folder of an adapter?"
        )
    return path


def _check_ours(folder: Path, ours: Any) -> dict[str, Any]:
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        found = ours.get("format") if isinstance(ours, dict) else type(ours).__name__
        raise ValueError(
            f"{OURS} must have format {FORMAT}, got {found}; is it of another version of fastkit?"
        )
    wanted = {TENSORS} if ours.get("uniform") is True else {TENSORS, STATE}
    digests = ours.get("digests")
    kinds = {"uniform": bool, "layers": dict, "modules_to_save": list}
    whole = all(isinstance(ours.get(key), kind) for key, kind in kinds.items())
    if not whole or not isinstance(digests, dict) or set(digests) != wanted:
        raise ValueError(f"{OURS} must have uniform, layers, modules_to_save and digests, got others")
    for name in sorted(wanted):
        if digest(_needed(folder, name)) != digests[name]:
            raise ValueError(
                f"{name} must be the file that {OURS} was written with, got another; copy the folder again,"
                f" or, if another program has replaced it, delete {OURS}: then it is loaded as a LoRA of PEFT"
            )
    return ours


def match(model: nn.Module, contents: Contents) -> Found:
    """Each adapter with its module, and each tensor with its place; ValueError where one has none."""
    modules = {name: module for name, module in model.named_modules() if name}
    config = contents.config
    saved = peft_format.saved_modules(config, modules)
    missing = [name for name in (contents.ours or {}).get("modules_to_save", ()) if name not in saved]
    if missing:
        raise ValueError(f"modules_to_save must have {missing[0]}, as it was saved, got {saved}")
    pairs, others = _sort(contents.tensors)
    expected = _adapted(model, config, list(modules), list(pairs))
    for name in saved:
        inside = [n for n in expected if n == name or n.startswith(f"{name}.") or name.startswith(f"{n}.")]
        if inside:
            raise ValueError(
                f"modules_to_save must not be adapted too, got {name} with {inside[0]} among targets"
            )
    adapters = {name: peft_format.adapter_of(config, name) for name in expected}
    found: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        found |= _check_pair(name, modules[name], adapter, pairs.get(name, {}))
    if config.get("use_rslora"):
        adapters = {name: Adapter(a.rank, a.alpha * math.sqrt(a.rank)) for name, a in adapters.items()}
    if contents.ours is not None:
        adapters = _check_as_saved(adapters, contents.ours["layers"])
    for name in saved:
        found |= _check_saved(name, modules[name], others)
    _check_ties(model, saved, found)
    for name in others:
        raise ValueError(
            f"{TENSORS} must have tensors of adapters and of modules_to_save, got {name}, which is of neither"
            f" kind: modules_to_save is {config.get('modules_to_save')}; load it with PEFT"
        )
    if contents.ours is not None:  # the file has also what PEFT takes for them
        saved = [name for name in saved if name in contents.ours["modules_to_save"]]
        found = {
            key: value
            for key, value in found.items()
            if any(key.startswith(f"{name}.") for name in (*adapters, *saved))
        }
    return Found(adapters, saved, found)


def _adapted(
    model: nn.Module, config: Mapping[str, Any], modules: Sequence[str], stored: Sequence[str]
) -> list[str]:
    """The names of adapted modules, of which ``stored`` have tensors."""
    kind = type(model).__name__
    for name in stored:
        if name not in modules:
            raise ValueError(
                f"the adapter must be of this model, got tensors of {name}, which {kind} has"
                f" not; {nearest(name, modules)}"
            )
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":  # PEFT asks the model, and saves what it has found
        expected = [name for name in modules if name in stored]
    else:
        expected = [name for name in modules if peft_format.targets(config, name)]
    if not expected:
        raise ValueError(
            f"target_modules must match modules of {kind}, got {str(wanted)[:200]}, which matches nothing; is"
            " the adapter of another model?"
        )
    for name in stored:
        if name not in expected:
            raise ValueError(f"target_modules must name {name}, which has tensors, got {str(wanted)[:200]}")
    return expected


def _check_ties(model: nn.Module, saved: Sequence[str], found: Mapping[str, Tensor]) -> None:
    """PEFT copies what it trains in full, which ends a tie; here there is one tensor, and one value of it."""
    called: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    ):  # fmt: skip
        called.setdefault(id(tensor), []).append(name)
    for names in called.values():
        key = next((n for n in names if any(n.startswith(f"{module}.") for module in saved)), None)
        for other in names if key is not None else ():
            if other not in found or not torch.equal(found[other], found[key or other]):
                raise ValueError(
                    f"modules_to_save must not be tied to others, got {key}, which is also {other} and has"
                    " another value there; untie them"
                )


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A and B by module, and the others by their names in the model."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(f"{TENSORS} must have names that begin with {PREFIX}, got {key}; is it of PEFT?")
        module, _, end = name.rpartition(".lora_")
        if not module:
            others[name] = value
        elif end in ("A.weight", "B.weight"):
            pairs.setdefault(module, {})[end[0]] = value
        else:
            kinds = {"magnitude": "a magnitude of DoRA", "embedding": "of an embedding", "B.bias": "a bias"}
            kind = next((text for start, text in kinds.items() if end.startswith(start)), "neither")
            raise ValueError(
                f"{TENSORS} must have A and B of linear layers, got {key}, {kind}; load it with PEFT"
            )
    return pairs, others


def _check_pair(
    name: str, module: nn.Module, adapter: Adapter, pair: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not is_linear(module):
        raise ValueError(
            f"target_modules must be linear layers, got {name}, a {type(module).__name__}; load it with PEFT"
        )
    inputs, outputs = features(module)
    for key, shape in (("A", (adapter.rank, inputs)), ("B", (outputs, adapter.rank))):
        tensor = pair.get(key)
        if tensor is None:
            raise ValueError(f"{name} must have lora_{key} of rank {adapter.rank}, got no such tensor")
        if tensor.shape != shape:
            at = 0 if key == "A" else 1
            rank = tensor.shape[at] if tensor.dim() == 2 else "none"
            raise ValueError(
                f"{name} must have lora_{key} of rank {adapter.rank} and shape {shape}, got rank {rank} and"
                f" shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have lora_{key} in a floating-point dtype, got {tensor.dtype}")
    if adapter.rank > min(inputs, outputs):
        raise ValueError(
            f"{name} must have a rank of at most {min(inputs, outputs)}, the least of its sizes, got"
            f" {adapter.rank}; is it a uniform export? Then load the folder that is not"
        )
    return {f"{name}.lora_a": pair["A"], f"{name}.lora_b": pair["B"]}


def _check_as_saved(adapters: Mapping[str, Adapter], layers: Mapping[str, Any]) -> dict[str, Adapter]:
    """With alpha to the bit, which PEFT's file may have in another form."""
    for name in sorted({*adapters, *layers}):
        adapter, alpha = adapters.get(name), layers.get(name)
        known = float(alpha) if alpha is not None and peft_format.is_number(alpha) else math.nan
        if adapter is None or not math.isclose(known, adapter.alpha, rel_tol=1e-9):
            got = "no such adapter" if adapter is None else f"alpha {adapter.alpha:g}"
            raise ValueError(
                f"{name} must have alpha {alpha}, as it was saved, got {got} by {CONFIG}; restore that, or"
                f" delete {OURS}: then the folder is loaded as a LoRA of PEFT"
            )
    return {name: Adapter(adapter.rank, float(layers[name])) for name, adapter in adapters.items()}


def _check_saved(name: str, module: nn.Module, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes the module's tensors out of ``others``."""
    taken = {}
    for key, value in module.state_dict().items():
        tensor = others.pop(f"{name}.{key}", None)
        if tensor is None:
            raise ValueError(f"{name} of modules_to_save must have {key}, got no such tensor")
        if tensor.shape != value.shape:
            raise ValueError(
                f"{name} of modules_to_save must have {key} of shape {tuple(value.shape)}, got"
                f" {tuple(tensor.shape)}; does the model have as many classes?"
            )
        if tensor.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{name} of modules_to_save must have {key} in {value.dtype}, got {tensor.dtype}"
            )
        taken[f"{name}.{key}"] = tensor
    return taken
