"""Derivatives of linear_cross_entropy: by differences in float64, of graphs that are kept, and torch.func."""

import itertools
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastkit import reference
from fastkit.ops import linear_cross_entropy, linear_cross_entropy_products, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread", "has_dtype"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's forward mode
]

N, D, V = 4, 3, 5
REDUCTIONS = "none", "sum", "mean"
NAMES = "input", "linear_weight", "linear_bias"

# What a loss may have besides its reduction; targets and ignore_index count as one.
OPTIONS = {
    "bias": {"linear_bias": torch.tensor([0.5, -1.0, 0.25, 2.0, -0.125])},
    "weight": {"weight": torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0])},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.05},
    "token_weight": {"token_weight": torch.tensor([1.5, -0.5, 0.0, 1.0])},
    "ignored": {"target": torch.tensor([2, -100, 4, 0])},
    "ignored class": {"ignore_index": 2},
}
EVERY = tuple(name for name in OPTIONS if name != "ignored class")


@pytest.fixture
def has_dtype(request):
    """That of the test, where it names one; else float64, which differences take."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    dtype = parameters.get("dtype", torch.float64)
    for name in {"impl", "kernel"} & {*request.fixturenames}:
        impl = request.getfixturevalue(name)
        if impl != "reference" and dtype not in KERNELS[impl]:
            pytest.skip(f"{impl} has no {dtype}")


def arguments_of(*names, size=(N, D, V), dtype=torch.float64, seed=0):
    """Noise, and the options with these names."""
    tokens, columns, classes = size
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    arguments = {
        "input": torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype),
        "linear_weight": torch.randn(classes, columns, generator=generator, dtype=torch.float64).to(dtype),
        "target": torch.randint(classes, (tokens,), generator=generator),
    }
    if size == (N, D, V):
        arguments["target"] = torch.tensor([2, 0, 4, 2])
    for name in names:
        for key, value in OPTIONS[name].items():
            there = value.to(arguments["input"].device) if isinstance(value, torch.Tensor) else value
            arguments[key] = there.to(dtype) if key in ("linear_bias", "weight", "token_weight") else there
    return arguments


def call_of(arguments, names=NAMES, op=linear_cross_entropy, **options):
    """The op as a function of the arguments with these names that there are, and those arguments."""
    names = [name for name in names if arguments.get(name) is not None]

    def call(*tensors):
        return op(**(arguments | options | dict(zip(names, tensors, strict=True))))

    return call, [arguments[name].detach().requires_grad_() for name in names]


def by_reference(arguments, reduction, scale=1.0):
    """Gradients of the loss, times what is upstream."""
    call, leaves = call_of(arguments, op=reference.linear_cross_entropy, reduction=reduction)
    loss = call(*leaves)
    return torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))


def assert_near(found, expected):
    torch.testing.assert_close(list(found), list(expected), rtol=1e-10, atol=1e-12)


@pytest.fixture
def products(monkeypatch):
    """How many products there were: 1 a block for its logits, and 1 for each of two gradients."""
    counted = []
    product = linear_cross_entropy_products._product
    monkeypatch.setattr(
        linear_cross_entropy_products,
        "_product",
        lambda *args, **options: (counted.append(1), product(*args, **options))[1],
    )

    def count():
        number = len(counted)
        counted.clear()
        return number

    return count


# First derivatives


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "names",
    [(), *((name,) for name in OPTIONS), *itertools.combinations(OPTIONS, 2), EVERY],
    ids=lambda names: "-".join(names) or "plain",
)
def test_gradcheck(native, names, reduction):
    """Of the loss, where there are gradients of both kinds: formed in forward, and computed again."""
    if {"ignored", "ignored class"} <= {*names}:
        names = tuple(name for name in names if name != "ignored")
    call, leaves = call_of(arguments_of(*names), reduction=reduction, impl=native)
    assert gradcheck(call, leaves, nondet_tol=1e-13)


@pytest.mark.parametrize("names", [(), *((name,) for name in OPTIONS), EVERY], ids="-".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", ["lse", "both"])
def test_gradcheck_of_lse(kernel, which, reduction, names):
    """Alone, and with the loss."""
    call, leaves = call_of(
        arguments_of(*names), op=linear_cross_entropy_with_lse, reduction=reduction, impl=kernel
    )
    of = call if which == "both" else lambda *tensors: call(*tensors).lse
    assert gradcheck(of, leaves, nondet_tol=1e-13)


@pytest.mark.parametrize("names", [("bias",), EVERY], ids=["plain", "every"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 2), (13, 9, 33), (3, 17, 100)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_other_sizes(native, reduction, size, names):
    tokens, _, classes = size
    generator = torch.Generator().manual_seed(0)
    arguments = arguments_of(size=size) | {
        "linear_bias": torch.randn(classes, generator=generator, dtype=torch.float64)
    }
    if names == EVERY:
        arguments |= {
            "weight": torch.rand(classes, generator=generator, dtype=torch.float64),
            "token_weight": torch.randn(tokens, generator=generator, dtype=torch.float64),
            "label_smoothing": 0.1,
            "softcap": 3.0,
            "z_loss": 0.01,
        }
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, reduction=reduction, impl=native)
    assert gradcheck(call, leaves, fast_mode=tokens > 1, nondet_tol=1e-12)
    alone = call_of(arguments, reduction=reduction, impl=native)[0]
    assert gradcheck(alone, leaves, fast_mode=tokens > 1, nondet_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_a_hidden_size(native, reduction):
    """768, as of GPT-2, with more classes than vectors hold."""
    arguments = arguments_of(size=(17, 768, 1003))
    arguments["input"] = arguments["input"] / 768**0.5
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, reduction=reduction, impl=native)
    assert gradcheck(call, leaves, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0, 65536.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [(), EVERY], ids=["plain", "every"])
def test_what_is_upstream_scales_the_gradients(impl, names, reduction, upstream):
    arguments = arguments_of(*names)
    call, leaves = call_of(arguments, reduction=reduction, impl=impl)
    loss = call(*leaves)
    found = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    expected = by_reference(arguments, reduction, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * max(1.0, abs(upstream)))


def test_a_gradient_of_infinity_or_nan_is_not_lost(impl):
    """As a loss scaler sees it: no gradient is finite that depends on it."""
    for upstream in (torch.inf, torch.nan):
        call, leaves = call_of(arguments_of(), reduction="mean", impl=impl)
        loss = call(*leaves)
        found = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
        assert not any(g.isfinite().any() for g in found)


SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_what_requires_no_grad_takes_no_part(native, products, names, reduction):
    """Of three products those that are wanted, in forward where the loss is one number, else in backward."""
    arguments = arguments_of("bias", "softcap", "ignored")
    expected = dict(zip(NAMES, by_reference(arguments, reduction), strict=True))
    call, leaves = call_of(arguments, names, reduction=reduction, impl=native)
    loss = call(*leaves)
    of_gradients = len({*names} - {"linear_bias"})
    assert products() == (1 if reduction == "none" else 1 + of_gradients)
    found = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert products() == (1 + of_gradients if reduction == "none" else 0)
    assert_near(found, [expected[name] for name in names])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_gradients_to_some_of_what_requires_them(impl, names, reduction):
    """One graph asked twice: first for some, then for the others."""
    arguments = arguments_of("bias", "weight")
    expected = dict(zip(NAMES, by_reference(arguments, reduction), strict=True))
    call, leaves = call_of(arguments, reduction=reduction, impl=impl)
    of = dict(zip(NAMES, leaves, strict=True))
    loss = call(*leaves)
    for asked in (names, [name for name in NAMES if name not in names]):
        if asked:
            found = torch.autograd.grad(
                loss, [of[n] for n in asked], torch.ones_like(loss), retain_graph=True
            )
            assert_near(found, [expected[name] for name in asked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_have_the_dtypes_of_their_arguments(kernel, reduction, dtype):
    """A bias may be float32 beside half precision; two tokens of three are ignored."""
    for bias in (dtype, torch.float32):
        arguments = arguments_of("bias", dtype=dtype)
        arguments["linear_bias"] = arguments["linear_bias"].to(bias)
        arguments["target"][:2] = -100
        call, leaves = call_of(arguments, reduction=reduction, impl=kernel)
        loss = call(*leaves)
        gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        assert [g.dtype for g in gradients] == [dtype, dtype, bias]
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
        assert not gradients[0][:2].any() and gradients[0][2:].all()


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_scaled_loss_keeps_what_float16_would_lose(kernel, reduction, dtype):
    """Gradients below the least of float16, times 65536, are those of float32 within its roundings."""
    arguments = arguments_of(size=(40, 16, 30), dtype=dtype)
    arguments["linear_weight"] = 0.001 * arguments["linear_weight"]
    arguments["input"] = 0.001 * arguments["input"]
    arguments["token_weight"] = torch.full((40,), 1e-3)
    scale = 65536.0
    call, leaves = call_of(arguments, reduction=reduction, impl=kernel)
    loss = call(*leaves)
    found = torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))
    exact = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    for g, want in zip(found, by_reference(exact, reduction), strict=True):
        assert (want.half() == 0).any()  # what would be lost
        assert (g.double() - scale * want).abs().max() <= 2e-3 * scale * want.abs().max()
        assert ((g == 0) <= (scale * want.abs() < 1e-7)).all()


# Graphs that are kept


@pytest.mark.parametrize("names", [(), EVERY], ids=["plain", "every"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_has_the_same_gradients_and_leaves_the_first_alone(impl, reduction, names):
    """Though what was formed in forward was given away, scaled in place."""
    arguments = arguments_of(*names)
    call, leaves = call_of(arguments, reduction=reduction, impl=impl)
    loss = call(*leaves)
    given = []
    for upstream in (3.0, -0.5, 3.0, 1.0):
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream), retain_graph=True)
        assert_near(gradients, by_reference(arguments, reduction, upstream))
        given.append((gradients, [g.clone() for g in gradients]))
    for gradients, copies in given:
        assert all(map(torch.equal, gradients, copies))
    memory = [g.untyped_storage().data_ptr() for gradients, _ in given for g in gradients]
    assert len({*memory}) == len(memory)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_grad_accumulates_over_backwards_and_over_calls(impl, reduction):
    arguments = arguments_of("bias")
    call, leaves = call_of(arguments, reduction=reduction, impl=impl)
    expected = by_reference(arguments, reduction)
    loss = call(*leaves)
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    held = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (2 * loss).backward()
    assert all(map(torch.equal, held, first))  # held by someone else, as by a gradient clipper
    call(*leaves).backward()
    assert_near([leaf.grad for leaf in leaves], [3 * g for g in expected])
    (call(*leaves) - 4 * call(*leaves)).backward()
    assert_near([leaf.grad for leaf in leaves], [torch.zeros_like(leaf) for leaf in leaves])


def test_a_backward_through_lse_alone_then_one_through_the_loss(impl):
    """What was formed is of no use to the first, and need not be there for the second."""
    arguments = arguments_of("bias", "ignored")
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, reduction="sum", impl=impl)
    loss, lse = call(*leaves)
    of_lse = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    expected = by_reference(arguments, "sum")
    assert_near(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
    both = torch.autograd.grad(2 * loss - 3 * lse.sum(), leaves)
    assert_near(both, [2 * g - 3 * h for g, h in zip(expected, of_lse, strict=True)])


def test_without_retain_graph_a_second_backward_is_refused_as_ever(native):
    call, leaves = call_of(arguments_of(), reduction="mean", impl=native)
    loss = call(*leaves)
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_formed_where_none_can_be_asked_for(native, products, context, reduction):
    arguments = arguments_of("bias", "ignored")
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, reduction=reduction, impl=native)
    expected = call(*leaves)
    products()
    with context():
        found = call(*leaves)
        assert products() == 1
        assert call(*(leaf.detach() for leaf in leaves)) is not None and products() == 1
    assert not any(t.requires_grad for t in found)
    torch.testing.assert_close([t.clone() for t in found], [t.detach() for t in expected])
    call(*(leaf.detach() for leaf in leaves))  # gradients are enabled, and nothing requires one
    assert products() == 1


def test_the_memory_that_a_graph_keeps(native):
    """Arguments, lse, and nothing as large as the logits; the gradients besides, until they are given."""
    arguments = arguments_of("bias", size=(N, D, V)) | {
        "input": torch.randn(50, 4, dtype=torch.float64),
        "linear_weight": torch.randn(V, 4, dtype=torch.float64),
        "target": torch.arange(50) % V,
    }
    for reduction in REDUCTIONS:
        call, leaves = call_of(arguments, reduction=reduction, impl=native)
        kept = []

        def keep(t, kept=kept):
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            call(*leaves)
        assert kept and all(t.shape != (50, V) for t in kept)
        assert sum(t.numel() for t in kept) == 50 * 4 + V * 4 + V + 50 + 50


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_saved_tensors_may_be_packed(impl, reduction):
    """As they are moved to a host, or to a disk; also for a backward that computes the logits again."""
    arguments = arguments_of(*EVERY)
    call, leaves = call_of(arguments, reduction=reduction, impl=impl)

    def pack(t):
        return t.device, t.dtype, t.detach().cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[2].to(packed[0])):
        loss = call(*leaves)
    for _ in range(2):
        found = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
        assert_near(found, by_reference(arguments, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_has_the_same_gradients(impl, reentrant, reduction):
    """Bit for bit, of a loss with lse and what is before it."""
    arguments = arguments_of("bias", "ignored")
    for op in (linear_cross_entropy, linear_cross_entropy_with_lse):
        results = []
        for checkpoints in (False, True):
            call, leaves = call_of(arguments, op=op, reduction=reduction, impl=impl)

            def run(x, *others, call=call):
                outcome = call(x.sin(), *others)
                return (
                    outcome if isinstance(outcome, torch.Tensor) else outcome.loss.sum() + outcome.lse.sum()
                )

            loss = checkpoint(run, *leaves, use_reentrant=reentrant) if checkpoints else run(*leaves)
            (2 * loss).sum().backward()
            results.append([leaf.grad for leaf in leaves])
        assert all(map(torch.equal, *results))


def test_arguments_that_are_changed_before_a_backward(native):
    """Gradients that were formed are those of the call; what would have to be computed again is refused."""
    arguments = arguments_of()
    expected = by_reference(arguments, "mean")
    call, leaves = call_of(arguments, reduction="mean", impl=native)
    loss = call(*leaves)
    with torch.no_grad():
        leaves[1].add_(1.0)
    assert_near(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


# Second derivatives

REFUSED = (
    "linear_cross_entropy: second derivatives must be those of the reference, got a backward of a backward;"
    ' use impl="reference"'
)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_with_lse])
def test_second_derivatives_are_refused(native, op, reduction):
    """The first ones of create_graph are as ever; a backward through them raises, to whatever it goes."""
    arguments = arguments_of(*EVERY)
    call, leaves = call_of(arguments, op=op, reduction=reduction, impl=native)
    outcome = call(*leaves)
    loss = outcome if op is linear_cross_entropy else outcome.loss
    upstream = torch.ones_like(loss, requires_grad=True)
    gradients = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    assert_near([g.detach() for g in gradients], by_reference(arguments, reduction))
    for gradient in gradients:
        assert gradient.requires_grad
        for to in (*leaves, upstream):
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(gradient.sum(), to, retain_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused_where_one_argument_requires_grad(native, name):
    """No silent zero: the gradient of W alone still depends on W."""
    call, leaves = call_of(arguments_of("bias"), (name,), impl=native)
    (gradient,) = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.sum().backward()


def test_a_penalty_on_a_gradient_is_refused_in_the_second_backward(native):
    """Of a loss squared, whose own gradient requires grad."""
    call, leaves = call_of(arguments_of(), impl=native)
    (of_input,) = torch.autograd.grad(call(*leaves).square(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        of_input.square().sum().backward()


@pytest.mark.parametrize("names", [(), *((name,) for name in OPTIONS), EVERY], ids="-".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradgradcheck_of_the_reference(reduction, names):
    arguments = arguments_of(*names)
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, reduction=reduction, impl="reference")
    assert gradcheck(call, leaves) and gradgradcheck(call, leaves, fast_mode=True)


# torch.func and forward mode, which run the reference


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [(), EVERY], ids=["plain", "every"])
def test_func_grad_and_hessian(impl, names, reduction):
    arguments = arguments_of(*names)
    every = tuple(range(2 if not names else 3))

    def of(op, transform, **options):
        call, leaves = call_of(arguments, op=op, reduction=reduction, **options)
        return transform(lambda *tensors: call(*tensors).sum(), every)(*(t.detach() for t in leaves))

    for transform in (torch.func.grad, torch.func.hessian):
        found = of(linear_cross_entropy, transform, impl=impl)
        torch.testing.assert_close(found, of(reference.linear_cross_entropy, transform))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode(kernel, reduction):
    call, leaves = call_of(arguments_of(*EVERY), reduction=reduction, impl=kernel)
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_with_dual_numbers(impl):
    arguments = arguments_of("bias")
    call, leaves = call_of(arguments, op=linear_cross_entropy_with_lse, impl=impl)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    plain = call_of(arguments, op=reference.linear_cross_entropy_with_lse)[0]
    expected = torch.func.jvp(plain, tuple(leaves), tuple(tangents))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(leaf.detach(), t) for leaf, t in zip(leaves, tangents, strict=True)]
        for i, each in enumerate(map(forward_ad.unpack_dual, call(*dual))):
            torch.testing.assert_close((each.primal, each.tangent), (expected[0][i], expected[1][i]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_is_a_loop(impl, reduction):
    """Over inputs and targets, with one weight; results and gradients."""
    many = [arguments_of("softcap", seed=seed) for seed in range(3)]
    for i, arguments in enumerate(many):
        arguments["target"] = (arguments["target"] + i) % V
    weight = many[0]["linear_weight"]

    def run(x, target, weight):
        def loss(x, weight):
            op = partial(linear_cross_entropy, reduction=reduction, softcap=2.0, impl=impl)
            return op(x, weight, target).sum()

        gradients, value = torch.func.grad_and_value(loss, (0, 1))(x, weight)
        return value, *gradients

    given = [(arguments["input"], arguments["target"], weight) for arguments in many]
    found = torch.vmap(run, (0, 0, None))(
        *(torch.stack(t) for t in list(zip(*given, strict=True))[:2]), weight
    )
    looped = [run(*each) for each in given]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_gradients_per_token_add_up(impl):
    """As of differential privacy: by vmap of grad, and by the loss of each token."""
    arguments = arguments_of()
    call, leaves = call_of(arguments, reduction="sum", impl=impl)
    x, weight = (t.detach() for t in leaves)

    def of_token(weight, row, target):
        return linear_cross_entropy(row, weight, target, impl=impl)

    found = torch.vmap(torch.func.grad(of_token), (None, 0, 0))(weight, x, arguments["target"])
    (expected,) = torch.autograd.grad(call(*leaves), leaves[1:])
    torch.testing.assert_close(found.sum(0), expected)


def test_batched_gradients(impl):
    """``is_grads_batched``: a loop over the products; of one number the factors of one gradient."""
    arguments = arguments_of("bias")
    call, leaves = call_of(arguments, reduction="none", impl=impl)
    found = torch.autograd.grad(
        call(*leaves), leaves, torch.eye(N, dtype=torch.float64), is_grads_batched=True
    )
    for token in range(N):
        expected = torch.autograd.grad(call(*leaves)[token], leaves)
        assert_near([g[token] for g in found], expected)
    call, leaves = call_of(arguments, reduction="sum", impl=impl)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = torch.autograd.grad(call(*leaves), leaves, upstream, is_grads_batched=True)
    one = torch.autograd.grad(call(*leaves), leaves)
    for factor, *gradients in zip(upstream, *found, strict=True):
        assert_near(gradients, [factor * g for g in one])


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_passes_ignored_tokens_by(impl, upstream):
    arguments = arguments_of("ignored", "bias")
    call, leaves = call_of(arguments, reduction="mean", impl=impl)
    of_input, of_weight, _ = torch.autograd.grad(
        call(*leaves), leaves, torch.tensor(upstream, dtype=torch.float64)
    )
    assert not of_input[1].any() and not of_input[[0, 2, 3]].isfinite().any()
    assert not of_weight.isfinite().all()


def test_a_backward_of_fake_tensors(native):
    arguments = arguments_of("bias")
    with FakeTensorMode() as mode:
        arguments = {k: mode.from_tensor(v) for k, v in arguments.items()}
        call, leaves = call_of(arguments, reduction="mean", impl=native)
        gradients = torch.autograd.grad(call(*leaves), leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


def test_a_target_that_is_no_class_makes_gradients_nan_where_it_cannot_be_refused(native):
    arguments = arguments_of() | {"target": torch.tensor([2, 0, V, 1])}
    call, leaves = call_of(arguments, reduction="sum", impl=native)
    of_input, of_weight = torch.func.grad(call, argnums=(0, 1))(*leaves)
    assert of_input.isnan().any(1).tolist() == [False, False, True, False] and of_weight.isnan().all()
