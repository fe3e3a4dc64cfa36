"""run focus --task recall: the strings, the models, the figures, and what a folder holds."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.recipes import _focus_recall
from fastkit.recipes._experiment import write_checkpoint
from fastkit.recipes._focus_models import LanguageModel, matched, parameters
from fastkit.recipes._focus_recall import ARMS, KEYS, predict, probes, strings
from fastkit.recipes._focus_responses import coefficients, peak_gains, peaks, responses
from fastkit.recipes.focus import load_language_model

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def language_model(arm, **others):
    sizes = {"vocabulary": 30, "longest": 64, "hidden_size": 16, "layers": 2}
    sizes |= {"attn_chunk": 4, "bin_length": 16, "kernel_length": 64}
    return LanguageModel(**matched(LanguageModel, {**sizes, "arm": arm, **others}))


# The strings


@pytest.mark.parametrize("length", [32, 64, 96])
def test_a_key_has_one_value_in_a_string_and_the_last_stood_before(length):
    found = strings(200, length, generator())
    assert found.tokens.shape == (200, length - 1)
    assert found.tokens[:, ::2].max() < KEYS <= found.tokens[:, 1::2].min()
    assert found.tokens.max() < 2 * KEYS
    for tokens, value, distance in zip(*found, strict=True):
        pairs = tokens[:-1].view(-1, 2).tolist()
        values = dict(pairs)
        assert all(values[key] == v for key, v in pairs)
        asked = tokens[-1].item()
        assert values[asked] == value
        places = [2 * i for i, (key, _) in enumerate(pairs) if key == asked]
        assert distance == length - 2 - max(places)


def test_strings_are_drawn_anew_and_from_the_generator_alone():
    one, other = strings(50, 64, generator(0)), strings(50, 64, generator(0))
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens, strings(50, 64, generator(1)).tokens)
    maps = {tuple(sorted({*zip(t[0:-1:2].tolist(), t[1::2].tolist(), strict=True)})) for t in one.tokens}
    assert len(maps) == 50


@pytest.mark.parametrize("places", [range(16), range(16, 32), range(48, 64)])
def test_in_a_probe_the_key_stands_once_before(places):
    found = probes(100, 64, places, generator())
    keys = found.tokens[:, ::2]
    assert ((keys == keys[:, -1:]).sum(1) == 2).all()
    begins = 62 - found.distance
    assert all(int(begin) in places for begin in begins)
    assert len(begins.unique()) == min(8, len([p for p in places if p < 62 and p % 2 == 0]))
    assert torch.equal(found.values, found.tokens.gather(1, begins[:, None] + 1)[:, 0])


# The models


@pytest.mark.parametrize(("hidden_size", "longest"), [(16, 64), (64, 256), (64, 1024)])
def test_arms_have_as_many_parameters(hidden_size, longest):
    options = {"hidden_size": hidden_size, "longest": longest, "kernel_length": longest}
    counts = {arm: parameters(language_model(arm, **options)) for arm in ARMS}
    for arm in ARMS:
        assert counts[arm] == pytest.approx(counts["focus"], rel=0.02)


@pytest.mark.parametrize("arm", ARMS)
def test_logits_are_of_the_last_tokens_and_see_none_to_come(arm):
    model = language_model(arm)
    tokens = strings(3, 64, generator()).tokens
    logits = model(tokens)
    assert logits.shape == (3, 63, 30)
    torch.testing.assert_close(model(tokens, last=1), logits[:, -1:])
    other = tokens.clone()
    other[:, 40] = (other[:, 40] + 1) % 30
    changed = ((model(other) - logits).abs() > 1e-6).any(2).any(0).nonzero().flatten()
    assert changed[0] == 40
    assert (changed[-1] == 62) == (arm in ("full", "focus"))  # else within the chunk, or the bin


@pytest.mark.parametrize("arm", ARMS)
def test_a_model_is_read_back(tmp_path, arm):
    model = language_model(arm, parameterization="triangle").eval()
    data = _focus_recall.Data(None, strings(4, 64, generator()), 64, 2)
    _focus_recall.Training(model, data, lr=1e-3, batch=32).save(tmp_path / "x.pt")
    tokens = data.test.tokens
    assert torch.equal(predict(load_language_model(tmp_path / "x.pt"), tokens), predict(model, tokens))


def test_another_checkpoint_is_refused(tmp_path):
    write_checkpoint(tmp_path / "x.pt", {"config": {"arm": "focus"}, "state_dict": {}})
    with pytest.raises(Refusal, match="must be a model of run focus, got another checkpoint"):
        load_language_model(tmp_path / "x.pt")


@pytest.mark.parametrize("arm", ["focus", "full"])
def test_training_finds_the_values_of_short_strings(arm):
    """Of three pairs, at first, which values there are."""
    torch.manual_seed(0)
    model = language_model(arm, longest=8, hidden_size=32, attn_chunk=8)
    test = strings(500, 8, generator())
    training = _focus_recall.Training(model, _focus_recall.Data(None, test, 8, 6), lr=3e-3, batch=32)
    figures = [training.advance() for _ in range(9)]
    assert figures[-1]["train_loss"] < 0.6 * math.log(KEYS)
    assert figures[-1]["accuracy"] > 0.35  # by chance 1 / 15
    assert math.isnan(figures[-1]["accuracy_beyond"])  # there is nothing beyond


# The figure


def test_responses_are_those_of_scipy():
    signal = pytest.importorskip("scipy.signal")
    a = torch.rand(3, 2, 2, dtype=torch.float64) * 0.9
    w = torch.linspace(0, math.pi, 65, dtype=torch.float64)
    expected = [abs(sum(signal.freqz(1, [1, *f], w.numpy())[1] for f in filters)) for filters in a.tolist()]
    np.testing.assert_allclose(responses(a, w).numpy(), np.array(expected), rtol=1e-9)


def test_peaks_are_found_between_all_frequencies():
    """Of poles next to the unit circle, anywhere on it; of real ones at an end."""
    w = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    near = 1 - 10.0 ** -torch.arange(1, 6, dtype=torch.float64)
    sharp = torch.cartesian_prod(torch.tensor([0.0, 0.5, 1.3, -0.7], dtype=torch.float64), near)
    real = torch.tensor([[0.9, 0.1], [-0.9, 0.0], [0.3, -0.6], [0.0, 0.0]], dtype=torch.float64)
    for a in torch.cat([sharp, real]):
        seen = responses(a[None], w).amax()
        peak = peaks(a[None])
        assert peak >= seen * (1 - 1e-12)
        assert peak == pytest.approx(float(seen), rel=1e-6) or 1 - a[1] < 2e-3
    r = 1 - 1e-5
    exact = 1 / ((1 - r) * math.sqrt(1 - 0.5**2 / (4 * r)))  # of complex poles, at its own frequency
    assert float(peaks(torch.tensor([[0.5, r]], dtype=torch.float64))) == pytest.approx(exact, rel=1e-6)


def test_coefficients_are_those_that_each_layer_filters_with():
    torch.manual_seed(0)
    model = language_model("focus").body
    tokens = strings(3, 64, generator()).tokens
    found = coefficients(model, tokens)
    assert [a.shape for a in found] == [(3, 16, 4, 1, 2)] * 2
    assert all((a[:, :, 0] == 0).all() and (a[:, :, 1:] > 0).all() for a in found)  # the first bin's, sigmoid
    before = model(tokens).logits
    found = [a.shape for a in coefficients(model, tokens)]
    assert torch.equal(model(tokens).logits, before) and len(found) == 2  # and leaves nothing behind
    gains = peak_gains(model, tokens)
    assert len(gains) == 2 and all(gain[0] == 1 and len(gain) == 4 for gain in gains)


# A run


TINY = [
    "--task",
    "recall",
    "--quick",
    "--hidden-size",
    "8",
    "--layers",
    "1",
    "--length",
    "32",
    "--batch",
    "128",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("recall") / "out"
    assert main(["run", "focus", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """For what goes on with it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_metrics_and_models_agree(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    config, figures = metrics["config"], metrics["figures"]
    assert (config["attn_chunk"], config["bin_length"], config["kernel_length"]) == (1, 8, 32)
    assert (config["lr"], config["strings"], config["epochs"]) == (1e-4, "fixed", 2)
    seeds = generator(0)
    strings(_focus_recall.TRAIN, 32, seeds)
    test = strings(_focus_recall.TEST, 32, seeds)
    assert metrics["data"]["nearby"] == 0  # a chunk of one token
    for arm in ARMS:
        model = load_language_model(finished / "models" / f"recall-{arm}-0.pt")
        hits = predict(model, test.tokens).argmax(-1) == test.values
        assert hits.double().mean().item() == pytest.approx(figures["accuracy"][arm]["mean"], abs=0.002)
        assert figures["accuracy_beyond"][arm]["mean"] == figures["accuracy"][arm]["mean"]
    gains = metrics["peak_gains"]  # of the key's bin, layer, bin
    assert np.array(gains).shape == (3, 1, 4)
    assert (finished / "responses.png").read_bytes().startswith(b"\x89PNG")
    with (finished / "curves.csv").open(newline="") as file:
        assert [line["arm"] for line in csv.DictReader(file)] == [arm for arm in ARMS for _ in range(2)]


def test_it_goes_on_with_other_arms_and_seeds(copied, capsys):
    before = (copied / "results.jsonl").read_text()
    arguments = ["run", "focus", *TINY, "--out", str(copied), "--resume", "--arms", "constant"]
    assert main([*arguments, "--seeds", "0", "1"]) == 0
    after = (copied / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(ARMS) + 1
    assert "constant" in capsys.readouterr().out


def test_strings_are_fresh_in_each_epoch(finished, tmp_path, monkeypatch):
    drawn, draw = [], _focus_recall.strings
    monkeypatch.setattr(
        _focus_recall, "strings", lambda *args: drawn.append(draw(*args).tokens) or draw(*args)
    )
    out = tmp_path / "out"
    assert main(["run", "focus", *TINY, "--strings", "fresh", "--arms", "constant", "--out", str(out)]) == 0
    losses = [
        json.loads((folder / "metrics.json").read_text())["figures"]["train_loss"]["constant"]["seeds"]["0"]
        for folder in (finished, out)
    ]
    assert losses[0] != losses[1]
    assert len(drawn) == 4 and not torch.equal(drawn[2], drawn[3])  # two epochs, after two that are not used
    assert not (out / "responses.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "100"], "--length must be a multiple of 32, got 100; take 128"),
        (["--batch", "4000"], "--batch must be at most 2000, the strings to train on, got 4000"),
        (
            ["--attn-chunk", "4096"],
            "--attn-chunk must leave arm transformer no more parameters than focus has, got a chunk whose"
            " positions are more; take a smaller one, or a larger --kernel-length",
        ),
        (["--data", "."], "--data must be left out with --task recall, which makes strings of its own"),
        (["--chunk", "12"], "--chunk must be a multiple of 8, got 12; take 16"),
    ],
)
def test_refusals(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert main(["run", "focus", "--task", "recall", *options, "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"run focus: {message}\n"
    assert not out.exists()
