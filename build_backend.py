"""setuptools' build backend; it asks for torch, CMake and ninja only where they are needed and not there."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).parent.resolve()
CMAKE_MINIMUM = (3, 22)
PLATFORMS = ("linux-x86_64", "linux-aarch64")  # that FASTKIT_NATIVE=AUTO builds the library for


def get_requires_for_build_sdist(config_settings=None):
    return build_meta.get_requires_for_build_sdist(config_settings)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements(editable=False)


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements(editable=True)


def build_requirements(*, editable: bool) -> list[str]:
    """What this machine lacks; a torch that is already there is never downloaded again."""
    missing = []
    if why_pure() is not None:
        return missing
    if find_torch() is None:
        missing += [pinned("torch"), "numpy"]
    if shutil.which("ninja") is None:
        missing.append("ninja")
    if cmake_version() < CMAKE_MINIMUM:
        missing.append("cmake>=" + ".".join(map(str, CMAKE_MINIMUM)))
    if wants_host_tests(editable):
        missing.append("pybind11>=2.13")
    return missing


@functools.cache
def why_pure() -> str | None:
    """Why this build has no native library, or None where it has one."""
    wanted = os.environ.get("FASTKIT_NATIVE", "AUTO")
    if wanted == "OFF":
        return "FASTKIT_NATIVE=OFF"
    if wanted not in ("AUTO", "ON"):
        raise SystemExit(f"fastkit: FASTKIT_NATIVE must be AUTO, ON or OFF, got {wanted!r}")
    if wanted == "AUTO" and sysconfig.get_platform() not in PLATFORMS:
        return f"on {sysconfig.get_platform()} the native library is built with FASTKIT_NATIVE=ON alone"
    fault = compiler_fault()
    if fault is not None and wanted == "ON":
        raise SystemExit(
            f"fastkit: FASTKIT_NATIVE=ON needs a C++ compiler, and {fault}; install g++ or set CXX"
        )
    return fault


def compiler_fault() -> str | None:
    """Why there is no C++ compiler, or None where there is: each of CC and CXX that is set must work."""
    program = "#include <string>\nint main() { return std::string().size(); }\n"
    with tempfile.TemporaryDirectory() as folder:

        def fails(command: str, suffix: str, text: str) -> bool:
            source = Path(folder, f"program.{suffix}")
            source.write_text(text)
            arguments = [*shlex.split(command), str(source), "-o", str(Path(folder, "program"))]
            try:
                return subprocess.run(arguments, capture_output=True).returncode != 0
            except OSError:
                return True

        if (cc := os.environ.get("CC")) and fails(cc, "c", "int main(void) { return 0; }\n"):
            return f"CC={cc} compiles no C program"
        if cxx := os.environ.get("CXX"):
            return f"CXX={cxx} compiles no C++ program" if fails(cxx, "cpp", program) else None
        # CMake looks in this order.
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if found is None:
            return "none of c++, g++ and clang++ is on PATH"
        return f"{found} compiles no C++ program" if fails(found, "cpp", program) else None


def wants_host_tests(editable: bool) -> bool:
    wanted = os.environ.get("FASTKIT_HOST_TESTS", "1" if editable else "0") == "1"
    return wanted and Path(sysconfig.get_path("include"), "Python.h").is_file()


def find_torch() -> Path | None:
    """The torch package to build against, found without importing it: also from pip's isolated build."""
    if root := os.environ.get("FASTKIT_TORCH_ROOT"):
        return Path(root)
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folders = [Path(sysconfig.get_path("platlib"))]
    if environment := os.environ.get("VIRTUAL_ENV"):
        folders += Path(environment).glob("lib/python*/site-packages")
    return next((f / "torch" for f in folders if (f / "torch" / "include").is_dir()), None)


def pinned(package: str) -> str:
    """``package==version`` as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith(f"{package}=="))


def cmake_version() -> tuple[int, ...]:
    if shutil.which("cmake") is None:
        return (0, 0)
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0)
