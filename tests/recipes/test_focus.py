"""run focus: the model is what it says, a run is honest about its arms, and a killed one ends the same."""

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
from fastkit.bench import demo
from fastkit.nn import AdaptiveIIR
from fastkit.recipes import focus
from fastkit.recipes._experiment import read_checkpoint, write_checkpoint
from fastkit.recipes.focus import ARMS, SequenceClassifier, load_classifier, save_classifier

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

TINY = ["--quick", "--epochs", "2", "--channels", "8", "--batch", "256"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The model


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kernel", [1, 5])
def test_what_stands_behind_the_end_changes_nothing(arm, kernel):
    model = SequenceClassifier(2, 3, filter=arm, kernel=kernel)
    x, lengths = torch.randn(4, 50, 2), torch.tensor([50, 1, 16, 29])
    expected = model(x, lengths)
    other = x.clone()
    for row, length in zip(other, lengths, strict=True):
        row[length:] = torch.nan
    assert torch.equal(model(other, lengths), expected)
    for row, length, logits in zip(x, lengths, expected, strict=True):
        torch.testing.assert_close(model(row[None, :length], length[None])[0], logits)


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_are_finite_beside_padding_of_nan(arm):
    model = SequenceClassifier(1, 3, filter=arm)
    x = torch.randn(2, 20, 1)
    x[1, 7:] = torch.nan
    model(x, torch.tensor([20, 7])).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_arms_differ_in_their_filters_alone():
    models = {arm: SequenceClassifier(1, 3, filter=arm) for arm in ARMS}
    others = [
        {name: tensor.shape for name, tensor in model.state_dict().items() if "filters" not in name}
        for model in models.values()
    ]
    assert others[0] == others[1] == others[2]
    kinds = [[type(layer) for layer in model.filters] for model in models.values()]
    assert kinds == [[AdaptiveIIR] * 2, [AdaptiveIIR] * 2, [torch.nn.Identity] * 2]
    assert [layer.adaptive for arm in ARMS[:2] for layer in models[arm].filters] == [True, True, False, False]


def test_without_filters_order_is_seen_within_the_kernel_only():
    lengths = torch.tensor([40])
    x = torch.randn(1, 40, 1)
    for arm in ARMS:
        model = SequenceClassifier(1, 3, filter=arm, kernel=1)
        same = torch.allclose(model(x.flip(1), lengths), model(x, lengths), atol=1e-5)
        assert same == (arm == "none")


@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_is_read_back(tmp_path, arm):
    model = SequenceClassifier(2, 3, filter=arm, layers=1, kernel=3, parameterization="polar")
    save_classifier(tmp_path / "x.pt", model, ["a", "b", "c"])
    loaded, classes = load_classifier(tmp_path / "x.pt")
    x, lengths = torch.randn(2, 30, 2), torch.tensor([30, 20])
    assert torch.equal(loaded(x, lengths), model(x, lengths))
    assert classes == ["a", "b", "c"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    write_checkpoint(tmp_path / "x.pt", {"config": {"inputs": 1}, "state_dict": {}})
    with pytest.raises(Refusal, match="must be a model of run focus, got another checkpoint"):
        load_classifier(tmp_path / "x.pt")


def test_the_validation_part_is_a_stratified_quarter_of_the_training_part():
    y = torch.tensor([0] * 40 + [1] * 20)
    train = focus.Samples(torch.arange(60.0).view(60, 1, 1), torch.ones(60), y)
    fit, held_out = focus._validation(train)
    assert held_out.y.bincount().tolist() == [10, 5]
    assert torch.equal(torch.cat([fit.x, held_out.x]).flatten().sort().values, torch.arange(60.0))


def test_a_class_of_one_series_is_refused():
    train = focus.Samples(torch.zeros(5, 4, 1), torch.full((5,), 4), torch.tensor([0, 0, 0, 0, 1]))
    with pytest.raises(Refusal, match="--data must have at least 2 training series of each class"):
        focus._validation(train)


def test_two_series_a_class_are_enough():
    train = focus.Samples(torch.zeros(6, 4, 1), torch.full((6,), 4), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert [len(part.y) for part in focus._validation(train)] == [3, 3]


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


def test_each_arm_has_as_many_trials_and_the_best_is_chosen(finished):
    selection = json.loads((finished / "metrics.json").read_text())["selection"]
    assert selection.keys() == set(ARMS)
    assert len({len(focus._choices(quick)[arm]) for quick in (True, False) for arm in ARMS}) == 2
    for arm in selection.values():
        assert len(arm["trials"]) == 2
        assert arm["trials"][arm["chosen"]]["accuracy"] == max(t["accuracy"] for t in arm["trials"].values())


def test_models_give_the_figures_that_are_reported(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    test = focus._samples(focus.digits().test)
    for arm in ARMS:
        for seed in (3, 5):
            model, classes = load_classifier(finished / "models" / f"test-{arm}-{seed}.pt")
            hits = focus.predict(model, test).argmax(-1) == test.y
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
    monkeypatch.setattr(focus.Training, "advance", lambda _: pytest.fail("trained again"))
    assert main(["run", "focus", *TINY, "--seeds", "3", "5", "--out", str(finished), "--resume"]) == 0
    assert (finished / "results.jsonl").read_bytes() == before


def test_series_from_a_folder(tmp_path, capsys):
    """Slow waves against fast ones, of several lengths: no help from filters is needed, but none may harm."""
    generator = np.random.default_rng(0)
    arrays = {"classes": np.array(["slow", "fast"])}
    for part, count in (("train", 24), ("test", 12)):
        y = np.arange(count) % 2
        time = np.arange(60) * (0.2 + y[:, None]) + generator.uniform(0, 6, (count, 1))
        arrays |= {f"x_{part}": np.sin(time)[:, None], f"y_{part}": y}
        arrays[f"len_{part}"] = generator.integers(40, 61, count)
    (tmp_path / "waves").mkdir()
    np.savez(tmp_path / "waves" / "waves.npz", **arrays)
    options = ["--quick", "--epochs", "12", "--batch", "8", "--channels", "16"]
    arguments = ["run", "focus", "--data", str(tmp_path / "waves"), "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "waves: test accuracy" in output.out and "1-NN" in output.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["config"]["kernel"] == 8 and metrics["config"]["chunk"] == 8
    assert metrics["data"]["longest"] == arrays["len_train"].max()
    assert metrics["figures"]["accuracy"]["adaptive"]["mean"] > 0.9


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

    monkeypatch.setattr(focus.Training, "advance", interrupted)
    assert main(["run", "focus", *TINY, "--out", str(tmp_path)]) == 130
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err


def test_an_interrupted_demo_says_what_is_kept(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "\ndemo: stopped; demo.csv has what was measured\n"


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
    command = [str(file), str(tmp_path), str(kills), "0", "focus", *TINY]
    script = "import runpy, sys; sys.argv = {}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_script(script.format(command))
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
