"""Options of the test run, the implementations of iir_scan under test, and scripts in fresh processes."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkit import _native
from fastkit._dispatch import unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import devices


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    without_cuda = torch.cuda.is_available() and _native.BUILD_INFO.get("cuda") is None
    if _native.REASON is not None or without_cuda:  # tests run the reference for want of kernels: no error
        config.addinivalue_line("filterwarnings", "ignore:fastkit runs its slow reference")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: run with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "gpu: no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


BACKENDS = [
    pytest.param(
        (name, device),
        marks=[pytest.mark.gpu] if device.type == "cuda" else [],
        id=f"{name}-on-{device.type}",
    )
    for device in devices()
    for name in ("reference", device.type)
]


@pytest.fixture(params=BACKENDS)
def impl(request):
    """An implementation; the tensors that the test makes are born on its device."""
    name, device = request.param
    reason = unavailable(name, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    # The CPU is the default as it is; to say so would make every call of PyTorch slower.
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield name


@pytest.fixture
def native():
    """The CPU kernel, for what the reference is too slow for or has no part in."""
    reason = unavailable("cpu", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Runs a script in a process that has imported torch alone; keywords are variables of its environment."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("scripts")
    command = [sys.executable, "-P", str(Path(__file__).with_name("forked_scripts.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run_script(script, **environment):
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps([script, environment, str(folder)]) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(script, code, *printed)

        yield run_script
