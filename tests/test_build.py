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


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout, never built."""
    ignored = shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)


def install(tree, target, **environment):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, tree]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return target / "fastkit"


@pytest.mark.slow
def test_installing_twice_in_one_tree_works_when_the_build_tools_have_moved(tree, tmp_path):
    """pip's isolated build brings a ninja of its own, which is gone at the next install."""
    for attempt in ("first", "second"):
        tools = tmp_path / attempt
        tools.mkdir()
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        package = install(tree, tmp_path / f"site-{attempt}", PATH=path, FASTKIT_CUDA="OFF")
        assert (package / "_C.so").is_file()
        (tools / "ninja").unlink()


@pytest.mark.slow
def test_a_build_holds_what_was_asked_for_whatever_was_built_before(tree, tmp_path):
    """Options that return find their own library, and modules that are gone stay gone."""
    (tree / "python" / "fastkit" / "gone.py").touch()
    first = install(tree, tmp_path / "first", FASTKIT_CUDA="OFF")
    assert (first / "gone.py").is_file()
    (tree / "python" / "fastkit" / "gone.py").unlink()
    other = install(tree, tmp_path / "other", FASTKIT_CUDA="AUTO", FASTKIT_CUDA_ARCHS="90-real")
    again = install(tree, tmp_path / "again", FASTKIT_CUDA="OFF")
    assert not (again / "gone.py").exists()
    assert (again / "_C.so").read_bytes() == (first / "_C.so").read_bytes()
    if shutil.which("nvcc"):
        assert (other / "_C.so").read_bytes() != (first / "_C.so").read_bytes()
