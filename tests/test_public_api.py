"""What users write down and store: signatures, fields of results, keys of state_dicts.

``public_api.txt`` has them as they were, and ``public_api_transformers.txt`` those that need transformers;
``python tests/test_public_api.py`` writes what there is now into both.
"""

import difflib
import importlib
import inspect
import re
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest
import torch

from fastkit import info, nn, ops, reference
from fastkit._dispatch import Impl
from fastkit.methods import tied_embedding
from fastkit.methods.multiverse import elimination
from fastkit.methods.prilora import config as prilora_config
from fastkit.methods.tied_embedding import presets as language_model_presets
from fastkit.methods.tied_embedding import projection as tied_projection
from fastkit.methods.word_translation import settings as word_translation_settings
from fastkit.methods.word_translation import vectors as word_vectors
from fastkit.nn import multiverse_head
from fastkit.nn.adaptive_iir import Parameterization
from fastkit.nn.tied_embedding import TieGrad
from fastkit.ops.mtadam import NonFinite
from fastkit.ops.topk_similarity import Metric
from fastkit.optim.mtadam import OnNonFinite

pytestmark = pytest.mark.native

HERE = Path(__file__).parent

PACKAGES = (
    "nn",
    "ops",
    "optim",
    "reference",
    "methods.prilora",
    "methods.tied_embedding",
    "methods.word_translation",
)
OF_TRANSFORMERS = ("integrations.transformers", "methods.focus", "methods.multiverse")
ALIASES = {"Impl": Impl, "Parameterization": Parameterization}  # of annotations
ALIASES |= {"NonFinite": NonFinite, "OnNonFinite": OnNonFinite, "Metric": Metric, "TieGrad": TieGrad}
ALIASES |= {
    name: value
    for module in (
        elimination,
        multiverse_head,
        prilora_config,
        word_translation_settings,
        word_vectors,
        tied_projection,
        language_model_presets,
    )
    for name, value in vars(module).items()
    if get_origin(value) is Literal
}
STATE_DICTS = [
    "AdaptiveIIR(6)",
    "AdaptiveIIR(6, filters=2, pool=4, hidden=5)",
    "AdaptiveIIR(6, adaptive=False)",
    "AdaptiveIIR(6, adaptive=False, filters=2)",
    "AdaptiveIIR(6, first='learned')",
    "FocusLayer(6, attn_chunk=4, kernel_length=3)",
    "FocusLayer(6, attn_chunk=4, kernel_length=3, conv_glu=True, causal=False)",
    "FocusLayer(6, coefficients='constant', position='none')",
    "GlobalConv(6, 3)",
    "MultiverseHead(6, 2, 3)",
    "PRILoRALinear(torch.nn.Linear(6, 4), 2)",
    "TiedEmbedding(6, 4)",
    "TiedEmbedding(6, 4, bias=True, exclude_ids=[1])",
]
STATE_DICTS_OF_METHODS = [
    "Projection(4)",
    "TiedLanguageModel(6, 4)",
    "TiedLanguageModel(6, 4, tie=True, projection=True)",
]


def package(name: str) -> ModuleType:
    if name in OF_TRANSFORMERS:
        for library in ("transformers", "accelerate"):
            pytest.importorskip(library)
    return importlib.import_module(f"fastkit.{name}")


class Verbatim(str):
    """An annotation that a signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def public_names(module: ModuleType) -> list[str]:
    if "__getattr__" in vars(module):  # which imports some of them when they are asked for
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    )


def described(name: str, value: object) -> str:
    """A signature, one parameter a line; of a NamedTuple its fields are the parameters."""
    assert callable(value)
    signature = inspect.signature(value)
    lines, keyword_only = [f"{name}("], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("    *,")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        annotation = parameter.annotation
        if not isinstance(annotation, str):  # typing.NamedTuple keeps a ForwardRef
            annotation = getattr(annotation, "__forward_arg__", annotation)
        lines.append(f"    {parameter.replace(annotation=Verbatim(annotation))},")
    result = signature.return_annotation
    fields = getattr(value, "_fields", None)
    if isinstance(value, type):
        lines.append(")" if fields is None else f") is a tuple ({', '.join(fields)})")
    else:
        lines.append(f") -> {result}")
    return "\n".join(lines)


def methods(name: str, of: type) -> list[str]:
    """Of a class, and its properties, beyond those that every module of torch has."""
    bases = [base for base in reversed(of.__mro__) if base.__module__.startswith("fastkit.")]
    own = {key: getattr(of, key) for base in bases for key in vars(base) if not key.startswith("_")}
    properties = sorted(key for key, value in own.items() if isinstance(value, property))
    functions = sorted(key for key, value in own.items() if inspect.isroutine(value))
    lines = [f"properties of {name}: {', '.join(properties)}"] if properties else []
    return lines + [described(f"{name}.{key}", own[key]) for key in functions if key != "extra_repr"]


def exports(name: str) -> list[str]:
    """Of a package."""
    module, parts = package(name), []
    for public in public_names(module):
        value = getattr(module, public)
        parts.append(described(f"{module.__name__}.{public}", value))
        if isinstance(value, type) and not issubclass(value, tuple):
            parts += methods(f"{module.__name__}.{public}", value)
    return parts


def state_dict(call: str, module: ModuleType = nn) -> str:
    state = eval(call, {**vars(module), "torch": torch}).state_dict()
    keys = [f"    {key} {tuple(tensor.shape)}" for key, tensor in state.items()]
    return "\n".join([f"state_dict of {module.__name__}.{call}:", *keys])


def native() -> list[str]:
    parts = [described(f"fastkit.info.{f.__name__}", f) for f in (info.available, info.describe, info.report)]
    parts += [f"{alias}: {', '.join(get_args(of))}" for alias, of in ALIASES.items()]
    parts += [*chain.from_iterable(map(exports, PACKAGES)), *map(state_dict, STATE_DICTS)]
    return [*parts, *(state_dict(call, tied_embedding) for call in STATE_DICTS_OF_METHODS)]


def of_transformers() -> list[str]:
    return list(chain.from_iterable(map(exports, OF_TRANSFORMERS)))


FILES = {"public_api.txt": native, "public_api_transformers.txt": of_transformers}


def text_of(name: str) -> str:
    return "\n\n".join(FILES[name]()) + "\n"


@pytest.mark.parametrize("name", FILES)
def test_what_users_rely_on_is_as_it_was(name):
    now, was = text_of(name), (HERE / name).read_text()
    difference = "\n".join(difflib.unified_diff(was.splitlines(), now.splitlines(), "was", "is", lineterm=""))
    assert now == was, (
        f"the public interface has changed:\n{difference}\n"
        f"If that is intended, run `python tests/{Path(__file__).name}`, and say in CHANGELOG.md who will"
        " notice. A state_dict that loaded before must load after."
    )


def test_ops_and_reference_share_types():
    """So that states go from the one to the other."""
    assert ops.IIRState is reference.IIRState


@pytest.mark.parametrize("name", [*PACKAGES, *OF_TRANSFORMERS])
def test_what_is_public_is_documented(name):
    """In a docstring of its own, and by name in the README or on a page of docs."""
    module = package(name)
    public = public_names(module)
    assert [each for each in public if not (getattr(module, each).__doc__ or "").strip()] == []
    root = HERE.parent
    if not (root / "docs").is_dir():
        pytest.skip("the tests are here without the documentation")
    pages = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").rglob("*.md")))
    named = set(re.findall(r"\b\w+\b", " ".join(re.findall(r"`[^`\n]+`", pages))))
    assert [each for each in public if each not in named] == []


@pytest.mark.parametrize("name", [*PACKAGES, *OF_TRANSFORMERS])
def test_what_init_imports_is_what_is_public(name):
    """So that ``help`` lists them, and ``import *`` takes no more."""
    module = package(name)
    assert sorted(module.__all__) == public_names(module)


if __name__ == "__main__":
    for name in FILES:
        (HERE / name).write_text(text_of(name))
