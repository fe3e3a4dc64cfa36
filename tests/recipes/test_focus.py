"""run focus: the models are what they say, a run is honest about its arms, and a killed one ends the same."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkit import _command
from fastkit.__main__ import RECIPES, main
from fastkit._command import Refusal
from fastkit.recipes import _focus_classify, _focus_series
from fastkit.recipes._experiment import read_checkpoint, write_checkpoint
from fastkit.recipes._focus_classify import predict, save_classifier
from fastkit.recipes._focus_models import ARMS, ChunkedTransformer, SeriesClassifier, matched, parameters
from fastkit.recipes.focus import load_classifier

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

TINY = ["--quick", "--epochs", "2", "--hidden-size", "8", "--batch", "256"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sizes(arm, **others):
    common = {"inputs": 2, "classes": 3, "kernel": 1, "hidden_size": 16, "layers": 2}
    return {"arm": arm, **common, "attn_chunk": 12, "bin_length": 16, "kernel_length": 20, **others}


def classifier(arm, **others):
    return SeriesClassifier(**matched(SeriesClassifier, sizes(arm, **others)))


# The models


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kernel", [1, 5])
def test_what_stands_behind_the_end_changes_nothing(arm, kernel):
    model = classifier(arm, kernel=kernel)
    x, lengths = torch.randn(4, 50, 2), torch.tensor([50, 1, 16, 29])
    expected = model(x, lengths)
    for filling in (torch.nan, 1e6):
        other = x.clone()
        for row, length in zip(other, lengths, strict=True):
            row[length:] = filling
        assert torch.equal(model(other, lengths), expected)
    for row, length, logits in zip(x, lengths, expected, strict=True):
        alone = model(row[None, :length], length[None])[0]
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_are_finite_beside_padding_of_nan(arm):
    model = classifier(arm)
    x = torch.randn(2, 40, 2)
    x[1, 7:] = torch.nan
    model(x, torch.tensor([40, 7])).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize(("hidden_size", "kernel_length"), [(8, 64), (32, 64), (32, 2048), (50, 427)])
def test_arms_have_as_many_parameters(hidden_size, layers, kernel_length):
    options = {"hidden_size": hidden_size, "layers": layers, "kernel_length": kernel_length}
    models = {arm: classifier(arm, **options) for arm in ARMS}
    assert models["focus"].config["intermediate_size"] == 2 * hidden_size
    counts = {arm: parameters(model) for arm, model in models.items()}
    for arm in ARMS:
        assert counts[arm] == pytest.approx(counts["focus"], rel=0.02)


def test_filters_adapt_in_one_arm_alone():
    filters = {arm: [block.layer.filter for block in classifier(arm).body.model.layers] for arm in ARMS[:2]}
    assert [filter.adaptive for filter in filters["focus"] + filters["constant"]] == [
        True,
        True,
        False,
        False,
    ]
    assert classifier("focus").body.model.global_conv.length == 20
    assert classifier("constant").body.model.global_conv is None


def test_the_transformer_sees_its_chunk_alone_and_nothing_later():
    model = ChunkedTransformer(16, intermediate_size=32, layers=2, attn_chunk=12)
    x = torch.randn(2, 29, 16)
    y = model(x)
    for place in (0, 5, 11, 12, 28):
        other = x.clone()
        other[:, place] += torch.randn(16)
        changed = ((model(other) - y).abs() > 1e-5).any(2).all(0).nonzero().flatten()
        assert changed.tolist() == list(range(place, min(29, (place // 12 + 1) * 12)))


@pytest.mark.parametrize("arm", ARMS)
def test_all_of_a_series_before_a_place_is_seen_there_by_filters_alone(arm):
    """By the token at the end, of what the first bin holds: for adaptive ones, through their coefficients."""
    model = classifier(arm, layers=1)
    x = torch.randn(1, 64, 2, requires_grad=True)
    body = model.body if arm == "transformer" else model.body.model
    h = model.embedding(x)
    h = body(h) if arm == "transformer" else body(inputs_embeds=h).last_hidden_state
    (grad,) = torch.autograd.grad(h[0, -1].square().sum(), x)
    assert bool((grad[0, :40] != 0).any()) == (arm == "focus")


def test_an_arm_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="arm must be one of focus, constant, transformer, got 'none'"):
        SeriesClassifier(**sizes("none"), intermediate_size=4)


@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_is_read_back(tmp_path, arm):
    model = classifier(arm, layers=1, kernel=3, parameterization="polar").eval()
    save_classifier(tmp_path / "x.pt", model, ["a", "b", "c"])
    loaded, classes = load_classifier(tmp_path / "x.pt")
    x, lengths = torch.randn(2, 30, 2), torch.tensor([30, 20])
    assert torch.equal(loaded(x, lengths), model(x, lengths))
    assert classes == ["a", "b", "c"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    write_checkpoint(tmp_path / "x.pt", {"config": {"inputs": 1}, "state_dict": {}})
    with pytest.raises(Refusal, match="must be a model of run focus, got another checkpoint"):
        load_classifier(tmp_path / "x.pt")


# The data


def test_the_validation_part_is_a_stratified_quarter_of_the_training_part():
    y = torch.tensor([0] * 40 + [1] * 20)
    train = _focus_series.Samples(torch.arange(60.0).view(60, 1, 1), torch.ones(60), y)
    fit, held_out = _focus_series.validation(train)
    assert held_out.y.bincount().tolist() == [10, 5]
    assert torch.equal(torch.cat([fit.x, held_out.x]).flatten().sort().values, torch.arange(60.0))


def test_a_class_of_one_series_is_refused():
    y = torch.tensor([0, 0, 0, 0, 1])
    train = _focus_series.Samples(torch.zeros(5, 4, 1), torch.full((5,), 4), y)
    with pytest.raises(Refusal, match="--data must have at least 2 training series of each class"):
        _focus_series.validation(train)


def test_two_series_a_class_are_enough():
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    train = _focus_series.Samples(torch.zeros(6, 4, 1), torch.full((6,), 4), y)
    assert [len(part.y) for part in _focus_series.validation(train)] == [3, 3]


def test_images_are_series_of_their_pixels(tmp_path):
    arrays = {"x_train": np.arange(4 * 6 * 12).reshape(4, 6, 12) % 256, "y_train": np.array([0, 1, 1, 0])}
    arrays |= {"x_test": arrays["x_train"][:3], "y_test": arrays["y_train"][:3]}
    arrays = {key: a.astype(np.uint8) for key, a in arrays.items()}
    np.savez(tmp_path / "small.npz", **arrays)
    series, kernel, chunk = _focus_series.read(tmp_path)
    assert (series.name, series.classes, kernel, chunk) == ("small", ["0", "1"], 1, 24)  # 24: two rows
    assert (len(series.train.y), len(series.test.y)) == (4, 3)
    assert series.train.x.shape == (4, 1, 72) and series.train.lengths.tolist() == [72] * 4
    expected = 2 * arrays["x_train"].astype(np.float32).reshape(4, 1, 72) / 255 - 1
    np.testing.assert_allclose(series.train.x, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("x_train", "y_train", "x_test", "y_test"), "x_train must be grey images"),
        (("x_train", "y_train", "x_test", "y_test", "classes"), "got a file without len_train, len_test"),
        (("y_train",), "got a file without x_train, len_train"),
    ],
)
def test_an_archive_is_refused_as_what_it_most_likely_is(tmp_path, keys, message):
    np.savez(tmp_path / "x.npz", **dict.fromkeys(keys, np.zeros(3)))
    with pytest.raises(Refusal, match=message):
        _focus_series.read(tmp_path)


def test_a_broken_archive_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(Refusal, match="npz of plain arrays, got one that cannot be read"):
        _focus_series.read(tmp_path)


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("focus") / "out"
    assert main(["run", "focus", *TINY, "--seeds", "3", "5", "--out", str(out)]) == 0
    return out


def test_metrics_have_each_arm_and_seed_beside_plain_baselines(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["data"]["name"] == "digits"
    assert (metrics["data"]["train"], metrics["data"]["test"]) == (1347, 450)
    for figure in ("accuracy", "loss"):
        assert metrics["figures"][figure].keys() == set(ARMS)
        for arm in metrics["figures"][figure].values():
            assert arm["seeds"].keys() == {"3", "5"}
            assert arm["mean"] == pytest.approx(sum(arm["seeds"].values()) / 2)
            assert arm["std"] >= 0
    assert metrics["plain_baselines"]["accuracy"]["1-NN"] > 0.9
    assert 0.05 < metrics["plain_baselines"]["accuracy"]["majority"] < 0.2
    assert [*metrics["parameters"]] == [*ARMS]
    for count in metrics["parameters"].values():
        assert count == pytest.approx(metrics["parameters"]["focus"], rel=0.02)


def test_each_arm_has_as_many_trials_and_the_best_is_chosen(finished):
    selection = json.loads((finished / "metrics.json").read_text())["selection"]
    assert selection.keys() == set(ARMS)
    for quick, count in ((True, 2), (False, 8)):
        assert [len(choices) for choices in _focus_classify._choices(quick).values()] == [count] * 3
    for arm in selection.values():
        assert len(arm["trials"]) == 2
        assert arm["trials"][arm["chosen"]]["accuracy"] == max(t["accuracy"] for t in arm["trials"].values())


def test_models_give_the_figures_that_are_reported(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    test = _focus_series.samples(_focus_series.digits().test)
    for arm in ARMS:
        for seed in (3, 5):
            model, classes = load_classifier(finished / "models" / f"test-{arm}-{seed}.pt")
            hits = predict(model, test).argmax(-1) == test.y
            found = hits.double().mean().item()
            assert found == pytest.approx(metrics["figures"]["accuracy"][arm]["seeds"][str(seed)], abs=0.005)
    assert classes == [str(digit) for digit in range(10)]


def test_curves_are_of_the_test_rows(finished):
    with (finished / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["seed"], line["epoch"]) for line in lines] == [
        (arm, seed, epoch) for seed in "35" for arm in ARMS for epoch in "12"
    ]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    before = (finished / "results.jsonl").read_bytes()
    monkeypatch.setattr(_focus_classify.Training, "advance", lambda _: pytest.fail("trained again"))
    assert main(["run", "focus", *TINY, "--seeds", "3", "5", "--out", str(finished), "--resume"]) == 0
    assert (finished / "results.jsonl").read_bytes() == before


def waves(folder):
    """Slow waves against fast ones, of several lengths; returns those to train on."""
    generator = np.random.default_rng(0)
    arrays = {"classes": np.array(["slow", "fast"])}
    for part, count in (("train", 24), ("test", 12)):
        y = np.arange(count) % 2
        time = np.arange(60) * (0.2 + y[:, None]) + generator.uniform(0, 6, (count, 1))
        arrays |= {f"x_{part}": np.sin(time)[:, None], f"y_{part}": y}
        arrays[f"len_{part}"] = generator.integers(40, 61, count)
    folder.mkdir()
    np.savez(folder / "waves.npz", **arrays)
    return arrays["len_train"]


def test_series_from_a_folder(tmp_path, capsys):
    """What the kernel sees is enough for each arm."""
    lengths = waves(tmp_path / "waves")
    options = ["--quick", "--epochs", "12", "--batch", "8", "--hidden-size", "16"]
    arguments = ["run", "focus", "--data", str(tmp_path / "waves"), "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "waves: test accuracy" in output.out and "1-NN" in output.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    config = metrics["config"]
    assert (config["kernel"], config["bin_length"], config["attn_chunk"]) == (8, 8, 8)
    assert config["kernel_length"] == lengths.max()
    assert metrics["data"]["longest"] == lengths.max()
    for arm in ARMS:
        assert metrics["figures"]["accuracy"][arm]["mean"] > 0.9


def test_refusals_are_printed_without_a_traceback(tmp_path, capsys):
    def refused(*options):
        assert main(["run", "focus", *options]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    missing, out = tmp_path / "no", tmp_path / "out"
    assert refused("--data", str(missing), "--out", str(out)) == (
        f"run focus: --data must be a folder, got nothing there: {missing}; give the folder that holds one"
        " .npz, or NAME_TRAIN.ts and NAME_TEST.ts\n"
    )
    assert refused("--chunk", "12", "--out", str(out)) == (
        "run focus: --chunk must be a multiple of 8, got 12; take 16\n"
    )
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    assert refused("--out", str(out)).startswith(f"run focus: --out must be empty, got {out};")


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_command, "find_spec", lambda module: None if module == "sklearn" else True)
    assert main(["run", "focus", "--out", str(tmp_path / "out")]) == 1
    message = "run focus: scikit-learn not found; install with pip install 'fastkit[recipes]'\n"
    assert capsys.readouterr().err == message


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_focus_classify.Training, "advance", interrupted)
    assert main(["run", "focus", *TINY, "--out", str(tmp_path)]) == 130
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err


def test_the_command_line_imports_no_recipe_until_it_is_run(run_script):
    script = (
        "import sys; from fastkit.__main__ import main; main(['info']);"
        "sys.exit(any(name.startswith('fastkit.recipes') for name in sys.modules))"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_the_common_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", name, "--help"])
    text = capsys.readouterr().out
    for option in ("--data PATH", "--out DIR", "--seeds N", "--resume", "--quick"):
        assert option in text


# Killed


def _rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") > 0
    return rows


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_as_one_that_was_not(run_script, tmp_path, kills):
    """To the bit: rows, figures, curves and the tensors of every model."""
    file = Path(__file__).with_name("killed_runs.py")
    waves(tmp_path / "waves")
    options = ["--data", str(tmp_path / "waves"), *TINY, "--batch", "8", "--epochs", "4"]
    command = [str(file), str(tmp_path), str(kills), "0", "focus", *options]
    script = (
        # What the first run alone would wait for; the times of kills are shares of its time.
        "import fastkit.methods.focus, matplotlib.figure, sklearn.model_selection, sklearn.neighbors\n"
        f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert not re.search("^0 of", done.stdout, re.MULTILINE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _rows(killed / "results.jsonl") == _rows(whole / "results.jsonl")
    assert (killed / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (whole, killed)]
    assert all(m.pop("wall_seconds") > 0 for m in metrics)
    assert metrics[0] == metrics[1]
    models = sorted(path.name for path in (whole / "models").iterdir())
    assert models == sorted(path.name for path in (killed / "models").iterdir())
    assert len(models) == len(ARMS)
    for name in models:
        one, other = (read_checkpoint(out / "models" / name) for out in (whole, killed))
        tensors = one.pop("state_dict"), other.pop("state_dict")
        assert one == other
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert not list((killed / "training").iterdir())
