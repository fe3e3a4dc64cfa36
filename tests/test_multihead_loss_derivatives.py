"""Derivatives of multihead_loss and orthogonality_penalty: by differences, of kept graphs, by torch.func."""

import importlib
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastkit import reference
from fastkit.ops import multihead_loss, multihead_loss_products, orthogonality_penalty
from fastkit.ops.multihead_loss import KERNELS as KERNELS  # for the fixtures

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's forward mode
]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
B, H, C, D = 4, 3, 5, 2
NAMES = "x", "weight", "bias"

# Of each problem what a loss may have.
CASES = {
    "single_label": {},
    "single_label, everything": {
        "active": torch.tensor([True, False, True]),
        "class_weight": torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0]),
        "label_smoothing": 0.2,
        "ignore_index": 2,
    },
    "multi_label": {},
    "multi_label, everything": {
        "active": torch.tensor([False, True, True]),
        "class_weight": torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0]),
    },
    "regression": {},
    "regression, everything": {"active": torch.tensor([True, True, False])},
}
PENALTIES = [
    {"kind": kind, "center_classes": centers, "huber_width": 0.7}
    for kind in ("abs", "squared", "cos_abs", "cos_squared", "huber")
    for centers in (False, True)
]


def name_of(options):
    return options["kind"] + "-centered" * options["center_classes"]


of_each_case = pytest.mark.parametrize("case", CASES)
of_each_penalty = pytest.mark.parametrize("options", PENALTIES, ids=name_of)


def arguments_of(case, *, dtype=DOUBLE, seed=0):
    """Noise, and the options of a case."""
    problem = case.split(",")[0]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    classes = 1 if problem == "regression" else C

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)

    arguments = {"x": randn(B, D), "weight": randn(H, classes, D), "bias": randn(H, classes)}
    if problem == "single_label":
        arguments["target"] = torch.tensor([2, 0, 4, 1])
    else:
        arguments["target"] = randn(B, C).sigmoid() if problem == "multi_label" else randn(B)
    device = arguments["x"].device
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in CASES[case].items()}
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].to(dtype)
    return arguments | {"problem": problem} | options


def call_of(arguments, names=NAMES, op=multihead_loss, **options):
    """The losses as a function of the arguments with these names, and those arguments."""

    def call(*tensors):
        return op(**(arguments | options | dict(zip(names, tensors, strict=True)))).loss

    return call, [arguments[name].detach().requires_grad_() for name in names]


def cotangent_of(loss):
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype)


def gradients_of(call, leaves, cotangent=None, **options):
    loss = call(*leaves)
    return torch.autograd.grad(
        loss, leaves, cotangent_of(loss) if cotangent is None else cotangent, **options
    )


def by_reference(arguments, cotangent=None, names=NAMES):
    return gradients_of(*call_of(arguments, names, reference.multihead_loss), cotangent)


def heads_of(dtype=DOUBLE, seed=0, H=4):
    """A weight, of which no product is near 0."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(H, 3, 5, generator=generator, dtype=DOUBLE).to(dtype)


def penalty_of(options, op=orthogonality_penalty, **more):
    return lambda weight: op(weight, **options, **more)


def active_of():
    return torch.tensor([True, True, False, True])


def assert_near(found, expected):
    torch.testing.assert_close(list(found), list(expected), rtol=1e-10, atol=1e-12)


# First derivatives


@of_each_case
def test_gradcheck(case, native):
    call, leaves = call_of(arguments_of(case), impl=native)
    assert gradcheck(call, leaves, nondet_tol=1e-13)


@of_each_penalty
def test_gradcheck_of_the_penalty(options, native):
    for active in (None, active_of()):
        call = penalty_of(options, active=active, impl=native)
        assert gradcheck(call, heads_of().requires_grad_(), nondet_tol=1e-13)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_gradcheck_of_more_rows_than_vectors_hold(problem, native):
    arguments = arguments_of(problem)
    rows = torch.arange(37) % B
    arguments["x"] = arguments["x"][rows] + torch.linspace(0, 1, 37, dtype=DOUBLE)[:, None]
    arguments["target"] = arguments["target"][rows]
    call, leaves = call_of(arguments, impl=native)
    assert gradcheck(call, leaves, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0, 65536.0])
@of_each_case
def test_what_is_upstream_scales_the_gradients(case, upstream, impl):
    """One number for each head; or one that is expanded, as of a sum."""
    arguments = arguments_of(case)
    call, leaves = call_of(arguments, impl=impl)
    one = torch.tensor(upstream, dtype=DOUBLE)
    for cotangent in (one.expand(H), upstream * torch.linspace(-1, 2, H, dtype=DOUBLE)):
        found = gradients_of(call, leaves, cotangent)
        expected = by_reference(arguments, cotangent)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * max(1.0, abs(upstream)))
    loss = call(*leaves)
    assert_near(
        torch.autograd.grad(loss.mean(), leaves), by_reference(arguments, (one * 0 + 1 / H).expand(H))
    )


@of_each_penalty
@pytest.mark.parametrize("upstream", [-2.5, 0.0, 65536.0])
def test_what_is_upstream_scales_the_gradient_of_the_penalty(options, upstream, impl):
    weight = heads_of().requires_grad_()
    found, expected = (
        torch.autograd.grad(upstream * penalty_of(options, op)(weight), weight)
        for op in (lambda *a, **k: orthogonality_penalty(*a, **k, impl=impl), reference.orthogonality_penalty)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * max(1.0, abs(upstream)))


@of_each_case
def test_gradients_to_some_heads_alone(case, impl):
    """Of an upstream gradient with zeros: other heads have none, and NaN in them stays there."""
    arguments = arguments_of(case)
    call, leaves = call_of(arguments, impl=impl)
    for head in range(H):
        of_x, of_weight, of_bias = torch.autograd.grad(call(*leaves)[head], leaves)
        expected = by_reference(arguments, torch.eye(H, dtype=DOUBLE)[head])
        assert_near((of_x, of_weight, of_bias), expected)
        others = torch.arange(H) != head
        assert not of_weight[others].any() and not of_bias[others].any()


def test_a_gradient_of_infinity_or_nan_is_not_lost(impl):
    """As a loss scaler sees it: no gradient is finite that depends on it. An inactive head has none."""
    for upstream in (torch.inf, torch.nan):
        call, leaves = call_of(arguments_of("single_label, everything"), impl=impl)
        of_x, of_weight, of_bias = gradients_of(call, leaves, torch.full((H,), upstream, dtype=DOUBLE))
        assert not of_x[1:].isfinite().any() and not of_x[0].any()
        assert not of_weight[[0, 2]].isfinite().all() and not of_weight[1].any()
        assert not of_bias[[0, 2]].isfinite().any() and not of_bias[1].any()
        weight = heads_of().requires_grad_()
        penalty = orthogonality_penalty(weight, active=active_of(), impl=impl)
        (gradient,) = torch.autograd.grad(penalty, weight, torch.tensor(upstream, dtype=DOUBLE))
        assert not gradient[active_of()].isfinite().any()


SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(NAMES, n)]


@of_each_case
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_what_requires_no_grad_takes_no_part(case, names, impl):
    arguments = arguments_of(case)
    expected = by_reference(arguments)
    call, leaves = call_of(arguments, names, impl=impl)
    found = gradients_of(call, leaves)
    assert_near(found, [g for name, g in zip(NAMES, expected, strict=True) if name in names])


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_products_of_no_gradient_that_is_wanted_are_not_formed(native, names, monkeypatch):
    """What is needed of the three, is asked of the op of backward."""
    asked = []
    backward = multihead_loss_products.run_backward

    def counted(*args):
        asked.append(args[-2])
        return backward(*args)

    monkeypatch.setattr("fastkit.ops.multihead_loss_autograd.run_backward", counted)
    gradients_of(*call_of(arguments_of("single_label"), names, impl=native))
    assert asked == [[name in names for name in NAMES]]


@of_each_case
def test_gradients_to_some_of_what_requires_them(case, impl):
    """One graph asked twice: first for some, then for the others."""
    arguments = arguments_of(case)
    expected = dict(zip(NAMES, by_reference(arguments), strict=True))
    for names in SUBSETS:
        call, leaves = call_of(arguments, impl=impl)
        of = dict(zip(NAMES, leaves, strict=True))
        loss = call(*leaves)
        for asked in (names, [name for name in NAMES if name not in names]):
            if asked:
                wanted = [of[name] for name in asked]
                found = torch.autograd.grad(loss, wanted, cotangent_of(loss), retain_graph=True)
                assert_near(found, [expected[name] for name in asked])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@of_each_case
def test_gradients_have_the_dtypes_of_their_arguments(case, dtype, impl):
    """A bias may be float32 beside half precision; the losses are."""
    for bias in (dtype, FLOAT):
        arguments = arguments_of(case, dtype=dtype)
        arguments["bias"] = arguments["bias"].to(bias)
        call, leaves = call_of(arguments, impl=impl)
        assert call(*leaves).dtype == FLOAT
        found = multihead_loss(**(arguments | dict(zip(NAMES, leaves, strict=True))), impl=impl)
        assert not (found.correct.requires_grad or found.count.requires_grad)
        gradients = gradients_of(call, leaves)
        assert [g.dtype for g in gradients] == [dtype, dtype, bias]
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@of_each_penalty
def test_gradients_of_a_penalty_in_half_precision(options, dtype, impl):
    """Are those of float32, rounded once."""
    weight = heads_of(dtype).requires_grad_()
    wide = weight.detach().float().requires_grad_()
    penalties = [orthogonality_penalty(w, **options, impl=impl) for w in (weight, wide)]
    assert torch.equal(*penalties) and penalties[0].dtype == FLOAT
    found, expected = (
        torch.autograd.grad(3 * p, w)[0] for p, w in zip(penalties, (weight, wide), strict=True)
    )
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_a_scaled_loss_keeps_what_float16_would_lose(impl):
    """Gradients below the least of float16, times 65536, are those of float32 within its roundings."""
    arguments = arguments_of("single_label", dtype=HALF)
    scale, cotangent = 65536.0, 1e-8 * torch.linspace(-1, 2, H)
    call, leaves = call_of(arguments, impl=impl)
    found = gradients_of(call, leaves, scale * cotangent)
    exact = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    for g, want in zip(found, by_reference(exact, cotangent.double()), strict=True):
        assert (want.half() == 0).any()  # what would be lost
        assert (g.double() - scale * want).abs().max() <= 2e-3 * scale * want.abs().max()


# Graphs that are kept


@of_each_case
def test_a_second_backward_has_the_same_gradients_and_leaves_the_first_alone(case, impl):
    arguments = arguments_of(case)
    call, leaves = call_of(arguments, impl=impl)
    loss = call(*leaves)
    given = []
    for upstream in (3.0, -0.5, 3.0, 1.0):
        cotangent = upstream * cotangent_of(loss)
        gradients = torch.autograd.grad(loss, leaves, cotangent, retain_graph=True)
        assert_near(gradients, by_reference(arguments, cotangent))
        given.append((gradients, [g.clone() for g in gradients]))
    for gradients, copies in given:
        assert all(map(torch.equal, gradients, copies))
    memory = [g.untyped_storage().data_ptr() for gradients, _ in given for g in gradients]
    assert len({*memory}) == len(memory)


@of_each_penalty
def test_a_second_backward_of_the_penalty(options, impl):
    weight = heads_of().requires_grad_()
    penalty = orthogonality_penalty(weight, **options, impl=impl)
    (first,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    copy = first.clone()
    first.mul_(7)  # as a clipper does in place
    (second,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    assert torch.equal(second, copy)
    (third,) = torch.autograd.grad(2 * penalty, weight)
    assert torch.equal(third, 2 * copy)


def test_grad_accumulates_over_backwards_and_over_calls(impl):
    """Of losses and a penalty together, as heads are trained."""
    arguments = arguments_of("single_label")

    def total(leaves, op, penalty, **more):
        return call_of(arguments, op=op, **more)[0](*leaves).mean() + 0.1 * penalty(leaves[1], **more)

    leaves = call_of(arguments)[1]
    wanted = torch.autograd.grad(
        total(leaves, reference.multihead_loss, reference.orthogonality_penalty), leaves
    )
    loss = total(leaves, multihead_loss, orthogonality_penalty, impl=impl)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    total(leaves, multihead_loss, orthogonality_penalty, impl=impl).backward()
    assert_near([leaf.grad for leaf in leaves], [4 * g for g in wanted])


def test_without_retain_graph_a_second_backward_is_refused_as_ever(native):
    call, leaves = call_of(arguments_of("single_label"), impl=native)
    weight = heads_of().requires_grad_()
    for value, of in ((call(*leaves).sum(), leaves), (orthogonality_penalty(weight, impl=native), weight)):
        torch.autograd.grad(value, of)
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            torch.autograd.grad(value, of)


@of_each_case
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_formed_where_none_can_be_asked_for(case, context, native, monkeypatch):
    call, leaves = call_of(arguments_of(case), impl=native)
    weight = heads_of().requires_grad_()
    expected = call(*leaves).detach(), orthogonality_penalty(weight, impl=native).detach()
    formed = []
    for module in ("multihead_loss_autograd", "multihead_loss_penalty"):
        run = importlib.import_module(f"fastkit.ops.{module}").run_forward

        def counted(*args, run=run):
            formed.append(args[-2])
            return run(*args)

        monkeypatch.setattr(f"fastkit.ops.{module}.run_forward", counted)
    with context():
        found = call(*leaves), orthogonality_penalty(weight, impl=native)
    call(*(leaf.detach() for leaf in leaves))  # gradients are enabled, and nothing requires one
    orthogonality_penalty(weight.detach(), impl=native)
    assert formed == [False] * 4
    assert not any(t.requires_grad for t in found)
    assert torch.equal(found[0].clone(), expected[0]) and torch.equal(found[1].clone(), expected[1])


@of_each_case
def test_saved_tensors_may_be_packed(case, impl):
    """As they are moved to a host, or to a disk."""
    arguments = arguments_of(case)
    call, leaves = call_of(arguments, impl=impl)
    weight = heads_of().requires_grad_()

    def pack(t):
        return t.device, t.detach().cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0])):
        loss, penalty = call(*leaves), orthogonality_penalty(weight, kind="cos_abs", impl=impl)
    wanted = torch.autograd.grad(reference.orthogonality_penalty(weight, kind="cos_abs"), weight)
    for _ in range(2):
        found = torch.autograd.grad(loss, leaves, cotangent_of(loss), retain_graph=True)
        assert_near(found, by_reference(arguments))
        assert_near(torch.autograd.grad(penalty, weight, retain_graph=True), wanted)


@of_each_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_has_the_same_gradients(case, reentrant, impl):
    """Bit for bit, of losses, a penalty, and what is before them."""
    results = []
    for checkpoints in (False, True):
        call, leaves = call_of(arguments_of(case), impl=impl)

        def run(x, weight, bias, call=call):
            return call(x.sin(), weight, bias).sum() + orthogonality_penalty(weight.sin(), impl=impl)

        loss = checkpoint(run, *leaves, use_reentrant=reentrant) if checkpoints else run(*leaves)
        (2 * loss).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


def test_arguments_that_are_changed_before_a_backward(native):
    """Are refused, as by every product."""
    for place in range(2):
        call, leaves = call_of(arguments_of("single_label"), impl=native)
        loss = call(*leaves)
        with torch.no_grad():
            leaves[place].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss.sum(), leaves)


# Second derivatives


@of_each_case
def test_gradgradcheck(case, impl):
    call, leaves = call_of(arguments_of(case), impl=impl)
    assert gradgradcheck(call, leaves, fast_mode=True, nondet_tol=1e-12)


@of_each_penalty
def test_gradgradcheck_of_the_penalty(options, impl):
    for active in (None, active_of()):
        call = penalty_of(options, active=active, impl=impl)
        assert gradgradcheck(call, heads_of().requires_grad_(), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@of_each_case
def test_a_penalty_on_gradients_is_that_of_the_reference(case, names, impl):
    """With create_graph: first, second and third derivatives, to what requires them and what is upstream."""
    arguments = arguments_of(case)
    results = []
    for op, more in ((multihead_loss, {"impl": impl}), (reference.multihead_loss, {})):
        call, leaves = call_of(arguments, names, op, **more)
        upstream = torch.linspace(-1, 2, H, dtype=DOUBLE).requires_grad_()
        first = torch.autograd.grad(call(*leaves), leaves, upstream, create_graph=True)
        of = (*leaves, upstream)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), of, create_graph=True, materialize_grads=True
        )
        third = torch.autograd.grad(
            sum(g.square().sum() for g in second if g.requires_grad), of, materialize_grads=True
        )
        results.append([*first, *second, *third])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@of_each_penalty
def test_second_derivatives_of_the_penalty_are_those_of_the_reference(options, impl):
    results = []
    for op, more in ((orthogonality_penalty, {"impl": impl}), (reference.orthogonality_penalty, {})):
        weight = heads_of().requires_grad_()
        penalty = op(weight, active=active_of(), **options, **more)
        upstream = torch.tensor(-1.5, dtype=DOUBLE, requires_grad=True)
        (first,) = torch.autograd.grad(penalty, weight, upstream, create_graph=True)
        of = (weight, upstream)
        second = torch.autograd.grad(first.square().sum(), of, create_graph=True)
        third = torch.autograd.grad(second[0].square().sum(), of)
        results.append([first, *second, *third])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_a_first_backward_of_create_graph_has_the_values_of_one_without(impl):
    for case in CASES:
        call, leaves = call_of(arguments_of(case), impl=impl)
        assert_near(
            [g.detach() for g in gradients_of(call, leaves, create_graph=True)], gradients_of(call, leaves)
        )
    weight = heads_of().requires_grad_()
    for options in PENALTIES:
        penalty = orthogonality_penalty(weight, **options, impl=impl)
        (with_graph,) = torch.autograd.grad(penalty, weight, create_graph=True)
        assert_near([with_graph.detach()], torch.autograd.grad(penalty, weight))


# torch.func and forward mode, which run the reference


@of_each_case
def test_func_grad_and_hessian(case, impl):
    arguments = arguments_of(case)

    def of(op, transform, **more):
        call, leaves = call_of(arguments, op=op, **more)
        return transform(lambda *tensors: call(*tensors).sum(), (0, 1, 2))(*(t.detach() for t in leaves))

    for transform in (torch.func.grad, torch.func.hessian):
        found = of(multihead_loss, transform, impl=impl)
        torch.testing.assert_close(found, of(reference.multihead_loss, transform))


@of_each_penalty
def test_func_transforms_of_the_penalty(options, impl):
    weight = heads_of()
    ours = penalty_of(options, active=active_of(), impl=impl)
    theirs = penalty_of(options, reference.orthogonality_penalty, active=active_of())
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(weight), transform(theirs)(weight))
    tangent = heads_of(seed=1)
    torch.testing.assert_close(
        torch.func.jvp(ours, (weight,), (tangent,)), torch.func.jvp(theirs, (weight,), (tangent,))
    )
    assert gradcheck(ours, weight.requires_grad_(), check_forward_ad=True, check_backward_ad=False)


@of_each_case
def test_forward_mode(case, impl):
    arguments = arguments_of(case)
    call, leaves = call_of(arguments, impl=impl)
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    expected = torch.func.jvp(
        call_of(arguments, op=reference.multihead_loss)[0], tuple(leaves), tuple(tangents)
    )
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(leaf.detach(), t) for leaf, t in zip(leaves, tangents, strict=True)]
        found = forward_ad.unpack_dual(call(*dual))
        torch.testing.assert_close((found.primal, found.tangent), expected)


@of_each_case
def test_vmap_is_a_loop(case, impl):
    """Over inputs, heads and targets; losses, right rows, counts and gradients."""
    many = [arguments_of(case, seed=seed) for seed in range(3)]
    for i, arguments in enumerate(many):
        if arguments["problem"] == "single_label":
            arguments["target"] = (arguments["target"] + i) % C
    options = {k: v for k, v in many[0].items() if k not in (*NAMES, "target")}

    def run(x, weight, bias, target):
        def loss(*tensors):
            found = multihead_loss(*tensors, target, **options, impl=impl)
            return (cotangent_of(found.loss) * found.loss).sum(), (found.loss, found.correct)

        gradients, aux = torch.func.grad(loss, (0, 1, 2), has_aux=True)(x, weight, bias)
        return *gradients, *aux

    given = [[arguments[name] for name in (*NAMES, "target")] for arguments in many]
    found = torch.vmap(run)(*map(torch.stack, zip(*given, strict=True)))
    looped = [run(*each) for each in given]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*looped, strict=True))))


def test_vmap_over_the_active_heads(impl):
    """As of several eliminations at once."""
    arguments = arguments_of("single_label")
    masks = torch.tensor([[True, True, False], [False, True, True], [True, True, True], [False] * 3])
    call = call_of(arguments)[0]
    found = torch.vmap(lambda on: call_of(arguments, (), active=on, impl=impl)[0]())(masks)
    expected = call(*(arguments[name] for name in NAMES)) * masks
    torch.testing.assert_close(found, expected)
    weight = heads_of(H=3)
    for options in PENALTIES:
        found = torch.vmap(lambda on, o=options: orthogonality_penalty(weight, **o, active=on, impl=impl))(
            masks
        )
        expected = [orthogonality_penalty(weight[on], **options) if on.any() else 0.0 for on in masks]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE))


def test_batched_gradients(impl):
    """``is_grads_batched``: a row for each head, which is a loop over them."""
    for case in CASES:
        arguments = arguments_of(case)
        call, leaves = call_of(arguments, impl=impl)
        eye = torch.eye(H, dtype=DOUBLE)
        found = torch.autograd.grad(call(*leaves), leaves, eye, is_grads_batched=True)
        for head in range(H):
            assert_near([g[head] for g in found], by_reference(arguments, eye[head]))
    weight = heads_of().requires_grad_()
    upstream = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    penalty = orthogonality_penalty(weight, impl=impl)
    (one,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    (found,) = torch.autograd.grad(penalty, weight, upstream, is_grads_batched=True)
    assert_near(found, torch.stack([one, -2 * one]))


def test_a_backward_of_fake_tensors(native):
    for case in CASES:
        arguments = arguments_of(case)
        with FakeTensorMode() as mode:
            fake = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
            }
            call, leaves = call_of(fake, impl=native)
            gradients = gradients_of(call, leaves)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    weight = heads_of()
    with FakeTensorMode() as mode:
        weight = mode.from_tensor(weight).requires_grad_()
        (gradient,) = torch.autograd.grad(orthogonality_penalty(weight, impl=native), weight)
    assert gradient.shape == weight.shape


# Autocast


@of_each_case
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_autocast(case, dtype, impl):
    """As of x, weight and bias that were cast; losses are float32, gradients in their arguments' dtypes."""
    arguments = arguments_of(case, dtype=dtype)
    call, leaves = call_of(arguments, impl=impl)
    with torch.autocast(leaves[0].device.type, dtype=BFLOAT):
        loss = call(*leaves)
    assert loss.dtype == FLOAT
    found = torch.autograd.grad(loss, leaves, cotangent_of(loss))
    assert [g.dtype for g in found] == [dtype] * 3
    by_hand, others = call_of(arguments, impl=impl)
    expected = by_hand(*(t.to(BFLOAT) for t in others))
    assert torch.equal(loss, expected)
    wanted = torch.autograd.grad(expected, others, cotangent_of(expected))
    assert all(map(torch.equal, found, wanted))
    if dtype == FLOAT:
        assert not torch.equal(loss, by_hand(*others))


def test_autocast_leaves_float64_and_the_penalty_alone(impl):
    arguments = arguments_of("single_label")
    call, leaves = call_of(arguments, impl=impl)
    expected = call(*leaves)
    for dtype, options in itertools.product((FLOAT, DOUBLE), PENALTIES):
        weight = heads_of(dtype).requires_grad_()
        plain = orthogonality_penalty(weight, **options, impl=impl)
        with torch.autocast(weight.device.type, dtype=BFLOAT):
            found = orthogonality_penalty(weight, **options, impl=impl)
        assert torch.equal(found, plain) and found.dtype == dtype
        assert all(map(torch.equal, *(torch.autograd.grad(p, weight) for p in (found, plain))))
    with torch.autocast(leaves[0].device.type, dtype=BFLOAT):
        assert torch.equal(call(*leaves), expected) and expected.dtype == DOUBLE


def test_a_backward_under_autocast_is_in_the_arithmetic_of_forward(native):
    """With a graph and without; PyTorch would have its products in bfloat16."""
    for case in CASES:
        call, leaves = call_of(arguments_of(case, dtype=FLOAT), impl=native)
        expected = gradients_of(call, leaves)
        loss = call(*leaves)
        for create_graph in (False, True):
            with torch.autocast("cpu", dtype=BFLOAT):
                found = torch.autograd.grad(
                    loss, leaves, cotangent_of(loss), retain_graph=True, create_graph=create_graph
                )
            for g, want in zip(found, expected, strict=True):
                torch.testing.assert_close(g.detach(), want, rtol=1e-5, atol=1e-6)
    weight = heads_of(FLOAT).requires_grad_()
    for options in PENALTIES:
        penalty = orthogonality_penalty(weight, **options, impl=native)
        (expected,) = torch.autograd.grad(penalty, weight, retain_graph=True)
        with torch.autocast("cpu", dtype=BFLOAT):
            (found,) = torch.autograd.grad(penalty, weight, create_graph=True)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
