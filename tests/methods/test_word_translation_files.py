"""Fits that are killed and go on, and translators that are saved and loaded."""

import json
import os
import warnings

import numpy as np
import pytest
import torch

from fastkit.methods.word_translation import WordTranslator, checkpoint, refinement, restarts

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:WordTranslator. not conv"),
]

OPTIONS = {
    "components": 8,
    "restarts": 4,
    "epochs": 6,
    "halvings": (2, 4),
    "batch_size": 32,
    "trial_rounds": 1,
}
WAYS = {
    "csls": {"refine_rounds": 2},
    "icp": {"transfer": "icp", "transfer_epochs": 2, "refine": "reciprocal_icp", "refine_epochs": 2},
}
LEARNT = (
    "w_xy_", "w_yx_", "means_x_", "means_y_", "restart_costs_", "restart_mutual_", "restart_epochs_",
    "restart_seeds_", "penalty_",
)  # fmt: skip
FIGURES = ("converged_", "candidates_", "control_score_", "criterion_", "best_restart_")


def tables(n=150, d=10):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).exp() * torch.linspace(3, 0.5, d)
    return x, (x @ torch.linalg.qr(torch.randn(d, d, generator=g))[0])[torch.randperm(n, generator=g)]


def same(a, b):
    return all(getattr(a, name) == getattr(b, name) for name in FIGURES) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in LEARNT
    )


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """Every state is written, and the work ends before its n-th call of the op that moves a stage on."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    whole = restarts.ops.icp_epoch, refinement.induced

    def kill_at(n):
        calls = 0

        def counted(op):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == n:
                    raise Killed
                return op(*args, **options)

            return call

        monkeypatch.setattr(restarts.ops, "icp_epoch", counted(whole[0]))
        monkeypatch.setattr(refinement, "induced", counted(whole[1]))

    return kill_at


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_fit_goes_on_and_ends_with_the_same_bits(tmp_path, kill_at, way):
    options = {**OPTIONS, **WAYS[way]}
    expected = WordTranslator(**options).fit(*tables())
    kills = 0
    while True:
        kill_at(3)  # two more steps each time
        try:
            resumed = WordTranslator(**options).fit(*tables(), checkpoint=tmp_path)
            break
        except Killed:
            kills += 1
    assert kills >= 8
    assert same(resumed, expected)
    assert set(resumed.timings_) == set(expected.timings_)
    kill_at(1 if way == "csls" else 3)  # of what is finished nothing is done again
    again = WordTranslator(**options, progress=False, retrieval="nn").fit(*tables(), checkpoint=str(tmp_path))
    assert torch.equal(again.w_xy_, expected.w_xy_) and again.penalty_ is None
    assert again.timings_["restarts"] == resumed.timings_["restarts"]


def test_a_kill_while_a_state_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    expected = WordTranslator(**OPTIONS).fit(*tables())
    calls = 0
    replaced = os.fsync

    def killed(descriptor):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Killed
        replaced(descriptor)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)
    (tmp_path / "restarts.pt.1.tmp").write_bytes(b"half")  # what a process that was killed outright leaves
    state = torch.load(tmp_path / "restarts.pt", weights_only=True)
    assert 0 < state["step"] < 6
    assert same(WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path), expected)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    x, y = tables()
    WordTranslator(**OPTIONS).fit(x, y, checkpoint=tmp_path / "fit")
    before = {path.name: path.read_bytes() for path in (tmp_path / "fit").iterdir()}

    def refuses(message, x=x, y=y, **options):
        with pytest.raises(ValueError, match=f"^WordTranslator: checkpoint must .*{message}"):
            WordTranslator(**{**OPTIONS, **options}).fit(x, y, checkpoint=tmp_path / "fit")

    refuses(
        "of the same data and settings, got .*fit of others: X '[0-9a-f]+' there, '[0-9a-f]+' here; take",
        x=x + 1,
    )
    refuses("others: Y '", y=y.flip(0))
    refuses("others: settings.seed 0 there, 1 here; take another folder", seed=1)
    refuses(
        "settings.restarts 4 there, 5 here; settings.refine_rounds 5 there, 6 here",
        restarts=5,
        refine_rounds=6,
    )
    with pytest.raises(ValueError, match=r"others: settings.refine .*; pairs None there, '"):
        WordTranslator(**OPTIONS).fit(x, y, pairs=torch.tensor([[0, 1]] * 20), checkpoint=tmp_path / "fit")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fit").iterdir()} == before

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"must be empty or of an earlier fit, got .*other with notes.txt; take"
    ):
        WordTranslator(**OPTIONS).fit(x, y, checkpoint=tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"checkpoint must be a folder that can be written to, got .*notes.txt"
    ):
        WordTranslator(**OPTIONS).fit(x, y, checkpoint=tmp_path / "other" / "notes.txt")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04N.", b"[" * 100_000], ids=range(4))
def test_a_state_that_cannot_be_read_is_refused(tmp_path, content):
    WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)
    (tmp_path / "refine.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^WordTranslator: checkpoint must have .*refine.pt.*; remove it"):
        WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)
    (tmp_path / "refine.pt").unlink()
    WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"checkpoint must have a config.json that can be read, got .*; take"
    ):
        WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)


def test_a_state_runs_nothing(tmp_path):
    WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)
    torch.save({"step": 0, "finished": False, "seconds": 0.0, "w_xy": np.dtype}, tmp_path / "refine.pt")
    with pytest.raises(ValueError, match="checkpoint must have files that can be read"):
        WordTranslator(**OPTIONS).fit(*tables(), checkpoint=tmp_path)


def test_progress(capsys):
    tqdm = pytest.importorskip("tqdm")
    del tqdm
    WordTranslator(**OPTIONS).fit(*tables())
    WordTranslator(**OPTIONS, progress=False).fit(*tables())
    assert capsys.readouterr() == ("", "")
    WordTranslator(**OPTIONS, progress=True).fit(*tables())
    printed = capsys.readouterr()
    assert printed.out == "" and "restarts" in printed.err and "refine" in printed.err


# Files


@pytest.fixture(scope="module")
def fitted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return WordTranslator(**OPTIONS, preprocess=["center", "unit"], seed=4).fit(*tables())


@pytest.fixture
def saved(fitted, tmp_path):
    pytest.importorskip("safetensors")
    fitted.save(tmp_path / "words.safetensors")
    return tmp_path / "words.safetensors"


def test_what_is_loaded_is_what_was_saved(fitted, saved):
    loaded = WordTranslator.load(saved)
    assert same(loaded, fitted)
    assert loaded.timings_ == fitted.timings_
    assert loaded.get_params() == {**fitted.get_params(), "preprocess": ("center", "unit")}
    x, y = tables()
    assert torch.equal(loaded.transform(x), fitted.transform(x))
    assert torch.equal(loaded.inverse(y), fitted.inverse(y))
    for retrieval in ("csls", "isf", "nn"):
        for ours, theirs in zip(
            loaded.translate(x, 3, retrieval=retrieval),
            fitted.translate(x, 3, retrieval=retrieval),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    pairs = torch.arange(20).repeat(2, 1).T
    assert loaded.score(pairs) == fitted.score(pairs)
    assert same(loaded.fit(x, y), fitted)
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("retrieval", ["csls", "isf", "nn"])
def test_without_tables_and_of_pairs(tmp_path, retrieval):
    pytest.importorskip("safetensors")
    x, y = tables()
    translator = WordTranslator(retrieval=retrieval).fit(x, y, pairs=torch.arange(150).repeat(2, 1).T)
    path = tmp_path / "maps.safetensors"
    translator.save(path, tables=False)
    assert path.stat().st_size < 10_000
    loaded = WordTranslator.load(path)
    assert np.isnan(loaded.control_score_) and loaded.candidates_ == [] and loaded.best_restart_ == -1
    assert torch.equal(loaded.transform(x), translator.transform(x))
    for call in (
        lambda: loaded.translate(x),
        lambda: loaded.score(torch.tensor([[0, 0]])),
        lambda: loaded.save(path),
    ):
        with pytest.raises(
            RuntimeError, match=r"translations must have the tables, got a file of save.tables=False"
        ):
            call()
    loaded.save(path, tables=False)
    assert torch.equal(WordTranslator.load(path).w_xy_, translator.w_xy_)


def test_a_save_that_fails_leaves_the_file(fitted, saved, monkeypatch):
    before = saved.read_bytes()

    def killed(descriptor):
        raise Killed

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        fitted.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def rewritten(path, change):
    """The file with changed tensors and facts."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        key, text = next(iter(file.metadata().items()))
    facts = json.loads(text)
    change(tensors, facts)
    save_file(tensors, path, {key: json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.pop("w_xy_"), "must have a tensor w_xy_, got none"),
        (
            lambda t, f: t.update(w_yx_=torch.ones(10, 9)),
            r"w_yx_ of .* must have shape \(10, 10\), got \(10, 9\)",
        ),
        (lambda t, f: t.update(w_xy_=torch.full((10, 10), torch.nan)), "w_xy_ of .* must be finite, got NaN"),
        (
            lambda t, f: t.update(penalty_=torch.ones(9)),
            r"targets of .* must have shape \(9, 10\), got \(150, 10\)",
        ),
        (lambda t, f: t.pop("targets"), "must have a tensor targets, got none"),
        (lambda t, f: t.pop("penalty_"), "must have tensors of its options, got others"),
        (
            lambda t, f: t.update(w_xy_=torch.ones(10, 10, dtype=torch.float64)),
            "must be torch.float32, got torch.fl",
        ),
        (lambda t, f: f.update(format=2), "must be of format 1, got 2; is it of a later version"),
        (
            lambda t, f: f["settings"].update(restarts=0),
            "must have options and figures, got others .*restarts",
        ),
        (lambda t, f: f["params"].update(later=1), "must have options and figures, got others .*later"),
        (lambda t, f: f.pop("criterion_"), "must have options and figures, got others .*criterion_"),
        (lambda t, f: f.update(candidates_=[1]), "must have options and figures, got others"),
    ],
)
def test_files_of_other_content_are_refused(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(ValueError, match=f"^WordTranslator: .*{message}"):
        WordTranslator.load(saved)


def test_other_files_are_refused(fitted, saved):
    with pytest.raises(ValueError, match=r"path must be a file, got the folder .*; pass .*words.safetensors"):
        fitted.save(saved.parent)
    with pytest.raises(FileNotFoundError, match=r"path must be a file of save, got .*, which is not there"):
        WordTranslator.load(saved.parent / "none")
    content = saved.read_bytes()
    for part in (content[:-10], content[:100], b"", b"text"):
        saved.write_bytes(part)
        with pytest.raises(ValueError, match="must be a whole safetensors file, got one that is not"):
            WordTranslator.load(saved)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, saved)
    with pytest.raises(
        ValueError, match=r"path must be a file of save, got .*, a safetensors file of something else"
    ):
        WordTranslator.load(saved)
