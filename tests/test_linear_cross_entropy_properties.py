"""What the loss must be whatever its sizes: of tokens and classes in any order, of parts, of any blocks."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import linear_cross_entropy, linear_cross_entropy_products, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS
from fastkit.testing import assert_matches_reference
from fastkit.testing.linear_cross_entropy import check, expected_results, make_inputs

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

REDUCTIONS = "none", "sum", "mean"
TENSORS = "input", "linear_weight", "target", "linear_bias", "weight", "token_weight"
PER_TOKEN = "input", "target", "token_weight", "g_lse"


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def case_of(N, V, D, reduction, flags, numbers, seed):
    """Inputs, and the options that are no tensors."""
    bias, weight, token_weight, ignored = flags
    inputs = make_inputs(
        N, V, D, reduction=reduction, linear_bias=bias, weight=weight, token_weight=token_weight,
        ignored=ignored and N > 1, seed=seed,
    )  # fmt: skip
    label_smoothing, softcap, z_loss = numbers
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "z_loss": z_loss,
    }
    return inputs, options


def cases(*, reductions=REDUCTIONS, smoothing=(0.0, 0.1), softcaps=(None, 3.0), zetas=(0.0, 0.01), most=60):
    flag = strategies.booleans()
    return strategies.builds(
        case_of,
        N=strategies.integers(1, most),
        V=strategies.integers(1, most),
        D=strategies.integers(1, most),
        reduction=strategies.sampled_from(reductions),
        flags=strategies.tuples(flag, flag, flag, flag),
        numbers=strategies.tuples(*map(strategies.sampled_from, (smoothing, softcaps, zetas))),
        seed=strategies.integers(0, 1000),
    )


def given(examples=40, **which):
    """Runs a test on many sizes and options, always the same ones."""
    settings = hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)

    def decorate(test):
        return settings(hypothesis.given(case=cases(**which))(test))

    return decorate


def tensors_of(inputs):
    return {name: getattr(inputs, name) for name in TENSORS}


def loss_of(impl, inputs, options, op=linear_cross_entropy, **changes):
    return op(**(tensors_of(inputs) | options | changes), impl=impl)


def results_of(impl, inputs, options):
    """The loss, lse and the gradients of the loss, by name."""
    names = [n for n in ("input", "linear_weight", "linear_bias") if getattr(inputs, n) is not None]
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in names]
    inputs = inputs._replace(**dict(zip(names, leaves, strict=True)))
    loss = loss_of(impl, inputs, options)
    gradients = torch.autograd.grad(loss, leaves, inputs.g_loss)
    lse = loss_of(impl, inputs, options, linear_cross_entropy_with_lse).lse
    named = {f"g{name}": g for name, g in zip(names, gradients, strict=True)}
    return {"loss": loss.detach(), "lse": lse.detach(), **named}


def picked(inputs, tokens, reduction):
    """Some of the tokens, or all of them in another order."""
    names = (*PER_TOKEN, "g_loss") if reduction == "none" else PER_TOKEN
    return inputs._replace(**{n: t[tokens] for n in names if (t := getattr(inputs, n)) is not None})


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def assert_within(results, expected):
    for name, (value, budget) in expected.items():
        assert_matches_reference(results[name], value, budget, name=name)


# Tokens


@given()
def test_tokens_in_another_order_are_the_same_tokens(impl, case):
    inputs, options = case
    reduction, at = options["reduction"], order(len(inputs.target))
    results = results_of(impl, picked(inputs, at, reduction), options)
    back = at.argsort()
    for name in ("lse", "ginput", *(["loss"] if reduction == "none" else [])):
        results[name] = results[name][back]
    assert_within(results, expected_results(inputs, options, with_lse=False))


@given(reductions=("sum",))
def test_parts_of_a_batch_add_up(impl, case):
    """Losses, and gradients of what the parts share; those of the input lie beside each other."""
    inputs, options = case
    cut = len(inputs.target) // 3
    parts = [
        results_of(impl, picked(inputs, part, "sum"), options) for part in (slice(cut), slice(cut, None))
    ]
    results = {}
    for name in parts[0]:
        one, other = (part[name] for part in parts)
        results[name] = (
            torch.cat([one, other]) if name in ("lse", "ginput") else one.double() + other.double()
        )
    assert_within(results, expected_results(inputs, options, with_lse=False))


@given()
def test_ignored_tokens_are_as_if_they_were_not_there(impl, case):
    """Whatever their inputs are, NaN too: bit for bit in the kernel, which never reads them."""
    inputs, options = case
    reduction = options["reduction"]
    ignored = torch.rand(len(inputs.target), generator=torch.Generator().manual_seed(0)) < 0.4
    hidden = inputs.input.masked_fill(ignored[:, None], torch.nan)
    target = inputs.target.masked_fill(ignored, -100)
    weight = inputs.token_weight
    with_ignored = inputs._replace(
        input=hidden,
        target=target,
        token_weight=None if weight is None else weight.masked_fill(ignored, torch.inf),
    )
    found = results_of(impl, with_ignored, options)
    absent = results_of(impl, picked(inputs, ~ignored, reduction), options)
    for name in found:
        result = found[name]
        if name in ("lse", "ginput") or (name == "loss" and reduction == "none"):
            assert not result[ignored].any()
            result = result[~ignored]
        if reduction == "mean" and (target == -100).all():
            assert result.isnan().all() if name == "loss" else not result.any()
        elif impl == "cpu":
            assert torch.equal(result, absent[name])
        else:
            torch.testing.assert_close(result, absent[name], rtol=1e-4, atol=1e-5)
            assert result.isfinite().all()


@given(reductions=("none",))
def test_a_token_weight_is_a_factor(impl, case):
    """Bit for bit; lse has none; and a sum of what is weighed is the sum of weighed losses."""
    inputs, options = case
    factor = torch.randn(len(inputs.target), generator=torch.Generator().manual_seed(0))
    plain = loss_of(impl, inputs, options, linear_cross_entropy_with_lse, token_weight=None)
    weighed = loss_of(impl, inputs, options, linear_cross_entropy_with_lse, token_weight=factor)
    assert torch.equal(weighed.loss, plain.loss * factor) and torch.equal(weighed.lse, plain.lse)
    given_weight = inputs._replace(token_weight=factor, g_loss=torch.tensor(1.0))
    of_sum = expected_results(given_weight, options | {"reduction": "sum"}, with_lse=False)
    given_loss = inputs._replace(token_weight=None, g_loss=factor)
    results = results_of(impl, given_loss, options)
    del of_sum["loss"], of_sum["lse"]
    assert_within(results, of_sum)


@given(reductions=("none",))
def test_a_mean_is_the_sum_over_the_weights_of_the_targets(impl, case):
    inputs, options = case
    losses = loss_of(impl, inputs, options).double()
    of_target = torch.ones(len(inputs.linear_weight)) if inputs.weight is None else inputs.weight
    taken = inputs.target != -100
    divisor = of_target.double()[inputs.target.clamp(min=0)][taken].sum()
    eps = torch.finfo(torch.float32).eps * len(losses)
    for reduction, value in (("sum", losses.sum()), ("mean", losses.sum() / divisor)):
        found = loss_of(impl, inputs, options, reduction=reduction)
        size = losses.abs().sum() / (divisor if reduction == "mean" else 1)
        assert not (found - value).abs() > 2 * eps * size  # NaN of no token
        assert found.isnan() == value.isnan()


@given()
def test_tokens_of_any_shape(impl, case):
    """Bit for bit those of one axis."""
    inputs, options = case
    n = len(inputs.target)
    if n % 2:
        return
    flat = results_of(impl, inputs, options)
    shaped = inputs._replace(
        **{
            name: t.unflatten(0, (2, 1, n // 2))
            for name in ("input", "target", "token_weight", *(["g_loss"] if inputs.g_loss.dim() else []))
            if (t := getattr(inputs, name)) is not None
        }
    )
    for name, result in results_of(impl, shaped, options).items():
        assert torch.equal(result.reshape(flat[name].shape), flat[name]), name
        if name in ("lse", "ginput"):
            assert result.shape[:3] == (2, 1, n // 2)


# Classes


@given(softcaps=(None,), zetas=(0.0,))
def test_a_bias_that_all_classes_share_moves_lse_alone(impl, case):
    """Losses and gradients are the same within their budgets, and those of the bias sum to 0."""
    inputs, options = case
    shift = 7.5
    bias = torch.zeros(len(inputs.linear_weight)) if inputs.linear_bias is None else inputs.linear_bias
    at_rest, moved = (inputs._replace(linear_bias=b) for b in (bias, bias + shift))
    expected = expected_results(moved, options, with_lse=False)
    of_rest = expected_results(at_rest, options, with_lse=False)
    results = results_of(impl, moved, options)
    for name in expected.keys() - {"lse"}:
        # The sum of bias and shift is rounded: an error of a logit that the budgets of moved ones have.
        budget = expected[name].budget + of_rest[name].budget
        assert_matches_reference(results[name], of_rest[name].value, budget, name=name)
    taken = inputs.target != -100
    difference = results["lse"].double() - of_rest["lse"].value
    assert ((difference - shift).abs() <= expected["lse"].budget + 1e-6 * shift)[taken].all()
    value, budget = results["glinear_bias"].double(), expected["glinear_bias"].budget
    assert not value.sum().abs() > budget.sum()


@given()
def test_classes_in_another_order_are_the_same_classes(impl, case):
    inputs, options = case
    at = order(len(inputs.linear_weight))
    back = at.argsort()
    moved = inputs._replace(
        **{
            n: t[at]
            for n in ("linear_weight", "linear_bias", "weight")
            if (t := getattr(inputs, n)) is not None
        },
        target=torch.where(inputs.target < 0, inputs.target, back[inputs.target.clamp(min=0)]),
    )
    results = results_of(impl, moved, options)
    for name in results.keys() & {"glinear_weight", "glinear_bias"}:
        results[name] = results[name][back]
    assert_within(results, expected_results(inputs, options, with_lse=False))


@given(reductions=("none",), smoothing=(0.0,), zetas=(0.0,))
def test_smoothing_is_a_mixture_of_losses(impl, case):
    """Of that of the target, and the mean of those that each class would have as a target."""
    inputs, options = case
    inputs = inputs._replace(weight=None, token_weight=None)
    V, eps = len(inputs.linear_weight), 0.3
    plain = linear_cross_entropy_with_lse(**tensors_of(inputs), **options, impl=impl)
    taken = inputs.target != -100
    of_each = torch.stack(
        [
            linear_cross_entropy(
                **(tensors_of(inputs) | {"target": torch.where(taken, v, -100)}), **options, impl=impl
            )
            for v in range(V)
        ]
    ).double()
    mixture = (1 - eps) * plain.loss.double() + eps * of_each.mean(0)
    budget = expected_results(inputs, options | {"label_smoothing": eps}, with_lse=False)["loss"].budget
    size = torch.finfo(torch.float32).eps * (of_each.abs().amax(0) + plain.lse.abs())
    smooth = linear_cross_entropy(**tensors_of(inputs), **(options | {"label_smoothing": eps}), impl=impl)
    assert ((smooth.double() - mixture).abs() <= 2 * budget + 4 * size).all()


@given(smoothing=(0.0,))
def test_a_class_weight_that_all_share_is_a_factor_and_has_no_part_in_the_mean(impl, case):
    inputs, options = case
    options = options | {"z_loss": 0.0}
    shared = inputs._replace(weight=torch.full((len(inputs.linear_weight),), 0.25))
    plain = loss_of(impl, inputs, options, weight=None)
    found = loss_of(impl, shared, options)
    assert torch.equal(
        found.nan_to_num(), (plain if options["reduction"] == "mean" else plain / 4).nan_to_num()
    )


@given()
def test_a_class_that_minus_infinity_leaves_out_is_as_if_it_were_not_there(impl, case):
    """Of a bias; no loss counts it, and no gradient goes to it."""
    inputs, options = case
    V = len(inputs.linear_weight)
    options = options | {"label_smoothing": 0.0, "softcap": None}
    bias = torch.zeros(V) if inputs.linear_bias is None else inputs.linear_bias
    more = inputs._replace(
        linear_weight=torch.cat([inputs.linear_weight, 1 + inputs.linear_weight[:1]]),
        linear_bias=torch.cat([bias, torch.tensor([-torch.inf])]),
        weight=None if inputs.weight is None else torch.cat([inputs.weight, torch.ones(1)]),
    )
    results = results_of(impl, more, options)
    for name in ("glinear_weight", "glinear_bias"):
        assert not results[name][V].any() or results["loss"].isnan().all()
        results[name] = results[name][:V]
    assert_within(results, expected_results(inputs._replace(linear_bias=bias), options, with_lse=False))


# Values


@given(reductions=("none",), smoothing=(0.0,), zetas=(0.0,))
def test_a_loss_is_not_negative_but_for_the_roundings_of_its_logit(impl, case):
    """Of large logits, whose targets have all the probability; and lse less the loss is a target's logit."""
    inputs, options = case
    logits = inputs.input @ inputs.linear_weight.T
    if inputs.linear_bias is not None:
        logits = logits + inputs.linear_bias
    inputs = inputs._replace(target=logits.argmax(1), input=4 * inputs.input, weight=None, token_weight=None)
    loss, lse = linear_cross_entropy_with_lse(**tensors_of(inputs), **options, impl=impl)
    of_target = lse - loss
    least = -2 * torch.finfo(torch.float32).eps * of_target.abs()
    assert (loss >= least).all()
    value, budget = expected_results(inputs, options, with_lse=False)["lse"]
    exact = torch.einsum("nd,nd->n", inputs.input.double(), inputs.linear_weight.double()[inputs.target])
    if inputs.linear_bias is not None:
        exact = exact + inputs.linear_bias.double()[inputs.target]
    if options["softcap"]:
        exact = options["softcap"] * torch.tanh(exact / options["softcap"])
    assert ((of_target.double() - exact).abs() <= 2 * budget).all() and (value >= exact - budget).all()


@given()
def test_results_are_within_their_budgets(impl, case):
    """Of all options together, with and without a gradient to lse."""
    inputs, options = case
    if options["reduction"] == "mean" and (inputs.target == -100).all():
        return
    for with_lse in (False, True):
        check(inputs, options, with_lse=with_lse, impl=impl)


# Blocks


def blocks(**sizes):
    """Of other sizes."""
    stack = ExitStack()
    for name, size in sizes.items():
        stack.enter_context(mock.patch.object(linear_cross_entropy_products, f"_{name}", size))
    return stack


@given(examples=60)
def test_the_sizes_of_blocks_are_no_matter(case):
    """Of a few tokens and classes, which divide neither: gradients formed in forward, and in backward."""
    if unavailable("cpu", KERNELS) is not None:
        pytest.skip("there is no CPU kernel")
    inputs, options = case
    if options["reduction"] == "mean" and (inputs.target == -100).all():
        return
    N, V = len(inputs.target), len(inputs.linear_weight)
    rows = max(1, N // 3)
    sizes = {
        "BLOCK_TOKENS": rows,
        "BLOCK_BYTES": 4 * rows * max(1, min(7, V - 1)),
        "KEPT_BYTES": 4 * V * max(1, N // 5),
        "KEPT_TOKENS": 1,
    }
    with threads(1), blocks(**sizes):
        for with_lse in (False, True):
            check(inputs, options, with_lse=with_lse, impl="cpu")
    with threads(1), blocks(BLOCK_BYTES=4 * N, KEPT_BYTES=1, KEPT_TOKENS=1):  # one class, and one token
        check(inputs, options, impl="cpu")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_every_dtype(dtype, reduction):
    """23 tokens by 4, of which a third is ignored, and 101 classes by 13."""
    if unavailable("cpu", KERNELS) is not None:
        pytest.skip("there is no CPU kernel")
    inputs = make_inputs(
        23, 101, 9, dtype=dtype, reduction=reduction, linear_bias=True, weight=True, token_weight=True,
        ignored=True,
    )  # fmt: skip
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01}
    size = torch.promote_types(dtype, torch.float32).itemsize
    with (
        threads(1),
        blocks(BLOCK_TOKENS=4, BLOCK_BYTES=size * 4 * 13, KEPT_BYTES=size * 101 * 3, KEPT_TOKENS=1),
    ):
        for with_lse in (False, True):
            check(inputs, options, with_lse=with_lse, impl="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hidden_size_of_768(impl, dtype, reduction):
    """With blocks as they are, of which the classes are no multiple: 16381 is a prime."""
    inputs = make_inputs(300, 16381, 768, dtype=dtype, reduction=reduction, linear_bias=True, ignored=True)
    options = {"reduction": reduction, "softcap": 30.0}
    check(inputs, options, impl=impl)
