"""How PEFT writes a LoRA down: names of tensors, and which module adapter_config.json means by what.

PEFT has no list of modules: it asks for each module of a model whether a suffix or a regular expression fits.
So what is written here is read back by the same rules before it is stored, and refused where they would give
other modules, ranks or scales than those that were trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastkit.methods.prilora.names import is_named

PREFIX = "base_model.model."
# The ends of a model's class for each task of PEFT, and what PEFT then trains beside the adapters, whether or
# not the file names it.
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SEQ_CLS": (("ForSequenceClassification",), ("classifier", "score")),
    "TOKEN_CLS": (("ForTokenClassification",), ("classifier", "score")),
    "QUESTION_ANS": (("ForQuestionAnswering",), ("qa_outputs",)),
    "SEQ_2_SEQ_LM": (("ForConditionalGeneration",), ()),
    "CAUSAL_LM": (("ForCausalLM", "LMHeadModel"), ()),
}
# Options that say nothing about what a saved adapter computes.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "fan_in_fan_out",
    "eva_config",
    "qalora_group_size",
    "megatron_core",
    "runtime_config",
}
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
    "bias",
}
# Those that begin from the base layer's weight as it is; the others of PEFT change it as well.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """The low-rank part of one module, as PEFT counts: scale = alpha / rank, or alpha / sqrt(rank)."""

    rank: int
    alpha: float


def check(config: Any) -> dict[str, Any]:
    """The parsed adapter_config.json of a LoRA that a low-rank linear layer can be; ValueError in words."""
    if not isinstance(config, dict):
        raise ValueError(f"must be an object, got {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type must be LORA, got {kind!r}; load it with PEFT")
    if config.get("use_dora"):
        raise ValueError(
            "use_dora must be false, got true: the magnitudes of DoRA are not part of a LoRA layer; load it"
            " with PEFT"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', got {config['bias']!r}; load it with PEFT")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(known, str) and start == known) for known in INITIALISATIONS):
        raise ValueError(
            f"init_lora_weights must leave the base model as it is, got {start!r}, which changes its weights;"
            " convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        if (
            key not in NEUTRAL
            and key not in READ
            and key != "use_dora"
            and value not in (None, False, [], {})
        ):
            raise ValueError(f"{key} is an option that is not known here, got {value!r}; load it with PEFT")
    _check_rank(config.get("r", 8), "r")
    _check_alpha(config.get("lora_alpha", 8), "lora_alpha")
    for option, check_value in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{option} must be an object, got {type(patterns).__name__}")
        for key, value in patterns.items():
            check_value(value, f"{option}[{key!r}]")
            _matches(key, "")
    dropout = config.get("lora_dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {dropout!r}")
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise ValueError(f"use_rslora must be true or false, got {config['use_rslora']!r}")
    for option in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(option)
        if isinstance(value, str) and option != "modules_to_save":
            _matches(value, "")
        elif value is not None and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
            raise ValueError(f"{option} must be a list of names, got {value!r}")
    layers = config.get("layers_to_transform")
    if layers is not None and not all(
        _is_integer(n) for n in (layers if isinstance(layers, list) else [layers])
    ):
        raise ValueError(f"layers_to_transform must be a list of integers, got {layers!r}")
    return config


def targets(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT puts an adapter of this configuration on the module of that name."""
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if _matches(excluded, name, full=True):
            return False
    elif any(is_named(name, end) for end in excluded):
        return False
    if any(_matches(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ()):
        return False
    wanted = config["target_modules"]
    if isinstance(wanted, str):
        return _matches(wanted, name, full=True)
    if name in wanted:
        return True
    if not any(is_named(name, end) for end in wanted):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    number = r"\.(?P<idx>\d+)\."
    forms = [rf"(?:^|.*?\.){pattern}{number}" for pattern in patterns] or [rf".*?\.[^.]*{number}"]
    found = next(filter(None, (_search(form, name) for form in forms)), None)
    return found is not None and int(found["idx"]) in (layers if isinstance(layers, list) else [layers])


def adapter_of(config: Mapping[str, Any], name: str) -> Adapter:
    """Rank and alpha that PEFT gives to the module of that name."""

    def value(option: str, default: Any) -> Any:
        patterns = config.get(option) or {}
        return next((v for key, v in patterns.items() if _matches(rf"(.*\.)?({key})$", name)), default)

    return Adapter(
        value("rank_pattern", config.get("r", 8)), float(value("alpha_pattern", config.get("lora_alpha", 8)))
    )


def saved_modules(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those modules that PEFT copies, trains and saves whole."""
    endings = tuple(config.get("modules_to_save") or ())
    found = [name for name in names if endings and name.endswith(endings)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def write_config(
    adapters: Mapping[str, Adapter],
    modules_to_save: Sequence[str],
    names: Sequence[str],
    *,
    dropout: float,
    rslora: bool,
    fan_in_fan_out: bool,
    base_model: str | None,
    model: object,
) -> tuple[dict[str, Any], list[str]]:
    """The adapter_config.json by which PEFT finds just these adapters among ``names``, all of a model.

    Returns it, and the modules of which PEFT wants all tensors: ``modules_to_save``, and what else ends in a
    name of theirs, as PEFT compares letters, not parts of names.
    """
    largest = max(adapter.rank for adapter in adapters.values())
    alphas = [adapter.alpha for adapter in adapters.values()]
    alpha = max(alphas, key=alphas.count)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": rslora,
        "use_dora": False,
        "target_modules": [],
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for name, adapter in adapters.items():
        key = _pattern(name, adapters)
        if adapter.rank != largest:
            config["rank_pattern"][key] = adapter.rank
        if adapter.alpha != alpha:
            config["alpha_pattern"][key] = _plain(adapter.alpha)
    saved = saved_modules(config, names)
    config["target_modules"] = _target_modules(config, adapters, names)
    task = _task(config, adapters, names, saved, model)
    if task is not None:
        config["task_type"], config["auto_mapping"] = task, None
    assert all(adapter_of(config, name) == adapter for name, adapter in adapters.items())
    return config, saved


def _target_modules(
    config: Mapping[str, Any], adapters: Mapping[str, Adapter], names: Sequence[str]
) -> list[str] | str:
    """The shortest form by which PEFT finds just these: the ends of names, whole names, or an expression."""
    forms = (
        sorted({name.rpartition(".")[2] for name in adapters}),
        sorted(adapters),
        "|".join(re.escape(name) for name in adapters),
    )
    for wanted in forms:
        if {name for name in names if targets({**config, "target_modules": wanted}, name)} == set(adapters):
            return wanted
    last = {**config, "target_modules": forms[-1]}
    lost = next(name for name in adapters if not targets(last, name))
    raise ValueError(
        f"modules_to_save, {config['modules_to_save']}, must not end the names of adapted modules, got the"
        f" adapted {lost}, which PEFT would take for one of them; adapt it or train it whole, not both"
    )


def _task(
    config: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    names: Sequence[str],
    saved: Sequence[str],
    model: object,
) -> str | None:
    """That of the model's class, unless PEFT would then take other modules."""
    for task, (endings, trained) in TASKS.items():
        if not type(model).__name__.endswith(endings):
            continue
        if task.endswith("_LM") and not hasattr(model, "prepare_inputs_for_generation"):
            continue
        if task == "SEQ_2_SEQ_LM" and not getattr(
            getattr(model, "config", None), "is_encoder_decoder", False
        ):
            continue
        more = {**config, "modules_to_save": [*(config["modules_to_save"] or ()), *trained]}
        if all(targets(more, name) for name in adapters) and saved_modules(more, names) == saved:
            return task
    return None


def _pattern(name: str, names: Iterable[str]) -> str:
    """The name itself, where no other name of these matches it as PEFT matches."""
    alone = all((other == name) == _safely(rf"(.*\.)?({name})$", other) for other in names)
    return name if alone else f"^{re.escape(name)}"


def _safely(pattern: str, name: str) -> bool | None:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return None


def _search(pattern: str, name: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, name)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} must be a regular expression ({error})") from None


def _matches(pattern: str, name: str, *, full: bool = False) -> bool:
    return _search(rf"(?:{pattern})\Z" if full else pattern, name) is not None


def _check_rank(value: Any, what: str) -> None:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{what} must be an integer of at least 1, got {value!r}")


def _check_alpha(value: Any, what: str) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """One that fits into a float, as integers of JSON need not."""
    return isinstance(value, float) or (_is_integer(value) and abs(value) <= 2**53)


def _plain(alpha: float) -> float:
    """16, not 16.0, which PEFT has as an integer."""
    return int(alpha) if alpha == int(alpha) else alpha
