"""run focus --task lm: the text, bits per character, and what a folder holds."""

import gzip
import json
import math
from itertools import pairwise

import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.recipes import _text
from fastkit.recipes._focus_lm import ARMS, RATES, STRETCH, bits_per_character
from fastkit.recipes.focus import load_language_model

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

TINY = [
    "--task",
    "lm",
    "--hidden-size",
    "8",
    "--layers",
    "1",
    "--length",
    "32",
    "--chunk",
    "16",
    "--batch",
    "4",
]


def text_folder(folder, **parts):
    folder.mkdir()
    rows = "to be, or not to be, that is the question:\n"
    for part, text in {"train": rows * 40, "valid": rows * 4, "test": rows * 5, **parts}.items():
        (folder / f"{part}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


# The text


def test_a_folder_is_read(tmp_path):
    folder = text_folder(tmp_path / "hamlet", valid="be bé\r\n")
    text = _text.load(folder)
    assert text.name == "hamlet"
    assert text.characters == "".join(sorted(set("to be, or not to be, that is the question:\n")))
    assert "".join(text.characters[i] for i in text.test[:5]) == "to be"
    assert text.valid.tolist()[4:6] == [len(text.characters)] * 2  # é and the carriage return
    assert text.facts()["unknown"] == [0, 2, 0]
    for part in _text.PARTS:
        path = folder / f"{part}.txt"
        (folder / f"{part}.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert _text.load(folder).facts() == text.facts()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: (f / "test.txt").unlink(),
            r"--data must hold test\.txt or test\.txt\.gz, got neither in ",
        ),
        (lambda f: (f / "valid.txt").write_bytes(b"\xff\xfe"), "valid must be text in UTF-8, got one that"),
        (lambda f: (f / "valid.txt").write_text("x"), "valid must have at least 2 characters, got 1"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, make, message):
    folder = text_folder(tmp_path / "x")
    make(folder)
    with pytest.raises(Refusal, match=message):
        _text.load(folder)


def test_a_broken_archive_is_refused(tmp_path):
    folder = text_folder(tmp_path / "x")
    (folder / "train.txt").unlink()
    (folder / "train.txt.gz").write_bytes(gzip.compress(b"to be" * 100)[:-9])
    with pytest.raises(Refusal, match="train must be text in UTF-8, got one that cannot be read"):
        _text.load(folder)


def test_without_a_folder_there_is_a_text():
    text = _text.descriptions()
    assert len(text.train) > 10_000 and min(len(text.valid), len(text.test)) > 1000
    assert text.facts()["unknown"] == [0, 0, 0]


# The figure


class _Table(torch.nn.Module):
    """Logits of the next token by the last one alone."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens):
        return self.logits[tokens]


@pytest.mark.parametrize("length", [3, 10, 64, 1000])
@pytest.mark.parametrize("characters", [2, 64, 65, 66, 500])
def test_bits_are_of_all_characters_but_the_first(characters, length):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(7, (characters,), generator=generator)
    logits = torch.randn(7, 7, generator=generator)
    p = logits.double().softmax(-1)
    expected = sum(-math.log2(p[a, b]) for a, b in pairwise(text.tolist())) / (characters - 1)
    assert bits_per_character(_Table(logits), text, length) == pytest.approx(expected, rel=1e-5)


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    text_folder(folder / "hamlet")
    options = ["--data", str(folder / "hamlet"), *TINY, "--steps", "60", "--seeds", "0", "1"]
    assert main(["run", "focus", *options, "--out", str(folder / "out")]) == 0
    return folder


def test_each_arm_has_the_rate_that_is_best_on_the_valid_part(finished):
    metrics = json.loads((finished / "out" / "metrics.json").read_text())
    assert metrics["config"]["steps"] == 100  # in whole stretches
    assert metrics["config"]["rates"] == list(RATES)
    lines = (finished / "out" / "results.jsonl").read_text().splitlines()
    trials = {}
    for row in map(json.loads, lines):
        assert len(row["curve"]) == 100 // STRETCH
        if row["table"] == "valid":
            arm, rate = row["arm"].split(",lr=")
            trials.setdefault(arm, {})[float(rate)] = row["figures"]["bpc"]
    assert {arm: min(bits, key=bits.get) for arm, bits in trials.items()} == metrics["chosen"]
    assert len(lines) == len(ARMS) * (len(RATES) + 2)


def test_models_give_the_figures_and_learn(finished):
    metrics = json.loads((finished / "out" / "metrics.json").read_text())
    text = _text.load(finished / "hamlet")
    for arm in ARMS:
        model = load_language_model(finished / "out" / "models" / f"test-{arm}-1.pt")
        found = bits_per_character(model, text.test, 32)
        assert found == pytest.approx(metrics["figures"]["bpc"][arm]["seeds"]["1"], abs=1e-4)
        assert found < 0.9 * math.log2(text.vocabulary)
        assert metrics["parameters"][arm] == pytest.approx(metrics["parameters"]["focus"], rel=0.02)
    assert set(metrics["differences"]) == {f"focus minus {arm}" for arm in ARMS[1:]}


def test_a_finished_run_goes_on_with_another_seed(finished, capsys):
    options = [
        "--data",
        str(finished / "hamlet"),
        *TINY,
        "--steps",
        "60",
        "--arms",
        "transformer",
        "--seeds",
        "2",
    ]
    before = (finished / "out" / "results.jsonl").read_text()
    assert main(["run", "focus", *options, "--resume", "--out", str(finished / "out")]) == 0
    after = (finished / "out" / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 1
    assert "transformer" in capsys.readouterr().out
