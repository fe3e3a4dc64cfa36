"""What compiled GPU kernels take of a multiprocessor: no stack without a reason, and the page that shows it.

``python tests/test_kernel_resources.py`` writes the table into docs/performance.md, between its markers. It
reads the built library, so it needs one with CUDA, for all architectures of CMakeLists.txt; and no GPU.

Triton kernels are those of the ``AOT_VARIANTS`` in a ``fastkit.testing.<stem>_triton``, compiled here.
"""

import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastkit import _native, testing

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "performance.md"
BEGIN, END = "<!-- kernel table: begin -->", "<!-- kernel table: end -->"
TRITON_ARCHS = (80, 90, 100)

# By kernel, without namespace fastkit and template arguments; of a Triton kernel, the name of its function.

# That it reads and writes for a float32 sample of a signal and a filter, or element of activations, of a
# table, or of a parameter under one term.
BYTES: dict[str, str] = {
    "icp_warps::Layout": "12",
    "icp_warps::Mapped": "8",
    "icp_warps::Nearest": "4 for each block of queries",
    "icp_warps::Costs": "8",
    "icp_warps::Order": "0; 16 a row",
    "icp_warps::Steps": "8 of a row that is visited",
    "iir_scan_warps::Segments": "8; 4 if it composes maps",
    "iir_scan_warps::WalkTiles": "8; 4 if it composes maps",
    "iir_scan_warps::BackwardTiles": "16; 40 a chunk",
    "iir_scan_warps::Enter": "0; 64 a segment",
    "iir_scan_warps::EndOfX": "0; 16 a row",
    "iir_scan_warps::ReadOff": "16; 20 a piece of a chunk",
    "iir_scan_warps::Finish": "0; 40 a chunk",
    "iir_scan_warps::StateOfX": "0; 32 a row",
    "iir_scan_warps::Unpack": "0; 24 a sequence",
    "iir_scan_reduce": "4",
    "iir_scan_link": "0; 32 a segment",
    "iir_scan_walk": "8",
    "iir_scan_gradients": "16; 20 a piece of a chunk",
    "linear_cross_entropy_sums": "4",
    "linear_cross_entropy_gradient": "8",
    "lora_linear_project": "4",
    "lora_linear_gather": "4",
    "lora_linear_expand": "8; 4 if it does not add",
    "lora_linear_sum": "0; 4 a part",
    "lora_linear_warps::PruneRows": "13",
    "moments_means": "4",
    "moments_products": "8 for each tile of 64 columns",
    "moments_merge": "0; 4 a piece",
    "topk_similarity_search": "2 for each block of queries",
    "topk_similarity_decide": "0; 4 D a kept key",
    "multihead_loss_forward": "4; 4 D C a head",
    "multihead_loss_weights": "8",
    "multihead_loss_inputs": "8",
    "multihead_loss_slopes": "8 a pair",
    "phrase_scores_rows": "24 a number of a candidate",
    "phrase_scores_variances": "4 a number of a candidate; 4 for 32 candidates of the scatter",
    "phrase_scores_finish": "4 a number of a candidate",
    "phrase_scores_pick": "0; 8 a candidate",
    "phrase_scores_follow": "4 a number of a candidate; with deflation 28",
    "mtadam_warps::SquareSums": "4",
    "mtadam_warps::Totals": "0; 8 a chunk",
    "mtadam_warps::Balance": "0; 20 a tensor and term",
    "mtadam_warps::Update": "28; 12 for each term more; 8 if it has amsgrad",
}

# Why it has a stack, on the architectures where it does.
STACKS: dict[str, str] = {
    "multihead_loss_forward": "8 numbers a thread, on sm_80, of weighted classes in several tiles",
}


class Kernel(NamedTuple):
    name: str  # run_teams<Segments<float, true> > is Segments<float, true>
    arch: str
    registers: int
    stack: int
    shared: int

    @property
    def key(self) -> str:
        return self.name.partition("<")[0].partition(" ")[0]


# Reading


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    bundled = Path(next(iter(folders)), "backends", "nvidia", "bin", "cuobjdump") if folders else None
    return str(bundled) if bundled is not None and bundled.is_file() else shutil.which("cuobjdump")


def resource_usage(file: Path) -> str:
    """What cuobjdump says of a library, an object or a cubin, with names as in the source."""
    tool = cuobjdump()
    assert tool is not None
    listing = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True)
    if "does not contain device code" in listing.stdout + listing.stderr:
        return ""
    assert listing.returncode == 0, listing.stderr
    return subprocess.run(
        ["c++filt"], input=listing.stdout, capture_output=True, text=True, check=True
    ).stdout


def kernels_of(usage: str, arch: str = "") -> Iterator[Kernel]:
    """Those in the output of cuobjdump; ``arch`` is that of a cubin, where the output does not say it."""
    name = ""
    for line in usage.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            name = plain_name(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            yield Kernel(name, arch, registers, stack + local, shared)


def plain_name(signature: str) -> str:
    """``void fastkit::f<fastkit::Half, 4>(int)`` is ``f<Half, 4>``, and a run_teams is what it runs."""
    name = re.sub(r"\(anonymous namespace\)::|\bfastkit::|^void ", "", signature)
    end = depth = 0
    for end, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:end]
            break
    if match := re.fullmatch(r"run_teams<(.*\S)\s*>", name):
        name = match[1]
    return name.replace("> >", ">>")


@cache
def cuda_kernels() -> list[Kernel]:
    return sorted(kernels_of(resource_usage(_native.LIBRARY)), key=lambda k: (k.name, len(k.arch), k.arch))


@cache
def triton_kernels() -> list[Kernel]:
    kernels = []
    for variant in variants():
        from fastkit.testing.aot import compiled

        name = f"{variant.kernel.__name__} {variant.name}"
        kernels += [Kernel(name, f"sm_{arch}", *compiled(variant, arch)) for arch in TRITON_ARCHS]
    return kernels


def variants() -> list[Any]:
    """What is compiled of Triton's kernels."""
    modules = [importlib.import_module(f"fastkit.testing.{stem}") for stem in triton_stems()]
    return [variant for module in modules for variant in module.AOT_VARIANTS]


def triton_stems() -> list[str]:
    """The modules with variants; none where Triton would not compile them."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    return sorted(m.name for m in pkgutil.iter_modules(testing.__path__) if m.name.endswith("_triton"))


# Why there is nothing to read


def why_not_read() -> str | None:
    if _native.REASON is not None:
        return _native.REASON
    if _native.BUILD_INFO["cuda"] is None:
        return "the library was built without CUDA"
    return why_no_tools()


def why_no_tools() -> str | None:
    if cuobjdump() is None:
        return "no cuobjdump: it comes with triton (pip install triton) and with CUDA"
    if shutil.which("c++filt") is None:
        return "no c++filt: it comes with the binutils"
    return None


def why_not_compared() -> str | None:
    """Why the table of this build would be another than the page's."""
    if reason := why_not_read():
        return reason
    lists = TESTS.parent / "CMakeLists.txt"
    if not lists.is_file() or not PAGE.is_file():
        return "the tests are here without the checkout"
    wanted = re.search(r'set\(FASTKIT_CUDA_ARCHS "([^"]*)"', lists.read_text())
    assert wanted is not None
    if _native.BUILD_INFO["cuda_archs"].split() != wanted[1].split(";"):
        return f"the library was built for {_native.BUILD_INFO['cuda_archs']} alone"
    shown = re.search(r"^nvcc ([\d.]+)", PAGE.read_text(), re.MULTILINE)
    if shown is not None and shown[1] != _native.BUILD_INFO["cuda"]:
        return f"the page has what nvcc {shown[1]} made, the library is of {_native.BUILD_INFO['cuda']}"
    if stale := stale_sources():
        return f"{stale} is newer than the library"
    if triton_stems():
        shown = re.search(r"^nvcc .* triton (\S+):", PAGE.read_text(), re.MULTILINE)
        if shown is not None and shown[1] != version("triton"):
            return f"the page has what triton {shown[1]} made, here is {version('triton')}"
    return None


def stale_sources() -> str | None:
    """A source of the kernels that has changed since the library was built."""
    built = _native.LIBRARY.stat().st_mtime
    folders = (TESTS.parent / "csrc" / name for name in ("cuda", "include", "common"))
    newer = [file for folder in folders for file in folder.rglob("*.*") if file.stat().st_mtime > built]
    return str(newer[0].relative_to(TESTS.parent)) if newer else None


# What is wanted


@pytest.mark.parametrize("made_by", ["nvcc", pytest.param("triton", marks=pytest.mark.slow)])
def test_no_kernel_has_a_stack_without_a_reason(made_by):
    if reason := why_not_read():
        pytest.skip(reason)
    kernels = cuda_kernels() if made_by == "nvcc" else triton_kernels()
    found = {f"{k.name} on {k.arch}: {k.stack} bytes" for k in kernels if k.stack and k.key not in STACKS}
    assert not found, f"spills or arrays on the stack; mend that, or say in STACKS why: {sorted(found)}"


def test_the_bytes_are_those_of_the_kernels_that_there_are():
    if reason := why_not_read():
        pytest.skip(reason)
    keys = {kernel.key for kernel in cuda_kernels()} | {variant.kernel.__name__ for variant in variants()}
    unknown = sorted(keys - {*BYTES})
    assert not unknown, f"say in BYTES, in {Path(__file__).name}, what a sample takes: {unknown}"
    if reason := why_not_compared():
        pytest.skip(reason)
    assert {*BYTES} <= keys


@pytest.mark.slow
def test_the_page_has_the_table():
    if reason := why_not_compared():
        pytest.skip(reason)
    text = PAGE.read_text()
    assert text == with_table(text), f"run: python tests/{Path(__file__).name}"


USAGE = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function void fastkit::run_teams<fastkit::s::Walk<fastkit::Half, true> >(fastkit::s::Walk<float>, long):
  REG:72 STACK:16 SHARED:128 LOCAL:8 CONSTANT[2]:8 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Function fastkit::(anonymous namespace)::spill(float*, int (*)(int)):
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function void fastkit::(anonymous namespace)::iir_scan_apply<float, (int)4>(float*):
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_kernels_are_read_from_what_cuobjdump_says():
    kernels = list(kernels_of(USAGE))
    assert kernels == [
        Kernel("s::Walk<Half, true>", "sm_80", 72, 24, 128),
        Kernel("spill", "sm_90a", 20, 0, 0),
        Kernel("iir_scan_apply<float, (int)4>", "sm_90a", 10, 0, 0),
    ]
    assert [kernel.key for kernel in kernels] == ["s::Walk", "spill", "iir_scan_apply"]
    assert list(kernels_of("")) == []


def test_the_table_has_each_kernel_on_each_architecture():
    lines = table_of(list(kernels_of(USAGE)), {"spill": "4"})
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["kernel", "bytes", "sm_80", "sm_90a"],
        ["-" * 29, "-----", "-------------", "----------"],
        ["s::Walk<Half, true>", "", "72 / 24 / 128", ""],
        ["spill", "4", "", "20 / 0 / 0"],
        ["iir_scan_apply<float, (int)4>", "", "", "10 / 0 / 0"],
    ]
    assert table_of([], {}) == ["No kernels."]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_stack_is_seen(tmp_path):
    """Of an array that is indexed at run time, from a file compiled here."""
    if reason := why_no_tools():
        pytest.skip(reason)
    (tmp_path / "kernel.cu").write_text(
        "namespace fastkit { template <class T> __global__ void spill(T* p, int n) {"
        "  T a[64]; for (int i = 0; i < n; ++i) a[(i * 7) & 63] = p[i]; p[n] = a[n & 63]; }"
        "template __global__ void spill(float*, int); }"
    )
    command = ["nvcc", "-O3", "-gencode=arch=compute_80,code=sm_80", "-c", "kernel.cu", "-o", "kernel.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (kernel,) = kernels_of(resource_usage(tmp_path / "kernel.o"))
    assert (kernel.name, kernel.key, kernel.arch, kernel.stack) == ("spill<float>", "spill", "sm_80", 256)


# The page


def table_of(kernels: list[Kernel], bytes_of: dict[str, str]) -> list[str]:
    """In Markdown: a line a kernel, a column an architecture."""
    if not kernels:
        return ["No kernels."]
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: (len(arch.rstrip("a")), arch))
    cells = [["kernel", "bytes", *archs]]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        of_name = {kernel.arch: kernel for kernel in kernels if kernel.name == name}
        key = next(iter(of_name.values())).key
        figures = (of_name.get(arch) for arch in archs)
        cells.append(
            [name, bytes_of.get(key, "")]
            + [f"{k.registers} / {k.stack} / {k.shared}" if k else "" for k in figures]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]


def table() -> str:
    of_triton = triton_kernels()
    triton = f", triton {version('triton')}" if of_triton else ""
    lines = [f"nvcc {_native.BUILD_INFO['cuda']}{triton}:", "", *table_of(cuda_kernels(), BYTES)]
    if of_triton:
        lines += ["", *table_of(of_triton, BYTES)]
    present = {kernel.key for kernel in (*cuda_kernels(), *of_triton) if kernel.stack}
    reasons = [f"- `{key}` has a stack: {reason}" for key, reason in STACKS.items() if key in present]
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def with_table(text: str) -> str:
    """A page with the table as it is now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if reason := why_not_read():
        sys.exit(f"{PAGE.name} stays as it is: {reason}")
    PAGE.write_text(with_table(PAGE.read_text()))
