"""What is wrong with a native library, which must serve every torch from 2.10; audits of wheels ask too."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

from elftools.elf.elffile import ELFFile

TARGET = "0x020a000000000000ULL"  # torch 2.10, the oldest that the package runs with

# No libc10, no libpython; libcudart is linked statically, and threads are torch's, so there is no libgomp.
LIBRARIES = re.compile(
    r"libtorch\.so|libtorch_cpu\.so|libstdc\+\+\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux-[\w-]+\.so\.\d"
    r"|libm\.so\.6|libdl\.so\.2|libpthread\.so\.0|librt\.so\.1"
)
# What the compiler and the linker add to every library, and libstdc++'s templates, which it makes visible.
STARTUP = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
LINKER = {"__bss_start", "_edata", "_end", "_init", "_fini"}
STD = re.compile(r"_Z(T[ISV]|GV|Z)?N?[rVKRO]*(S[tabsiod]|9__gnu_cxx)")
SOURCE = re.compile(rb"(?<![\w./-])/[\w./+-]+\.(?:cpp|cuh?|h)\b")


def torch_root():
    if root := os.environ.get("FASTKIT_TORCH_ROOT"):
        return Path(root)
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "no torch: set FASTKIT_TORCH_ROOT"
    return Path(spec.origin).parent


def compile_(*arguments, source):
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def shims(*options):
    """The C functions of torch 2.10, whatever torch is installed: its headers guard each newer one."""
    source = """
        #include <torch/csrc/stable/c/shim.h>
        #include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
    """
    definition = f"-DTORCH_TARGET_VERSION={TARGET}"
    text = compile_(
        "-E", "-P", "-xc++", "-I", torch_root() / "include", definition, *options, "-", source=source
    )
    return set(re.findall(r"\b((?:aoti_)?torch_(?!mps_)\w+)\s*\(", text))  # mps: from 2.14, without a guard


def faults(library):
    """What is wrong with a library, a sentence for each fault."""
    found = []
    with library.open("rb") as file:
        elf = ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
        versions = [version["ndx"] for version in elf.get_section_by_name(".gnu.version").iter_symbols()]
        constants = elf.get_section_by_name(".rodata")
        paths = set(SOURCE.findall(constants.data())) if constants else set()

    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    found += [f"needs the library {name}" for name in sorted(needed) if not LIBRARIES.fullmatch(name)]
    if "libtorch.so" not in needed:  # it alone brings in the CUDA part of a torch that has one
        found.append("does not need libtorch.so")
    found += [f"has a {tag.entry.d_tag}" for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    found += [f"holds the path {path.decode()}" for path in sorted(paths)]

    for symbol, version in zip(symbols[1:], versions[1:], strict=True):  # the first of any table is empty
        name, weak = symbol.name, symbol.entry.st_info.bind == "STB_WEAK"
        if symbol.entry.st_shndx != "SHN_UNDEF":
            if name not in LINKER and not STD.match(name):
                found.append(f"exports {name}")
        elif isinstance(version, int) or name in shims() or (weak and name in STARTUP):
            pass  # a version names the library that it comes from, which is among those above
        elif name not in shims("-DUSE_CUDA"):
            found.append(f"needs {name}, which is no C function of torch 2.10")
        elif not weak:
            found.append(f"needs {name}, which is in no torch without CUDA: declare it weak")
    return found
