"""The Triton kernels of iir_scan without a GPU: in the interpreter, and compiled for GPUs elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastkit import _dispatch, info
from fastkit.ops import iir_scan

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    """A process of its own: Triton decides as it is imported. It prints its tests."""
    if version("triton").startswith("3.6."):
        pytest.skip("the interpreter of triton 3.6 fails with numpy >= 2.4")
    file = Path(__file__).with_name("interpreted_iir_scan_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def variants():
    """Every variant for one architecture, and every kernel for the others."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    from fastkit.testing.iir_scan_triton import AOT_VARIANTS

    of_kernels = {variant.kernel.__name__: variant for variant in AOT_VARIANTS}.values()
    others = [(variant, capability) for capability in (80, 100) for variant in of_kernels]
    return [(variant, 90) for variant in AOT_VARIANTS] + others


@needs_triton
@pytest.mark.parametrize(("variant", "capability"), variants(), ids=lambda v: getattr(v, "name", v))
def test_compiles_without_spills(variant, capability, monkeypatch, tmp_path):
    from fastkit.testing.iir_scan_triton import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    resources = compiled(variant, capability)
    assert 0 < resources.registers <= 255
    assert resources.stack == 0
    assert resources.shared <= 48 * 1024


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")
def test_every_kernel_is_among_the_variants():
    import triton

    from fastkit.testing.iir_scan_triton import AOT_VARIANTS
    from fastkit.triton import iir_scan as kernels

    launched = {
        name
        for name, kernel in vars(kernels).items()
        if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
    }
    assert {variant.kernel.__name__ for variant in AOT_VARIANTS} == launched


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


def test_import_of_the_ops_leaves_triton_alone():
    script = """if True:
        import sys, torch, fastkit.ops
        torch.ops.fastkit_triton.iir_scan_fwd
        print("triton" in sys.modules)
        """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
