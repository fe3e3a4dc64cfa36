"""run word_translation: what it reads and leaves, what it refuses, and that a killed run ends the same."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.methods.word_translation import WordTranslator, load_vectors, row_pairs, save_vectors
from fastkit.methods.word_translation.settings import resolve
from fastkit.recipes import _words
from fastkit.recipes._word_arms import ARMS
from fastkit.recipes.word_translation import load_model

for package in ("matplotlib", "tqdm", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def one_core(one_thread):
    pass


QUICK = ["--quick", "--threads", "1"]


def write_pair(folder, words=700, columns=30):
    """Two languages in a folder, as docs/data.md has it."""
    languages = _words.generated(words, columns, noise=0.05)
    folder.mkdir(parents=True, exist_ok=True)
    save_vectors(folder / "wiki.aa.vec", languages.source.words, languages.source.vectors)
    save_vectors(folder / "bb.npz", languages.target.words, languages.target.vectors)
    for kind, entries in (("test", languages.test), ("train", languages.train)):
        text = "".join(f"{source}\t{target}\n" for source, target in entries)
        (folder / f"aa-bb.{kind}.tsv").write_text(text)
    return languages


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "data"
    return folder, write_pair(folder)


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    options = [
        "--data",
        str(pair[0]),
        "--out",
        str(out),
        "--arms",
        "robust",
        "supervised",
        "--translations",
        "3",
    ]
    assert main(["run", "word_translation", *QUICK, *options, "--seeds", "1", "2"]) == 0
    return out


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def test_what_is_left(finished, pair):
    metrics = metrics_of(finished)
    assert metrics["recipe"] == "word_translation" and metrics["seeds"] == [1, 2]
    data = metrics["data"]
    assert data["name"] == "aa-bb" and data["words"] == [700, 700] and data["test"] == data["train"] == 350
    figures = metrics["figures"]
    assert {"p_at_1", "p_at_5", "p_at_10", "isf_p_at_1", "nn_p_at_1", "criterion", "converged"} <= set(
        figures
    )
    assert figures["p_at_1"].keys() == {"robust", "supervised"}
    assert all(figures["p_at_1"][arm]["mean"] > 0.95 for arm in figures["p_at_1"])
    assert metrics["fits"]["robust, seed 1"]["coverage"] == 1
    assert metrics["fits"]["robust, seed 1"]["queries"] == 350


def test_figures_are_those_of_the_models(finished, pair):
    languages = pair[1]
    pairs = row_pairs(languages.test, languages.source.words, languages.target.words).pairs
    for arm in ("robust", "supervised"):
        translator = load_model(finished / "models" / f"test-{arm}-2.safetensors")
        score = translator.score(pairs)
        for k, value in score.precision.items():
            assert metrics_of(finished)["figures"][f"p_at_{k}"][arm]["seeds"]["2"] == value


def test_dictionary_and_mapped_vectors_are_of_the_first_arm(finished, pair):
    languages = pair[1]
    translator = load_model(finished / "models" / "test-robust-1.safetensors")
    with (finished / "dictionary.tsv").open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert len(lines) == 3 * 700
    scores, indices = translator.translate(languages.source.vectors[5:6], 3)
    of_word = [line for line in lines if line["source"] == languages.source.words[5]]
    assert [line["target"] for line in of_word] == [languages.target.words[i] for i in indices[0]]
    assert [float(line["score"]) for line in of_word] == pytest.approx(scores[0].tolist(), abs=1e-5)
    mapped = load_vectors(finished / "mapped.aa.npz")
    assert mapped.words == languages.source.words
    assert torch.equal(mapped.vectors, translator.transform(languages.source.vectors))
    own = load_vectors(finished / "mapped.bb.npz")
    assert torch.equal(own.vectors, translator.transform_target(languages.target.vectors))


def test_curves_have_a_line_for_each_restart(finished):
    with (finished / "curves.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["arm"] == "robust" and line["seed"] == "1"]
    assert [line["restart"] for line in lines] == [str(i) for i in range(1, 9)]
    accuracy, cost = (np.array([float(line[name]) for line in lines]) for name in ("accuracy", "cost"))
    assert accuracy[cost.argmin()] == accuracy.max() > 0.5
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_answers_queries_without_a_fit(finished, pair, monkeypatch, capsys):
    monkeypatch.setattr(WordTranslator, "fit", lambda *_, **__: pytest.fail("fitted again"))
    options = ["--data", str(pair[0]), "--out", str(finished), "--seeds", "1", "--resume"]
    word = pair[1].source.words[7]
    options += ["--mapped", "vec", "--query", word]
    assert main(["run", "word_translation", *QUICK, *options]) == 0
    right = dict(
        zip(*[[*column] for column in zip(*(pair[1].test + pair[1].train), strict=True)], strict=True)
    )
    assert f"{word}: {right[word]} " in capsys.readouterr().out
    assert load_vectors(finished / "mapped.aa.vec").words == pair[1].source.words


def test_two_files_and_no_dictionary(pair, tmp_path, capsys):
    options = ["--source", str(pair[0] / "wiki.aa.vec"), "--target", str(pair[0] / "bb.npz")]
    assert main(["run", "word_translation", *QUICK, *options, "--out", str(tmp_path / "out")]) == 0
    assert metrics_of(tmp_path / "out")["figures"].keys() == {"criterion", "control", "converged"}
    assert "test dictionary" not in capsys.readouterr().out


def test_source_is_as_the_dictionary_says_or_as_asked(pair):
    folder = pair[0]
    assert _words.load(folder).names == ("aa", "bb")
    turned = _words.load(folder, source="bb", max_words=100)
    assert turned.names == ("bb", "aa") and turned.test is None and len(turned.source) == 100


@pytest.mark.parametrize("options, text", [
    (["--data", "{tmp}/none"], "--data must be a folder, got nothing there"),
    (["--data", "{tmp}"], "--data must hold two files of word vectors"),
    (["--data", "{data}", "--from", "cc"], "--from must be one of bb, aa, got cc"),
    (["--data", "{data}", "--source", "{data}/bb.npz"], "--source and --target must be given both"),
    (["--dictionary", "{data}/aa-bb.test.tsv"], "--dictionary must be with --source and --target"),
    (["--data", "{data}", "--query", "nothere"], "--query must be words of aa, got nothere"),
    (["--data", "{data}", "--translations", "701"], "--translations must be at most 700"),
    (["--source", "{data}/wiki.aa.vec", "--target", "{data}/bb.npz", "--arms", "supervised"],
     "--arms supervised must have a training dictionary"),
    (["--source", "{data}/wiki.aa.vec", "--target", "{tmp}/none.vec"], "path must be a file, got none"),
])  # fmt: skip
def test_refusals(pair, tmp_path, capsys, options, text):
    options = [option.format(tmp=tmp_path, data=pair[0]) for option in options]
    assert main(["run", "word_translation", *QUICK, *options, "--out", str(tmp_path / "out")]) == 1
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [
    ("a b\nc\n", "line 2 must have two words, got 1"),
    ("a\tb\tc\n", "line 1 must have two words, got 3"),
    ("\n\n", "must have pairs of words, got none"),
    (b"\xff\xfe a\n", "must be a dictionary in UTF-8"),
])  # fmt: skip
def test_dictionaries_that_are_none(tmp_path, text, message):
    path = tmp_path / "x-y.test.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refusal, match=re.escape(message)) as caught:
        _words.read_dictionary(path)
    assert str(path) in str(caught.value)


def test_dictionaries_with_blanks_or_tabs(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"ein one\r\n\nzwei  two\ndrei\tthree\n")
    assert _words.read_dictionary(path) == [("ein", "one"), ("zwei", "two"), ("drei", "three")]


def test_a_dictionary_of_other_words_is_refused_before_anything_is_written(pair, tmp_path, capsys):
    path = tmp_path / "other.tsv"
    path.write_text("Haus\thouse\n")
    options = ["--source", str(pair[0] / "wiki.aa.vec"), "--target", str(pair[0] / "bb.npz")]
    options += ["--dictionary", str(path), "--out", str(tmp_path / "out")]
    assert main(["run", "word_translation", *QUICK, *options]) == 1
    assert "dictionary must have a pair whose words are both in the tables" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_arm_has_options_of_its_own_that_a_fit_takes():
    resolved = {}
    for name, arm in ARMS.items():
        options = {**({"refine": "none"} if arm.supervised else {}), **arm.options}  # as fit has it
        settings = resolve(options.pop("preset", "robust"), options)
        assert all(getattr(settings, option) == value for option, value in options.items())
        resolved[name] = settings, arm.supervised
    assert len(set(map(repr, resolved.values()))) == len(ARMS)


def _rows(path):
    """But for what a clock says."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        assert row.pop("seconds") > 0
        row["facts"] = {name: value for name, value in row["facts"].items() if not name.startswith("seconds")}
    return rows


def test_killed_runs_end_as_one_that_was_not(run_script, pair, tmp_path):
    """To the bit: rows, figures, curves, translations and maps."""
    file = Path(__file__).with_name("killed_runs.py")
    arms = ["robust", "reciprocal_icp", "supervised_refined"]
    options = [*QUICK, "--data", str(pair[0]), "--arms", *arms]
    command = [str(file), str(tmp_path), "4", "0", "word_translation", *options]
    script = (
        "import runpy, sys, matplotlib.figure, safetensors.torch;"
        " sys.argv = {}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_script(script.format(command))
    assert done.returncode == 0, done.stderr
    assert not re.search("^0 of", done.stdout, re.MULTILINE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _rows(killed / "results.jsonl") == _rows(whole / "results.jsonl")
    for name in ("curves.csv", "curves.png", "dictionary.tsv", "mapped.aa.npz"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    for path in (whole / "models").iterdir():
        one, other = (load_model(folder / "models" / path.name) for folder in (whole, killed))
        assert torch.equal(one.w_xy_, other.w_xy_) and torch.equal(one.w_yx_, other.w_yx_)
    assert not any((killed / "training").iterdir())


def test_without_data_it_makes_its_own(tmp_path):
    assert main(["run", "word_translation", *QUICK, "--out", str(tmp_path / "out")]) == 0
    figures = metrics_of(tmp_path / "out")["figures"]
    assert figures["converged"]["robust"]["mean"] == 1 and figures["p_at_1"]["robust"]["mean"] > 0.7
