"""Options of the test run, and the implementations that tests of iir_scan run on."""

import pytest

from fastkit import _native
from fastkit._dispatch import unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import devices


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


BACKENDS = [(name, device) for device in devices() for name in ("reference", device.type)]


@pytest.fixture(params=BACKENDS, ids=lambda backend: f"{backend[0]}-on-{backend[1].type}")
def impl(request):
    """An implementation; the tensors that the test makes are born on its device."""
    name, device = request.param
    reason = unavailable(name, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with device:
        yield name


@pytest.fixture
def native():
    """The CPU kernel, for what the reference is too slow for or has no part in."""
    reason = unavailable("cpu", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "cpu"
