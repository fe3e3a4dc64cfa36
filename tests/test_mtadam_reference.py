"""reference.mtadam_update_ against the authors' algorithm and torch's Adam; the budgets of its results."""

import math
from itertools import pairwise

import pytest
import torch

from fastkit import ops, reference
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.mtadam import update_
from fastkit.testing.mtadam import (
    LR,
    Options,
    check,
    cloned,
    compare,
    expected_results,
    make_grads,
    make_inputs,
)

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
BETAS = 0.9, 0.999, 0.9  # the defaults


def update(inputs, op=reference.mtadam_update_, **options):
    *tensors, maxima = inputs
    op(*tensors, max_exp_avg_sqs=maxima, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# The authors' algorithm


class Authors:
    """Of one tensor: with a first moment a term, and amsgrad's maximum a term."""

    def __init__(self, param, terms):
        self.p, self.t, self.norms = param.clone(), 0, [1.0] * terms
        self.first, self.second, self.maxima = (
            [torch.zeros_like(param) for _ in range(terms)] for _ in range(3)
        )

    def step(self, grads, lr, betas=BETAS, eps=1e-8, weight_decay=0.0, amsgrad=False, ranks=None):
        beta1, beta2, beta3 = betas
        self.t += 1
        for i, g in enumerate(grads):
            raw = math.sqrt(float((g * g).sum()))
            self.norms[i] = raw if self.t == 1 else beta3 * self.norms[i] + (1 - beta3) * raw
        denominators = []
        for i, g in enumerate(grads):
            h = g
            if self.norms[i] > 1e-10:
                anchor = next(j for j, norm in enumerate(self.norms) if norm > 1e-10)
                h = (1.0 if ranks is None else ranks[i]) * self.norms[anchor] / self.norms[i] * g
            if weight_decay != 0:
                h = h + weight_decay * self.p
            self.first[i] = beta1 * self.first[i] + (1 - beta1) * h
            self.second[i] = beta2 * self.second[i] + (1 - beta2) * h * h
            self.maxima[i] = torch.maximum(self.maxima[i], self.second[i])
            of_term = self.maxima[i] if amsgrad else self.second[i]
            denominators.append(of_term.sqrt() / math.sqrt(1 - beta2**self.t) + eps)
        denominator = torch.stack(denominators).amax(0)
        self.p = self.p - sum(lr / (1 - beta1**self.t) * first / denominator for first in self.first)


TRAJECTORIES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "ranks": {"ranks": (0.3, 2.0, 1.0)},
    "amsgrad": {"amsgrad": True},
    "dead_first": {"dead": [0], "ranks": (3.0, 0.5, 2.0)},
    "dead_second": {"dead": [1], "ranks": (1.0, 5.0, 2.0), "weight_decay": 0.01},
    "all_dead": {"dead": [0, 1, 2], "weight_decay": 0.1},
    "other_betas": {"betas": (0.5, 0.9, 0.99), "eps": 1e-3},
    "no_memory": {"betas": (0.0, 0.5, 0.0)},
    "all": {"weight_decay": 0.1, "ranks": (0.7, 2.0, 1.0), "amsgrad": True, "betas": (0.8, 0.99, 0.7)},
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_is_the_authors_algorithm(name):
    """Over 200 steps, with gradients that depend on the parameters; of first moments there is the sum."""
    options = {"lr": 1e-2} | TRAJECTORIES[name]
    dead, amsgrad = options.pop("dead", ()), options.pop("amsgrad", False)
    inputs = make_inputs([(3, 5)], 3, dtype=torch.float64, amsgrad=amsgrad)
    author = Authors(inputs.params[0], 3)
    alive = [float(term not in dead) for term in range(3)]
    for step in range(200):
        noise = make_grads(inputs.params, 3, seed=step)
        ours, theirs = (
            [a * (g + p) for a, g in zip(alive, noise, strict=True)] for p in (inputs.params[0], author.p)
        )
        author.step(theirs, amsgrad=amsgrad, **options)
        update(inputs._replace(grads=ours), **options)
    close(inputs.params[0], author.p)
    close(inputs.exp_avgs[0], sum(author.first))
    close(inputs.exp_avg_sqs, author.second)
    close(inputs.grad_norms[0], torch.tensor(author.norms, dtype=torch.float64))
    if amsgrad:
        close(inputs.max_exp_avg_sqs[0], torch.stack(author.maxima).amax(0))
    assert inputs.steps == 200


def test_a_missing_gradient_is_one_of_zeros():
    """And a term that never comes has no part."""
    runs = []
    for zeros in (False, True):
        inputs = make_inputs([(5,)], 3, dtype=torch.float64)
        for step in range(20):
            missing = [(0, 0)] * (step % 3 == 1) + [(1, 0)]
            grads = make_grads(inputs.params, 3, seed=step, missing=missing)
            if zeros:
                grads = [torch.zeros(5, dtype=torch.float64) if g is None else g for g in grads]
            update(inputs._replace(grads=grads), lr=0.1)
        runs.append(inputs.results())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not runs[0]["exp_avg_sqs[1]"].any() and runs[0]["grad_norms"][0, 1] == 0


# What follows from the formula


def test_the_first_norm_is_the_gradient_s_and_then_they_are_averaged():
    inputs = make_inputs([(5,), (2, 3)], 3, dtype=torch.float64)
    norms = [torch.tensor([[g.norm() for g in inputs.grads[i::2]] for i in range(2)]).double()]
    update(inputs, lr=LR)
    close(inputs.grad_norms, norms[0])
    grads = make_grads(inputs.params, 3, seed=5)
    update(inputs._replace(grads=grads), lr=LR, betas=(0.9, 0.999, 0.75))
    then = torch.tensor([[g.norm() for g in grads[i::2]] for i in range(2)]).double()
    close(inputs.grad_norms, 0.75 * norms[0] + 0.25 * then)


@pytest.mark.parametrize("L", [1, 2, 3, 5, 9])
def test_no_coordinate_moves_further_than_that_many_rates_at_first(L):
    inputs = make_inputs([(1000,)], L, dtype=torch.float64)
    before = inputs.params[0].clone()
    update(inputs, lr=0.5)
    moved = (inputs.params[0] - before).abs()
    assert moved.max() <= L * 0.5
    if L == 1:
        close(moved, torch.full_like(moved, 0.5), 1e-4)  # eps against the least gradient


@pytest.mark.parametrize("same", ["value", "direction"])
def test_equal_terms_move_as_many_rates(same):
    """The sum is not divided by the number of terms, and their weights do not matter."""
    inputs = make_inputs([(50,)], 4, dtype=torch.float64)
    before = inputs.params[0].clone()
    grad = inputs.grads[0].sign() * (1 + inputs.grads[0].abs())
    weights = (1.0,) * 4 if same == "value" else (1.0, 500.0, 1e-3, 7.0)
    update(inputs._replace(grads=[weight * grad for weight in weights]), lr=0.5)
    close(inputs.params[0], before - 4 * 0.5 * grad.sign(), 1e-7)  # eps = 1e-8


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {}, {}),
    "Adam_decay": (torch.optim.Adam, {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "Adam_amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.01}, {"weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}),
    "AdamW_amsgrad": (
        torch.optim.AdamW,
        {"weight_decay": 0.1, "amsgrad": True},
        {"weight_decay": 0.1, "decoupled": True},
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_one_term_it_is_adam(impl, name, dtype, tolerance):
    make, theirs, ours = OPTIMIZERS[name]
    inputs = make_inputs([(33,), (4, 5)], 1, dtype=dtype, amsgrad="amsgrad" in theirs)
    params = [torch.nn.Parameter(p.clone()) for p in inputs.params]
    optimizer = make(params, lr=1e-2, **theirs)
    for step in range(50):
        noise = make_grads(inputs.params, 1, seed=step)
        for param, grad in zip(params, noise, strict=True):
            param.grad = grad + param.detach()
        optimizer.step()
        inputs = inputs._replace(grads=[g + p for g, p in zip(noise, inputs.params, strict=True)])
        update(inputs, ops.mtadam_update_, lr=1e-2, impl=impl, **ours)
    close(inputs.params, [p.detach() for p in params], tolerance)
    close(inputs.exp_avgs, [optimizer.state[p]["exp_avg"] for p in params], tolerance)


@pytest.mark.parametrize("cuts", [(0, 3), (0, 2, 3), (0, 1, 2, 3), (0, 1, 3, 3)], ids=str)
def test_pieces_of_a_step_are_the_step(cuts):
    """But for the roundings of the first moment between them."""
    options = Options(weight_decay=0.1, ranks=(1.0, 0.5, 2.0))._asdict()
    once = make_inputs([(7,), (3, 4), ()], 3, dtype=torch.float64, missing=[(1, 0), (2, 1)], amsgrad=True)
    apart = cloned(once)
    for step in range(10):
        grads = make_grads(once.params, 3, seed=step, missing=[(2, 0), (1, 1)])
        update(once._replace(grads=grads), **options)
        for first, end in pairwise(cuts):
            *tensors, maxima = apart._replace(grads=grads[3 * first : 3 * end])
            last = end == 3 and cuts[-2] == first
            update_(
                *tensors,
                max_exp_avg_sqs=maxima,
                impl="reference",
                first=first,
                applies=last,
                **options,
            )
    for name, want in once.results().items():
        close(apart.results()[name], want)


# Budgets accept honest arithmetic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_accepts_the_implementations(impl, dtype):
    """With constants that are rounded too."""
    for steps in (0, 4):
        for options in ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}):
            inputs = make_inputs([(300,), (5, 7), ()], 3, dtype=dtype, steps=steps, amsgrad=True)
            check(inputs, impl=impl, betas=BETAS, lr=1e-3, ranks=(1.0, 0.3, 3.0), **options)


def step_in_float32(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    grad_norms,
    steps,
    *,
    max_exp_avg_sqs=None,
    fault="",
    impl=None,
    **options,
):
    """Another honest order, and ``fault`` what it does wrong. All tensors have all gradients."""
    o = Options(**options)
    (beta1, beta2, beta3), n, L = o.betas, len(params), grad_norms.shape[1]
    ranks = o.ranks or (1.0,) * L
    anchor = 1 if fault == "wrong_anchor" else o.anchor
    limit = math.inf if o.max_scale is None or fault == "max_scale_ignored" else o.max_scale
    steps += 1
    for i, p in enumerate(params):
        t = int(steps[i])
        raw = torch.stack([g.float().view(-1, 5).square().sum(0).sum().sqrt() for g in grads[i::n]])
        if fault == "norms_in_half_precision":
            raw = raw.bfloat16().float()
        old = grad_norms[i].clone()
        seeded = (old <= o.alive_eps) & (fault != "norms_from_zero")
        grad_norms[i] = torch.where(seeded, raw, torch.lerp(raw, old, beta3))
        norms = old if fault == "old_norms" else grad_norms[i]
        total, v_all = torch.zeros_like(p, dtype=torch.float32), []
        for k in reversed(range(L)):
            factor = ranks[k] * min(float(norms[anchor] / norms[k]), limit)
            if norms[k] <= o.alive_eps:
                factor = ranks[k] if fault == "rank_of_the_dead" else 1.0
            if fault == "anchor_without_rank" and k == anchor:
                factor = 1.0
            h = factor * grads[k * n + i].float()
            if not o.decoupled and (fault != "decay_once" or k == 0):
                h = h + o.weight_decay * p.float()
            total = total + h
            v = exp_avg_sqs[k * n + i]
            of_v = grads[k * n + i].float() if fault == "v_of_what_is_not_balanced" else h
            v.copy_(torch.lerp(of_v * of_v, v, beta2))
            v_all.append(v)
        total = total / L if fault == "mean_of_terms" else total
        exp_avgs[i].lerp_(total, 1 - beta1)
        most = torch.stack(v_all).mean(0) if fault == "mean_of_v" else torch.stack(v_all).amax(0)
        if max_exp_avg_sqs is not None:
            kept = most if fault == "maximum_forgotten" else torch.maximum(max_exp_avg_sqs[i], most)
            most = max_exp_avg_sqs[i].copy_(kept)
        corrected = most / (1.0 if fault == "v_not_corrected" else 1 - beta2**t)
        d = (corrected + o.eps).sqrt() if fault == "eps_within_the_root" else corrected.sqrt() + o.eps
        m = exp_avgs[i] / (1.0 if fault == "m_not_corrected" else 1 - beta1**t)
        decay = o.lr * o.weight_decay if o.decoupled else 0.0
        value = p.float()
        if fault == "decay_after_the_step":
            p.copy_((value - o.lr * m / d) * (1 - decay))
        else:
            p.copy_(value - (L if fault == "decay_of_each_term" else 1) * decay * value - o.lr * m / d)


def planted(fault):
    def op(*tensors, **options):
        return step_in_float32(*tensors, fault=fault, **options)

    return op


SHAPES = [(100,), (5000,), (8, 10)]
USUAL = {"weight_decay": 2.0**-3, "ranks": (0.5, 1.0, 2.0)}
APART = {**USUAL, "decoupled": True}


@pytest.mark.parametrize("options", [{}, USUAL, APART, {"anchor": 2, "max_scale": 0.25}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_budget_accepts_another_order(dtype, options, monkeypatch):
    monkeypatch.setattr("fastkit.ops.mtadam_update_", step_in_float32)
    for steps in (0, 3):
        check(make_inputs(SHAPES, 3, dtype=dtype, steps=steps, amsgrad=True), **options)


def test_budget_follows_tiny_gradients(impl):
    """Whose squares float32 has not: D is eps, whatever is left of v."""
    for size, alive_eps in ((1e-9, 1e-10), (1e-18, 1e-30), (1e-21, 1e-10)):
        inputs = make_inputs([(40,)], 2, sizes=(size, 300 * size))
        for _ in range(2):
            check(inputs, impl=impl, alive_eps=alive_eps)


def test_there_is_no_budget_where_nothing_bounds_the_denominator():
    inputs = make_inputs([(40,)], 1, sizes=(1e-21,))
    with pytest.raises(ValueError, match=r"^params\[0\]: eps is too small for these gradients"):
        expected_results(inputs, eps=1e-30, alive_eps=1e-30)
    expected_results(inputs, eps=1e-8, alive_eps=1e-30)


# and reject planted faults


def rejected(inputs, expected):
    """Which of the lists of results are over budget."""
    names = set()
    for name, of in expected.items():
        try:
            compare(inputs, {name: of})
        except AssertionError as error:
            assert str(error).startswith(name)
            names.add(name.partition("[")[0])
    return names


M, V, MOST, P, N = {"exp_avgs"}, {"exp_avg_sqs"}, {"max_exp_avg_sqs"}, {"params"}, {"grad_norms"}
BALANCED = M | V | MOST | P
FAULTS = [
    ("", USUAL, 3, set()),
    ("wrong_anchor", USUAL, 3, BALANCED),
    ("max_scale_ignored", {"max_scale": 4.0}, 3, BALANCED),
    ("norms_in_half_precision", {}, 3, BALANCED | N),
    ("norms_from_zero", {}, 0, N),  # all alike: their ratios are right
    ("old_norms", {}, 3, BALANCED),
    ("rank_of_the_dead", {**USUAL, "alive_eps": 1.0}, 3, BALANCED),
    ("anchor_without_rank", USUAL, 3, BALANCED),
    ("decay_once", USUAL, 3, BALANCED),
    ("decay_of_each_term", APART, 3, P),
    ("decay_after_the_step", APART, 3, P),
    ("v_of_what_is_not_balanced", {}, 3, V | MOST | P),
    ("mean_of_terms", {}, 3, M | P),
    ("mean_of_v", {}, 3, MOST | P),
    ("maximum_forgotten", {}, 3, MOST | P),
    ("v_not_corrected", {}, 3, P),
    ("m_not_corrected", {}, 3, P),
    ("eps_within_the_root", {"eps": 1e-4}, 3, P),
]


@pytest.mark.parametrize(("fault", "options", "steps", "where"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_budget_rejects(fault, options, steps, where, monkeypatch):
    """Where it is, and nowhere else."""
    inputs = make_inputs(SHAPES, 3, steps=steps, amsgrad=True)
    expected = expected_results(inputs, **options)
    other = cloned(inputs)
    update(inputs, step_in_float32, **options, fault=fault)
    assert rejected(inputs, expected) == where
    monkeypatch.setattr("fastkit.ops.mtadam_update_", planted(fault))
    if where:
        with pytest.raises(AssertionError, match="over budget"):
            check(other, **options)
    else:
        check(other, **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_budget_rejects_a_bias(dtype):
    """Of 1e-3; of the parameter, in its step."""
    inputs = make_inputs(SHAPES, 2, dtype=dtype, steps=2, amsgrad=True)
    before = [p.clone() for p in inputs.params]
    expected = expected_results(inputs)
    update(inputs, **Options()._asdict())
    compare(inputs, expected)
    for name, tensors in inputs._asdict().items():
        if name in ("grads", "steps"):
            continue
        biased = cloned(inputs)
        of_name = getattr(biased, name)
        for k, tensor in enumerate([of_name] if isinstance(of_name, torch.Tensor) else of_name):
            off = before[k] if name == "params" else 0.0
            tensor.copy_(off + 1.001 * (tensor - off))
        assert rejected(biased, expected) == {name}, tensors
    late = inputs._replace(steps=inputs.steps - 1)
    assert rejected(late, expected) == {"steps"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_rejects_one_wrong_element(dtype):
    for name in expected_results(make_inputs([(4097,)], 2, dtype=dtype)):
        inputs = make_inputs([(4097,)], 2, dtype=dtype)
        expected = expected_results(inputs)
        update(inputs, **Options()._asdict())
        results = inputs.results()[name].view(-1)
        results[results.abs().argmax()] *= 1.05 if dtype.itemsize == 2 and name == "params[0]" else 1.001
        with pytest.raises(
            AssertionError, match=rf"^{name.replace('[', chr(92) + '[')}.*: 1 of \d+ elements"
        ):
            compare(inputs, expected)


def test_budget_rejects_errors_that_lean_one_way():
    inputs = make_inputs([(5000,)], 1, steps=2)
    expected = expected_results(inputs)
    update(inputs, **Options()._asdict())
    inputs.exp_avgs[0].mul_(1 + 1.2e-7)
    with pytest.raises(AssertionError, match=r"^exp_avgs\[0\].* lean one way"):
        compare(inputs, expected)


def test_what_a_step_leaves_alone_has_no_budget():
    missing = [(l, 1) for l in range(2)]  # noqa: E741
    inputs = make_inputs([(9,), (7,), (8,)], 2, steps=1, missing=missing, amsgrad=True)
    inputs.grads[2].fill_(math.nan)
    expected = expected_results(inputs)
    before = cloned(inputs)
    update(inputs, **Options()._asdict())
    compare(inputs, expected)
    for name, tensor in inputs.results().items():
        if name.endswith(("s[1]", "s[2]", "s[4]", "s[5]")):
            assert torch.equal(tensor, before.results()[name]) and not expected[name].budget.any()
            tensor.view(-1)[3] += 1e-6
            with pytest.raises(AssertionError, match="over budget"):
                compare(inputs, {name: expected[name]})
    assert inputs.steps.tolist() == [2, 1, 1]
