"""impl="triton" of iir_scan where it cannot run or lacks what is asked of it: what is said, what runs."""

import functools
import os
import re
import sysconfig
import warnings

import pytest
import torch

from fastkit import _dispatch, _native, info, ops, reference
from fastkit.ops import iir_scan


def refused(reason):
    return pytest.raises(RuntimeError, match=re.escape(f'iir_scan: impl="triton" cannot run: {reason}'))


def test_what_is_missing_is_named(monkeypatch):
    x, a = torch.zeros(1, 1, 20), torch.zeros(1, 1, 1, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    assert info.available("iir_scan")["triton"] == "no CUDA device"
    with refused('no CUDA device; use impl="reference"'):
        iir_scan(x, a, impl="triton")
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    reason = "triton is not installed; pip install 'fastkit[triton]'"
    assert info.available("iir_scan")["triton"] == reason
    with refused(reason):
        iir_scan(x, a, impl="triton")


def test_what_triton_builds_with_is_missing(monkeypatch):
    """Said where there is a GPU; the interpreter builds nothing."""
    x, a = torch.zeros(1, 1, 20), torch.zeros(1, 1, 1, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(_dispatch, "_search_build_tools", lambda: None)
    assert info.available("iir_scan")["triton"] is True
    monkeypatch.setattr(_dispatch, "_search_build_tools", lambda: "no C compiler (set CC)")
    assert info.available("iir_scan")["triton"] == "no C compiler (set CC)"
    with refused('no C compiler (set CC); use impl="reference"'):
        iir_scan(x, a, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert info.available("iir_scan")["triton"] is True


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Without compilers and headers; ``machine(name, ...)`` makes some, and returns the path of the last."""
    for variable in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path / name / scheme))
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "venv")

    def make(*names):
        files = [tmp_path / name for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o755)
        return files[-1]

    return make


HEADER = "include/venv/Python.h"


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_compiler_and_headers_are_enough(machine, compiler):
    machine(compiler, HEADER)
    assert _dispatch._search_build_tools.__wrapped__() is None


def test_no_compiler(machine, monkeypatch):
    machine("cc", HEADER)
    assert _dispatch._search_build_tools.__wrapped__() == "no C compiler (set CC)"
    monkeypatch.setenv("CC", "cc")
    assert _dispatch._search_build_tools.__wrapped__() is None


def test_a_compiler_that_is_named_is_the_only_one(machine, monkeypatch):
    mine = machine("gcc", HEADER, "tools/mine")
    monkeypatch.setenv("CC", "mine -m64")
    assert _dispatch._search_build_tools.__wrapped__() == "no C compiler 'mine -m64' (set CC)"
    monkeypatch.setenv("CC", str(mine))
    assert _dispatch._search_build_tools.__wrapped__() is None


def test_no_headers(machine, monkeypatch):
    folder = machine("gcc", "headers/Python.h").parent
    monkeypatch.chdir(folder)  # which nobody asked to look in
    assert _dispatch._search_build_tools.__wrapped__() == "no Python.h (install python3-dev)"
    monkeypatch.setenv("C_INCLUDE_PATH", f"/elsewhere{os.pathsep}{folder}")
    assert _dispatch._search_build_tools.__wrapped__() is None


def test_headers_of_debians_python(machine, monkeypatch):
    """Triton does not look where Debian installs a user's packages."""
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    machine("gcc", "include/posix_local/Python.h")
    assert _dispatch._search_build_tools.__wrapped__() == "no Python.h (install python3-dev)"
    machine("include/posix_prefix/Python.h")
    assert _dispatch._search_build_tools.__wrapped__() is None


def test_a_gpu_without_the_compiled_library_takes_triton(monkeypatch):
    """What ``impl=None`` means there, asked of a tensor that has only a device."""
    x = torch.zeros(1, device="meta")
    monkeypatch.setattr(_dispatch, "_OF_DEVICE", {"meta": ("cuda", "triton")})
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, _: "no nvcc" if impl == "cuda" else None)
    covered = {"cuda": (torch.float32,), "triton": (torch.float32,)}
    assert _dispatch.choose("op", None, x, covered) == "triton"
    assert _dispatch.choose("op", None, x, {"triton": (torch.float64,)}) == "reference"
    monkeypatch.setattr(_dispatch, "unavailable", lambda *_: None)
    assert _dispatch.choose("op", None, x, covered) == "cuda"


NO_CUDA = f"the library was built without CUDA; {_native.BUILD_CUDA}"
INSTEAD = "fastkit runs its slow reference implementations: "


@pytest.fixture
def without_nvcc(monkeypatch):
    """CPU tensors, chosen for as CUDA tensors are where only Triton runs; and nothing was warned of yet."""
    monkeypatch.setattr(_dispatch, "_OF_DEVICE", {"cpu": ("cuda", "triton")})
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, _: NO_CUDA if impl == "cuda" else None)
    monkeypatch.setattr(_native, "_warned", False)


X, A, BANK = torch.ones(1, 1, 40), torch.full((1, 1, 1, 2), 0.1), torch.full((1, 1, 1, 2, 2), 0.1)
NOT_IN_TRITON = {
    "banks": lambda: iir_scan(X, BANK),
    "chunks of less than 16 samples": lambda: iir_scan(X, A.expand(-1, -1, 5, -1), chunk=8),
    "packed sequences": lambda: iir_scan(X, A, cu_seqlens=torch.tensor([0, 10, 40])),
    "states": lambda: ops.iir_scan_with_state(X, A),
    "single steps": lambda: ops.iir_step(X[..., 0], A[:, :, 0]),
    "cascades": lambda: ops.sosfilt(X, torch.tensor([[1.0, 0, 0, 1, -0.5, 0]])),
}


@pytest.mark.parametrize("what", NOT_IN_TRITON)
def test_what_triton_lacks_warns_once_of_the_reference(without_nvcc, what):
    call = NOT_IN_TRITON[what]
    with pytest.warns(RuntimeWarning) as warned:
        call()
    [warning] = warned
    lack = f'impl="triton" has no {what}; impl="cuda" cannot run: {NO_CUDA}'
    assert str(warning.message) == INSTEAD + lack
    assert warning.filename == __file__  # the caller's line, not the package's
    with warnings.catch_warnings(action="error"):
        call()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
def test_it_does_not_warn_while_compiling(without_nvcc):
    compiled = torch.compile(lambda x, a: iir_scan(x, a), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastkit")
        y = compiled(X, BANK)
    torch.testing.assert_close(y, reference.iir_scan(X, BANK))
    with pytest.warns(RuntimeWarning, match="fastkit runs its slow reference"):
        iir_scan(X, BANK)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
@pytest.mark.parametrize("found", [True, False])
def test_the_search_for_build_tools_is_not_traced(without_nvcc, machine, monkeypatch, found):
    """PyTorch has no graph of looking for files."""
    if found:
        machine("gcc", HEADER)
    search = functools.cache(_dispatch._search_build_tools.__wrapped__)
    monkeypatch.setattr(_dispatch, "_search_build_tools", search)
    monkeypatch.setattr(_dispatch, "_OF_DEVICE", {"cpu": ("triton",)})
    monkeypatch.setattr(_dispatch, "unavailable", lambda *_: _dispatch._missing_build_tool())
    torch.compiler.reset()
    compiled = torch.compile(lambda x, a: iir_scan(x, a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, BANK), reference.iir_scan(X, BANK))
    assert search.cache_info().currsize == 1
    assert search() == (None if found else "no C compiler (set CC)")


def test_neither_cuda_nor_triton_warns_why(without_nvcc, monkeypatch):
    reasons = {"cuda": NO_CUDA, "triton": "no C compiler (set CC)"}
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, _: reasons[impl])
    with pytest.warns(RuntimeWarning) as warned:
        iir_scan(X, A)
    [warning] = warned
    because = f'impl="cuda" cannot run: {NO_CUDA}; impl="triton" cannot run: no C compiler (set CC)'
    assert str(warning.message) == INSTEAD + because
    assert warning.filename == __file__
