"""run tied_embedding: the text, the training and its figures, and what a folder holds."""

import csv
import dataclasses
import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.methods.tied_embedding import TiedLanguageModel, assert_tied
from fastkit.methods.tied_embedding.presets import PRESETS
from fastkit.recipes import _corpus, _tied_correlations, _tied_lm, _tied_speed
from fastkit.recipes._corpus import Corpus
from fastkit.recipes.tied_embedding import load_language_model

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(package)

TINY = ["--quick", "--hidden-size", "8"]
CPU = torch.device("cpu")


LINES = "the cat sees the dog\nthe dog sees a cat\n\na bird sees nothing\n"


def text_folder(folder, **parts):
    folder.mkdir()
    for part, text in {"train": LINES * 20, "valid": LINES * 3, "test": LINES * 4, **parts}.items():
        (folder / f"{part}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def run(*options):
    assert main(["run", "tied_embedding", *map(str, options)]) == 0


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


# The text


def test_a_folder_is_read(tmp_path):
    train = "b a b\r\n\nc\tb a c"
    folder = text_folder(tmp_path / "letters", train=train, valid="a d\n", test="c\n")
    corpus = _corpus.load(folder)
    assert corpus.name == "letters"
    assert corpus.words == ("<unk>", "<eos>", "b", "a", "c")  # the most frequent first, then by name
    assert corpus.train.tolist() == [2, 3, 2, 1, 1, 4, 2, 3, 4, 1]
    assert corpus.valid.tolist() == [3, 0, 1]
    facts = corpus.facts()
    assert facts["unknown"] == [0, pytest.approx(1 / 3, abs=1e-6), 0]
    assert (facts["train"], facts["valid"], facts["test"], facts["words"]) == (10, 3, 2, 5)
    for part in ("train", "valid", "test"):
        path = folder / f"{part}.txt"
        (folder / f"{part}.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert _corpus.load(folder).facts() == facts


def test_words_that_are_not_trained_on_are_unknown(tmp_path):
    corpus = _corpus.load(text_folder(tmp_path / "x", train="a b\nb a\nd d d\n"), train_words=5)
    assert corpus.words == ("<unk>", "<eos>", "a", "b")
    assert corpus.train.tolist() == [2, 3, 1, 3, 2]


def test_words_that_occur_once_are_unknown_where_no_others_are(tmp_path):
    lines = "a b\nb a c\n"
    open_, closed = (
        _corpus.load(text_folder(tmp_path / name, train=lines + mark))
        for name, mark in (("open", ""), ("closed", "<unk>\n"))
    )
    assert open_.words == ("<unk>", "<eos>", "a", "b")
    assert open_.train.tolist() == [2, 3, 1, 3, 2, 0, 1]
    assert closed.words == ("<unk>", "<eos>", "a", "b", "c")
    assert _corpus.load(tmp_path / "open", vocabulary=2).words == open_.words


@pytest.mark.parametrize(
    ("mark", "vocabulary", "known"),
    [("often", None, 10_000), ("<unk>", None, 10_050), ("<unk>", 7, 7), ("often", 20_000, 1)],
)
def test_a_vocabulary_is_closed_where_the_text_has_unknown_words(tmp_path, mark, vocabulary, known):
    train = " ".join([*(f"w{i}" for i in range(10_050)), mark, mark])
    corpus = _corpus.load(text_folder(tmp_path / "x", train=train), vocabulary=vocabulary)
    assert len(corpus.words) == known + 2
    assert corpus.words[2] == ("often" if mark == "often" else "w0")
    left_out = (2 if mark == "<unk>" else 0) + 10_050 + (mark == "often") - known
    assert (corpus.train == 0).sum() == left_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-words", "361"], r"--train-words must be at most 360, those of the training part, got 361"),
        (["--train-words", "39"], r"--data: train must have at least 40 words, got 39"),
        (
            ["--arms", "wt", "decoder"],
            r"--arms must be of untied, wt, pr, wt\+pr with --task lm, got decoder",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, capsys, options, message):
    folder = text_folder(tmp_path / "x")
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), *options]
    assert main(["run", "tied_embedding", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_text_is_refused(tmp_path):
    folder = text_folder(tmp_path / "x")
    (folder / "valid.txt").unlink()
    with pytest.raises(Refusal, match=r"--data must hold valid\.txt or valid\.txt\.gz, got neither"):
        _corpus.load(folder)


def test_without_a_folder_a_text_is_made_up_the_same_each_time():
    one, other = _corpus.generated(words=6000), _corpus.generated(words=6000)
    assert one.facts() == other.facts()
    assert [len(part) for part in (one.train, one.valid, one.test)] == [6000, 600, 600]
    counts = one.train.bincount(minlength=len(one.words))[2:]
    assert (counts.diff() <= 0).all()
    # A word tells of the next: the entropy of pairs is well below that of two words apart.
    pairs = torch.stack([one.train[:-1], one.train[1:]], 1).unique(dim=0, return_counts=True)[1]
    shuffled = one.train[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    apart = torch.stack([shuffled[:-1], shuffled[1:]], 1).unique(dim=0, return_counts=True)[1]
    assert len(pairs) < 0.9 * len(apart)


# The training


def corpus_of(train, valid, test, words):
    return Corpus("random", tuple(map(str, range(words))), train, valid, test)


@pytest.mark.parametrize("arm", _tied_lm.ARMS)
def test_the_training_is_that_of_the_paper(arm):
    """In float64, beside a plain loop: SGD on the sum over rows, clipped, P's penalty, the rate halved."""
    generator = torch.Generator().manual_seed(0)
    train, valid, test = (torch.randint(11, (n,), generator=generator) for n in (97, 50, 30))
    preset = dataclasses.replace(PRESETS["small"], hidden_size=5, batch_size=3, steps=4, epochs=6, clip=0.7)
    model = _tied_lm.model_of(arm, corpus_of(train, valid, test, 11), preset, CPU, 1).double()
    other = TiedLanguageModel(11, 5, tie="wt" in arm, projection="pr" in arm).double()
    other.load_state_dict(model.state_dict())
    if "wt" in arm:
        other.embedding.fused_accumulate = False
    training = _tied_lm.Training(model, (train, valid, test), preset)
    figures = [training.advance() for _ in range(6)]

    rows = train[:96].view(3, 32)
    clipped = 0
    for epoch in range(6):
        total, state = 0.0, None
        for begin in range(0, 31, 4):
            ids, target = rows[:, begin : min(begin + 4, 31)], rows[:, begin + 1 : begin + 5]
            h, last = other(ids, state)
            state = last.detach()
            loss = cross_entropy(other.logits(h).flatten(0, 1), target.flatten(), reduction="sum")
            cost = loss / 3
            if "pr" in arm:
                cost = cost + other.projection.weight.square().sum() / 2 / 6.5 / 3
            trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(cost, trained)
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
            clipped += norm > 0.7
            rate = (1.0, 1.0, 1.0, 1.0, 1.0, 0.5)[epoch] * min(1.0, 0.7 / (norm + 1e-6))
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter -= rate * gradient
            total += loss.item()
        assert figures[epoch]["train"] == pytest.approx(math.exp(total / (3 * 31)), rel=1e-9)
    assert clipped > 0
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(parameter, other.state_dict()[name], rtol=1e-8, atol=1e-10)
    assert ["test" in point for point in figures] == [False] * 5 + [True]
    # The test part is one text, with a state; that which is looked at in training are three.
    with torch.no_grad():
        z = other.logits(other(test[None, :-1])[0][0])
        assert figures[-1]["test"] == pytest.approx(cross_entropy(z, test[1:]).exp().item(), rel=1e-9)
        pieces = valid[:48].view(3, 16)
        z = other.logits(other(pieces[:, :-1])[0]).flatten(0, 1)
        expected = cross_entropy(z, pieces[:, 1:].flatten()).exp().item()
        assert figures[-1]["valid"] == pytest.approx(expected, rel=1e-9)


def test_arms_of_a_seed_begin_alike_in_what_they_have_in_common():
    text = torch.arange(100)
    corpus, preset = (
        corpus_of(text, text, text, 100),
        dataclasses.replace(PRESETS["small"], hidden_size=5),
    )
    models = {arm: _tied_lm.model_of(arm, corpus, preset, CPU, 3) for arm in _tied_lm.ARMS}
    torch.manual_seed(0)  # which decides nothing
    states = {arm: model.state_dict() for arm, model in models.items()}
    for arm, state in states.items():
        again = _tied_lm.model_of(arm, corpus, preset, CPU, 3).state_dict()
        other = _tied_lm.model_of(arm, corpus, preset, CPU, 4).state_dict()
        for name, tensor in state.items():
            assert torch.equal(tensor, again[name])
            assert torch.equal(tensor, other[name]) == name.startswith("lstm.bias")
            for same in states.values():
                shared = name == "embedding.weight" and ("output.weight" in state) != (
                    "output.weight" in same
                )
                if name in same and not shared:
                    assert torch.equal(tensor, same[name])
    assert torch.equal(states["wt"]["embedding.bias"], states["untied"]["output.bias"])
    # The tied matrix has nothing of the two that it is compared to, nor have they of each other.
    matrices = (
        states["wt"]["embedding.weight"],
        *(states["untied"][f"{name}.weight"] for name in ("embedding", "output")),
    )
    flat = torch.stack([matrix.flatten() for matrix in matrices])
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 0.2  # 4.5 standard deviations


def test_a_projection_is_without_a_bias_where_that_is_asked_for(tmp_path):
    run(
        "--quick",
        "--hidden-size",
        8,
        "--epochs",
        1,
        "--arms",
        "wt+pr",
        "--no-projection-bias",
        "--out",
        tmp_path,
    )
    assert metrics_of(tmp_path)["config"]["projection_bias"] is False
    model = load_language_model(tmp_path / "models" / "test-wt+pr-0")
    assert model.projection.bias is None


def test_what_diverges_is_infinite_and_what_is_nan_stays_so():
    assert _tied_lm._perplexity(math.log(7)) == pytest.approx(7)
    assert _tied_lm._perplexity(1e4) == math.inf
    assert math.isnan(_tied_lm._perplexity(math.nan))


# Correlations


def ranks(values):
    return torch.empty_like(values).scatter_(
        0, values.argsort(), torch.arange(len(values), dtype=values.dtype)
    )


def test_correlations_are_of_ranks_of_cosines():
    torch.manual_seed(0)
    untied, tied = TiedLanguageModel(60, 7), TiedLanguageModel(60, 7, tie=True)
    with torch.no_grad():  # the tied one is much like the output
        tied.embedding.weight.copy_(untied.output.weight + 0.02 * torch.randn(60, 7))
    chosen = _tied_correlations.pairs(60)
    assert chosen.shape == (20_000, 2)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert (chosen.min(), chosen.max()) == (2, 59)
    assert torch.equal(chosen, _tied_correlations.pairs(60))
    lists = _tied_correlations.similarities(untied, tied)
    tables = untied.embedding.weight, untied.output.weight, tied.embedding.weight
    for found, table in zip(lists, tables, strict=True):
        unit = table.detach().double()
        unit = unit / unit.norm(dim=1, keepdim=True)
        expected = (unit @ unit.T)[chosen[:, 0], chosen[:, 1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # Pairs that occur twice are ties, whose mean rank is as good as any.
    different = torch.tensor(np.unique(np.sort(chosen.numpy(), 1), axis=0, return_index=True)[1])
    few = _tied_correlations.Similarities(*(each[different] for each in lists))
    found = _tied_correlations.correlations(few)
    for name, one, other in (("in/out", 0, 1), ("in/tied", 0, 2), ("out/tied", 1, 2)):
        expected = torch.corrcoef(torch.stack([ranks(few[one]), ranks(few[other])]))[0, 1].item()
        assert found[name] == pytest.approx(expected, abs=1e-9)
    assert found["out/tied"] > 0.8 > 0.2 > abs(found["in/tied"])


def test_a_model_that_is_nan_has_no_correlations():
    numbers = torch.arange(5.0)
    lists = _tied_correlations.Similarities(numbers, -numbers, torch.full((5,), torch.nan))
    found = _tied_correlations.correlations(lists)
    assert found == {"in/out": pytest.approx(-1), "in/tied": None, "out/tied": None}


def test_too_few_words_for_a_pair_leave_the_table_without_correlations(tmp_path, capsys):
    options = ["--quick", "--vocabulary", "1", "--arms", "untied", "wt", "--hidden-size", "8"]
    assert main(["run", "tied_embedding", *options, "--out", str(tmp_path)]) == 0
    assert (
        "untied and wt, correlation of similarities: in/out -, in/tied -, out/tied -"
        in capsys.readouterr().out
    )


def test_pairs_are_of_the_2000_most_frequent_words():
    assert _tied_correlations.pairs(10_000).max() == 2001
    assert len(_tied_correlations.pairs(3)) == 0


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    text_folder(folder / "cats")
    options = "--data", folder / "cats", "--hidden-size", 8, "--epochs", 3
    run(*options, "--seeds", 0, 4, "--out", folder / "out")
    return folder


def test_metrics_have_each_arm_and_seed(finished):
    metrics = metrics_of(finished / "out")
    for figure in ("test", "valid", "train"):
        assert list(metrics["figures"][figure]) == list(_tied_lm.ARMS)
        for of in metrics["figures"][figure].values():
            assert of["seeds"].keys() == {"0", "4"}
    h, v = 8, metrics["data"]["words"]
    lstm, softmax = 2 * (8 * h * h + 8 * h), v * h + v
    assert metrics["parameters"] == {
        "untied": lstm + softmax + v * h,
        "wt": lstm + softmax,
        "pr": lstm + softmax + v * h + h * h + h,
        "wt+pr": lstm + softmax + h * h + h,
    }
    assert metrics["config"]["lr"] == 1 and metrics["config"]["decay"] == 0.5
    tests = {arm: of["seeds"] for arm, of in metrics["figures"]["test"].items()}
    difference = metrics["differences"]["wt minus untied"]["test"]
    assert difference["seeds"]["4"] == pytest.approx(tests["wt"]["4"] - tests["untied"]["4"])
    order = metrics["order"]
    assert order["asked"] == ["untied", "wt", "pr", "wt+pr"]
    for seed, arms in order["seeds"].items():
        assert sorted(tests, key=lambda arm, seed=seed: -tests[arm][seed]) == arms
    assert order["as_asked"] == sum(arms == order["asked"] for arms in order["seeds"].values())


def test_models_give_the_figures(finished):
    metrics = metrics_of(finished / "out")
    corpus = _corpus.load(finished / "cats")
    for arm in _tied_lm.ARMS:
        model = load_language_model(finished / "out" / "models" / f"test-{arm}-4")
        assert (model.tie, model.projection is not None) == ("wt" in arm, "pr" in arm)
        if model.tie:
            assert_tied(model)
        found = model.perplexity(corpus.test)
        assert found == pytest.approx(metrics["figures"]["test"][arm]["seeds"]["4"], rel=1e-5)


def test_correlations_are_those_of_the_models(finished):
    metrics = metrics_of(finished / "out")
    for untied, tied in (("untied", "wt"), ("pr", "wt+pr")):
        models = (load_language_model(finished / "out" / "models" / f"test-{a}-0") for a in (untied, tied))
        expected = _tied_correlations.correlations(_tied_correlations.similarities(*models))
        for name, value in expected.items():
            of = metrics["correlations"][name][f"{untied} and {tied}"]
            assert of["seeds"]["0"] == pytest.approx(value, abs=1e-9)
            assert of["mean"] == pytest.approx(sum(of["seeds"].values()) / 2)
    assert (finished / "out" / "correlations.png").read_bytes().startswith(b"\x89PNG")


def test_the_test_part_is_looked_at_once(finished):
    with (finished / "out" / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["epoch"]) for line in lines[:6]] == [
        (arm, epoch) for arm in ("untied", "wt") for epoch in "123"
    ]
    assert [bool(line["test"]) for line in lines] == [False, False, True] * 8
    assert (finished / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_goes_on_with_another_seed(finished, capsys):
    before = (finished / "out" / "results.jsonl").read_text()
    options = ["--data", finished / "cats", "--hidden-size", 8, "--epochs", 3, "--arms", "wt", "--seeds", 2]
    run(*options, "--resume", "--out", finished / "out")
    after = (finished / "out" / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 1
    assert "cats: 360 words" in capsys.readouterr().out
    assert metrics_of(finished / "out")["correlations"] == {}
    options[options.index("--epochs") + 1] = 4
    out = ["--out", str(finished / "out")]
    assert main(["run", "tied_embedding", *map(str, options), "--resume", *out]) == 1
    assert "epochs 4 instead of 3" in capsys.readouterr().err


def test_killed_runs_end_as_one_that_was_not(run_script, tmp_path):
    """To the bit: rows, figures, curves and every model."""
    file = Path(__file__).with_name("killed_runs.py")
    text_folder(tmp_path / "cats")
    options = ["--data", str(tmp_path / "cats"), "--hidden-size", "16", "--epochs", "6", "--seeds", "0"]
    command = [str(file), str(tmp_path), "3", "0", "tied_embedding", *options]
    script = (
        # What the first run alone would wait for; the times of kills are shares of its time.
        "import fastkit.methods.tied_embedding, matplotlib.figure, scipy.stats, safetensors.torch\n"
        f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert not re.search("^0 of", done.stdout, re.MULTILINE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = [
        [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        for out in (whole, killed)
    ]
    assert all(row.pop("seconds") > 0 for row in rows[0] + rows[1])
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert (killed / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    metrics = [metrics_of(out) for out in (whole, killed)]
    assert all(m.pop("wall_seconds") > 0 for m in metrics)
    assert metrics[0] == metrics[1]
    models = sorted(path.relative_to(whole) for path in (whole / "models").rglob("*.safetensors"))
    assert len(models) == 4
    for name in models:
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not list((killed / "training").iterdir())


# Speed


@pytest.mark.parametrize("arm", _tied_speed.ARMS)
def test_both_losses_train_the_same_model(arm):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(30, (3000,), generator=generator)
    preset = dataclasses.replace(PRESETS["small"], hidden_size=6)
    found = _tied_speed.contestants(arm, corpus_of(text, text, text, 30), preset, CPU, 3)
    ours, plain = found["fastkit"], found["plain"]
    assert ours.first_loss() == pytest.approx(plain.first_loss(), rel=1e-6)
    for contestant in (ours, plain):
        contestant.model.double()
    before = plain.model.embedding.weight.detach().clone()
    assert ours.round() > 0 and plain.round() > 0
    assert not torch.equal(before, plain.model.embedding.weight)
    for name, parameter in ours.model.state_dict().items():
        torch.testing.assert_close(parameter, plain.model.state_dict()[name], rtol=1e-8, atol=1e-10)
    if "wt" in arm:
        assert [each.model.embedding.fused_accumulate for each in (ours, plain)] == [True, False]


def test_speed_is_measured_once(tmp_path, capsys, monkeypatch):
    options = *TINY, "--task", "speed", "--rounds", 4, "--arms", "wt", "--out", tmp_path / "out"
    run(*options)
    metrics = metrics_of(tmp_path / "out")
    figures = {name: of["wt"]["seeds"]["0"] for name, of in metrics["figures"].items()}
    with (tmp_path / "out" / "curves.csv").open(newline="") as file:
        points = [{name: float(line[name]) for name in ("fastkit", "plain")} for line in csv.DictReader(file)]
    assert len(points) == 4
    for name in ("fastkit", "plain"):
        assert figures[name] == pytest.approx(np.median([point[name] for point in points]))
    ratios = np.percentile([point["fastkit"] / point["plain"] for point in points], (25, 50, 75))
    assert [figures[f"ratio{end}"] for end in ("_low", "", "_high")] == pytest.approx(ratios.tolist())
    assert figures["apart"] < 1e-6
    monkeypatch.setattr(_tied_speed, "contestants", lambda *_: pytest.fail("measured again"))
    run(*options, "--resume")
    assert "words a second of training" in capsys.readouterr().out
