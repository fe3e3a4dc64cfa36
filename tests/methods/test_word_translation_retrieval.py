"""Translations by fitted maps: penalties, scores, their bits, and precision; dictionaries as rows."""

import numpy as np
import pytest
import torch

from fastkit.methods.word_translation import WordTranslator, row_pairs
from fastkit.methods.word_translation import tables as rows

pytestmark = pytest.mark.usefixtures("one_thread")

U = 2.0**-24


@pytest.fixture(scope="module")
def tables():
    """150 and 130 words, of which the first 100 are translations of one another, but for noise."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(150, 12, generator=g), torch.randn(130, 12, generator=g)
    y[:100] = (x[:100] + 0.5 * torch.randn(100, 12, generator=g)) @ torch.linalg.qr(y[:12])[0]
    return x + 0.3, y - 0.2


@pytest.fixture(scope="module", params=["csls", "isf", "nn"])
def retrieval(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(tables, retrieval):
    pairs = torch.arange(100).repeat(2, 1).T
    return WordTranslator(retrieval=retrieval, neighbors=7, isf_beta=20.0).fit(*tables, pairs=pairs)


def cosines(fitted, tables):
    """Of all words, in float64, from the tables as they were given."""
    units = []
    for table in tables:
        table = torch.nn.functional.normalize(table.double())
        units.append(torch.nn.functional.normalize(table - table.mean(0)))
    return torch.nn.functional.normalize(units[0] @ fitted.w_xy_.double().T) @ units[1].T


def dense(cosines, retrieval):
    """Scores (n, m) by the formula, and what each target is charged with."""
    if retrieval == "csls":
        of_targets = cosines.topk(7, 0).values.mean(0)
        return 2 * cosines - cosines.topk(7, 1).values.mean(1, keepdim=True) - of_targets, of_targets
    if retrieval == "isf":
        return (20 * cosines).softmax(0), (20 * cosines).logsumexp(0)
    return cosines, None


def test_scores_and_penalty_are_those_of_all_pairs(fitted, tables, retrieval):
    expected, charged = dense(cosines(fitted, tables), retrieval)
    scores, indices = fitted.translate(tables[0], 9)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    # Rows of both tables are normalised three times, and a cosine is a sum over 12 columns.
    tolerance = 2 * 80 * U * (20 if retrieval == "isf" else 1)
    best = expected.topk(9, 1).values
    torch.testing.assert_close(scores.double(), best, atol=tolerance, rtol=0)
    torch.testing.assert_close(expected.gather(1, indices), best, atol=tolerance, rtol=0)
    if retrieval == "nn":
        assert fitted.penalty_ is None
    else:
        torch.testing.assert_close(fitted.penalty_.double(), charged, atol=tolerance, rtol=0)


def test_a_word_by_itself_has_the_bits_that_it_has_among_others(fitted, tables):
    x = tables[0]
    everything = fitted.translate(x, 5)
    for some in (slice(0, 1), slice(7, 8), slice(149, 150), slice(3, 40)):
        part = fitted.translate(x[some], 5)
        assert torch.equal(part.scores, everything.scores[some])
        assert torch.equal(part.indices, everything.indices[some])
        assert torch.equal(fitted.transform(x[some]), fitted.transform(x)[some])
    assert fitted.translate(x[:0]).indices.shape == (0, 10)
    assert torch.equal(fitted.translate(x.double().numpy(), 5).scores, everything.scores)


def test_another_retrieval_is_that_of_a_fit_with_it(fitted, tables, retrieval):
    pairs = torch.arange(100).repeat(2, 1).T
    for other in ("csls", "isf", "nn"):
        one = WordTranslator(retrieval=other, neighbors=7, isf_beta=20.0).fit(*tables, pairs=pairs)
        assert torch.equal(
            one.translate(tables[0], 4).scores, fitted.translate(tables[0], 4, retrieval=other).scores
        )
        assert one.score(pairs) == fitted.score(pairs, retrieval=other)


def test_options_of_the_fit_are_kept(tables):
    pairs = torch.arange(100).repeat(2, 1).T
    translator = WordTranslator(neighbors=7).fit(*tables, pairs=pairs)
    before = translator.translate(tables[0], 3)
    translator.set_params(retrieval="nn", neighbors=2, preprocess=())
    assert torch.equal(translator.translate(tables[0], 3).scores, before.scores)


def test_transform_and_inverse(fitted, tables):
    x, y = tables
    for table, means, w, method in (
        (x, fitted.means_x_, fitted.w_xy_, fitted.transform),
        (y, fitted.means_y_, fitted.w_yx_, fitted.inverse),
    ):
        own = torch.nn.functional.normalize(table.double())
        torch.testing.assert_close(means[1].double(), own.mean(0), atol=8 * U, rtol=0)
        assert not means[[0, 2]].any()
        own = torch.nn.functional.normalize(own - own.mean(0))
        torch.testing.assert_close(method(table).double(), own @ w.double().T, atol=60 * U, rtol=0)
    there = fitted.transform(x)
    assert torch.allclose(there.norm(dim=1), torch.ones(150), atol=1e-5)


def test_precision_is_that_of_a_count(fitted, tables):
    g = torch.Generator().manual_seed(3)
    pairs = torch.stack([torch.randint(40, (60,), generator=g), torch.randint(130, (60,), generator=g)], 1)
    pairs = torch.cat([pairs, torch.arange(30, 60).repeat(2, 1).T, pairs[:5]])
    found = fitted.translate(tables[0], 10).indices.tolist()
    right: dict[int, set[int]] = {}
    for source, target in pairs.tolist():
        right.setdefault(source, set()).add(target)
    score = fitted.score(pairs, ks=(1, 3, 10))
    assert score.queries == len(right)
    for k in (1, 3, 10):
        hits = sum(bool(right[source] & set(found[source][:k])) for source in right)
        assert score.precision[k] == pytest.approx(hits / len(right), abs=1e-12)
    assert 0 < score.precision[1] < score.precision[10]
    assert fitted.score(pairs.numpy().astype(np.int32), ks=(1, 3, 10)) == score


# Rows


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 64, 100])
def test_products_and_norms_within_rounding_and_with_bits_of_their_own(columns):
    g = torch.Generator().manual_seed(columns)
    table, w = torch.randn(37, columns, generator=g), torch.randn(5, columns, generator=g)
    result = rows.mapped(table, w)
    budget = (columns + 2) * U * (table.abs().double() @ w.abs().double().T)
    assert ((result.double() - table.double() @ w.double().T).abs() <= budget).all()
    unit = rows.unit(table)
    exact = table.double() / table.double().norm(dim=1, keepdim=True)
    assert ((unit.double() - exact).abs() <= 20 * U * exact.abs()).all()
    for i in (0, 20, 36):
        assert torch.equal(rows.mapped(table[i : i + 1], w), result[i : i + 1])
        assert torch.equal(rows.unit(table[i : i + 1]), unit[i : i + 1])
        assert torch.equal(rows.row_sums(table[i : i + 1]), rows.row_sums(table)[i : i + 1])


def test_rows_of_any_size_are_normalised():
    table = torch.tensor([[3.0, 4], [3e-38, 4e-38], [0, 0], [3e14, 4e14]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0, 0], [0.6, 0.8]])
    torch.testing.assert_close(rows.unit(table), expected, atol=1e-6, rtol=0)


# Dictionaries


def test_a_dictionary_of_words_as_rows():
    source, target = ["the", "cat", "dog", "cat"], ["die", "katze", "hund", "der"]
    entries = [
        ("the", "der"),
        ("the", "die"),
        ("cat", "katze"),
        ("cat", "katze"),
        ("cow", "kuh"),
        ("dog", "köter"),
    ]
    found = row_pairs(entries, source, target)
    assert found.pairs.tolist() == [[0, 3], [0, 0], [1, 1]]
    assert (found.found, found.words, found.coverage) == (2, 4, 0.5)
    assert row_pairs(iter(entries[:1]), source, target).coverage == 1.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "dictionary must have pairs of words, got none"),
        (
            [("cow", "kuh")],
            "must have a pair whose words are both in the tables, got 1 source words without one",
        ),
        (["cow"], "dictionary must have pairs of words, got 'cow'"),
        ([("a", "b", "c")], r"dictionary must have pairs of words, got \('a', 'b', 'c'\)"),
    ],
)
def test_dictionaries_that_are_refused(entries, message):
    with pytest.raises(ValueError, match=f"^row_pairs: .*{message}"):
        row_pairs(entries, ["cat"], ["katze"])
