"""The shapes of each op and who competes there: one module for each stem, which is all that an op needs here.

A module has three functions, each returning a list of cases:

    cases(*, quick=False)        of ``python -m fastkit bench``; quick: the small ones, nothing compiled
    demo_cases(*, quick=False)   of ``python -m fastkit demo``, where an op has 8 seconds without compilation
    gpu_cases()                  of ``python -m fastkit.bench.gpu``

What a stem needs besides lies in ``<stem>_<part>.py``, from which its module draws.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def stems() -> list[str]:
    """The modules of this package, but for the parts of others."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def of(stem: str) -> ModuleType:
    """The module of a stem, with the functions above."""
    return import_module(f"{__name__}.{stem}")
