"""Importing fastkit is cheap and does nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastkit
from fastkit.__main__ import RECIPES

pytestmark = pytest.mark.native


def brought(run_script, module, first="torch"):
    """The libraries that importing the module brings in, beyond those of ``first``, and with not a word."""
    before = f"import json, sys; import {first}; before = set(sys.modules)"
    after = "new = {name.split('.')[0] for name in set(sys.modules) - before}"
    done = run_script(f"{before}; import {module}; {after}; print(json.dumps(sorted(new)))")
    assert (done.returncode, done.stderr) == (0, "")
    [output] = done.stdout.splitlines()
    return set(json.loads(output)) - sys.stdlib_module_names - {"torch"}


@pytest.mark.parametrize(
    "module",
    [
        "fastkit",
        "fastkit.ops",
        "fastkit.nn",
        "fastkit.optim",
        "fastkit.info",
        "fastkit.methods.multiverse",
        "fastkit.methods.prilora",
        "fastkit.methods.prilora.files",
        "fastkit.methods.tied_embedding",
        "fastkit.integrations",
    ],
)
def test_import_brings_nothing_but_torch(run_script, module):
    """No triton, no transformers, no PEFT, nothing that torch has not loaded."""
    assert brought(run_script, module) == {"fastkit"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_brings_nothing_that_it_may_have_to_ask_for(run_script, recipe):
    """What it needs and does not find it says in words, when it is run."""
    assert brought(run_script, f"fastkit.recipes.{recipe}") <= {"fastkit", "numpy"}


def test_the_callback_brings_nothing_but_transformers(run_script):
    """PEFT comes with that, where it is installed."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert brought(run_script, "fastkit.integrations.transformers", "transformers.trainer") == {"fastkit"}


def test_import_does_not_touch_cuda(run_script):
    """Not even to ask for a device, which would make a context in the parent of a fork."""
    done = run_script("""if True:
        import torch

        def refuse(*args):
            raise AssertionError("CUDA was initialised")

        torch.cuda._lazy_init = torch._C._cuda_init = torch.cuda.current_device = refuse
        import fastkit.ops, fastkit.nn, fastkit.optim
        assert not torch.cuda.is_initialized()
        from fastkit import _dispatch
        assert _dispatch._ask_driver.cache_info().currsize == 0  # nor is the driver's library opened
        """)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_does_not_need_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(fastkit.__file__).parents[1])])
    script = "import fastkit, fastkit.info; print(fastkit.__version__)"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == (f"{fastkit.__version__}\n", "")


def test_import_costs_less_than_50_ms_over_torch(tmp_path):
    """The best of up to five processes, of their own time: others may hold the machine.

    With bytecode, as pip leaves it, which the first process writes here, that of torch aside. No forks, which
    pay for each page of their parent's that they write to.
    """
    script = f"""if True:
        import sys, time, torch
        sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False
        start = time.process_time()
        import fastkit.ops
        print(1000 * (time.process_time() - start))
        """
    best = float("inf")
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        best = min(best, float(done.stdout))
        if best < 50:
            return
    raise AssertionError(f"import fastkit.ops takes {best:.0f} ms")
