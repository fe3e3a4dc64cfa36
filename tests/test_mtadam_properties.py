"""What ops.mtadam_update_ must be whatever its sizes: of weights, of the order of terms, of tensors apart."""

import pytest
import torch

from fastkit import ops
from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops.mtadam import KERNELS
from fastkit.testing.mtadam import (
    Inputs,
    Options,
    cloned,
    compare,
    expected_results,
    make_grads,
    make_inputs,
)

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

STEPS = 3
SHAPES = (), (1,), (3,), (8,), (2, 5), (33,), (70,), (3, 4, 2)


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def given_calls(dtypes=(torch.float32, torch.float64), **more):
    """Runs a test on many sizes and options; always the same ones."""
    inputs = strategies.builds(
        make_inputs,
        strategies.lists(strategies.sampled_from(SHAPES), min_size=1, max_size=4),
        strategies.integers(1, 5),
        dtype=strategies.sampled_from(dtypes),
        amsgrad=strategies.booleans(),
        steps=strategies.sampled_from((0, 2)),
        seed=strategies.integers(0, 1000),
    )
    options = strategies.fixed_dictionaries(
        {
            "alive_eps": strategies.just(1e-30),  # whatever the weights, all are alive
            "weight_decay": strategies.sampled_from((0.0, 0.125)),
            "decoupled": strategies.booleans(),
            "max_scale": strategies.sampled_from((None, 8.0)),
        }
    )

    def decorate(test):
        settings = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
        return settings(hypothesis.given(inputs=inputs, options=options, **more)(test))

    return decorate


def of_terms(draw, L, strategy):
    return draw.draw(strategies.lists(strategy, min_size=L, max_size=L))


def gradients(inputs):
    return [make_grads(inputs.params, inputs.terms, seed=2000 + step) for step in range(STEPS)]


def run(impl, inputs, steps, **options):
    """The trajectory of a copy under these gradients."""
    inputs = cloned(inputs)
    *tensors, maxima = inputs
    options = {**Options()._asdict(), **options}
    for grads in steps:
        tensors[1] = grads
        ops.mtadam_update_(*tensors, max_exp_avg_sqs=maxima, impl=impl, **options)
    return inputs


def weighted(steps, weights):
    """Gradients of losses with these weights, one a term."""
    return [
        [None if g is None else weights[j * len(weights) // len(grads)] * g for j, g in enumerate(grads)]
        for grads in steps
    ]


def assert_same_bits(inputs, others, but=()):
    of_others = others.results()
    for name, got in inputs.results().items():
        if name.partition("[")[0] not in but:
            assert torch.equal(got, of_others[name]), name


@given_calls(draw=strategies.data())
def test_weights_of_powers_of_two_do_not_matter(impl, inputs, options, draw):
    """Of all terms but the anchor, for the trajectory, bit for bit; norms are what they are."""
    L = inputs.terms
    anchor = draw.draw(strategies.integers(0, L - 1))
    inputs = inputs._replace(grad_norms=torch.zeros_like(inputs.grad_norms))  # norms before are weighted too
    options["max_scale"] = None  # limits what weights do
    weights = [2.0**k for k in of_terms(draw, L, strategies.integers(-20, 20))]
    weights[anchor] = 1.0
    steps = gradients(inputs)
    plain = run(impl, inputs, steps, anchor=anchor, **options)
    other = run(impl, inputs, weighted(steps, weights), anchor=anchor, **options)
    assert_same_bits(other, plain, but=["grad_norms"])
    assert torch.equal(other.grad_norms, plain.grad_norms * torch.tensor(weights))


@given_calls(dtypes=(torch.float64,), draw=strategies.data())
def test_weights_do_not_matter(impl, inputs, options, draw):
    """But for rounding."""
    L = inputs.terms
    inputs = inputs._replace(grad_norms=torch.zeros_like(inputs.grad_norms))
    options["max_scale"] = None
    weights = of_terms(draw, L, strategies.floats(-1e6, 1e6).filter(lambda w: abs(w) > 1e-6))
    weights = [1.0, *map(abs, weights[1:])]
    steps = gradients(inputs)
    plain = run(impl, inputs, steps, **options)
    other = run(impl, inputs, weighted(steps, weights), **options)
    for name, got in other.results().items():
        if name != "grad_norms":
            torch.testing.assert_close(got, plain.results()[name], rtol=1e-9, atol=1e-12)


@given_calls(draw=strategies.data())
def test_the_order_of_other_terms_is_no_matter(impl, inputs, options, draw):
    """Nor that of the anchor, which is named: but for m, a sum in another order, all bits are the same."""
    L, n = inputs.terms, len(inputs.params)
    anchor = draw.draw(strategies.integers(0, L - 1))
    order = draw.draw(strategies.permutations(range(L)))
    ranks = of_terms(draw, L, strategies.sampled_from((0.0, 0.5, 1.0, 2.0)))

    def reordered(tensors, of=order):
        return [tensors[term * n + i] for term in of for i in range(n)]

    other = cloned(inputs)._replace(
        grads=reordered(inputs.grads),
        exp_avg_sqs=[t.clone() for t in reordered(inputs.exp_avg_sqs)],
        grad_norms=inputs.grad_norms[:, order].contiguous(),
    )
    expected = expected_results(inputs, anchor=anchor, ranks=ranks, **options)
    plain = run(impl, inputs, [inputs.grads], anchor=anchor, ranks=ranks, **options)
    permuted = [ranks[term] for term in order]
    other = run(impl, other, [other.grads], anchor=order.index(anchor), ranks=permuted, **options)
    back = [order.index(term) for term in range(L)]
    other = other._replace(
        exp_avg_sqs=reordered(other.exp_avg_sqs, back), grad_norms=other.grad_norms[:, back].contiguous()
    )
    assert_same_bits(other, plain, but=["params", "exp_avgs"])
    compare(other, expected)


def some(inputs, indices):
    """The call on some of the tensors alone."""
    n = len(inputs.params)

    def chosen(tensors):
        return None if tensors is None else [t for j, t in enumerate(tensors) if j % n in indices]

    lists = [chosen(tensors) for tensors in (*inputs[:4], inputs.max_exp_avg_sqs)]
    indices = sorted(indices)
    return Inputs(*lists[:4], inputs.grad_norms[indices], inputs.steps[indices], lists[4])


@given_calls(draw=strategies.data())
def test_a_list_in_two_calls_is_the_same(impl, inputs, options, draw):
    """Bit for bit: no tensor depends on another."""
    n = len(inputs.params)
    mine = set(draw.draw(strategies.lists(strategies.integers(0, n - 1), min_size=1, unique=True)))
    steps = gradients(inputs)
    whole = run(impl, inputs, steps, **options)
    for indices in (mine, set(range(n)) - mine):
        if indices:
            of_them = [some(inputs._replace(grads=grads), indices).grads for grads in steps]
            part = run(impl, some(inputs, indices), of_them, **options)
            assert_same_bits(part, some(whole, indices))


@given_calls()
def test_a_term_that_reaches_nothing_may_be_added(impl, inputs, options):
    """Where the decay is not part of its gradient."""
    options["decoupled"] = True
    n = len(inputs.params)
    more = inputs._replace(
        exp_avg_sqs=inputs.exp_avg_sqs + [torch.zeros_like(t) for t in inputs.exp_avgs],
        grad_norms=torch.cat([inputs.grad_norms, torch.zeros_like(inputs.grad_norms[:, :1])], 1),
    )
    steps = gradients(inputs)
    plain = run(impl, inputs, steps, **options)
    for nothing in ([None] * n, [torch.zeros_like(p) for p in inputs.params]):
        added = run(impl, more, [grads + nothing for grads in steps], **options)
        assert not any(t.any() for t in added.exp_avg_sqs[-n:]) and not added.grad_norms[:, -1].any()
        trimmed = added._replace(
            exp_avg_sqs=added.exp_avg_sqs[:-n], grad_norms=added.grad_norms[:, :-1].contiguous()
        )
        assert_same_bits(trimmed, plain)


@given_calls(k=strategies.integers(-20, 20))
def test_the_scale_of_all_losses_does_not_matter(impl, inputs, options, k):
    """To a step from the start without eps, bit for bit: m and the root of v grow alike."""
    options |= {"decoupled": True, "eps": 0.0}
    fresh = make_inputs([p.shape for p in inputs.params], inputs.terms, dtype=inputs.params[0].dtype)
    steps = gradients(fresh)
    plain = run(impl, fresh, steps, **options)
    other = run(impl, fresh, weighted(steps, [2.0**k] * fresh.terms), **options)
    assert_same_bits(other, plain, but=["exp_avgs", "exp_avg_sqs", "grad_norms"])
    assert all(map(torch.equal, other.exp_avgs, [2.0**k * m for m in plain.exp_avgs]))
    assert all(map(torch.equal, other.exp_avg_sqs, [4.0**k * v for v in plain.exp_avg_sqs]))
