"""Options of the test run, the implementations under test, and scripts in fresh processes."""

import os

# Before torch is imported: threads that wait leave their core to others. Where there are not as many cores as
# threads, as under other processes, they would burn many times what the tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkit import _native
from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import devices

# Of what test modules share too, a failed assertion says what was compared.
pytest.register_assert_rewrite("contracts", "mtadam_steps", "mtadam_trainers", "prilora_folders")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    without_cuda = torch.cuda.is_available() and _native.BUILD_INFO.get("cuda") is None
    if torch.cuda.is_available():  # of the thread that runs backward, the first time
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS, but there was no current")
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


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of a dtype, run on a GPU by Triton's kernels that have it not, is left out, and says so."""
    try:
        return (yield)
    except RuntimeError as error:
        if pyfuncitem.get_closest_marker("gpu") and 'impl="triton" covers torch' in str(error):
            pytest.skip(str(error))
        raise


BACKENDS = [
    pytest.param(
        (name, device),
        marks=[pytest.mark.gpu] if device.type == "cuda" else [],
        id=f"{name}-on-{device.type}",
    )
    for device in devices()
    for name in ("reference", device.type)
]


def kernels_of(request):
    """``KERNELS`` of the op that a test module is about: those that it imports, else iir_scan's."""
    return getattr(request.module, "KERNELS", KERNELS)


def implementation(request):
    """That of the parameter; the tensors that the test makes are born on its device."""
    name, device = request.param
    kernels = kernels_of(request)
    if name == "cuda" and name not in kernels:
        name = "triton"
    reason = unavailable(name, kernels)
    if reason is not None:
        pytest.skip(reason)
    # The CPU is the default as it is; to say so would make every call of PyTorch slower.
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield name


@pytest.fixture(params=BACKENDS)
def impl(request):
    yield from implementation(request)


@pytest.fixture(params=[backend for backend in BACKENDS if "reference" not in str(backend.id)])
def kernel(request):
    """As ``impl``, without the reference: for what its own tests and the cells of the contract ask of it."""
    yield from implementation(request)


@pytest.fixture
def native(request):
    """The CPU kernel, for what the reference is too slow for or has no part in."""
    reason = unavailable("cpu", kernels_of(request))
    if reason is not None:
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """An instruction set that kernels are compiled for, but for that of this process, which all tests run."""
    reason = unavailable("cpu", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    if request.param == _native.BUILD_INFO["cpu_isa"]:
        pytest.skip("it is that of this process")
    if request.param not in _native.BUILD_INFO["cpu_isas"]:
        pytest.skip(f"this CPU and build have {', '.join(_native.BUILD_INFO['cpu_isas'])}")
    return request.param


@pytest.fixture
def one_thread():
    """For what is small: two threads are no faster, and wait for each other where other processes run."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def patched_once():
    """Each function that a kernel calls patches Triton's language anew, which takes most of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        modules = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        needed = any(tl.core.is_builtin(m.load) for m in modules)
        return patch(fn) if needed else interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield


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
