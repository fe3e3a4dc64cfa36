"""The Triton kernels of every op without a GPU: in the interpreter, and compiled for GPUs elsewhere.

What Triton's interpreter computes of an op is in ``interpreted_<stem>_triton.py``, and what is compiled of it
the ``AOT_VARIANTS`` of ``fastkit.testing.<stem>_triton``.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fastkit

STEMS = sorted(
    file.stem for file in Path(fastkit.__file__).with_name("triton").glob("*.py") if file.stem != "__init__"
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_in_the_interpreter(stem):
    """A process of its own: Triton decides as it is imported. It prints its tests."""
    if version("triton").startswith("3.6."):
        pytest.skip("the interpreter of triton 3.6 fails with numpy >= 2.4")
    file = Path(__file__).with_name(f"interpreted_{stem}_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def variants_of(stem):
    return importlib.import_module(f"fastkit.testing.{stem}_triton").AOT_VARIANTS


def compilations():
    """Every kernel once, for one architecture; slow: its other variants, and every kernel for others."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    cases = []
    for stem in STEMS:
        of_kernels = {variant.kernel.__name__: variant for variant in variants_of(stem)}
        for capability in (90, 80, 100):
            for variant in variants_of(stem) if capability == 90 else of_kernels.values():
                kernel = variant.kernel.__name__
                marks = () if capability == 90 and variant is of_kernels[kernel] else pytest.mark.slow
                name = f"{kernel}-{variant.name}-{capability}"
                cases.append(pytest.param(stem, variant, capability, marks=marks, id=name))
    return cases


# Of shared memory: what a program may have where a multiprocessor has least, on sm_86; or has unasked.
SHARED = dict.fromkeys(STEMS, 99 * 1024) | {"iir_scan": 48 * 1024}


@needs_triton
@pytest.mark.parametrize(("stem", "variant", "capability"), compilations())
def test_compiles_without_spills(stem, variant, capability, monkeypatch, tmp_path):
    from fastkit.testing.aot import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    resources = compiled(variant, capability)
    assert 0 < resources.registers <= 255
    assert resources.stack == 0
    assert resources.shared <= SHARED[stem]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel_is_among_the_variants(stem):
    import triton

    launched = {
        name
        for name, kernel in vars(importlib.import_module(f"fastkit.triton.{stem}")).items()
        if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
    }
    assert launched and {variant.kernel.__name__ for variant in variants_of(stem)} == launched


def test_import_of_the_ops_leaves_triton_alone(run_script):
    script = """if True:
        import sys, torch, fastkit.ops
        names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(("fastkit_t", "fastkit_p"))]
        for name in names:
            library, _, op = name.partition("::")
            getattr(getattr(torch.ops, library), op.partition(".")[0])
        print("triton" in sys.modules, *names)
        """
    done = run_script(script)
    loaded, *names = done.stdout.split()
    assert loaded == "False", done.stderr
    for stem in STEMS:
        libraries = ("fastkit_triton", "fastkit_products")  # the second: kernels between PyTorch's products
        assert any(name.startswith(tuple(f"{of}::{stem}" for of in libraries)) for name in names), stem
