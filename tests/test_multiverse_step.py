"""benchmarks/multiverse_step.py: the share of a step that is the heads'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "multiverse_step.py"
SMALL = ["--heads", "8", "--width", "64", "--layers", "1", "--rows", "2", "--length", "8", "--repeats", "2"]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests are here without benchmarks/")
def test_a_share_is_printed():
    done = subprocess.run([sys.executable, SCRIPT, *SMALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"8 heads of 3 classes, 2 rows of 8 tokens, \d+ threads: ([\d.]+)% of a step"
        r" \(([\d.]+)% to ([\d.]+)%\)\n",
        done.stdout,
    )
    assert found, done.stdout
    median, least, most = map(float, found.groups())
    assert 0 < least <= median <= most
