"""What WordTranslator refuses, in words."""

import re

import numpy as np
import pytest
import torch

from fastkit.methods.word_translation import WordTranslator

pytestmark = pytest.mark.usefixtures("one_thread")


def table(n=200, d=30, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_rows(value, *rows):
    changed = table()
    changed[list(rows)] = value
    return changed


PAIRS = torch.arange(40).repeat(2, 1).T


def refuses(error, message, X=None, Y=None, pairs=None, **options):
    X, Y = table() if X is None else X, table(seed=1) if Y is None else Y
    with pytest.raises(error, match=f"^WordTranslator: {message}"):
        WordTranslator(**options).fit(X, Y, pairs=pairs)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "X must be finite, got NaN or inf in rows 3, 5, 7, 9, 11 and 2 more; drop them"),
        (-float("inf"), "X must be finite, got NaN or inf in rows 3, 5, 7, 9, 11 and 2 more; drop them"),
        (0.0, "X must have no row of zeros, got zeros in rows 3, 5, 7, 9, 11 and 2 more; drop them"),
        (
            0.5,
            "X must have rows that are not constant, got one number in all columns of rows 3, 5, 7, 9, 11;",
        ),
        (1e20, r"X must have entries up to 1e\+15, got larger ones; divide it"),
    ],
)
def test_rows(value, message):
    refuses(ValueError, message, X=with_rows(value, 3, 5, 7, 9, 11, 13, 15))
    message = message.replace("X must", "Y must")
    refuses(ValueError, message, Y=with_rows(value, 3, 5, 7, 9, 11, 13, 15))


def test_one_row_and_rows_that_are_the_mean():
    refuses(ValueError, "X must be finite, got NaN or inf in row 4; drop them", X=with_rows(float("nan"), 4))
    one = torch.ones(50, 3) * torch.tensor([1.0, 2, 2])
    refuses(
        ValueError,
        "Y must have rows that differ from their mean, got none in rows 0, 1",
        X=table(50, 3),
        Y=one,
        pairs=PAIRS,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0]], "X must be a tensor or a numpy array, got list"),
        (torch.ones(3, 3, dtype=torch.int64), "X must be of floats, got torch.int64; pass X.float"),
        (torch.ones(3, 3, dtype=torch.complex64), "X must be of floats, got torch.complex64"),
        (np.ones((3, 3), dtype=np.int32), "X must be of floats, got int32; pass X.astype"),
        (torch.ones(3, 3).to_sparse(), "X must be dense, got torch.sparse_coo; pass X.to_dense"),
    ],
)
def test_types_of_tables(value, message):
    refuses(TypeError, message, X=value)


def test_shapes():
    refuses(ValueError, r"X must have rows and columns, got shape \(30,\)", X=table()[0])
    refuses(ValueError, "Y must have as many columns as X, 30, got 34; pass allow_rect=True", Y=table(d=34))
    refuses(
        ValueError, 'refine="reciprocal_icp" must have tables of one width, got 30 and 34 columns; pass',
        Y=table(d=34), allow_rect=True, refine="reciprocal_icp",
    )  # fmt: skip
    refuses(
        ValueError, 'transfer="icp" must have tables of one width, got 30 and 34 columns; pass transfer="pro',
        Y=table(d=34), allow_rect=True, transfer="icp",
    )  # fmt: skip
    refuses(ValueError, "X must have at least components=25 columns, got 20", X=table(d=20), Y=table(d=20))
    refuses(
        ValueError, "Y must have at least components=25 rows of the first words=2000, got 24", Y=table(24)
    )
    refuses(
        ValueError, "X must have at least batch_size=128 rows of the first words=2000, got 127", X=table(127)
    )
    refuses(ValueError, "X must have at least batch_size=128 rows of the first words=100, got 100", words=100)
    refuses(
        ValueError, "X must have at least as many rows as columns, 300, got 200; pass more words, or fewer",
        X=table(d=300), Y=table(d=300),
    )  # fmt: skip
    refuses(
        ValueError,
        "Y must have at least neighbors=10 rows, got 9; lower neighbors",
        Y=table(9),
        pairs=PAIRS[:9],
    )
    refuses(ValueError, r"X must have rows and columns, got shape \(200, 0\)", X=table(d=0), Y=table(d=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "preset must be one of 'robust', 'release', 'paper', got 'fast'"),
        ({"refine": "csls"}, "refine must be one of 'none', 'reciprocal_icp', .*, got 'csls'"),
        ({"retrieval": "knn"}, "retrieval must be one of 'csls', 'isf', 'nn', got 'knn'"),
        ({"transfer": "svd"}, "transfer must be one of 'procrustes', 'icp', got 'svd'"),
        ({"dictionary": "t2s"}, "dictionary must be one of 's2t', 'mutual', got 't2s'"),
        (
            {"preprocess": ("unit", "whiten")},
            "a step of preprocess must be one of 'unit', 'center', got 'whiten'",
        ),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"components": 1}, "components must be at least 2, got 1"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"cycle_weight": -1.0}, "cycle_weight must be finite and not negative, got -1.0"),
        ({"betas": (0.5, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.5, 1.0\)"),
        ({"halvings": (30, 20)}, r"halvings must be epochs in ascending order, got \(30, 20\)"),
        ({"controls": 0}, "controls must be at least 1, got 0"),
        ({"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ({"isf_beta": -30.0}, "isf_beta must be positive and finite, got -30.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, r"seed must be below 2\^63"),
    ],
)
def test_values_of_options(options, message):
    refuses(ValueError, message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 2.0}, "restarts must be an integer, got 2.0"),
        ({"epochs": True}, "epochs must be an integer, got True"),
        ({"lr": "1e-2"}, "lr must be a number, got '1e-2'"),
        ({"preprocess": "unit"}, "preprocess must be a tuple, got 'unit'"),
        ({"allow_rect": 1}, "allow_rect must be True or False, got 1"),
        ({"progress": "bar"}, "progress must be None, True or False, got 'bar'"),
    ],
)
def test_types_of_options(options, message):
    refuses(TypeError, message, **options)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (PAIRS[:0], ValueError, "pairs must have at least one pair, got none"),
        (PAIRS[:, 0], ValueError, r"pairs must have shape \(P, 2\), rows of X and of Y, got \(40,\)"),
        (PAIRS.float(), TypeError, "pairs must be a tensor or an array of int64, got torch.float32"),
        ([(0, 0)], TypeError, "pairs must be a tensor or an array of int64, got list"),
        (PAIRS + torch.tensor([190, 0]), ValueError, "pairs must have rows of X below 200, got 200"),
        (PAIRS - torch.tensor([0, 1]), ValueError, "pairs must have rows of Y below 200, got -1"),
    ],
)
def test_pairs(pairs, error, message):
    refuses(error, message, pairs=pairs)
    with pytest.raises(error, match=f"^WordTranslator: {message}"):
        WordTranslator().fit(table(), table(seed=1), pairs=PAIRS).score(pairs)


def test_an_unfitted_one_and_what_a_fitted_one_is_given():
    translator = WordTranslator()
    for method in ("transform", "inverse", "translate", "score", "save"):
        with pytest.raises(RuntimeError, match=f"^WordTranslator: {method} needs a fit; call fit"):
            getattr(translator, method)(table())
    translator.fit(table(), table(seed=1), pairs=PAIRS)
    for call, message in (
        (lambda: translator.transform(table(d=29)), "X must have 30 columns, got shape (200, 29)"),
        (lambda: translator.inverse(table(d=29)), "Y must have 30 columns, got shape (200, 29)"),
        (lambda: translator.translate(table(d=29)), "vectors must have 30 columns, got shape (200, 29)"),
        (lambda: translator.translate(table()[0]), "vectors must have rows and columns, got shape (30,)"),
        (
            lambda: translator.translate(with_rows(float("nan"), 4)),
            "vectors must be finite, got NaN or inf in row 4",
        ),
        (
            lambda: translator.translate(with_rows(0.0, 4)),
            "vectors must have no row of zeros, got zeros in row 4",
        ),
        (lambda: translator.translate(table(), 0), "k must be between 1 and the 200 words of Y, got 0"),
        (lambda: translator.translate(table(), 201), "k must be between 1 and the 200 words of Y, got 201"),
        (lambda: translator.translate(table(), 2.0), "k must be between 1 and the 200 words of Y, got 2.0"),
        (
            lambda: translator.translate(table(), retrieval="l2"),
            "retrieval must be one of 'csls', 'isf', 'nn', got 'l2'",
        ),
        (lambda: translator.score(PAIRS, ks=()), "ks must be between 1 and the 200 words of Y, got ()"),
        (
            lambda: translator.score(PAIRS, ks=(1, 201)),
            "ks must be between 1 and the 200 words of Y, got (1, 201)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_fit_that_is_refused_changes_nothing():
    translator = WordTranslator().fit(table(), table(seed=1), pairs=PAIRS)
    before = translator.w_xy_
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        translator.set_params(restarts=0).fit(table(), table())
    assert translator.w_xy_ is before


def test_a_rate_that_is_too_large():
    options = {"restarts": 2, "epochs": 3, "halvings": (), "lr": 1e30}
    refuses(ValueError, r"no restart has a finite cost after 3 epochs; lower lr, got 1e\+30", **options)
    refuses(
        ValueError, r"the cost of transfer is not finite; lower lr, got 1e\+30", transfer="icp",
        **{**options, "epochs": 1},
    )  # fmt: skip


@pytest.mark.gpu
def test_tables_on_two_devices():
    refuses(RuntimeError, "Y must be on the device of X, cpu, got cuda", Y=table().cuda())
    translator = WordTranslator().fit(table(), table(seed=1), pairs=PAIRS)
    with pytest.raises(RuntimeError, match="vectors must be on the device of the maps, cpu, got cuda"):
        translator.translate(table().cuda())
