"""The recipes' folder: rows and checkpoints survive a kill, and what does not fit is refused in words."""

import argparse
import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkit._command import Refusal, require
from fastkit._sync import replace_file
from fastkit._threads import threads
from fastkit.recipes import _experiment
from fastkit.recipes._experiment import (
    Run,
    deterministic,
    read_checkpoint,
    replace_folder,
    seeded,
    sha256,
    write_checkpoint,
)
from fastkit.recipes._figures import Row, paired, summary
from fastkit.recipes._options import add_arguments, add_device, device_of, seeds_of

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


def begin(out, *, resume=False, config=(("lr", 0.1),), data=(("name", "noise"),), **options):
    return Run("tiny", out, config=dict(config), data=dict(data), resume=resume, **options)


class Tiny:
    """A training that draws from torch's generator in each epoch; it raises in epoch ``stop``."""

    def __init__(self, epochs=3, *, stop=None):
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.1)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=epochs)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.left = stop or 0

    def advance(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        loss = (self.model(torch.randn(4, 3)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return {"loss": loss.item()}

    def facts(self):
        return {"parameters": 4}

    def save(self, path):
        write_checkpoint(path, self.model.state_dict())


class TinyFolder(Tiny):
    """One whose model is a folder with a folder in it."""

    def save(self, path):
        def write(folder):
            (folder / "inner").mkdir()
            (folder / "notes.txt").write_text("mine")
            torch.save(self.model.state_dict(), folder / "inner" / "model.pt")

        replace_folder(path, write)


def without_seconds(row):
    return row._replace(seconds=0)


ROW = Row("test", "arm", 0, {"accuracy": 0.1 + 0.2}, [{"accuracy": 0.5}, {"accuracy": 0.1 + 0.2}], 1.5)


# Rows


def test_a_finished_row_is_there_again(tmp_path):
    with begin(tmp_path) as run:
        run.append(ROW)
    with begin(tmp_path, resume=True) as run:
        assert run.rows == {("test", "arm", 0): ROW}


@pytest.mark.parametrize("torn", [b'{"table": "te', b"\0\0\0\0", b'{"table": "test"}'], ids=repr)
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    with begin(tmp_path) as run:
        run.append(ROW)
    whole = (tmp_path / "results.jsonl").read_bytes()
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(torn)
    with begin(tmp_path, resume=True) as run:
        assert list(run.rows.values()) == [ROW]
        assert (tmp_path / "results.jsonl").read_bytes() == whole
        run.append(ROW._replace(seed=1))
    with begin(tmp_path, resume=True) as run:
        assert [row.seed for row in run.rows.values()] == [0, 1]


def test_a_whole_line_without_its_end_is_cut_off_too(tmp_path):
    """Or the next row would be written onto it."""
    with begin(tmp_path) as run:
        run.append(ROW)
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    with begin(tmp_path, resume=True) as run:
        assert not run.rows
        run.append(ROW)
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("place", [1, 2])
def test_a_whole_line_that_is_no_row_is_refused(tmp_path, place):
    """And stays: another version may have written it."""
    with begin(tmp_path) as run:
        run.append(ROW)
    path = tmp_path / "results.jsonl"
    lines = [path.read_bytes()]
    lines.insert(place - 1, b"{}\n")
    path.write_bytes(b"".join(lines))
    with pytest.raises(Refusal, match=f"must hold a row in each line, got another line {place}; take"):
        begin(tmp_path, resume=True)
    assert path.read_bytes() == b"".join(lines)
    begin(tmp_path / "other").__exit__()


def test_a_row_goes_on_in_the_middle_as_if_it_had_not_stopped(tmp_path):
    row = "test", "arm", 0
    with begin(tmp_path / "whole") as run:
        expected = run.row(*row, Tiny, stretches=3)
        expected_model = read_checkpoint(run.model_path(*row))
    with begin(tmp_path / "stopped") as run:
        with pytest.raises(KeyboardInterrupt):
            run.row(*row, lambda: Tiny(stop=3), stretches=3)
        assert list((tmp_path / "stopped" / "training").iterdir())
        assert not run.rows
    torch.randn(7)  # whatever else is drawn
    with begin(tmp_path / "stopped", resume=True) as run:
        found = run.row(*row, Tiny, stretches=3)
        assert without_seconds(found) == without_seconds(expected)
        assert found.seconds > 0
        model = read_checkpoint(run.model_path(*row))
        assert all(torch.equal(model[key], expected_model[key]) for key in ("weight", "bias"))
        assert not list((tmp_path / "stopped" / "training").iterdir())
        assert run.row(*row, pytest.fail, stretches=3) is found  # not begun again
        assert found.facts == {"parameters": 4}
    with begin(tmp_path / "stopped", resume=True) as run:
        assert run.rows[row] == found


def test_a_model_that_nobody_wants_is_not_kept(tmp_path):
    with begin(tmp_path) as run:
        run.row("validation", "arm", 0, Tiny, stretches=3, keeps_model=False)
    assert not list((tmp_path / "models").iterdir())


def test_figures_that_are_not_finite_are_none(tmp_path):
    with begin(tmp_path) as run:
        run.append(ROW._replace(figures={"loss": float("nan"), "accuracy": float("inf")}))
        metrics = run.write(run.finished("test", [0]), [0])
    assert metrics["figures"]["loss"]["arm"] == {"seeds": {"0": None}, "mean": None, "std": None}
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_names_of_rows_are_names_of_files(tmp_path):
    with begin(tmp_path) as run:
        paths = {run.model_path("test", arm, 0) for arm in ("../../a", "a/b", "a b", "a%2Fb", "lr=0.1,x")}
    assert len(paths) == 5
    assert {path.parent for path in paths} == {tmp_path / "models"}


# A kill between any two steps


def _run_to_the_end(out, resume, kind=Tiny):
    with begin(out, resume=resume, suffix=".pt" if kind is Tiny else "") as run:
        for arm in ("one", "two"):
            run.row("test", arm, 0, lambda: kind(2), stretches=2)
        run.write(run.finished("test", [0]), [0])


def _fork_and_die(out, step, kind):
    """In a fork, dies right before the step-th change of a file; whether it came to that."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    try:
        left = step

        def deadly(call):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        os.fsync = deadly(os.fsync)
        for name in ("mkdir", "replace", "unlink"):
            setattr(Path, name, deadly(getattr(Path, name)))
        _run_to_the_end(out, True, kind)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind, model", [(Tiny, "two-0.pt"), (TinyFolder, "two-0/inner/model.pt")])
def test_killed_at_each_step_it_ends_the_same(tmp_path, monkeypatch, kind, model):
    """At each change of a file, until a run has none left to die at."""
    monkeypatch.setattr(_experiment, "draw", lambda path, *_: path.write_bytes(b"slow to draw"))
    with threads(1):
        _run_to_the_end(tmp_path / "whole", False, kind)
        expected = (tmp_path / "whole" / "curves.csv").read_bytes()
        wanted = torch.load(tmp_path / "whole" / "models" / f"test-{model}")
        step = 1
        while _fork_and_die(tmp_path / str(step), step, kind):
            out = tmp_path / str(step)
            _run_to_the_end(out, True, kind)
            assert (out / "curves.csv").read_bytes() == expected
            assert len((out / "results.jsonl").read_bytes().splitlines()) == 2
            assert len(list((out / "models").iterdir())) == 2
            found = torch.load(out / "models" / f"test-{model}")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in ("weight", "bias"))
            assert not list((out / "training").iterdir())
            step += 1
        assert step > 30


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "model"
    for text in ("one", "two"):
        replace_folder(path, lambda folder, text=text: (folder / f"{text}.txt").write_text(text))
        assert [(file.name, file.read_text()) for file in path.iterdir()] == [(f"{text}.txt", text)]

    def fails(folder):
        (folder / "three.txt").write_text("thr")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(path, fails)
    assert [file.name for file in path.iterdir()] == ["two.txt"]
    replace_folder(path, lambda folder: (folder / "four.txt").touch())
    assert [file.name for file in tmp_path.iterdir()] == ["model"]  # not what was cut off


# Refusals


def refused(message, *args, **kwargs):
    with pytest.raises(Refusal, match=f"^{re.escape(message)}"):
        begin(*args, **kwargs)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = f"--out must be empty, got {tmp_path}; take another, or go on with it by --resume"
    refused(message, tmp_path)
    refused(f"--out must be a run's folder for --resume, got {tmp_path} without", tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_was_used_is_refused_and_left_as_it_was(tmp_path):
    with begin(tmp_path) as run:
        run.append(ROW)
    before = (tmp_path / "results.jsonl").read_bytes()
    refused(f"--out must be empty, got {tmp_path};", tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_resume_begins_where_there_is_nothing(tmp_path):
    (tmp_path / "config.json.tmp").write_text("cut o")  # what a kill at the start leaves
    with begin(tmp_path, resume=True) as run:
        assert not run.rows


def test_another_config_data_or_number_of_threads_is_refused(tmp_path):
    begin(tmp_path).__exit__()
    message = f"--resume must be given what {tmp_path} was begun with, got "
    refused(f"{message}config.lr 0.2 instead of 0.1; repeat", tmp_path, resume=True, config=[("lr", 0.2)])
    refused(f"{message}data.name 'x' instead of 'noise';", tmp_path, resume=True, data=[("name", "x")])
    with threads(torch.get_num_threads() + 1):
        refused(f"{message}threads ", tmp_path, resume=True)
    begin(tmp_path, resume=True).__exit__()
    assert json.loads((tmp_path / "config.json").read_text())["device"] == "cpu"


def test_another_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    begin(tmp_path, device=torch.device("cuda")).__exit__()
    message = (
        f"--resume must be given what {tmp_path} was begun with, got device 'cpu' instead of 'cuda: a GPU"
    )
    refused(message, tmp_path, resume=True, device=torch.device("cpu"))


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Refusal, match=r"^--(out|resume) must be"):
        begin(tmp_path, resume=True)


def test_a_second_run_on_one_folder_is_refused(tmp_path):
    with begin(tmp_path):
        message = f"--out must be a folder that no other run uses, got {tmp_path}; wait for that run to end"
        refused(message, tmp_path, resume=True)
    begin(tmp_path, resume=True).__exit__()


def test_a_refused_run_lets_go_of_its_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    begin(tmp_path).__exit__()
    (tmp_path / "results.jsonl").write_text("{}\n{}\n")
    refused(f"{tmp_path / 'results.jsonl'} must hold a row in each line", tmp_path, resume=True)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(f"--out must be a folder that can be written to, got {tmp_path / 'file'}", tmp_path / "file")
    refused("--out must be a folder that can be written to", tmp_path / "file" / "below")


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(Refusal, match=f"^{re.escape(str(path))} must be a checkpoint, got a file that"):
        read_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(Refusal, match="must be a checkpoint of format 1, got format 99"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(Refusal, match="got format None"):
        read_checkpoint(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"format": 1, "x": _Harmful()}, tmp_path / "x.pt")
    with pytest.raises(Refusal, match="cannot be read"):
        read_checkpoint(tmp_path / "x.pt")
    assert not _Harmful.harm


class _Harmful:
    harm = False

    def __reduce__(self):
        return setattr, (_Harmful, "harm", True)


def test_a_missing_package_is_named():
    require(torch="torch")
    message = "pytohrch not found; install with pip install 'fastkit[recipes]'"
    with pytest.raises(Refusal, match=f"^{re.escape(message)}$"):
        require(torch="torch", pytorch_misspelt="pytohrch")


# Figures


def test_summary_is_by_figure_and_arm():
    rows = [
        ROW._replace(arm=arm, seed=seed, figures={"accuracy": value})
        for arm, seed, value in (("b", 1, 1.0), ("b", 0, 0.5), ("a", 0, 0.25))
    ]
    assert summary(rows) == {
        "accuracy": {
            "a": {"seeds": {"0": 0.25}, "mean": 0.25, "std": None},
            "b": {"seeds": {"0": 0.5, "1": 1.0}, "mean": 0.75, "std": pytest.approx(0.125**0.5)},
        }
    }


def test_differences_are_of_the_seeds_that_both_arms_have():
    rows = [
        ROW._replace(arm=arm, seed=seed, figures={"accuracy": value, "loss": None, **more})
        for arm, seed, value, more in (
            ("a", 0, 0.75, {"only": 1.0}), ("a", 1, 0.5, {}), ("a", 2, 1.0, {}), ("b", 1, 0.25, {}),
            ("b", 0, 1.0, {}), ("b", 3, 0.0, {}), ("c", 0, 0.0, {}),
        )
    ]  # fmt: skip
    assert paired(rows, "a", "b") == {
        "accuracy": {"seeds": {"0": -0.25, "1": 0.25}, "mean": 0.0, "stderr": pytest.approx(0.25)},
        "loss": {"seeds": {"0": None, "1": None}, "mean": None, "stderr": None},
    }
    assert paired(rows, "c", "b")["accuracy"] == {"seeds": {"0": -1.0}, "mean": -1.0, "stderr": None}
    assert paired(rows, "a", "d") == {}


def test_curves_are_over_the_unit_of_the_run(tmp_path):
    """And a figure that only the last point has is no curve."""
    last = ROW._replace(curve=[{"loss": 0.5}, {"loss": 0.25, "test": 1.0}])
    with begin(tmp_path, unit="step", stretch=50) as run:
        run.append(last)
        run.write(run.finished("test", [0]), [0])
    text = (tmp_path / "curves.csv").read_text().splitlines()
    assert text == ["arm,seed,step,loss,test", "arm,0,50,0.5,", "arm,0,100,0.25,1.0"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_in_the_folder(tmp_path):
    with begin(tmp_path) as run:
        for row in (ROW, ROW._replace(arm="none"), ROW._replace(table="validation"), ROW._replace(seed=7)):
            run.append(row)
        metrics = run.write(run.finished("test", [0]), [0], note="more")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == metrics
    assert written["recipe"] == "tiny" and written["config"] == {"lr": 0.1} and written["note"] == "more"
    assert written["data"] == {"name": "noise"} and written["seeds"] == [0] and written["wall_seconds"] == 6
    assert {"python", "torch", "numpy", "fastkit"} <= written["versions"].keys()
    assert list(written["figures"]["accuracy"]) == ["arm", "none"]
    with (tmp_path / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["epoch"], float(line["accuracy"])) for line in lines] == [
        (arm, epoch, value) for arm in ("arm", "none") for epoch, value in (("1", 0.5), ("2", 0.1 + 0.2))
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# Small parts


def test_seeded_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)
    with seeded(5):
        one = torch.randn(2)
    assert torch.equal(torch.randn(2), expected)
    with seeded(5):
        assert torch.equal(torch.randn(2), one)


def test_a_device_is_named_and_refused_where_it_is_not(monkeypatch):
    parser = argparse.ArgumentParser()
    add_device(parser)
    assert device_of(parser.parse_args([])) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refusal, match=r"^--device must be cpu where torch sees no GPU, got cuda; leave it"):
        device_of(parser.parse_args(["--device", "cuda"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(parser.parse_args(["--device", "cuda"])) == torch.device("cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deterministic_algorithms_on_a_gpu_alone_and_as_before_afterwards(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(KeyError), deterministic(torch.device(device)):
        assert torch.are_deterministic_algorithms_enabled() == (device == "cuda")
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's is kept


def test_threads_are_as_before():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, write)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_hash_is_of_the_bytes_in_order():
    assert sha256([b"ab", b"c"]) == sha256([b"abc"]) != sha256([b"acb"])


def test_arguments():
    parser = argparse.ArgumentParser()
    add_arguments(parser, out="there")
    args = parser.parse_args(["--data", "x", "--seeds", "3", "4", "--quick"])
    assert (args.data, args.out, args.seeds, args.resume, args.quick) == (
        Path("x"), Path("there"), [3, 4], False, True,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["--seeds", "-1"])


@pytest.mark.parametrize("options, seeds", [
    ([], [1, 2]), (["--quick"], [1]),
    (["--seeds", "3", "4", "3"], [3, 4]), (["--quick", "--seeds", "5"], [5]),
])  # fmt: skip
def test_seeds_are_those_asked_for_each_once(options, seeds):
    parser = argparse.ArgumentParser()
    add_arguments(parser, out="there")
    assert seeds_of(parser.parse_args(options), (1, 2)) == seeds


def test_progress_is_silent_where_there_is_no_terminal(tmp_path, capfd):
    with begin(tmp_path) as run:
        run.row("test", "arm", 0, Tiny, stretches=3)
    assert capfd.readouterr() == ("", "")


def test_without_locks_runs_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_experiment, "fcntl", None)
    with begin(tmp_path) as run:
        run.append(ROW)
