#!/usr/bin/env python3
"""What is wrong with a built wheel: a table of what it holds, and a sentence for each fault.

Needs auditwheel, packaging and pyelftools, a C++ compiler, and the headers of a torch: that of this Python or
of FASTKIT_TORCH_ROOT.
"""

import argparse
import email
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from library_faults import faults

LIBRARY = "fastkit/_C.so"
FILES = re.compile(
    r"fastkit/([a-z_]\w*/)*\w+\.py|fastkit/py\.typed|fastkit/_C\.so"
    r"|fastkit-[\w.+]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|entry_points\.txt|licenses/LICENSE)"
)
EXCLUDED = ("libtorch*", "libc10*", "libcuda*")  # torch's own, and the driver's: .ci/wheel leaves them out


def policy_version(tag: str) -> tuple[int, int] | None:
    """(2, 34) of manylinux_2_34 and manylinux_2_34_x86_64."""
    match = re.match(r"manylinux_(\d+)_(\d+)(_|$)", tag)
    return (int(match[1]), int(match[2])) if match else None


def name_faults(path: Path, policy: str) -> list[str]:
    """Of the file's name."""
    try:
        name, _, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        return [f"{path.name} is no name of a wheel: {error}"]
    found = [] if name == "fastkit" else [f"its project is {name}, not fastkit"]
    for tag in sorted(map(str, tags)):
        python, abi, platform = tag.split("-", 2)
        if (python, abi) != ("py3", "none") or platform == "any":
            found.append(f"its tag is {tag}, not py3-none-<platform>")
        elif (version := policy_version(platform)) is None and not platform.startswith("manylinux"):
            found.append(f"its platform is {platform}, which is no manylinux: auditwheel repair gives it one")
        elif version is not None and version > (policy_version(policy) or (0, 0)):
            found.append(f"its platform is {platform}, and {policy} is the newest allowed")
    return found


def content_faults(path: Path, max_mb: float) -> list[str]:
    """Of its size, the files in it, and its metadata."""
    found = []
    if (size := path.stat().st_size) > max_mb * 1e6:
        found.append(f"it has {size / 1e6:.1f} MB, and {max_mb:g} MB are allowed")
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        metadata_files = [name for name in names if ".dist-info/" in name]
        texts = {name.rpartition("/")[2]: wheel.read(name).decode() for name in metadata_files}
    found += [f"it holds {name}, which does not belong in it" for name in names if not FILES.fullmatch(name)]
    if LIBRARY not in names:
        found.append(f"it has no {LIBRARY}")
    if "LICENSE" not in texts:
        found.append("it has no license")
    parts = path.stem.split("-")
    metadata = email.message_from_string(texts.get("METADATA", ""))
    for field, wanted in (("Name", parts[0]), ("Version", parts[1] if len(parts) > 1 else "")):
        if (metadata[field] or "") != wanted:
            found.append(f"its metadata say {field}: {metadata[field]}, its file name {wanted}")
    if metadata["License-Expression"] != "Apache-2.0":
        found.append(f"its metadata have the license {metadata['License-Expression']}, not Apache-2.0")
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    if not any(
        canonicalize_name(r.name) == "torch" and str(r.specifier) == ">=2.10" and r.marker is None
        for r in required
    ):
        found.append("its metadata do not require torch>=2.10")
    stated = email.message_from_string(texts.get("WHEEL", ""))
    if stated["Root-Is-Purelib"] != "false":
        found.append(f"its metadata say Root-Is-Purelib: {stated['Root-Is-Purelib']}")
    tags = stated.get_all("Tag", [])
    if {tag.rpartition("-")[2] for tag in tags} != set(parts[-1].split(".")):
        found.append(f"its metadata have the tags {' '.join(tags)}, its file name {parts[-1]}")
    return found


def auditwheel_facts(path: Path) -> dict:
    """What auditwheel finds: the oldest platform that has the symbols, and libraries that are not of it."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return {"error": said[-1] if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout)


def auditwheel_faults(facts: dict, path: Path, policy: str) -> list[str]:
    """Of what ``auditwheel_facts`` says of the file."""
    if "error" in facts or facts.get("pure"):
        return [f"auditwheel cannot read it: {facts.get('error', 'a pure-Python wheel')}"]
    found = [
        f"auditwheel would put {name} into it"
        for name in facts["external_libs"]
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED)
    ]
    needed, allowed = policy_version(facts["sym_tag"]), policy_version(policy)
    if needed is None or allowed is None or needed > allowed:
        found.append(f"its symbols are those of {facts['sym_tag']}, and {policy} is the newest allowed")
    stated = [version for tag in path.stem.rpartition("-")[2].split(".") if (version := policy_version(tag))]
    if needed is not None and stated and needed > min(stated):
        found.append(f"its symbols are those of {facts['sym_tag']}, newer than its name says")
    if facts["unsupported_isa"]:
        found.append("it needs a CPU newer than its tag says")
    return found


def library_facts(path: Path) -> tuple[dict, list[str]]:
    """Of the library in it: (size and what it needs, its faults)."""
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        if LIBRARY not in wheel.namelist():
            return {}, []  # content_faults says it
        library = Path(wheel.extract(LIBRARY, folder))
        with library.open("rb") as file:
            tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags()
            needed = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
        return {"size": library.stat().st_size, "needed": needed}, [f"{LIBRARY} {f}" for f in faults(library)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--policy", default="manylinux_2_34", help="newest platform; default: %(default)s")
    parser.add_argument("--max-mb", type=float, default=8, help="largest file, in MB; default: %(default)s")
    args = parser.parse_args(argv)
    if policy_version(args.policy) is None:
        parser.error(f"--policy must be like manylinux_2_34, got {args.policy!r}")

    if not zipfile.is_zipfile(args.wheel):
        parser.error(f"wheel must be a file that is a zip, got {args.wheel}")
    shown, (library, in_library) = auditwheel_facts(args.wheel), library_facts(args.wheel)
    found = name_faults(args.wheel, args.policy) + content_faults(args.wheel, args.max_mb)
    found += auditwheel_faults(shown, args.wheel, args.policy) + in_library
    with zipfile.ZipFile(args.wheel) as wheel:
        files = len(wheel.namelist())
    print(f"{'wheel':20} {args.wheel.name}")
    print(f"{'size':20} {args.wheel.stat().st_size / 1e6:.2f} MB, {files} files")
    if library:
        print(f"{LIBRARY:20} {library['size'] / 1e6:.2f} MB, needs {' '.join(library['needed'])}")
    if "sym_tag" in shown:
        print(f"{'symbols':20} those of {shown['sym_tag']}; allowed {args.policy}")
        print(f"{'left out':20} {' '.join(shown['external_libs']) or 'nothing'}")
    for fault in found:
        print(f"fault: {fault}")
    print("no fault" if not found else f"{len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
