"""The Triton kernels of topk_similarity without a GPU: in the interpreter, and compiled ahead of time."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    """A process of its own: Triton decides as it is imported. It prints its tests."""
    if version("triton").startswith("3.6."):
        pytest.skip("the interpreter of triton 3.6 fails with numpy >= 2.4")
    file = Path(__file__).with_name("interpreted_topk_similarity_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def variants():
    """Every variant for one architecture, and every kernel for the others, where there is time."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    from fastkit.testing.topk_similarity_triton import AOT_VARIANTS

    of_kernels = {variant.kernel.__name__: variant for variant in AOT_VARIANTS}.values()
    others = [
        pytest.param(variant, capability, marks=pytest.mark.slow)
        for capability in (80, 100)
        for variant in of_kernels
    ]
    return [(variant, 90) for variant in AOT_VARIANTS] + others


@needs_triton
@pytest.mark.parametrize(("variant", "capability"), variants(), ids=lambda v: getattr(v, "name", v))
def test_compiles_without_spills(variant, capability, monkeypatch, tmp_path):
    from fastkit.testing.aot import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    resources = compiled(variant, capability)
    assert 0 < resources.registers <= 255
    assert resources.stack == 0
    assert resources.shared <= 99 * 1024  # what a program may have where a multiprocessor has least, on sm_86


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")
def test_every_kernel_is_among_the_variants():
    import triton

    from fastkit.testing.topk_similarity_triton import AOT_VARIANTS
    from fastkit.triton import topk_similarity as kernels

    launched = {
        name
        for name, kernel in vars(kernels).items()
        if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
    }
    assert {variant.kernel.__name__ for variant in AOT_VARIANTS} == launched


def test_import_of_the_ops_leaves_triton_alone(run_script):
    script = """if True:
        import sys, torch, fastkit.ops.topk_similarity_triton
        torch.ops.fastkit_triton.topk_similarity_fwd
        print("triton" in sys.modules)
        """
    done = run_script(script)
    assert done.stdout.strip() == "False", done.stderr
