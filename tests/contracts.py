"""The tests that each ``test_<stem>_contract.py`` has of its table, and the page that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkit._dispatch import IMPLS, Kernels, unavailable
from fastkit.testing.contract import CAPABILITIES, Contract


def checks_of(stem: str, contract: Contract, kernels: Kernels) -> tuple[Callable[..., None], ...]:
    """That every cell is what the table says, that the table is whole, and that the page has it."""

    @pytest.mark.native
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp
    @pytest.mark.parametrize(("mode", "capability", "impl"), cells(contract))
    def test_cell(mode, capability, impl):
        reason = unavailable(impl, kernels)
        if reason is not None:
            pytest.skip(reason)
        contract.check(mode, capability, impl)

    @pytest.mark.native
    def test_the_table_has_every_implementation_and_no_stray_refusal():
        assert set(contract.implementations) == set(IMPLS)
        for impl in set(IMPLS) - {"reference", *kernels}:
            assert contract.implementations[impl] == f"no: {unavailable(impl, kernels)}"
        assert all(mode in contract.modes and name in CAPABILITIES for mode, name in contract.refusals)

    def test_page_has_the_table():
        page = page_of(stem)
        if not page.is_file():
            pytest.skip("the tests are here without the documentation")
        text = page.read_text()
        assert text == contract.on_page(text), f"run: python tests/test_{stem}_contract.py"

    return test_cell, test_the_table_has_every_implementation_and_no_stray_refusal, test_page_has_the_table


def cells(contract: Contract) -> list[Any]:
    """Slow: the graphs of the reference, which is of PyTorch's own ops, but for the first and the refused."""
    first, *_ = contract.modes
    params = []
    for mode in contract.modes:
        for capability in CAPABILITIES:
            refused = (mode, capability) in contract.refusals
            for impl in contract.running:
                again = (capability, impl) == ("compile", "reference") and mode != first and not refused
                params.append(pytest.param(mode, capability, impl, marks=[pytest.mark.slow] if again else []))
    return params


def page_of(stem: str) -> Path:
    return Path(__file__).parents[1] / "docs" / "ops" / f"{stem}.md"


def write_page(stem: str, contract: Contract) -> None:
    page = page_of(stem)
    page.write_text(contract.on_page(page.read_text()))
