"""The build: what it refuses, in words, and that it can be repeated in one tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file() or not shutil.which("cmake") or not shutil.which("ninja"),
    reason="needs a checkout, cmake and ninja",
)


def configure(folder, *defines, **environment):
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *defines]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_configure_without_torch_names_the_option(tmp_path):
    done = configure(tmp_path, "-DFASTKIT_TORCH_ROOT=/nowhere")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "FASTKIT_TORCH_ROOT must be the folder of a torch >= 2.10, got '/nowhere'" in message


@pytest.mark.parametrize("wanted", ["ON", "AUTO"])
def test_only_cuda_on_insists_on_nvcc(tmp_path, wanted):
    defines = f"-DFASTKIT_TORCH_ROOT={TORCH}", f"-DFASTKIT_CUDA={wanted}"
    done = configure(tmp_path, *defines, CUDACXX="/nowhere/nvcc")
    message = " ".join(done.stderr.split())
    assert (done.returncode == 0) == (wanted == "AUTO"), message
    assert ("FASTKIT_CUDA=ON needs nvcc" in message) == (wanted == "ON")


@pytest.mark.slow
def test_installing_twice_in_one_tree_works_when_the_build_tools_have_moved(tmp_path):
    """pip's isolated build brings a ninja of its own, which is gone at the next install."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "*.egg-info", "out")
    )
    for attempt in ("first", "second"):
        tools = tmp_path / attempt
        tools.mkdir()
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "FASTKIT_CUDA": "OFF"}
        target = tmp_path / f"site-{attempt}"
        command = [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, tree,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert (target / "fastkit" / "_C.so").is_file()
        (tools / "ninja").unlink()
