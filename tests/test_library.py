"""What the native library asks of others and shows to them: one file must serve every torch from 2.10."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkit import _native

elffile = pytest.importorskip("elftools.elf.elffile", reason="needs pyelftools, which reads the library")

TORCH = Path(torch.__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
TARGET = "0x020a000000000000ULL"  # torch 2.10, the oldest that the package runs with

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and a C++ compiler"),
]

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


def compile_(*arguments, source):
    command = [COMPILER, "-std=c++20", *arguments]
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
    text = compile_("-E", "-P", "-xc++", "-I", TORCH / "include", definition, *options, "-", source=source)
    return set(re.findall(r"\b((?:aoti_)?torch_(?!mps_)\w+)\s*\(", text))  # mps: from 2.14, without a guard


def faults(library):
    """What is wrong with a library, a sentence for each fault."""
    found = []
    with library.open("rb") as file:
        elf = elffile.ELFFile(file)
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


@pytest.mark.skipif(not _native.LIBRARY.is_file(), reason="the library is not built")
def test_the_library_asks_and_shows_no_more_than_it_must():
    assert faults(_native.LIBRARY) == []


SOUND = """
    extern "C" int aoti_torch_get_dim(void*, long*);
    extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int, void**);
    int sound(void** stream) {
        if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream(0, stream);
        return aoti_torch_get_dim(nullptr, new long);  // new is libstdc++'s
    }
"""
LINK = ("-Wl,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch")
OUTSIDE = "which is no C function of torch 2.10"
CASES = {
    "sound": ("", LINK, []),
    "c10": (
        "namespace c10 { void throw_(); } void use() { c10::throw_(); }",
        LINK,
        [f"needs _ZN3c106throw_Ev, {OUTSIDE}"],
    ),
    "python": (
        'extern "C" int Py_IsInitialized(); int use() { return Py_IsInitialized(); }',
        LINK,
        [f"needs Py_IsInitialized, {OUTSIDE}"],
    ),
    "torch 2.11": (
        'extern "C" __attribute__((weak)) int torch_from_blob(); int use() { return torch_from_blob(); }',
        LINK,
        [f"needs torch_from_blob, {OUTSIDE}"],
    ),
    "CUDA": (
        'extern "C" int torch_get_current_cuda_blas_handle(void**);'
        "int use() { return torch_get_current_cuda_blas_handle(nullptr); }",
        LINK,
        ["needs torch_get_current_cuda_blas_handle, which is in no torch without CUDA: declare it weak"],
    ),
    "rpath": ("", (*LINK, "-Wl,--disable-new-dtags,-rpath,/nowhere"), ["has a DT_RPATH"]),
    "runpath": ("", (*LINK, "-Wl,--enable-new-dtags,-rpath,/nowhere"), ["has a DT_RUNPATH"]),
    "openmp": ("", (*LINK, "-fopenmp"), ["needs the library libgomp.so.1"]),
    "no torch": ("", (), ["does not need libtorch.so"]),
    "export": ('__attribute__((visibility("default"))) void shown() {}', LINK, ["exports _Z5shownv"]),
    "path": (
        '#line 1 "/home/me/fastkit/csrc/a.cpp"\nconst char* where() { return __FILE__; }',
        LINK,
        ["holds the path /home/me/fastkit/csrc/a.cpp"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_library_with_a_fault_is_told(tmp_path, case):
    source, link, expected = CASES[case]
    library = tmp_path / "lib.so"
    options = "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"
    compile_(*options, "-xc++", "-", "-xnone", "-o", library, *link, source=SOUND + source)
    assert faults(library) == expected
