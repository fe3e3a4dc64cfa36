"""run tied_embedding --task translation: the languages, the translator, and what a folder holds."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.methods.tied_embedding import assert_tied
from fastkit.recipes import _parallel, _tied_translation
from fastkit.recipes._experiment import write_checkpoint
from fastkit.recipes._tied_translation import Data, exact, judged
from fastkit.recipes._tied_translator import (
    ARMS,
    BEGIN,
    END,
    IGNORED,
    PAD,
    Translator,
    load_translator,
    padded,
    parameters,
)

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "tokenizers"):
    pytest.importorskip(package)

made_up = _parallel.generated
TINY = ["--task", "translation", "--quick", "--hidden-size", "8", "--layers", "1", "--pieces", "200"]


def translator(arm, **others):
    torch.manual_seed(0)
    sizes = {"vocabulary": 40, "hidden_size": 16, "layers": 2, "longest": 12, **others}
    return Translator(arm=arm, **sizes).eval()


def sentences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 40, (length,), generator=generator).tolist() for length in lengths]


# The languages


def test_the_languages_share_roots_and_not_the_order_of_words():
    corpus = _parallel.generated(600)
    assert corpus.facts() == _parallel.generated(600).facts()
    pairs = [*corpus.train, *corpus.valid, *corpus.test]
    assert len(pairs) == len({source for source, _ in pairs}) > 500
    assert len(corpus.valid) == len(corpus.test) == len(pairs) // 10
    source, target = ({word for pair in pairs for word in pair[i].split()} for i in (0, 1))
    assert 0.1 < len(source & target) / len(source | target) < 0.5
    assert all(len(one.split()) == len(other.split()) for one, other in pairs)
    known = {}  # of the short ones, noun verb noun: the verb is the last
    for one, other in pairs:
        words = one.split(), other.split()
        if len(words[0]) == 3:
            assert known.setdefault(words[0][1], words[1][2]) == words[1][2]
    assert len(known) > 20


def parallel_folder(folder, source, target):
    folder.mkdir()
    (folder / "source.txt").write_text(source)
    (folder / "target.txt").write_text(target)
    return folder


def test_a_folder_is_read_and_equal_sources_stay_on_one_side(tmp_path):
    lines = [(f"one {i}", f"eins {i}") for i in range(60)]
    lines += [("one 7", "other"), ("", "nothing"), ("nothing", " ")]
    source, target = ("\n".join(side) + "\n" for side in zip(*lines, strict=True))
    corpus = _parallel.load(parallel_folder(tmp_path / "numbers", source, target))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (48, 6, 6)
    assert sorted([*corpus.train, *corpus.valid, *corpus.test]) == sorted(lines[:60])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "a\nb\nc\n", "source and target must have as many lines, got 2 and 3"),
        ("a\n" * 100, "b\n" * 100, "--data must have at least 40 pairs with different sources, got 1"),
    ],
)
def test_what_is_not_parallel_is_refused(tmp_path, source, target, message):
    with pytest.raises(Refusal, match=message):
        _parallel.load(parallel_folder(tmp_path / "x", source, target))


# The translator


def test_arms_differ_in_the_number_of_their_matrices():
    counts = {arm: parameters(translator(arm)) for arm in ARMS}
    assert counts["untied"] - counts["decoder"] == counts["decoder"] - counts["three_way"] == 40 * 16
    models = {arm: translator(arm) for arm in ARMS}
    assert_tied(models["decoder"])
    assert_tied(models["three_way"])
    assert models["decoder"].source.weight is not models["decoder"].target.weight
    assert models["three_way"].source.weight is models["three_way"].scores.weight


@pytest.mark.parametrize("arm", ARMS)
def test_padding_and_what_comes_later_change_nothing(arm):
    model = translator(arm)
    rows, targets = sentences(3, 9), sentences(7, 4)
    source, target = padded(rows, PAD), padded(targets, PAD)
    h = model(source, target)
    for i, (row, of_target) in enumerate(zip(rows, targets, strict=True)):
        alone = model(torch.tensor([row]), torch.tensor([of_target]))[0]
        torch.testing.assert_close(h[i, : len(of_target)], alone, atol=1e-5, rtol=1e-5)
    target[0, 5] = 4 if target[0, 5] != 4 else 5
    changed = ((model(source, target) - h)[0].abs() > 1e-6).any(1)
    assert changed.tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("arm", ARMS)
def test_the_loss_is_of_what_follows(arm):
    model = translator(arm)
    source, target = padded(sentences(3, 9), PAD), padded(sentences(7, 4), PAD)
    following = padded(sentences(7, 4)[::-1], IGNORED)[[1, 0]]
    z = model.scores(model(source, target)).flatten(0, 1).double()
    expected = cross_entropy(z, following.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(model.loss(source, target, following).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_translation_is_the_likeliest_piece_each_time():
    model = translator("three_way")
    with torch.no_grad():
        model.target_places.weight.normal_()  # or it repeats itself
        model.scores.bias[END] = 2.0  # so that some end
    rows = sentences(*range(1, 11))
    found = model.translate(padded(rows, PAD))
    ends = []
    for row, translation in zip(rows, found.tolist(), strict=True):
        pieces = [BEGIN]
        while len(pieces) <= 12 and pieces[-1] != END:
            h = model(torch.tensor([row]), torch.tensor([pieces]))
            pieces.append(model.scores(h[:, -1]).argmax().item())
        assert translation == pieces[1:] + [PAD] * (len(translation) - len(pieces) + 1)
        ends.append(pieces[-1] == END)
    assert any(ends) and len({(row == END).nonzero()[0].item() for row in found}) > 1


@pytest.mark.parametrize("arm", ARMS)
def test_a_model_and_its_tokenizer_are_read_back(tmp_path, arm):
    data = Data(_parallel.generated(200), 150)
    model = translator(arm, vocabulary=150, longest=64)
    training = _tied_translation.Training(model, data, lr=1e-3, steps=100, seed=0)
    training.save(tmp_path / "x")
    loaded, tokenizer = load_translator(tmp_path / "x")
    assert judged(loaded, data.valid) == judged(model, data.valid)
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    if arm != "untied":
        assert_tied(loaded)


def test_another_checkpoint_is_refused(tmp_path):
    write_checkpoint(tmp_path / "x", {"config": {"arm": "untied"}, "state_dict": {}})
    with pytest.raises(Refusal, match="must be a model of run tied_embedding, got another checkpoint"):
        load_translator(tmp_path / "x")


def test_figures_are_of_pieces_and_of_whole_sentences(monkeypatch):
    data = Data(_parallel.generated(200), 150)
    model = translator("untied", vocabulary=150, longest=64)
    part = data.test
    total = right = count = 0
    for source, target in zip(part.source, part.target, strict=True):
        z = model.scores(model(torch.tensor([source]), torch.tensor([[BEGIN, *target]])))[0].double()
        following = torch.tensor([*target, END])
        total += cross_entropy(z, following, reduction="sum").item()
        right += (z.argmax(1) == following).sum().item()
        count += len(following)
    found = judged(model, part)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / count, abs=1e-9)
    # A translator that knows half of the sentences.
    known = {tuple(source): target for source, target in zip(part.source[::2], part.target[::2], strict=True)}
    monkeypatch.setattr(
        model,
        "translate",
        lambda source: padded(
            ([*known.get(tuple(i for i in row if i != PAD), [5]), END] for row in source.tolist()), PAD
        ),
    )
    assert exact(model, part, data.tokenizer) == pytest.approx(len(known) / len(part.source))


# A run


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch, capsys):
    """To the bit; and models give the figures that are reported."""
    options = ["run", "tied_embedding", *TINY, "--steps", "20", "--arms", "three_way", "decoder"]
    monkeypatch.setattr(_tied_translation, "STRETCH", 10)
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    advance = _tied_translation.Training.advance

    def stopping(training):
        if training.schedule.last_epoch == 10:
            raise KeyboardInterrupt
        return advance(training)

    for _ in range(2):  # in the middle of each row
        monkeypatch.setattr(_tied_translation.Training, "advance", stopping)
        assert main([*options, "--out", str(tmp_path / "stopped"), "--resume"]) == 130
        monkeypatch.setattr(_tied_translation.Training, "advance", advance)
        if not (tmp_path / "stopped" / "results.jsonl").read_bytes():
            one = [*options[:-1], "--out", str(tmp_path / "stopped"), "--resume"]  # its first arm alone
            assert main(one) == 0
    assert main([*options, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "stopped")]
    assert all(each.pop("wall_seconds") > 0 for each in metrics)
    assert metrics[0] == metrics[1]
    for arm in ("three_way", "decoder"):
        one, other = (
            load_translator(tmp_path / name / "models" / f"test-{arm}-0")[0] for name in ("whole", "stopped")
        )
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        data = Data(_parallel.generated(1000), 200)
        found = judged(one, data.test)["loss"]
        assert found == pytest.approx(metrics[0]["figures"]["test_loss"][arm]["mean"], rel=1e-5)
        assert metrics[0]["parameters"][arm] == parameters(one)
    pieces = metrics[0]["data"]["pieces"]
    assert pieces["both"] > 50 and sum(pieces.values()) - pieces["all"] <= pieces["all"]
    assert set(metrics[0]["differences"]) == {"three_way minus decoder"}
    assert metrics[0]["chosen"] == {"three_way": 1e-3, "decoder": 1e-3}  # the only one that is tried
    assert "right sentences" in capsys.readouterr().out


def test_each_arm_has_the_rate_that_is_best_on_the_valid_part(tmp_path, monkeypatch):
    monkeypatch.setattr(_tied_translation, "STRETCH", 20)
    options = [option for option in TINY if option != "--quick"]
    monkeypatch.setattr(_parallel, "generated", lambda: made_up(1000))
    monkeypatch.setattr(_tied_translation, "RATES", (1e-4, 1e-2))
    sizes = ["--steps", "20", "--arms", "untied", "decoder", "--seeds", "0", "5"]
    assert main(["run", "tied_embedding", *options, *sizes, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["table"], row["arm"], row["seed"]) for row in rows] == [
        *(("valid", f"{arm},lr={lr}", 0) for arm in ("untied", "decoder") for lr in ("0.0001", "0.01")),
        *(("test", arm, seed) for seed in (0, 5) for arm in ("untied", "decoder")),
    ]
    assert [any(name.startswith("test") for name in row["figures"]) for row in rows] == [False] * 4 + [
        True
    ] * 4
    chosen = json.loads((tmp_path / "metrics.json").read_text())["chosen"]
    for arm, lr in chosen.items():
        tried = {row["arm"]: row["figures"]["valid_loss"] for row in rows[:4] if row["arm"].startswith(arm)}
        assert min(tried, key=tried.get) == f"{arm},lr={lr:g}"
        (first,) = (row for row in rows[4:] if row["arm"] == arm and row["seed"] == 0)
        assert first["figures"]["valid_loss"] == tried[f"{arm},lr={lr:g}"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(
        f"test-{arm}-{seed}" for arm in ("untied", "decoder") for seed in (0, 5)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden-size", "10"], "--hidden-size must be a multiple of 4 with --task translation, got 10"),
        (["--arms", "wt"], "--arms must be of untied, decoder, three_way with --task translation, got wt"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert main(["run", "tied_embedding", *TINY, *options, "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_on_a_gpu_there_is_no_translation(tmp_path, capsys):
    assert main(["run", "tied_embedding", *TINY, "--device", "cuda", "--out", str(tmp_path / "out")]) == 1
    assert "--device must be cpu with --task translation, got cuda" in capsys.readouterr().err
