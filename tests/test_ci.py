"""The workflows: they run what .ci/run also runs, on Pythons of requires-python, and hold no secret."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from fastkit import __version__

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the tests are here without the checkout")


def load(path):
    return pytest.importorskip("yaml", reason="needs PyYAML, which transformers brings").safe_load(
        path.read_text()
    )


def jobs():
    return {f"{path.stem} {name}": job for path in WORKFLOWS for name, job in load(path)["jobs"].items()}


def steps(key):
    return [step[key] for job in jobs().values() for step in job.get("steps", []) if key in step]


def test_what_workflows_run_is_there_and_runs_in_every_checkout_too():
    configuration = (ROOT / "pyproject.toml").read_text()
    called = {
        Path(name).name
        for text in [*steps("run"), configuration]
        for name in re.findall(r"\.ci/\w+[.\w]*", text)
    }
    assert {"run", "lint", "smoke", "pure", "audit_wheel.py", "install_cuda"} <= called
    everywhere = "".join((CI / name).read_text() for name in ("run", "lint", "wheel"))
    for name in called:
        assert os.access(CI / name, os.X_OK) or name.endswith(".py"), name
        # A container alone has dnf; the test below runs it without.
        assert name in ("run", "install_cuda") or f".ci/{name}" in everywhere, name


def test_steps_that_workflows_name_are_those_of_run():
    script = (CI / "run").read_text()
    texts = [text.partition("#")[0] for text in steps("run") if text.startswith(".ci/run ")]
    named = {name for text in texts for name in re.findall(r"\w+", text.removeprefix(".ci/run"))}
    (all_,) = re.findall(r"^steps=\((.*)\)$", script, re.MULTILINE)
    known = set(re.findall(r"^(\w+)\(\) {", script, re.MULTILINE))
    # All run in a workflow, but for the emulator: there are machines of that processor there.
    assert set(re.findall(r"\w+", all_)) - {"aarch64"} <= named <= known


def test_pythons_are_from_the_oldest_on_that_the_package_takes():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(
        ">="
    )
    text = "".join(path.read_text() for path in WORKFLOWS)
    pythons = re.findall(r'python(?:-version)?: "([\d.]+)"', text)
    assert min(pythons, key=lambda version: [*map(int, version.split("."))]) == oldest
    assert len(set(pythons)) > 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_and_no_more(path):
    """And runs what nobody can exchange: actions by the hash of a commit, whose tag is in a comment."""
    text = path.read_text()
    assert set(re.findall(r"secrets\.(\w+)", text)) <= {"GITHUB_TOKEN"}
    assert "pull_request_target" not in text
    assert load(path)["permissions"] == {"contents": "read"}
    for line in re.findall(r"uses: (.*)$", text, re.MULTILINE):
        assert re.fullmatch(r"\./\S+( #.*)?|[\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    permissions = {
        name: job["permissions"] for name, job in load(path)["jobs"].items() if "permissions" in job
    }
    assert permissions == ({"publish": {"id-token": "write"}} if path.stem == "wheels" else {})


def test_nothing_is_published_that_another_job_refuses():
    wheels = load(ROOT / ".github" / "workflows" / "wheels.yml")["jobs"]
    publish = wheels["publish"]
    assert sorted(publish["needs"]) == sorted(set(wheels) - {"publish"})
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["environment"]["name"] == "pypi"
    assert not any("continue-on-error" in path.read_text() for path in WORKFLOWS)
    # What is smoked and published is what native and pure have left.
    names = [
        job["with"]["name"]
        for job in wheels["native"]["steps"] + wheels["pure"]["steps"]
        if "upload" in str(job)
    ]
    assert names == ["dist-${{ matrix.arch }}", "dist-pure"]


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("sed"), reason="needs bash and sed")
@pytest.mark.parametrize(
    ("tag", "heading", "cited", "message"),
    [
        ("v1.2.3", "## 1.2.3", "1.2.3", ""),
        ("v1.2.3", "## 1.2.3 (2030-01-01)", "1.2.3", ""),
        ("v1.2.4", "## 1.2.3", "1.2.3", "the tag must be v1.2.3, got v1.2.4"),
        ("v1.2.3", "## Unreleased", "1.2.3", "CHANGELOG.md must have a heading ## 1.2.3"),
        ("v1.2.3", "## 1.2.34", "1.2.3", "CHANGELOG.md must have a heading ## 1.2.3"),
        ("v1.2.3", "## 1.2.3", "1.2.2", "CITATION.cff must have version: 1.2.3"),
    ],
)
def test_a_release_has_one_version(tmp_path, tag, heading, cited, message):
    (tmp_path / ".ci").mkdir()
    shutil.copy(CI / "versions", tmp_path / ".ci")
    (tmp_path / "python" / "fastkit").mkdir(parents=True)
    (tmp_path / "python" / "fastkit" / "__init__.py").write_text('"""Doc."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text(f"title: fastkit\nversion: {cited}\n")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    done = subprocess.run([tmp_path / ".ci" / "versions", tag], capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (bool(message), True), done.stderr
    assert bool(done.stderr) == bool(message)


def test_versions_agree_now():
    done = subprocess.run([CI / "versions"], capture_output=True, text=True)
    assert done.returncode == 0, f"{__version__}: {done.stderr}"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("machine", "folder"), [("x86_64", "rhel8/x86_64"), ("aarch64", "rhel8/sbsa"), ("riscv64", None)]
)
def test_cuda_is_installed_for_the_machine(tmp_path, machine, folder):
    """With commands that only say how they were called."""
    for name in ("dnf", "ln", "uname"):
        said = machine if name == "uname" else f"{name} $*"
        (tmp_path / name).write_text(f'#!{shutil.which("bash")}\necho "{said}"\n')
        (tmp_path / name).chmod(0o755)
    # Up to what the container must have then.
    script = (CI / "install_cuda").read_text().rpartition("/usr/local/cuda/bin/nvcc")[0]
    done = subprocess.run(
        [shutil.which("bash")], input=script, capture_output=True, text=True, env={"PATH": str(tmp_path)}
    )
    assert (done.returncode == 0) == (folder is not None), done.stderr
    if folder is None:
        assert "must be x86_64 or aarch64, got riscv64" in done.stderr and done.stdout == ""
    else:
        repository, packages, _ = done.stdout.splitlines()
        assert f"/{folder}/" in repository
        assert re.fullmatch(r"dnf install -y cuda-nvcc-(\d+-\d+) cuda-cudart-devel-\1", packages)
