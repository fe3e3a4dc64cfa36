"""Options of the test run."""

import pytest

from fastkit import _native


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    if _native.REASON is not None:  # a checkout without a build tests the reference, which is no error
        config.addinivalue_line("filterwarnings", "ignore:fastkit runs its slow reference")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
