"""run mtadam: rows are honest, what is refused is refused in words, and a killed run ends the same."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.recipes import _experiment, mtadam
from fastkit.recipes._experiment import read_checkpoint, write_checkpoint
from fastkit.recipes._images import digits
from fastkit.recipes._mtadam_arms import ARMS
from fastkit.recipes._mtadam_models import MODELS, Classifier
from fastkit.recipes.mtadam import load_model

for package in ("sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def seed(one_thread):
    torch.manual_seed(0)


# A run

TINY = ["--quick", "--batch", "128", "--threads", "1"]


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(_experiment, "draw", lambda path, *_: path.write_bytes(b""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("mtadam") / "out"
    assert main(["run", "mtadam", *TINY, "--epochs", "2", "--seeds", "3", "5", "--out", str(out)]) == 0
    return out


def test_what_is_left(finished):
    metrics = metrics_of(finished)
    assert metrics["recipe"] == "mtadam" and metrics["seeds"] == [3, 5]
    assert metrics["data"]["name"] == "digits" and metrics["data"]["train"] == 1257
    assert metrics["figures"].keys() == {"accuracy", "worst_class", "loss", "step_length"}
    for arms in metrics["figures"].values():
        assert arms.keys() == set(ARMS)
        for arm in arms.values():
            assert arm["seeds"].keys() == {"3", "5"}
            assert arm["mean"] == pytest.approx(sum(arm["seeds"].values()) / 2)
            assert arm["std"] == pytest.approx(np.std(list(arm["seeds"].values()), ddof=1))
    rates = metrics["learning_rates"]
    assert [rates[arm] for arm in ("mtadam", "mtadam_xL", "mtadam_byL", "adam_balanced_xL")] == pytest.approx(
        [1e-3, 1e-2, 1e-4, 1e-2]
    )
    assert metrics["plain_baselines"]["majority"]["accuracy"] == pytest.approx(55 / 540)


def test_arms_of_a_seed_have_the_same_weights_and_seeds_their_own(finished):
    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    weights = metrics_of(finished)["weights"]
    for row in rows:
        of_row = {name[7:]: value for name, value in row["facts"].items() if name.startswith("weight_")}
        balanced = row["arm"].startswith("adam_balanced")
        assert of_row == (dict.fromkeys(of_row, 1.0) if balanced else weights[str(row["seed"])])
    assert weights["3"] != weights["5"]
    assert weights["3"]["class_0"] == 1 and all(0 <= weight < 1000 for weight in weights["3"].values())


def test_differences_are_of_pairs(finished):
    metrics = metrics_of(finished)
    assert metrics["differences"].keys() == {f"{one} minus {other}" for one, other in mtadam.QUESTIONS}
    accuracy = metrics["figures"]["accuracy"]
    for question, found in metrics["differences"].items():
        one, other = (accuracy[arm]["seeds"] for arm in question.split(" minus "))
        assert found["accuracy"]["seeds"] == {seed: one[seed] - other[seed] for seed in ("3", "5")}


def test_curves_are_of_all_rows(finished):
    with (finished / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["arm"], line["epoch"]) for line in lines] == [
        (seed, arm, epoch) for seed in "35" for arm in ARMS for epoch in "12"
    ]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_models_give_the_figures_that_are_reported(finished):
    metrics, test = metrics_of(finished), digits().test
    for arm in ARMS:
        for seed in ("3", "5"):
            model = load_model(finished / "models" / f"test-{arm}-{seed}.pt")
            assert not model.training
            with torch.no_grad():
                figures = model.judged(torch.from_numpy(test.x), torch.from_numpy(test.y))
            for name, value in figures.items():
                assert metrics["figures"][name][arm]["seeds"][seed] == pytest.approx(value, abs=1e-6)


def test_a_finished_run_is_not_run_again_and_seeds_are_added(finished, undrawn, monkeypatch, capsys):
    arguments = ["run", "mtadam", *TINY, "--epochs", "2", "--out", str(finished), "--resume"]
    before = (finished / "results.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(mtadam.Training, "advance", lambda _: pytest.fail("trained again"))
        assert main([*arguments, "--seeds", "3", "--arms", "mtadam", "adam_balanced"]) == 0
        assert main([*arguments, "--seeds", "3", "5"]) == 0
    assert (finished / "results.jsonl").read_bytes() == before
    assert "mtadam minus adam_balanced " in capsys.readouterr().out
    assert main([*arguments, "--lr", "0.5"]) == 1
    assert "config.lr 0.5 instead of 0.001" in capsys.readouterr().err


def test_arms_without_a_common_seed_have_no_difference(tmp_path, undrawn, capsys):
    arguments = ["run", "mtadam", *TINY, "--out", str(tmp_path), "--resume"]
    for arm, seeds in (("mtadam", ["1"]), ("adam_balanced", ["2"]), ("adam_unbalanced", ["1", "2", "1"])):
        assert main([*arguments, "--arms", arm, arm, "--seeds", *seeds]) == 0
    assert re.search(r"^  mtadam minus adam_balanced +-( +-)+$", capsys.readouterr().out, re.MULTILINE)
    assert metrics_of(tmp_path)["seeds"] == [1, 2]


def test_all_arms_begin_alike_and_see_the_same_batches(tmp_path, undrawn, monkeypatch):
    seen = {}
    losses = Classifier.losses

    def spied(model, x, y):
        values = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen.setdefault(id(model), []).append((values, y.clone(), model))  # which keeps the id
        return losses(model, x, y)

    monkeypatch.setattr(Classifier, "losses", spied)
    assert main(["run", "mtadam", *TINY, "--out", str(tmp_path)]) == 0
    one, *others = seen.values()
    assert len(others) == len(ARMS) - 1
    for other in others:
        assert torch.equal(other[0][0], one[0][0])
        assert all(torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of 6 x 5 images: which third of the image is lit."""
    folder = tmp_path_factory.mktemp("images") / "stripes"
    folder.mkdir()
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 240), ("test", 60)):
        y = np.arange(count) % 3
        lit = np.arange(6)[None, :, None] // 2 == y[:, None, None]
        arrays[f"x_{part}"] = (60 * generator.random((count, 6, 5)) + 150 * lit).astype(np.uint8)
        arrays[f"y_{part}"] = y.astype(np.uint8)
    np.savez(folder / "stripes.npz", **arrays)
    return folder


def test_mixed_on_images_from_a_folder(tmp_path, undrawn, data, capsys):
    options = ["--quick", "--epochs", "5", "--batch", "16", "--lr", "0.01", "--ranks", "1", "1", "0.1"]
    arguments = ["run", "mtadam", "--task", "mixed", "--data", str(data), *options]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert output.err == "" and output.out.startswith(
        "stripes, task mixed, batches of 16, epochs 5, seeds 0\n"
    )
    metrics = metrics_of(tmp_path / "out")
    assert metrics["config"]["ranks"] == [1, 1, 0.1] and metrics["data"]["size"] == [6, 5]
    figures = metrics["figures"]
    assert figures.keys() == {
        "accuracy", "classification", "reconstruction", "activity", "step_length"
    }  # fmt: skip
    assert figures["accuracy"]["mtadam"]["mean"] > 0.9
    assert figures["accuracy"].keys() == set(ARMS)
    assert all(1e-4 <= weight < 1e4 for weight in metrics["weights"]["0"].values())
    model = load_model(tmp_path / "out" / "models" / "test-mtadam-0.pt")
    assert model.config == {"height": 6, "width": 5, "classes": 3}


def test_ratio_is_flat_under_mtadam_and_not_under_adam(tmp_path, undrawn, capsys):
    options = [
        "--epochs",
        "4",
        "--lr",
        "0.01",
        "--seeds",
        "1",
        "2",
        "1",
        "--arms",
        "mtadam",
        "adam_unbalanced",
    ]
    arguments = ["run", "mtadam", "--task", "ratio", "--quick", *options]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    metrics = metrics_of(tmp_path / "out")
    ratio = metrics["ratio"]
    assert ratio.keys() == {"mtadam", "adam_unbalanced"}
    for name, arm in ratio.items():
        assert arm["exponents"] == [-4, 0, 4]
        for term in ("upper", "lower"):
            of_seeds = [
                list(metrics["figures"][term][f"{name},k={k}"]["seeds"].values()) for k in arm["exponents"]
            ]
            assert arm[term]["seeds"] == of_seeds
            means = arm[term]["means"]
            assert means == pytest.approx([sum(losses) / 2 for losses in of_seeds])
            assert arm[term]["spread"] == pytest.approx(max(means) / min(means))
            assert (arm[term]["spread"] < 1.01) if name == "mtadam" else (arm[term]["spread"] > 1.5)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["arm"], line["epoch"]) for line in lines] == [
        (seed, f"{arm},k={k}", epoch)
        for seed in "12"
        for arm in ("mtadam", "adam_unbalanced")
        for k in (-4, 0, 4)
        for epoch in "1234"
    ]
    assert (tmp_path / "out" / "models" / "k=-4-mtadam-1.pt").exists()
    table = capsys.readouterr().out
    assert "k=-4" in table and len(re.findall(r"^  mtadam +(upper|lower)", table, re.MULTILINE)) == 2


def test_a_loss_that_is_not_finite_is_no_number(tmp_path, undrawn, data):
    arguments = ["run", "mtadam", "--data", str(data), *TINY, "--lr", "1e30", "--out", str(tmp_path / "out")]
    for task in ("classes", "ratio"):
        assert main([*arguments[:-1], str(tmp_path / task), "--task", task]) == 0
    ratio = metrics_of(tmp_path / "ratio")["ratio"]
    assert ratio.keys() == {"mtadam", "adam_unbalanced", "adam_unbalanced_xL", "equal_norm"}
    assert ratio["adam_unbalanced"]["upper"]["spread"] is None
    assert metrics_of(tmp_path / "classes")["figures"]["loss"]["adam_unbalanced"]["mean"] is None


def test_the_measured_figures_of_the_digits_come_out_again(tmp_path, undrawn):
    """Measured once, with the authors' code, other seeds and another split: within two deviations."""
    arms = {"mtadam": (90.19, 1.17), "adam_unbalanced": (69.11, 7.23), "adam_balanced": (90.19, 1.10)}
    assert main(["run", "mtadam", "--arms", *arms, "--seeds", "0", "1", "2", "--out", str(tmp_path)]) == 0
    accuracy = metrics_of(tmp_path)["figures"]["accuracy"]
    for arm, (mean, std) in arms.items():
        found = 100 * accuracy[arm]["mean"], 100 * accuracy[arm]["std"]
        assert abs(found[0] - mean) < 2 * ((found[1] ** 2 + std**2) / 2) ** 0.5, arm
    assert accuracy["mtadam"]["mean"] > accuracy["adam_unbalanced"]["mean"] + 0.1


# Refusals


def test_refusals_are_printed_without_a_traceback(tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*options):
        assert main(["run", "mtadam", "--out", str(out), *options]) == 1
        assert not out.exists()
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    assert refused("--task", "mixed", "--ranks", "1", "2") == (
        "run mtadam: --ranks must be 3 numbers, for classification, reconstruction, activity, got 2; give"
        " each term one\n"
    )
    assert refused("--task", "ratio", "--arms", "mtadam", "adam_balanced") == (
        "run mtadam: --arms must be of mtadam, adam_unbalanced, adam_unbalanced_xL, equal_norm with --task"
        " ratio, got adam_balanced; leave them out\n"
    )
    assert refused("--data", str(tmp_path / "no")) == (
        f"run mtadam: --data must be a folder, got nothing there: {tmp_path / 'no'}; give the folder that"
        " holds one .npz of images\n"
    )


@pytest.mark.parametrize("option, value, message", [
    ("--lr", "0", "argument --lr: must be positive, got 0"),
    ("--lr", "inf", "argument --lr: must be positive, got inf"),
    ("--ranks", "-1", "argument --ranks"),
    ("--arms", "sgd", "argument --arms: invalid choice: 'sgd'"),
    ("--batch", "0", "argument --batch: must be at least 1, got 0"),
])  # fmt: skip
def test_options_that_are_none_are_refused(tmp_path, capsys, option, value, message):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "mtadam", option, value, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("state", [
    {"task": "no", "config": {}, "state_dict": {}},
    {"task": "mixed", "config": {"height": 8, "width": 8, "classes": 3}, "state_dict": {}},
    {"config": {}},
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(tmp_path, state):
    write_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises(Refusal, match="must be a model of run mtadam, got another checkpoint"):
        load_model(tmp_path / "x.pt")


# Killed


def _rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") > 0
    return rows


@pytest.mark.parametrize("task, kills", [
    ("classes", 3),
    *(pytest.param(task, 10, marks=pytest.mark.slow) for task in MODELS),
])  # fmt: skip
def test_killed_runs_end_as_one_that_was_not(run_script, tmp_path, task, kills):
    """To the bit: rows, figures, curves and the tensors of every model."""
    file = Path(__file__).with_name("killed_runs.py")
    arms = ["mtadam", "adam_unbalanced", "equal_norm"]
    options = [*TINY, "--epochs", "2", "--task", task, "--arms", *arms]
    command = [str(file), str(tmp_path), str(kills), "0", "mtadam", *options]
    # Imports would count as the time of a whole run, in which the others are killed.
    script = (
        "import runpy, sys, matplotlib.figure, sklearn.datasets, sklearn.model_selection;"
        " sys.argv = {}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_script(script.format(command))
    assert done.returncode == 0, done.stderr
    assert not re.search("^0 of", done.stdout, re.MULTILINE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _rows(killed / "results.jsonl") == _rows(whole / "results.jsonl")
    for name in ("curves.csv", "curves.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    metrics = [metrics_of(out) for out in (whole, killed)]
    assert all(m.pop("wall_seconds") > 0 for m in metrics)
    assert metrics[0] == metrics[1]
    models = sorted(path.name for path in (whole / "models").iterdir())
    assert models == sorted(path.name for path in (killed / "models").iterdir())
    assert len(models) == len(arms) * (3 if task == "ratio" else 1)
    for name in models:
        one, other = (read_checkpoint(out / "models" / name)["state_dict"] for out in (whole, killed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((killed / "training").iterdir())


@pytest.mark.parametrize("arm", ["mtadam", "adam_unbalanced", "equal_norm"])
def test_a_row_goes_on_in_the_middle_as_if_it_had_not_stopped(tmp_path, undrawn, monkeypatch, arm):
    arguments = ["run", "mtadam", *TINY, "--epochs", "2", "--arms", arm]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    advance, done = mtadam.Training.advance, []

    def stops(training):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return advance(training)

    with monkeypatch.context() as patch:
        patch.setattr(mtadam.Training, "advance", stops)
        assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    torch.randn(3)
    assert main([*arguments, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert _rows(tmp_path / "stopped" / "results.jsonl") == _rows(tmp_path / "whole" / "results.jsonl")
    one, other = (
        read_checkpoint(tmp_path / out / "models" / f"test-{arm}-0.pt")["state_dict"]
        for out in ("whole", "stopped")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
