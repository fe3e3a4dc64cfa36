"""Derivatives of lora_linear by differences, in float64, and torch.func."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fastkit import reference
from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS, low_rank
from fastkit.testing import LinearSize
from fastkit.testing.lora_linear import SCALE, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread", "has_float64"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's forward mode
]

NAMES = "x", "weight", "bias", "lora_a", "lora_b", "lora_x"
SMALL = LinearSize(3, 4, 5, 2)
FLAGS = list(itertools.product((False, True), repeat=3))


@pytest.fixture
def has_float64(request):
    """Which differences take; what is derived from the kernels' results is the same code for all of them."""
    if "impl" in request.fixturenames:
        impl = request.getfixturevalue("impl")
        if impl != "reference" and torch.float64 not in KERNELS[impl]:
            pytest.skip(f"{impl} has no float64")


def inputs_of(size=SMALL, flags=(True, True, True), seed=0):
    mask, lora_x, bias = flags
    return make_inputs(size, mask=mask, lora_x=lora_x, bias=bias, dtype=torch.float64, seed=seed)


def call_of(inputs, names=NAMES, op=lora_linear, **options):
    """The op as a function of the arguments with these names that there are, and those arguments."""
    names = [name for name in names if getattr(inputs, name) is not None]

    def call(*tensors):
        given = inputs._replace(**dict(zip(names, tensors, strict=True)))
        x, weight, bias, a, b, mask, lora_x, _ = given
        return op(x, weight, bias, a, b, SCALE, mask=mask, lora_x=lora_x, **options)

    return call, [getattr(inputs, name).detach().requires_grad_() for name in names]


# Gradients of first, second and third order


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gradcheck_and_gradgradcheck(kernel, flags):
    """With and without mask, lora_x and bias; to everything."""
    call, leaves = call_of(inputs_of(flags=flags), impl=kernel)
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize(
    "names",
    [*((name,) for name in NAMES), *itertools.combinations(NAMES, 2), ("x", "lora_a", "lora_b"), NAMES[2:]],
    ids="-".join,
)
def test_gradgradcheck_of_some_arguments(native, names, lora_x):
    """What needs no gradient takes no part."""
    if not lora_x and "lora_x" in names:
        return
    call, leaves = call_of(inputs_of(flags=(True, lora_x, True)), names, impl=native)
    assert gradgradcheck(call, leaves, fast_mode=len(names) > 1)


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("size", [LinearSize(1, 1, 1, 1), LinearSize(27, 11, 9, 13)], ids=str)
def test_gradgradcheck_of_other_sizes(native, size, lora_x):
    call, leaves = call_of(inputs_of(size, (True, lora_x, True)), impl=native)
    fast = size.N > 1
    assert gradcheck(call, leaves, fast_mode=fast) and gradgradcheck(call, leaves, fast_mode=fast)


@pytest.mark.parametrize("lora_x", [False, True])
def test_gradgradcheck_of_the_addition_alone(native, lora_x):
    def alone(x, weight, bias, a, b, scale, **options):
        return low_rank(x, a, b, scale, **options).y

    call, leaves = call_of(inputs_of(flags=(True, lora_x, False)), ("lora_a", "lora_b", "lora_x"), alone)
    assert gradcheck(call, leaves) and gradgradcheck(call, leaves)
    if not lora_x:
        call, leaves = call_of(inputs_of(flags=(True, False, False)), ("x", "lora_a", "lora_b"), alone)
        assert gradcheck(call, leaves) and gradgradcheck(call, leaves)


def graph_gradients(call, leaves, order):
    """Sums of squared gradients, again and again, and the gradients of the last."""
    value = call(*leaves).pow(2).sum()
    for _ in range(order):
        gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        value = sum(g.pow(2).sum() for g in gradients)
    return gradients


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("flags", [(True, False, True), (True, True, True), (False, True, False)], ids=str)
def test_create_graph_up_to_the_third_order(impl, flags, order):
    inputs = inputs_of(flags=flags)
    found = graph_gradients(*call_of(inputs, impl=impl), order)
    expected = graph_gradients(*call_of(inputs, op=reference.lora_linear), order)
    torch.testing.assert_close(found, expected)


def test_what_is_pruned_has_no_gradient_of_any_order(impl):
    inputs = inputs_of()
    for order in (1, 2, 3):
        call, leaves = call_of(inputs, impl=impl)
        of_a = graph_gradients(call, leaves, order)[3]
        assert not of_a[~inputs.mask].any() and of_a[inputs.mask].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_gradients_have_the_dtypes_of_their_arguments(native, dtype):
    inputs = make_inputs(SMALL, lora_x=True, dtype=dtype, adapter=torch.float32)
    call, leaves = call_of(inputs, impl=native)
    gradients = graph_gradients(call, leaves, 2)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    exact, leaves = call_of(
        inputs._replace(**{n: getattr(inputs, n).double() for n in (*NAMES, "gy")}), op=reference.lora_linear
    )
    for found, want in zip(gradients, graph_gradients(exact, leaves, 2), strict=True):
        # A dozen roundings to half precision, of values whose terms are as large as themselves.
        error = torch.linalg.vector_norm(found.double() - want) / torch.linalg.vector_norm(want)
        assert error <= 12 * torch.finfo(dtype).eps


def test_gradients_of_no_token_have_gradients(native):
    call, leaves = call_of(inputs_of(LinearSize(0, 4, 5, 2)), impl=native)
    for gradient, leaf in zip(graph_gradients(call, leaves, 2), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_the_statistic_has_no_part_in_second_gradients(native):
    def with_stats(*args, **options):
        return lora_linear_with_stats(*args, **options).y

    inputs = inputs_of()
    found = graph_gradients(*call_of(inputs, op=with_stats, impl=native), 2)
    torch.testing.assert_close(found, graph_gradients(*call_of(inputs, impl=native), 2), rtol=0, atol=0)


# Forward mode


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_forward_mode(kernel, flags):
    call, leaves = call_of(inputs_of(flags=flags), impl=kernel)
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_with_dual_numbers(impl):
    inputs = inputs_of()
    call, leaves = call_of(inputs, impl=impl)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    expected = torch.func.jvp(call_of(inputs, op=reference.lora_linear)[0], tuple(leaves), tuple(tangents))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(leaf.detach(), t) for leaf, t in zip(leaves, tangents, strict=True)]
        y = forward_ad.unpack_dual(call(*dual))
        torch.testing.assert_close((y.primal, y.tangent), expected)


def test_batched_gradients(impl):
    """``is_grads_batched``; a kernel that writes to an argument has no rule for it, and PyTorch says so."""
    call, leaves = call_of(inputs_of(LinearSize(2, 3, 2, 2)), impl=impl)
    if impl == "reference":
        assert gradcheck(call, leaves, check_batched_grad=True)
        return
    cotangents = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for fastkit"):
        torch.autograd.grad(call(*leaves), leaves, cotangents, is_grads_batched=True)


# torch.func


def compare_transforms(transform, impl, flags=(True, True, True), size=SMALL):
    """The transform of y cubed and summed, of the op and of the reference."""

    def transformed(**options):
        call, leaves = call_of(inputs_of(size, flags), **options)
        every = tuple(range(len(leaves)))
        return transform(lambda *tensors: call(*tensors).pow(3).sum(), every)(*(t.detach() for t in leaves))

    torch.testing.assert_close(transformed(impl=impl), transformed(op=reference.lora_linear))


@pytest.mark.parametrize("flags", [(True, False, True), (False, True, False), (True, True, True)], ids=str)
def test_func_grad(impl, flags):
    compare_transforms(torch.func.grad, impl, flags)


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("way", ["forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"])
def test_hessian(impl, way, lora_x):
    func = torch.func
    ways = {
        "forward-over-reverse": func.hessian,
        "reverse-over-reverse": lambda f, every: func.jacrev(func.jacrev(f, every), every),
        "reverse-over-forward": lambda f, every: func.jacrev(func.jacfwd(f, every), every),
    }
    compare_transforms(ways[way], impl, (True, lora_x, True), LinearSize(2, 3, 2, 2))


def test_hessian_of_autograd_is_that_of_the_reference(native):
    """Which takes the kernels, where those of torch.func take the reference."""
    inputs = inputs_of(LinearSize(2, 3, 2, 2))

    def hessian(**options):
        call, leaves = call_of(inputs, **options)
        of = lambda *tensors: call(*tensors).pow(3).sum()  # noqa: E731
        return torch.autograd.functional.hessian(of, tuple(leaves))

    torch.testing.assert_close(hessian(impl=native), hessian(op=reference.lora_linear))


def test_jacobians_agree(impl):
    call, leaves = call_of(inputs_of(LinearSize(2, 3, 2, 2)), impl=impl)
    every, leaves = tuple(range(len(leaves))), tuple(t.detach() for t in leaves)
    backwards = torch.func.jacrev(call, every)(*leaves)
    torch.testing.assert_close(torch.func.jacfwd(call, every)(*leaves), backwards)
    by_autograd = torch.autograd.functional.jacobian(call, leaves)
    torch.testing.assert_close(by_autograd, backwards)


@pytest.mark.parametrize(
    "axes", [axes for axes in itertools.product((0, None), repeat=3) if any(a == 0 for a in axes)]
)
def test_vmap_is_a_loop(impl, axes):
    """Over x, lora_a and lora_b; results and gradients."""
    many = [inputs_of(seed=seed) for seed in range(3)]
    names = "x", "lora_a", "lora_b"
    stacked = [torch.stack([getattr(inputs, name) for inputs in many]) for name in names]
    given = [t if axis == 0 else t[0] for t, axis in zip(stacked, axes, strict=True)]
    call, _ = call_of(many[0], names, impl=impl)

    def layer(*tensors):
        y, vjp = torch.func.vjp(call, *tensors)
        return y, *vjp(many[0].gy)

    found = torch.vmap(layer, axes)(*given)
    looped = [
        layer(*(t[i] if axis == 0 else t for t, axis in zip(given, axes, strict=True))) for i in range(3)
    ]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_vmap_of_adapters_over_one_layer(impl):
    """Of three adapters and their masks at once."""
    inputs = inputs_of()
    masks = torch.stack([inputs.mask, ~inputs.mask, inputs.mask | True])
    adapters = torch.stack([inputs.lora_a, 2 * inputs.lora_a, -inputs.lora_a])
    x, weight, bias, _, b, *_ = inputs

    def layer(a, mask):
        return lora_linear_with_stats(x, weight, bias, a, b, SCALE, mask=mask, impl=impl)

    y, square_sum = torch.vmap(layer)(adapters, masks)
    expected = [layer(a, mask) for a, mask in zip(adapters, masks, strict=True)]
    torch.testing.assert_close(y, torch.stack([each.y for each in expected]))
    torch.testing.assert_close(square_sum, expected[0].square_sum.expand(3, -1))


def test_gradients_per_token_add_up(impl):
    inputs = inputs_of(flags=(True, False, True))
    call, leaves = call_of(inputs, ("x", "lora_a", "lora_b"), impl=impl)
    x, a, b = (t.detach() for t in leaves)
    of_token = torch.func.grad(lambda a, b, row: call(row, a, b).square().sum(), (0, 1))
    found = [g.sum(0) for g in torch.vmap(of_token, (None, None, 0))(a, b, x)]
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves[1:])
    torch.testing.assert_close(found, list(expected))
