"""benchmarks/focus_decoding.py: a row for each decoder and length, and a picture."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "focus_decoding.py"
SMALL = ["--width", "64", "--layers", "1", "--bin", "8", "--kernel-length", "16", "--repeats", "1"]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests are here without benchmarks/")
def test_what_focus_keeps_does_not_grow(tmp_path):
    command = [sys.executable, SCRIPT, "--out", tmp_path, *SMALL, "--tokens", "16", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "decoding.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["16", "16", "64", "64"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    kept = [int(row["kept"]) for row in rows]
    assert kept[0] == kept[2] and kept[3] == 4 * kept[1]
    assert (tmp_path / "decoding.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == len(rows)
