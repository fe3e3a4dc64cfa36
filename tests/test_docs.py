"""The README, CONTRIBUTING and docs: code runs, commands are run or say that they are not, names exist."""

import contextlib
import io
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkit import __version__
from fastkit.__main__ import RECIPES, main

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for page in ROOT.glob(name)
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="the tests are here without the documentation"
)
of_each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

# Run by the test below; the rest is run by .ci/run, or its page says that it is not.
RUN_HERE = ["python -m fastkit info"]
NOT_RUN = "(not run in CI"  # and perhaps why


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Fenced blocks, each with the text before it."""
    text = page.read_text()
    return [(text[: match.start(2)], match[2]) for match in FENCE.finditer(text) if match[1] == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What is in backquotes."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# Code


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
@of_each_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace and one folder, without a warning. What they print is what comments say."""
    code = blocks(page, "python")
    for library in ("scipy", "transformers", "peft"):
        if any(library in block for _, block in code):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for before, block in code:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * before.count("\n") + block, str(page), "exec"), names)
            claimed = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
            assert printed.getvalue().splitlines() == claimed, block


@of_each_page
def test_fences_have_a_language(page):
    """``sh`` and ``python`` are checked; without one it is output."""
    assert {match[1] for match in FENCE.finditer(page.read_text())} <= {"", "python", "sh"}


# Commands


def taken_by_ci() -> list[str]:
    """The commands of the README that .ci/run takes from there, by the patterns that it has for them."""
    lines = (ROOT / "README.md").read_text().splitlines()
    patterns = re.findall(r"\$\(readme_command '?([^')]+)'?\)", (ROOT / ".ci" / "run").read_text())
    assert len(patterns) == 2
    matches = [[line for line in lines if re.match(f"python3 -m venv .*{p}", line)] for p in patterns]
    assert all(matches), patterns
    return [first for first, *_ in matches]


@of_each_page
def test_commands_are_run_or_say_that_they_are_not(page):
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    run = {line.strip() for line in ci} | {*taken_by_ci(), *RUN_HERE, ".ci/run"}
    for before, block in blocks(page, "sh"):
        commands = [line for line in block.splitlines() if line and not line.startswith("#")]
        paragraph = before.rpartition("```")[0].strip().rpartition("\n\n")[2]
        assert NOT_RUN in paragraph or [c for c in commands if c not in run] == []


@of_each_page
def test_commands_are_in_fences(page):
    """Where the test above looks for them."""
    command = r"^    (\w+=\S+ )*(\S*/)?(python3?|pip3?|pytest|ruff|pyright|cmake|git|bash)\b.*$"
    assert re.search(command, prose(page), re.MULTILINE) is None


@pytest.mark.parametrize("command", RUN_HERE)
def test_command_runs(command):
    program, *arguments = command.split()
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or "library: not used" in done.stdout, done.stderr


@of_each_page
def test_subcommands_exist(page, capsys):
    for command in sorted(set(re.findall(r"python -m fastkit (\w+)", page.read_text()))):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0, f"{command}: {capsys.readouterr().err}"


# Names


@of_each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], target


SOURCES = (
    ".cff",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".md",
    ".py",
    ".sh",
    ".toml",
    "CMakeLists.txt",
    "constraints.txt",
)


@of_each_page
def test_paths_exist(page):
    """Of sources, and of folders of the checkout; ``<stem>`` and ``*`` are any name."""
    tops = {path.name for path in ROOT.iterdir()}
    for span in spans(page):
        pattern = re.sub(r"<\w+>", "*", span)
        if not re.fullmatch(r"[\w.*/+-]+", pattern):
            continue
        if pattern.endswith(SOURCES) or ("/" in pattern and pattern.split("/")[0] in tops):
            folders = [ROOT] if "/" in pattern or (ROOT / pattern).exists() else ROOT.glob("[a-z]*/")
            anywhere = "" if folders == [ROOT] else "**/"
            assert any(next(folder.glob(anywhere + pattern), None) for folder in folders), span


@of_each_page
def test_names_of_the_package_exist(page):
    for span in spans(page):
        if (
            re.fullmatch(r"fastkit(\.\w+)+", span) and span != "fastkit._host"
        ):  # which is not built everywhere
            pkgutil.resolve_name(span)


def test_each_recipe_has_its_page():
    pages = {path.stem for path in (ROOT / "docs" / "recipes").glob("*.md")}
    assert pages == {"README", *RECIPES}


def test_every_variable_has_its_line():
    """Of those that the build and the library read, and no others."""
    read = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        read |= set(re.findall(r'(?:environ\.get|environ\[|getenv)\(?"(FASTKIT_\w+)"', path.read_text()))
    table = re.findall(r"^\| `(FASTKIT_\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(read)


def test_messages_are_those_of_the_sources():
    """The first column of the table of messages, but for what ``...`` stands for."""
    files = ["setup.py", "build_backend.py", "CMakeLists.txt", "csrc/cpu/isa.cpp"]
    files += [f"python/fastkit/{name}.py" for name in ("_dispatch", "_native", "info")]
    sources = "\n".join((ROOT / file).read_text() for file in files)
    page = (ROOT / "docs" / "install.md").read_text()
    messages = re.findall(r"^\| `([^`]*)` \|", page.partition("## Troubleshooting")[2], re.MULTILINE)
    assert messages
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in sources, message


def test_the_citation_is_of_this_version():
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == __version__


@of_each_page
def test_lines_are_short(page):
    """Tables and commands aside."""
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []
