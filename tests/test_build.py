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


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, never built."""
    ignored = shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", ignore=ignored)


@pytest.fixture(scope="module")
def install(tree, tmp_path_factory):
    """By the compiler that is here, without optimization: what it makes is not run."""
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)

    def install(name, **environment):
        target = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, tree]
        environment = {**os.environ, "CXX": str(compiler), **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return target / "fastkit"

    return install


@pytest.fixture(scope="module")
def install_with_tools(install, tmp_path_factory):
    """With a ninja of its own, which is gone afterwards: so is that of pip's isolated build."""

    def install_with_tools(name):
        tools = tmp_path_factory.mktemp("tools")
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        package = install(name, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", FASTKIT_CUDA="OFF")
        (tools / "ninja").unlink()
        return package

    return install_with_tools


@pytest.fixture(scope="module")
def first(tree, install_with_tools):
    """Installed when there was a module more."""
    (tree / "python" / "fastkit" / "gone.py").touch()
    package = install_with_tools("first")
    (tree / "python" / "fastkit" / "gone.py").unlink()
    assert (package / "_C.so").is_file() and (package / "gone.py").is_file()
    return package


@pytest.mark.slow
def test_installing_twice_in_one_tree_works_when_the_build_tools_have_moved(first, install_with_tools):
    assert (install_with_tools("second") / "_C.so").is_file()


@pytest.mark.slow
def test_a_build_holds_what_was_asked_for_whatever_was_built_before(first, install):
    """Options that return find their own library, and modules that are gone stay gone."""
    other = install("other", FASTKIT_CUDA="AUTO", FASTKIT_CUDA_ARCHS="90-real")
    again = install("again", FASTKIT_CUDA="OFF")
    assert not (again / "gone.py").exists()
    assert (again / "_C.so").read_bytes() == (first / "_C.so").read_bytes()
    if shutil.which("nvcc"):
        assert (other / "_C.so").read_bytes() != (first / "_C.so").read_bytes()
