"""multihead_loss and orthogonality_penalty under torch.compile, and the raw ops that are traced."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastkit.ops import multihead_loss, multihead_loss_autograd, orthogonality_penalty
from fastkit.ops.multihead_loss import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.multihead_loss import make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

RAW, PRODUCTS = torch.ops.fastkit, torch.ops.fastkit_products
FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
PROBLEMS = "single_label", "multi_label", "regression"
KINDS = "abs", "squared", "cos_abs", "cos_squared", "huber"
CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long
NEEDS = [[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)]

# No two dimensions of a call are equal, ranks included: dynamo would take them for one.
SIZES = (13, 5, 7, 9), (57, 33, 11, 21), (6, 12, 50, 8)  # rows, heads, classes, columns


def inputs_of(problem, size=SIZES[0], *, dtype=FLOAT, everything=False):
    """x, weight, bias, target, active and class_weight; ``everything``: none of them is None."""
    rows, heads, classes, columns = size
    single = problem == "single_label"
    inputs = make_inputs(
        rows, heads, 1 if problem == "regression" else classes, columns, problem=problem, dtype=dtype,
        class_weight=everything and problem != "regression", ignored=everything and single,
        inactive=everything,
    )  # fmt: skip
    return tuple(t if t is None or not t.is_floating_point() else t.nan_to_num(2.0) for t in inputs[:6])


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# The raw ops: their schemas, fakes and what they write to


def forward_call(inputs, problem, gradient=True):
    smoothing = 0.1 if problem == "single_label" else 0.0
    return [*inputs, problem, smoothing, -100, gradient, "cpu"]


def backward_call(inputs, problem, needs=(True, True, True)):
    x, weight, _, target, active, _ = inputs
    *_, dz = PRODUCTS.multihead_loss_fwd(*forward_call(inputs, problem))
    g_loss = torch.linspace(1, 2, len(weight), dtype=dz.dtype)
    return [g_loss, dz, x, weight, target, active, problem, -100, list(needs), "cpu"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck_of_the_products(native, problem, everything):
    inputs = inputs_of(problem, everything=everything)
    for gradient in (False, True):
        call = forward_call(inputs, problem, gradient)
        opcheck(PRODUCTS.multihead_loss_fwd.default, call, test_utils=TRACED if gradient else CHECKS)
    opcheck(PRODUCTS.multihead_loss_bwd.default, backward_call(inputs, problem), test_utils=TRACED)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_what_is_not_needed_is_empty_and_changes_nothing_else(native, needs):
    inputs = inputs_of("single_label", everything=True)
    call = backward_call(inputs, "single_label", needs)
    opcheck(PRODUCTS.multihead_loss_bwd.default, call, test_utils=CHECKS)
    expected = PRODUCTS.multihead_loss_bwd(*backward_call(inputs, "single_label"))
    for result, want, needed in zip(PRODUCTS.multihead_loss_bwd(*call), expected, needs, strict=True):
        assert torch.equal(result, want) if needed else result.numel() == 0


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck_of_the_products_of_dtypes_and_of_one(native, problem, dtype):
    for size in (SIZES[0], (1, 1, 2, 1)):
        inputs = inputs_of(problem, size, dtype=dtype, everything=True)
        opcheck(PRODUCTS.multihead_loss_fwd.default, forward_call(inputs, problem), test_utils=CHECKS)
        opcheck(PRODUCTS.multihead_loss_bwd.default, backward_call(inputs, problem), test_utils=CHECKS)


def test_opcheck_where_no_head_is_active(native):
    inputs = list(inputs_of("single_label", everything=True))
    inputs[4] = torch.zeros_like(inputs[4])
    opcheck(PRODUCTS.multihead_loss_fwd.default, forward_call(inputs, "single_label"), test_utils=CHECKS)
    opcheck(PRODUCTS.multihead_loss_bwd.default, backward_call(inputs, "single_label"), test_utils=CHECKS)
    call = [inputs[1], "cos_abs", 0.01, inputs[4], True, True, "cpu"]
    opcheck(PRODUCTS.orthogonality_penalty_fwd.default, call, test_utils=CHECKS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_of_the_products_of_the_penalty(native, gradient, kind):
    for dtype, everything in ((FLOAT, True), (DOUBLE, False), (BFLOAT, True), (HALF, False)):
        _, weight, _, _, active, _ = inputs_of("single_label", dtype=dtype, everything=everything)
        call = [weight, kind, 0.01, active, everything, gradient, "cpu"]
        checks = TRACED if dtype == FLOAT and gradient else CHECKS
        opcheck(PRODUCTS.orthogonality_penalty_fwd.default, call, test_utils=checks)


def raw_calls(problem, dtype=FLOAT, gradient=True, weighted=True):
    """Of the forward kernel and of the backward one."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator).to(dtype)

    single = problem == "single_label"
    target = torch.tensor([3, -100, 0, 4, 2, 2, 1]) if single else None
    x, weight, bias = rand(7, 4), rand(2, 5, 4), rand(2, 5)
    integers = [torch.zeros(shape, dtype=torch.int64) for shape in (2, ())]
    of_classes = rand(5) if weighted else None
    forward = [
        x, weight, bias, target, None if single else rand(5, 7), of_classes, problem, 0.1, -100, gradient,
        rand(2, 5, 7), rand(2), *integers,
    ]  # fmt: skip
    gradients = [rand(7, 4), rand(2, 5, 4) if weighted else None, rand(2, 5)]
    return forward, [rand(2), rand(2, 5, 7), x, weight, target, -100, *gradients]


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck_of_the_kernels(native, problem, gradient, dtype):
    for weighted in (False, True):
        forward, backward = raw_calls(problem, dtype, gradient, weighted)
        checks = TRACED if dtype == FLOAT and gradient and weighted else CHECKS
        opcheck(RAW.multihead_loss_fwd_.default, forward, test_utils=checks)
        opcheck(RAW.multihead_loss_bwd_.default, backward, test_utils=checks)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_of_the_kernel_of_the_penalty(native, gradient, dtype):
    for kind in ("abs", "squared", "huber"):
        checks = TRACED if dtype == FLOAT and gradient and kind == "huber" else CHECKS
        rows = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        call = [rows, kind, 0.5, torch.zeros(2, 3, dtype=dtype), torch.zeros_like(rows) if gradient else None]
        opcheck(RAW.multihead_loss_penalty_.default, call, test_utils=checks)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_tensors_without_values(dtype, everything, problem):
    """On the meta device: shapes and dtypes, of gradients too."""
    results = []
    for device in ("cpu", "meta"):
        inputs = [
            None if t is None else t.to(device)
            for t in inputs_of(problem, dtype=dtype, everything=everything)
        ]
        leaves = [t.requires_grad_() for t in inputs[:3]]
        found = multihead_loss(*inputs[:4], problem=problem, active=inputs[4], class_weight=inputs[5])
        penalty = orthogonality_penalty(
            leaves[1], kind="cos_abs", active=inputs[4], center_classes=everything and problem != "regression"
        )
        gradients = torch.autograd.grad(found.loss.sum() + penalty, leaves)
        results.append([(t.shape, t.dtype) for t in (*found, penalty, *gradients)])
    assert results[0] == results[1]


# Graphs


def layer(problem, **options):
    """The op as a function of tensors; what is no tensor is a constant of the graph."""
    if problem == "single_label":
        options = {"label_smoothing": 0.1} | options

    def run(x, weight, bias, target, active, class_weight):
        return tuple(
            multihead_loss(
                x, weight, bias, target, problem=problem, active=active, class_weight=class_weight, **options
            )
        )

    return run


def outputs_and_gradients(call, inputs, frozen=False):
    """For a gradient upstream that is not 1; ``frozen``: to the heads alone."""
    leaves = [t.detach().requires_grad_() for t in inputs[frozen:3]]
    outputs = call(*inputs[:frozen], *leaves, *inputs[3:])
    loss = outputs[0]
    cotangent = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    gradients = torch.autograd.grad(loss, leaves, cotangent)
    return *(y.detach() for y in outputs), *gradients


@pytest.mark.parametrize(
    ("problem", "everything", "frozen"),
    [
        *((problem, True, False) for problem in PROBLEMS),
        ("single_label", False, False),
        ("single_label", True, True),
    ],
)
def test_compile_one_graph_for_several_sizes(native, problem, everything, frozen):
    """With gradients, and equal to the eager call bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = layer(problem)
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in SIZES:
        inputs = inputs_of(problem, size, everything=everything)
        results = outputs_and_gradients(compiled, inputs, frozen)
        assert_all_equal(results, outputs_and_gradients(call, inputs, frozen))
        frames.append(counter.frame_count)
    assert len({*frames}) == 1  # dynamo may begin anew for numbers that are constant


def test_compile_other_active_heads_without_another_graph(native):
    """Which heads are active is a value: an elimination makes no graph, down to none."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, weight, bias, target, active, class_weight):
        loss = layer("single_label")(x, weight, bias, target, active, class_weight)[0]
        return (loss.sum() + 0.1 * orthogonality_penalty(weight, active=active),)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    inputs = list(inputs_of("single_label", everything=True))
    frames = []
    for heads in (5, 3, 1, 0, 4):
        inputs[4] = torch.arange(5) < heads
        assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))
        frames.append(counter.frame_count)
    assert len({*frames}) == 1


def test_compile_any_number_of_rows(native):
    """Not told that it changes: the second number makes one graph for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = layer("single_label")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for rows in (24, 60, 14, 500):
        inputs = inputs_of("single_label", (rows, 5, 7, 9), everything=True)
        assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("kind", "everything"),
    [("abs", False), ("squared", True), ("cos_abs", True), ("cos_squared", False), ("huber", True)],
)
def test_compile_the_penalty(native, kind, everything):
    """One graph for several sizes, with the gradient."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(weight, active):
        return orthogonality_penalty(weight, kind=kind, active=active, center_classes=everything)

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in (*SIZES, (1, 140, 3, 6)):
        _, weight, _, _, active, _ = inputs_of("single_label", size, everything=everything)
        results = []
        for run in (compiled, call):
            leaf = weight.detach().requires_grad_()
            penalty = run(leaf, active)
            results.append((penalty.detach(), *torch.autograd.grad(3 * penalty, leaf)))
        assert_all_equal(*results)
        frames.append(counter.frame_count)
    assert len({*frames}) == 1


@pytest.mark.parametrize(
    ("problem", "dtype"), [("single_label", BFLOAT), ("multi_label", DOUBLE), ("regression", HALF)], ids=str
)
def test_compile_other_dtypes(native, problem, dtype):
    torch._dynamo.reset()
    inputs, call = inputs_of(problem, dtype=dtype, everything=True), layer(problem)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))


def test_compile_without_gradients(native):
    """None is formed, of what requires one."""
    torch._dynamo.reset()
    inputs, call = inputs_of("single_label", everything=True), layer("single_label")
    inputs[1].requires_grad_()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(multihead_loss_autograd, "_MultiheadLoss", None)  # not to be applied
        assert_all_equal(compiled(*inputs), call(*inputs))


def test_a_graph_is_kept_and_asked_twice(native):
    torch._dynamo.reset()
    inputs, call = inputs_of("single_label", everything=True), layer("single_label")
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    loss, *_ = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves, *inputs[3:])
    first = torch.autograd.grad((3 * loss).sum(), leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    assert_all_equal(torch.autograd.grad((3 * loss).sum(), leaves), copies)
    assert_all_equal(first, copies)


@pytest.mark.parametrize("strict", [True, False])
def test_export(native, strict):
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3, 6))
            self.bias = torch.nn.Parameter(torch.zeros(4, 3))
            self.active = torch.nn.Buffer(torch.tensor([True, False, True, True]))

        def forward(self, x, target):
            found = multihead_loss(x, self.weight, self.bias, target, active=self.active, impl=native)
            return found.loss, orthogonality_penalty(self.weight, active=self.active, impl=native)

    module, arguments = Heads(), (torch.randn(5, 6), torch.randint(3, (5,)))
    exported = torch.export.export(module, arguments, strict=strict).module()
    assert_all_equal(exported(*arguments), module(*arguments))


@pytest.mark.parametrize("problem", ["single_label", "regression"])
def test_compile_the_reference(problem):
    """What runs where there is no kernel: in one graph, active heads included."""
    torch._dynamo.reset()
    call = layer(problem, impl="reference")

    def both(*inputs):
        penalty = orthogonality_penalty(inputs[1], kind="cos_abs", active=inputs[4], impl="reference")
        loss, *others = call(*inputs)
        return loss + penalty, *others

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    inputs = list(inputs_of(problem, everything=True))
    for _ in range(2):
        results = outputs_and_gradients(compiled, inputs)
        torch.testing.assert_close(results, outputs_and_gradients(both, inputs))
        inputs[4] = ~inputs[4]
    assert counter.frame_count == 1


def test_targets_that_are_no_class_make_the_losses_nan_in_a_graph(native):
    """Whose values were not there when it was traced; no other memory is read."""
    torch._dynamo.reset()
    x, weight, bias, target, *_ = inputs_of("single_label")
    compiled = torch.compile(layer("single_label"), backend="aot_eager", fullgraph=True)
    for bad in (7, -1, 2**62, -(2**63)):
        target[2] = bad
        loss, correct, count, *gradients = outputs_and_gradients(
            compiled, (x, weight, bias, target, None, None)
        )
        assert loss.isnan().all() and (correct <= 12).all() and count == 13
        assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_autocast_in_a_graph(native, problem):
    """As of arguments that were cast; gradients are in their own dtypes."""
    torch._dynamo.reset()
    inputs, call = inputs_of(problem, everything=True), layer(problem)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=BFLOAT):
            return call(*tensors)

    def cast(*tensors):
        return call(*(t.to(BFLOAT) for t in tensors[:3]), *tensors[3:])

    compiled = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)
    results = outputs_and_gradients(compiled, inputs)
    assert [t.dtype for t in results] == [FLOAT, torch.int64, torch.int64, FLOAT, FLOAT, FLOAT]
    assert_all_equal(results, outputs_and_gradients(cast, inputs))


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)


@needs_compiler
def test_compile_with_inductor(native):
    """Between fused neighbours; some heads are not active."""
    torch._dynamo.reset()
    x, weight, bias, target, active, class_weight = inputs_of("single_label", everything=True)

    def call(x, weight, bias):
        pooled = torch.where(x > 0, x, 0.5 * x)
        loss = multihead_loss(
            pooled, weight, bias, target, active=active, class_weight=class_weight, label_smoothing=0.1
        ).loss
        return 2 * loss.square().sum() / active.sum()

    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    found, expected = torch.compile(call, fullgraph=True)(*leaves), call(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)))


@needs_compiler
def test_compile_the_penalty_with_inductor(native):
    torch._dynamo.reset()
    _, weight, _, _, active, _ = inputs_of("single_label", everything=True)
    weight = weight.detach().requires_grad_()

    def call(weight):
        penalty = orthogonality_penalty(weight.tanh(), kind="cos_squared", active=active, center_classes=True)
        return (0.1 * penalty).exp()

    found, expected = torch.compile(call, fullgraph=True)(weight), call(weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight) for loss in (found, expected)))
