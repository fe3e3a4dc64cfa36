"""PRILoRA as a folder that PEFT reads, and back.

    adapter_config.json, adapter_model.safetensors    a LoRA, as PEFT has it
    prilora.json                                      format, layers, and the digests of the other files
    prilora_state.safetensors                         masks, averages, steps, events, options

PEFT does not look at the last two.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fastkit import __version__
from fastkit.methods._folder import digest, replace_files, write_json
from fastkit.methods._safetensors import write_tensors
from fastkit.methods.prilora import peft_format
from fastkit.methods.prilora.config import PRILoRAConfig, check_config
from fastkit.methods.prilora.model import PRILoRA, check_model
from fastkit.methods.prilora.peft_folder import CONFIG, FORMAT, OURS, TENSORS, Contents, Found, match, read
from fastkit.methods.prilora.peft_format import PREFIX, Adapter
from fastkit.methods.prilora.state_file import STATE, write_state
from fastkit.methods.prilora.targets import check_targets
from fastkit.nn import PRILoRALinear
from fastkit.nn.prilora_linear_base import is_conv1d

_OP = "load_prilora"
# What a config does not change in adapters that exist.
_OF_THE_FOLDER = (
    "rank_start", "rank_final", "rounding", "alpha", "scaling", "target_modules", "ranks", "modules_to_save",
)  # fmt: skip


def save_pretrained(prilora: PRILoRA, folder: str | Path, *, uniform: bool = False) -> None:
    """Write the adapter, and all else that is trained, into a folder that PEFT and ``load_prilora`` read.

    ::

        peft.PeftModel.from_pretrained(base, folder)    # the same logits
        load_prilora(base, folder)                      # and training goes on where it was

    What a hard mask has pruned is zero in the file. The folder is replaced whole: a process that is stopped
    leaves the old adapter or the new one. Under torch.distributed one process is to call it.

    Args:
        prilora: the handle, of a model that may be merged.
        folder: made where there is none; other files in it are left alone.
        uniform: for servers that read one rank and one scale. All adapters get the largest rank, by rows and
            columns of zeros, and scale 1, by a B that is multiplied by its scale: the same product, to one
            rounding of each entry of B. Training does not go on from it: masks, averages and steps are left
            out.

    Raises:
        ValueError: PEFT's files cannot say what is trained: a parameter beside the adapters that no module
            holds without also holding an adapter, or a module trained whole whose name ends that of an
            adapter. Nothing is written then.
        RuntimeError: the adapters were taken out by ``undo()``.
        ImportError: safetensors is not installed.
    """
    state = prilora.state_dict()
    model = prilora.model
    rslora = prilora.config.scaling == "rslora" and not uniform
    adapters, tensors, alphas = {}, {}, {}
    largest = max(layer.rank for layer in prilora.layers.values())
    for name, layer in prilora.layers.items():
        a, b = layer.lora_a.detach().masked_fill(~layer.mask, 0.0), layer.lora_b.detach()
        adapters[name] = Adapter(layer.rank, _alpha(layer, prilora.config) if rslora else layer.alpha)
        if uniform:
            more = largest - layer.rank
            a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b * layer.scale, (0, more))
            adapters[name] = Adapter(largest, float(largest))
        alphas[name] = float(largest) if uniform else layer.alpha
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    trained = _trained_modules(prilora)
    try:
        config, saved = peft_format.write_config(
            adapters,
            trained,
            _names(model),
            dropout=prilora.config.dropout,
            rslora=rslora,
            fan_in_fan_out=any(is_conv1d(layer.base_layer) for layer in prilora.layers.values()),
            base_model=getattr(model, "name_or_path", None) or None,
            model=model,
        )
    except ValueError as error:
        raise ValueError(f"save_pretrained: {error}") from None
    for name in saved:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    facts = {
        "format": FORMAT,
        "fastkit": __version__,
        "uniform": uniform,
        "layers": alphas,
        "modules_to_save": trained,
    }
    # The rest of the state is in PEFT's file.
    rest = {n: t for n, t in state["tensors"].items() if n.endswith((".mask", ".input_square", ".folds"))}
    rest = {n: t for n, t in rest.items() if n.rpartition(".")[0] in prilora.layers}
    folder = Path(folder)
    written: dict[str, Callable[[Path], object]] = {
        TENSORS: lambda path: write_tensors(path, tensors, {"format": "pt"}),
        STATE: lambda path: write_state(path, {**state, "tensors": rest}),
        OURS: lambda path: write_json(path, {**facts, "digests": _digests(path.parent)}),
        CONFIG: lambda path: write_json(path, config),
    }
    if uniform:
        del written[STATE]
    replace_files(folder, written, last=CONFIG)
    if uniform:
        (folder / STATE).unlink(missing_ok=True)


def load_prilora(
    model: nn.Module, folder: str | Path, *, config: PRILoRAConfig | None = None, automatic: bool = True
) -> PRILoRA:
    """Put the adapters of a folder into a model, in place: one of ``save_pretrained``, or a LoRA of PEFT.

    Ranks, scales, what is adapted and what is trained in full are those of the folder; from one of
    ``save_pretrained`` training goes on as if it had not ended, and from one of PEFT as after
    ``apply_prilora``. What fails changes nothing.

    Args:
        model: the base model, without adapters.
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the options of pruning, and dropout; default those of the folder, and of ``PRILoRAConfig()``
            for one of PEFT. Its ranks, alpha, scaling, targets and modules_to_save do not count.
        automatic: as in ``apply_prilora``.

    Returns:
        The handle, as ``apply_prilora``.

    Raises:
        FileNotFoundError: the folder, or a file that it needs, is not there.
        ValueError: a file is cut off, or not of one piece with the others; the adapter is none of LoRA, or
            has an option that a low-rank linear layer has not (DoRA, biases, embeddings); it is of another
            model; a tensor is missing or has another shape than rank and module give: the message names the
            module, the rank expected and the rank found. Or ``model`` has adapters already.
        TypeError: ``config`` is not a PRILoRAConfig.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from fastkit.methods.prilora import apply_prilora, load_prilora
        >>> encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(encoder, 3, enable_nested_tensor=False)
        >>> prilora = apply_prilora(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     prilora.save_pretrained(folder)
        ...     load_prilora(prilora.undo(), folder).layers["layers.2.linear1"].rank
        12
    """
    check_model(_OP, model)
    if config is not None:
        check_config(_OP, config)
    try:
        contents = read(Path(folder))
        found = match(model, contents)
    except ValueError as error:
        raise ValueError(f"{_OP}: {error}") from error
    check_targets(_OP, model, list(found.adapters))
    own = _config(contents, found)
    if config is not None:
        own = dataclasses.replace(config, **{option: getattr(own, option) for option in _OF_THE_FOLDER})
    ranks = {name: adapter.rank for name, adapter in found.adapters.items()}
    prilora = PRILoRA(model, own, ranks, found.modules_to_save, automatic=automatic)
    try:
        for name, layer in prilora.layers.items():
            alpha = found.adapters[name].alpha
            if contents.ours is not None or not math.isclose(layer.alpha, alpha, rel_tol=1e-12):
                layer.alpha = alpha
        state = prilora.state_dict()
        tensors = state["tensors"]
        if contents.state is not None:
            state = contents.state
            tensors |= state["tensors"]
        tensors |= {key: value for key, value in found.tensors.items() if key in tensors}
        prilora.load_state_dict({**state, "tensors": tensors})
    except BaseException:
        prilora.undo()
        raise
    return prilora


def _config(contents: Contents, found: Found) -> PRILoRAConfig:
    """That of the folder, or one by which apply_prilora would make the same adapters."""
    if contents.state is not None:
        try:
            return PRILoRAConfig.from_dict(contents.state["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_OP}: {STATE} must have a config, got one that is none ({error})") from error
    return PRILoRAConfig(
        alpha=float(contents.config.get("lora_alpha", 8)),
        scaling="rslora" if contents.config.get("use_rslora") else "lora",
        dropout=float(contents.config.get("lora_dropout", 0.0)),
        target_modules="|".join(re.escape(name) for name in found.adapters),
        ranks={name: adapter.rank for name, adapter in found.adapters.items()},
        modules_to_save=found.modules_to_save,
    )


def _trained_modules(prilora: PRILoRA) -> list[str]:
    """``modules_to_save``, and what the user has made trainable beside them."""
    found = list(prilora.modules_to_save)
    for name, parameter in prilora.model.named_parameters():
        owner = name.rpartition(".")[0]
        at = next((n for n in prilora.layers if owner == n or owner.startswith(f"{n}.")), None)
        if not parameter.requires_grad or any(owner == n or owner.startswith(f"{n}.") for n in found):
            continue
        if at is not None and name in (f"{at}.lora_a", f"{at}.lora_b"):
            continue
        if at is not None or not owner or any(n.startswith(f"{owner}.") for n in prilora.layers):
            raise ValueError(
                "save_pretrained: trained parameters must be of adapters, or of modules without one, got"
                f" {name}, for which the files of PEFT have no place; freeze it, or save the whole model"
            )
        found = [n for n in found if not n.startswith(f"{owner}.")] + [owner]
    return found


def _names(model: nn.Module) -> list[str]:
    """The modules of the model as it was without adapters."""
    names, base = [], None
    for name, module in model.named_modules():
        if base is not None and (name == base or name.startswith(f"{base}.")):
            inner = name.removeprefix(base)
            names += [base.removesuffix(".base_layer") + inner] if inner else []
            continue
        if isinstance(module, PRILoRALinear):
            base = f"{name}.base_layer"
        names += [name] if name else []
    return names


def _alpha(layer: PRILoRALinear, config: PRILoRAConfig) -> float:
    """Of rsLoRA, for which the scale is alpha / sqrt(rank)."""
    root = math.sqrt(layer.rank)
    return config.alpha if math.isclose(config.alpha / root, layer.scale) else layer.scale * root


def _digests(folder: Path) -> dict[str, str]:
    return {name: digest(folder / name) for name in (TENSORS, STATE) if (folder / name).exists()}
