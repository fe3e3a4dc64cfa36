"""What losses of heads and their penalty must be whatever the sizes: in any order, of parts, of a mean."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import multihead_loss, orthogonality_penalty
from fastkit.ops.multihead_loss import KERNELS
from fastkit.testing import assert_matches_reference
from fastkit.testing.multihead_loss import (
    Heads,
    check,
    check_penalty,
    expected_penalty,
    expected_results,
    make_heads,
    make_inputs,
)

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

DOUBLE = torch.float64
PROBLEMS = "single_label", "multi_label", "regression"
KINDS = "abs", "squared", "cos_abs", "cos_squared", "huber"
NAMES = "x", "weight", "bias"
OF_HEADS = "loss", "correct", "gweight", "gbias"


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def case_of(problem, B, H, C, D, flags, smoothing, seed):
    """Inputs, and the options that are no tensors."""
    weighted, ignored, inactive = flags
    single, classes = problem == "single_label", problem != "regression"
    inputs = make_inputs(
        B, H, max(C, 2) if single else C if classes else 1, D, problem=problem,
        class_weight=weighted and classes, ignored=ignored and single, inactive=inactive, seed=seed,
    )  # fmt: skip
    return inputs, {"problem": problem, "label_smoothing": smoothing if single else 0.0}


def penalty_case_of(kind, H, C, D, inactive, centers, width, seed):
    return make_heads(H, C, D, dtype=DOUBLE, inactive=inactive, seed=seed), {
        "kind": kind, "center_classes": centers and C > 1, "huber_width": width,
    }  # fmt: skip


def given(examples=40, problems=PROBLEMS, smoothing=(0.0, 0.1), flags=(True, True, True), most=40):
    """Runs a test on many sizes and options, always the same ones."""
    booleans = [strategies.booleans() if flag else strategies.just(False) for flag in flags]
    return _given(
        examples,
        strategies.builds(
            case_of,
            problem=strategies.sampled_from(problems),
            B=strategies.integers(1, most),
            H=strategies.integers(1, most),
            C=strategies.integers(1, 12),
            D=strategies.integers(1, most),
            flags=strategies.tuples(*booleans),
            smoothing=strategies.sampled_from(smoothing),
            seed=strategies.integers(0, 1000),
        ),
    )


def given_heads(examples=40, kinds=KINDS, inactive=True, centers=True, least=1):
    flag = strategies.booleans()
    return _given(
        examples,
        strategies.builds(
            penalty_case_of,
            kind=strategies.sampled_from(kinds),
            H=strategies.integers(least, 40) | strategies.integers(120, 140),
            C=strategies.integers(1, 5),
            D=strategies.integers(1, 40),
            inactive=flag if inactive else strategies.just(False),
            centers=flag if centers else strategies.just(False),
            width=strategies.sampled_from((1e-2, 1.0, 10.0)),
            seed=strategies.integers(0, 1000),
        ),
    )


def _given(examples, cases):
    settings = hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)

    def decorate(test):
        return settings(hypothesis.given(case=cases)(test))

    return decorate


def results_of(impl, inputs, options):
    """The losses, what is right, and the gradients, by name."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in NAMES}
    found = multihead_loss(
        **leaves, target=inputs.target, active=inputs.active, class_weight=inputs.class_weight, impl=impl,
        **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(found.loss, list(leaves.values()), inputs.g_loss)
    named = {f"g{name}": g for name, g in zip(NAMES, gradients, strict=True)}
    return {"loss": found.loss.detach(), "correct": found.correct, "count": found.count, **named}


def penalty_of(impl, heads, options):
    """The penalty, and its gradient."""
    weight = heads.weight.detach().requires_grad_()
    penalty = orthogonality_penalty(weight, active=heads.active, impl=impl, **options)
    return penalty.detach(), *torch.autograd.grad(penalty, weight)


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def picked_heads(inputs, at):
    names = [n for n in ("weight", "bias", "active", "g_loss") if getattr(inputs, n) is not None]
    return inputs._replace(**{name: getattr(inputs, name)[at] for name in names})


def assert_within(results, expected, but=()):
    for name, (value, budget) in expected.items():
        if name not in but:
            assert_matches_reference(results[name], value, budget, name=name)


# Heads


@given()
def test_results_are_within_their_budgets(impl, case):
    check(*case, impl=impl)


@given()
def test_heads_in_another_order_are_the_same_heads(impl, case):
    inputs, options = case
    at = order(len(inputs.weight))
    results = results_of(impl, picked_heads(inputs, at), options)
    for name in OF_HEADS:
        results[name] = results[name][at.argsort()]
    assert_within(results, expected_results(inputs, options))


@given(flags=(True, True, False))
def test_inactive_heads_are_as_if_they_were_not_there(impl, case):
    """Bit for bit in the kernel, whose products have none of them."""
    inputs, options = case
    on = torch.rand(len(inputs.weight), generator=torch.Generator().manual_seed(0)) < 0.6
    masked = inputs._replace(
        active=on,
        weight=inputs.weight.masked_fill(~on[:, None, None], torch.nan),
        bias=inputs.bias.masked_fill(~on[:, None], torch.nan),
    )
    found = results_of(impl, masked, options)
    for name in OF_HEADS:
        assert not found[name][~on].any()
        found[name] = found[name][on]
    if not on.any():
        assert not found["gx"].any()
        return
    alone = picked_heads(inputs, on)
    if impl == "cpu":
        for name, expected in results_of(impl, alone, options).items():
            assert torch.equal(found[name], expected), name
    assert_within(found, expected_results(alone, options))


@given(flags=(True, True, False))
def test_each_head_is_alone(impl, case):
    """Results of one do not depend on the others; gradients to x add up."""
    inputs, options = case
    cut = len(inputs.weight) // 2
    if cut == 0:
        return
    parts = [results_of(impl, picked_heads(inputs, part), options) for part in (slice(cut), slice(cut, None))]
    results = {name: torch.cat([part[name] for part in parts]) for name in OF_HEADS}
    results["gx"] = parts[0]["gx"].double() + parts[1]["gx"].double()
    assert_within(results, expected_results(inputs, options), but=("count",))


@given(flags=(True, True, False))
def test_a_head_that_is_the_mean_of_heads_is_no_worse_than_they_are(impl, case):
    """Heads may be folded: its logits are the mean of theirs, of which a loss is convex."""
    inputs, options = case
    inputs = inputs._replace(**{n: getattr(inputs, n).double() for n in NAMES})
    if inputs.class_weight is not None:
        inputs = inputs._replace(class_weight=inputs.class_weight.double())
    folded = inputs._replace(
        weight=inputs.weight.mean(0, keepdim=True), bias=inputs.bias.mean(0, keepdim=True), active=None,
        g_loss=torch.ones(1, dtype=DOUBLE),
    )  # fmt: skip
    x = inputs.x.masked_fill((inputs.target == -100)[:, None], 0.0) if inputs.target.dim() == 1 else inputs.x
    z = (torch.einsum("bd,hcd->bhc", x, inputs.weight) + inputs.bias).mean(1)
    # The mean of all logits, as the bias of a head that has no weight: row by row.
    of_rows = [
        multihead_loss(
            x[i : i + 1], torch.zeros_like(folded.weight), z[i : i + 1], inputs.target[i : i + 1],
            class_weight=inputs.class_weight, impl=impl, **options,
        )
        for i in range(len(x))
    ]  # fmt: skip
    loss = results_of(impl, folded, options)["loss"]
    if inputs.class_weight is None:
        total = sum(row.loss * row.count for row in of_rows)
        torch.testing.assert_close(loss, total / max(1, sum(int(row.count) for row in of_rows)))
    everyone = results_of(impl, inputs._replace(g_loss=inputs.g_loss.double()), options)["loss"]
    assert loss.item() <= everyone.mean().item() * (1 + 1e-12) + 1e-14


# Rows


@given()
def test_rows_in_another_order_are_the_same_rows(impl, case):
    inputs, options = case
    at = order(len(inputs.x))
    results = results_of(impl, inputs._replace(x=inputs.x[at], target=inputs.target[at]), options)
    results["gx"] = results["gx"][at.argsort()]
    assert_within(results, expected_results(inputs, options))


@given(flags=(False, True, True))
def test_parts_of_a_batch_add_up(impl, case):
    """By how many rows each has that count, as of accumulated gradients."""
    inputs, options = case
    cut = len(inputs.x) // 3
    if cut == 0:
        return
    parts = [
        results_of(impl, inputs._replace(x=inputs.x[part], target=inputs.target[part]), options)
        for part in (slice(cut), slice(cut, None))
    ]
    counts = [part["count"].double() for part in parts]
    total = sum(counts)
    if total == 0:
        return
    results = {
        name: sum(part[name].double() * n for part, n in zip(parts, counts, strict=True)) / total
        for name in ("loss", "gweight", "gbias")
    }
    results["gx"] = torch.cat(
        [part["gx"].double() * n / total for part, n in zip(parts, counts, strict=True)]
    )
    results["correct"] = parts[0]["correct"] + parts[1]["correct"]
    results["count"] = total
    assert_within(results, expected_results(inputs, options))


# Classes


@given()
def test_classes_in_another_order_are_the_same_classes(impl, case):
    inputs, options = case
    at = order(inputs.bias.shape[1])
    back = at.argsort()
    moved = inputs._replace(weight=inputs.weight[:, at], bias=inputs.bias[:, at])
    if inputs.class_weight is not None:
        moved = moved._replace(class_weight=inputs.class_weight[at])
    if options["problem"] == "single_label":
        target = inputs.target
        moved = moved._replace(target=torch.where(target < 0, target, back[target.clamp(min=0)]))
    elif options["problem"] == "multi_label":
        moved = moved._replace(target=inputs.target[:, at])
    results = results_of(impl, moved, options)
    for name in ("gweight", "gbias"):
        results[name] = results[name][:, back]
    assert_within(results, expected_results(inputs, options))


@given(problems=("single_label",))
def test_what_all_classes_of_a_head_have_in_common_is_not_seen(impl, case):
    """By a softmax: a vector and a number added to each; gradients of classes add up to 0."""
    inputs, options = case
    shifted = inputs._replace(weight=inputs.weight + 0.5 * inputs.weight[:, :1], bias=inputs.bias + 3)
    expected, results = expected_results(inputs, options), results_of(impl, shifted, options)
    of_shifted = expected_results(shifted, options)
    # What is added is rounded, which is an error of the logits as those of the products are.
    size = 4 * torch.finfo(torch.float32).eps
    for name in ("loss", "gweight", "gbias"):
        value, budget = expected[name]
        budget = budget + of_shifted[name].budget + size * value.abs()
        assert_matches_reference(results[name], value, budget, name=name)
    for name in ("gweight", "gbias"):
        assert (results[name].double().sum(1).abs() <= expected[name].budget.sum(1) * 2).all()


@given(problems=("single_label",), smoothing=(0.0,), flags=(False, True, True))
def test_smoothing_is_a_mixture_of_losses(impl, case):
    """Of that of the target, and the mean of those that each class would have as a target."""
    inputs, options = case
    eps, C = 0.3, inputs.bias.shape[1]
    plain = results_of(impl, inputs, options)["loss"].double()
    counts = inputs.target != -100
    of_each = [
        results_of(impl, inputs._replace(target=torch.where(counts, c, inputs.target)), options)["loss"]
        for c in range(C)
    ]
    mixture = (1 - eps) * plain + eps * torch.stack(of_each).double().mean(0)
    smooth = options | {"label_smoothing": eps}
    _, budget = expected_results(inputs, smooth)["loss"]
    found = results_of(impl, inputs, smooth)["loss"].double()
    size = torch.finfo(torch.float32).eps * (1 + inputs.x[counts].abs().sum())
    assert ((found - mixture).abs() <= 2 * budget + size).all()


@given(problems=("single_label", "multi_label"), flags=(True, True, True))
def test_a_factor_of_all_class_weights(impl, case):
    """A power of two changes no bit of a mean by weights, and is a factor of one over classes."""
    inputs, options = case
    if inputs.class_weight is None:
        inputs = inputs._replace(class_weight=torch.ones(inputs.bias.shape[1]))
        assert_within(
            results_of(impl, inputs, options), expected_results(inputs._replace(class_weight=None), options)
        )
    plain = results_of(impl, inputs, options)
    scaled = results_of(impl, inputs._replace(class_weight=4 * inputs.class_weight), options)
    factor = 1 if options["problem"] == "single_label" else 4
    for name in ("loss", "gx", "gweight", "gbias"):
        assert torch.equal(scaled[name], factor * plain[name]), name


@given(problems=("multi_label",), flags=(False, False, True))
def test_a_label_is_two_classes_of_which_one_has_no_logit(impl, case):
    inputs, options = case
    yes = inputs._replace(
        weight=inputs.weight[:, :1], bias=inputs.bias[:, :1], target=(inputs.target[:, :1] > 0.5).float()
    )
    two = inputs._replace(
        weight=torch.cat([torch.zeros_like(yes.weight), yes.weight], 1),
        bias=torch.cat([torch.zeros_like(yes.bias), yes.bias], 1),
        target=yes.target[:, 0].long(),
    )
    expected, results = (
        expected_results(yes, options),
        results_of(impl, two, {"problem": "single_label"}),
    )
    of_two = expected_results(two, {"problem": "single_label"})
    for name in ("loss", "gx", "correct", "count"):
        value, budget = expected[name]
        assert_matches_reference(results[name], value, budget + of_two[name].budget, name=name)
    for name in ("gweight", "gbias"):
        value, budget = expected[name]
        result = results[name][:, 1:]
        assert_matches_reference(result, value, budget + of_two[name].budget[:, 1:], name=name)


# The penalty


@given_heads()
def test_the_penalty_is_within_its_budgets(impl, case):
    check_penalty(*case, impl=impl)


def size_of(heads, options):
    """What products of pairs can be at most, times what rho makes of their errors."""
    weight = heads.weight.nan_to_num()
    if options["center_classes"]:
        weight = weight.abs() + weight.abs().mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(weight, dim=2)
    if options["kind"].startswith("cos_"):
        norms = torch.ones_like(norms)
    products = norms.T.unsqueeze(2) * norms.T.unsqueeze(1)
    return float((products.square() if options["kind"].endswith("squared") else products).sum())


@given_heads(centers=False)
def test_a_rotation_of_the_features_is_not_seen(impl, case):
    """And turns the gradient with it."""
    heads, options = case
    D = heads.weight.shape[2]
    rotation, _ = torch.linalg.qr(make_heads(D, 1, D, dtype=DOUBLE, seed=1).weight[:, 0])
    turned = heads._replace(weight=heads.weight @ rotation)
    penalty, gradient = penalty_of(impl, heads, options)
    found, of_turned = penalty_of(impl, turned, options)
    eps = torch.finfo(DOUBLE).eps
    assert abs(found - penalty) <= 8 * (D + 8) * eps * size_of(heads, options)
    expected, _ = expected_penalty(heads, options)
    # Rounding of a rotation is that of another product of D.
    budget = expected["gweight"].budget / heads.g.abs().clamp(min=1e-3)
    budget = (4 * budget).sum(2, keepdim=True) + 64 * D * eps * gradient.abs().sum(2, keepdim=True)
    assert ((of_turned - gradient @ rotation).abs() <= budget).all()


@given_heads(centers=False)
def test_signs_and_order_of_heads_are_not_seen(impl, case):
    """Rho is even, and a pair is one whichever is first."""
    heads, options = case
    H = len(heads.weight)
    sign = 1 - 2 * (torch.arange(H) % 3 == 0).double()[:, None, None]
    at = order(H)
    penalty, gradient = penalty_of(impl, heads, options)
    flipped, of_flipped = penalty_of(impl, heads._replace(weight=sign * heads.weight), options)
    bound = 64 * torch.finfo(DOUBLE).eps * size_of(heads, options)
    assert abs(flipped - penalty) <= bound
    torch.testing.assert_close(sign * of_flipped, gradient, rtol=1e-10, atol=1e-10)
    active = None if heads.active is None else heads.active[at]
    moved, _ = penalty_of(impl, Heads(heads.weight[at], active, heads.g), options)
    assert abs(moved - penalty) <= bound


@given_heads(kinds=("abs", "squared", "cos_abs", "cos_squared"))
def test_a_factor_of_all_heads(impl, case):
    """A power of two: of degree 2 and 4, or not seen."""
    heads, options = case
    degree = {"abs": 2, "squared": 4}.get(options["kind"], 0)
    penalty, gradient = penalty_of(impl, heads, options)
    found, of_scaled = penalty_of(impl, heads._replace(weight=0.5 * heads.weight), options)
    torch.testing.assert_close(found, penalty / 2**degree, rtol=1e-13, atol=0)
    torch.testing.assert_close(of_scaled * 0.5, gradient / 2**degree, rtol=1e-9, atol=1e-11)


@given_heads(inactive=False, least=3)
def test_the_penalty_of_a_union(impl, case):
    """Of three parts: a pair is in two of them together, so that what is within one is taken off again."""
    heads, options = case
    H = len(heads.weight)
    part = torch.arange(H) * 3 // H
    part = part[order(H)]

    def of(*parts):
        active = torch.isin(part, torch.tensor(parts))
        return penalty_of(impl, heads._replace(active=active), options)

    whole = penalty_of(impl, heads, options)
    pairs, single = [of(0, 1), of(0, 2), of(1, 2)], [of(0), of(1), of(2)]
    found = sum(p for p, _ in pairs) - sum(p for p, _ in single)
    assert abs(found - whole[0]) <= 1e3 * torch.finfo(DOUBLE).eps * size_of(heads, options)
    gradient = sum(g for _, g in pairs) - sum(g for _, g in single)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-9, atol=1e-9)


@given_heads(inactive=False, centers=False)
def test_heads_of_other_features_add_up(impl, case):
    """Whose products with the first are exactly 0."""
    heads, options = case
    first, second = heads.weight, make_heads(*heads.weight.shape, dtype=DOUBLE, seed=5).weight[1:]
    empty = torch.zeros_like(first)
    both = torch.cat([torch.cat([first, empty], 2), torch.cat([empty[1:], second], 2)])
    whole, gradient = penalty_of(impl, heads._replace(weight=both), options)
    if len(second) == 0:
        return
    (one, of_one), (other, of_other) = (
        penalty_of(impl, heads._replace(weight=w), options) for w in (first, second)
    )
    torch.testing.assert_close(whole, one + other, rtol=1e-12, atol=1e-14)
    H, D = len(first), first.shape[2]
    assert not gradient[:H, :, D:].any() and not gradient[H:, :, :D].any()
    found = torch.cat([gradient[:H, :, :D], gradient[H:, :, D:]])
    torch.testing.assert_close(found, torch.cat([of_one, of_other]), rtol=1e-9, atol=1e-9)


@given_heads(inactive=False)
def test_inactive_heads_have_no_part_in_the_penalty(impl, case):
    """Bit for bit in the kernel."""
    heads, options = case
    on = torch.rand(len(heads.weight), generator=torch.Generator().manual_seed(0)) < 0.6
    poisoned = heads.weight.masked_fill(~on[:, None, None], torch.nan)
    penalty, gradient = penalty_of(impl, heads._replace(weight=poisoned, active=on), options)
    assert not gradient[~on].any()
    if not on.any():
        assert penalty == 0
        return
    alone, of_alone = penalty_of(impl, heads._replace(weight=heads.weight[on]), options)
    if impl == "cpu":
        assert torch.equal(penalty, alone) and torch.equal(gradient[on], of_alone)
    torch.testing.assert_close(penalty, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[on], of_alone, rtol=1e-9, atol=1e-9)


def test_descent_makes_heads_orthogonal(impl):
    """Which they can be, having more features than there are heads; of huber without a step that shrinks."""
    for kind in KINDS:
        weight = make_heads(10, 3, 16, dtype=DOUBLE).weight.requires_grad_()
        rate = 0.2 if kind.startswith("cos") else 2e-3
        penalties = []
        for step in range(150):
            penalty = orthogonality_penalty(weight, kind=kind, huber_width=1.0, impl=impl)
            (gradient,) = torch.autograd.grad(penalty, weight)
            with torch.no_grad():
                weight -= rate * (1 - step / 150) * gradient
            penalties.append(penalty.item())
        assert penalties[-1] < 0.2 * penalties[0], kind
