"""What the demo trains: a model whose memory is its filters, with torch and scikit-learn alone."""

import pytest
import torch

from fastkit.__main__ import main
from fastkit.bench import demo
from fastkit.recipes._focus_demo import PixelClassifier, train_digits

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


def test_without_filters_order_is_not_seen():
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 64, 1), torch.tensor([64, 64])
    for filtered in (True, False):
        model = PixelClassifier(filtered=filtered)
        same = torch.allclose(model(x.flip(1), lengths), model(x, lengths), atol=1e-5)
        assert same != filtered


def test_curves_are_of_each_seed_and_come_out_the_same_again():
    curves = train_digits(seeds=(0, 3), epochs=1)
    assert [(c.seed, c.filtered) for c in curves] == [(0, True), (0, False), (3, True), (3, False)]
    assert all(len(curve.accuracy) == 1 and 0 <= curve.accuracy[0] <= 1 for curve in curves)
    assert train_digits(seeds=(3,), epochs=1) == curves[2:]


def test_the_demo_does_without_transformers(run_script):
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fastkit.bench.demo import train_digits\n"
        "assert len(train_digits(seeds=(0,), epochs=1)) == 2"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_demo_says_what_is_kept(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "\ndemo: stopped; demo.csv has what was measured\n"
