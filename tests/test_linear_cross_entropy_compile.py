"""linear_cross_entropy under torch.compile and autocast, and the raw ops that are traced."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastkit.ops import linear_cross_entropy, linear_cross_entropy_products, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS as KERNELS  # for the fixtures

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

RAW, PRODUCTS = torch.ops.fastkit, torch.ops.fastkit_products
FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
REDUCTIONS = "none", "sum", "mean"

# No two dimensions of a call are equal, ranks included: dynamo would take them for one.
SIZES = (13, 9, 17), (57, 33, 21), (5, 12, 1000)  # tokens, columns, classes


def inputs_of(size=SIZES[0], *, dtype=FLOAT, seed=0):
    """An input, a weight, targets of which some are ignored, a bias, class weights and token weights."""
    tokens, columns, classes = size
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, FLOAT)
    target = torch.randint(classes, (tokens,), generator=generator)
    target[::4] = -100
    return (
        torch.randn(tokens, columns, generator=generator).to(dtype),
        torch.randn(classes, columns, generator=generator).to(dtype),
        target,
        torch.randn(classes, generator=generator).to(wide),
        torch.rand(classes, generator=generator).to(wide),
        torch.randn(tokens, generator=generator).to(wide),
    )


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# The raw ops: their schemas, fakes and what they write to


CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long
NEEDS = [[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)]


def forward_call(inputs, reduction="mean", needs=(True, True, True), options=True):
    x, w, target, bias, weight, token_weight = inputs
    if not options:
        return [x, w, None, target, None, None, reduction, -100, 0.0, 0.0, 0.0, list(needs), "cpu"]
    return [x, w, bias, target, weight, token_weight, reduction, -100, 0.1, 5.0, 0.01, list(needs), "cpu"]


def backward_call(inputs, reduction="mean", needs=(True, True, True), *, options=True, of_lse=True):
    call = forward_call(inputs, reduction, needs, options)
    loss, lse, *_ = PRODUCTS.linear_cross_entropy_fwd(*call[:-2], [False] * 3, "cpu")
    return [torch.ones_like(loss), torch.ones_like(lse) if of_lse else None, lse, *call]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_opcheck_of_the_products(native, needs, reduction):
    """Forward forms no gradients of a loss that is not one number."""
    inputs, checks = inputs_of(), TRACED if all(needs) else CHECKS
    if reduction != "none" or not any(needs):
        opcheck(
            PRODUCTS.linear_cross_entropy_fwd.default,
            forward_call(inputs, reduction, needs),
            test_utils=checks,
        )
    call = backward_call(inputs, reduction, needs)
    opcheck(PRODUCTS.linear_cross_entropy_bwd.default, call, test_utils=checks)


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("options", [False, True])
def test_opcheck_of_the_products_of_dtypes(native, dtype, options):
    inputs = inputs_of(dtype=dtype)
    for call in (forward_call(inputs, options=options), forward_call(inputs, "none", [False] * 3, options)):
        opcheck(PRODUCTS.linear_cross_entropy_fwd.default, call, test_utils=CHECKS)
    for of_lse in (False, True):
        call = backward_call(inputs, options=options, of_lse=of_lse)
        opcheck(PRODUCTS.linear_cross_entropy_bwd.default, call, test_utils=CHECKS)


@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 1)], ids=str)
def test_opcheck_of_nothing_and_of_one(native, size):
    inputs = inputs_of(size)
    for reduction in REDUCTIONS:
        call = forward_call(inputs, reduction, [reduction != "none"] * 3)
        opcheck(PRODUCTS.linear_cross_entropy_fwd.default, call, test_utils=CHECKS)
        opcheck(
            PRODUCTS.linear_cross_entropy_bwd.default, backward_call(inputs, reduction), test_utils=CHECKS
        )


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_what_is_not_needed_is_empty_and_changes_nothing_else(native, needs):
    inputs = inputs_of()
    for op, make, first in (
        (PRODUCTS.linear_cross_entropy_fwd, forward_call, 2),
        (PRODUCTS.linear_cross_entropy_bwd, backward_call, 0),
    ):
        expected = op(*make(inputs))[first:]
        for result, want, needed in zip(op(*make(inputs, needs=needs))[first:], expected, needs, strict=True):
            assert torch.equal(result, want) if needed else result.numel() == 0


def kernel_call(name, dtype=FLOAT, *, softcap=0.0, weight=True, in_place=False):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    logits, target = randn(5, 19), torch.tensor([3, 0, 22, 24, 18])  # of classes 4 to 22, of 25
    classes = randn(25).abs() if weight else None
    if name == "sums":
        state = torch.zeros(5, 4, dtype=dtype)
        state[:, 0], state[:, 2] = -torch.inf, 0.0
        return [state, logits, target, 4, softcap, classes, weight]
    dz = logits if in_place else torch.zeros_like(logits)
    return [dz, logits, target, randn(5) + 4, randn(5, 3), 4, softcap, classes]


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", ["sums", "gradient"])
def test_opcheck_of_the_kernels(native, name, weight, softcap, dtype):
    call = kernel_call(name, dtype, softcap=softcap, weight=weight)
    op = getattr(RAW, f"linear_cross_entropy_{name}_").default
    opcheck(op, call, test_utils=TRACED if dtype == FLOAT and weight else CHECKS)


def test_a_gradient_may_lie_where_the_logits_are(native):
    apart, together = (kernel_call("gradient", in_place=in_place) for in_place in (False, True))
    for call in (apart, together):
        RAW.linear_cross_entropy_gradient_(*call)
    assert torch.equal(together[1], apart[0]) and not torch.equal(apart[1], apart[0])


# Graphs


def layer(reduction, options=True, with_lse=False, ignore_index=-100):
    """The op as a function of tensors; what is no tensor is a constant of the graph."""

    def run(x, w, target, bias, weight, token_weight):
        call = {"reduction": reduction, "ignore_index": ignore_index}
        if options:
            call |= {"linear_bias": bias, "weight": weight, "token_weight": token_weight}
            call |= {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}
        if with_lse:
            return tuple(linear_cross_entropy_with_lse(x, w, target, **call))
        return (linear_cross_entropy(x, w, target, **call),)

    return run


def outputs_and_gradients(call, inputs, frozen=False, upstream=0.5):
    """For a gradient upstream that is not 1; ``frozen``: to the input alone."""
    leaves = [t.detach().requires_grad_() for t in inputs[:1] + (() if frozen else inputs[1:2] + inputs[3:4])]
    given = list(inputs)
    for place, leaf in zip((0, 1, 3), leaves, strict=False):
        given[place] = leaf
    outputs = call(*given)
    cotangents = [torch.full_like(y, upstream / (1 + i)) for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    assert sum(g is None for g in gradients) <= 1  # of a bias that has no part
    return *(y.detach() for y in outputs), *(g for g in gradients if g is not None)


CASES = {
    "mean": layer("mean", options=False),
    "none": layer("none", options=False),
    "sum, options": layer("sum"),
    "none, options": layer("none"),
    "mean, lse": layer("mean", options=False, with_lse=True),
    "none, lse, options": layer("none", with_lse=True),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_compile_one_graph_for_several_sizes(native, case, frozen):
    """With gradients, and equal to the eager call bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CASES[case], backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in SIZES:
        inputs = inputs_of(size)
        results = outputs_and_gradients(compiled, inputs, frozen)
        assert_all_equal(results, outputs_and_gradients(CASES[case], inputs, frozen))
        frames.append(counter.frame_count)
    assert len({*frames}) == 1  # dynamo may begin anew for numbers that are constant


def test_compile_any_number_of_tokens(native):
    """Not told that it changes: the second number makes one graph for all others, in as many axes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = layer("mean", with_lse=True)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for batch, time in ((2, 12), (2, 30), (2, 7), (2, 500)):
        inputs = inputs_of((batch * time, 21, 11))
        for place in (0, 2, 5):
            shaped = inputs[place].unflatten(0, (batch, time))
            inputs = (*inputs[:place], shaped, *inputs[place + 1 :])
        results = outputs_and_gradients(compiled, inputs)
        assert_all_equal(results, outputs_and_gradients(call, inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT], ids=str)
def test_compile_other_dtypes(native, dtype):
    torch._dynamo.reset()
    inputs, call = inputs_of(dtype=dtype), layer("sum", with_lse=True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))


def test_compile_without_gradients(native):
    """No gradient is formed, of what requires one."""
    torch._dynamo.reset()
    inputs, call = inputs_of(), layer("mean")
    inputs[0].requires_grad_()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(linear_cross_entropy_products, "_with_gradients", None)  # not to be called
        assert_all_equal(compiled(*inputs), call(*inputs))


def test_a_graph_is_kept_and_asked_twice(native):
    """What was formed in forward is not written over."""
    torch._dynamo.reset()
    inputs, call = inputs_of(), layer("mean", options=False)
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    (loss,) = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves, *inputs[2:])
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    assert_all_equal(torch.autograd.grad(3 * loss, leaves), copies)
    assert_all_equal(first, copies)


@pytest.mark.parametrize("strict", [True, False])
def test_export(native, strict):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(12, 6))

        def forward(self, hidden, target):
            return linear_cross_entropy(hidden, self.weight, target, impl=native)

    module, arguments = Loss(), (torch.randn(5, 6), torch.randint(12, (5,)))
    exported = torch.export.export(module, arguments, strict=strict).module()
    assert torch.equal(exported(*arguments), module(*arguments))


def test_compile_the_reference():
    torch._dynamo.reset()
    inputs = inputs_of()

    def call(x, w, target, *_):
        return linear_cross_entropy(x, w, target, impl="reference")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), call(*inputs))


def test_targets_that_are_no_class_are_refused_when_the_graph_runs(native):
    """Whose values were not there when it was traced."""
    torch._dynamo.reset()
    x, w, target, *others = inputs_of()
    compiled = torch.compile(layer("mean", options=False), backend="aot_eager", fullgraph=True)
    compiled(x, w, target, *others)
    target[2] = 17
    with pytest.raises(
        RuntimeError, match=r"target must be in \[0, 17\) or ignore_index = -100, got 17 at index 2"
    ):
        compiled(x, w, target, *others)


def test_check_is_refused_in_a_graph(native):
    """On a CPU targets are looked at in any case, when the graph runs."""
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="check=True reads values, and cannot be compiled or transformed"):
        compiled(*inputs_of()[:3], check=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tokens_that_are_picked_by_their_values(native, reduction):
    """Of a number that the compiler does not know: those that are not ignored."""
    x, w, target, *_ = inputs_of()
    leaves = [t.detach().requires_grad_() for t in (x, w)]

    def picked(x, w):
        rows = (target != -100).nonzero().squeeze(1)
        return linear_cross_entropy(x[rows], w, target[rows], reduction=reduction).sum()

    compiled = torch.compile(picked, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        results = torch.autograd.grad(compiled(*leaves), leaves)
    assert_all_equal(results, torch.autograd.grad(picked(*leaves), leaves))
    whole = linear_cross_entropy(*leaves, target, reduction=reduction).sum()
    assert_all_equal(results, torch.autograd.grad(whole, leaves))


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)


@needs_compiler
def test_compile_with_inductor(native):
    """Between fused neighbours, the logits' weight being that of the embedding before it."""
    torch._dynamo.reset()
    x, w, target, *_ = inputs_of((24, 33, 57))
    target = target.clamp(min=0)

    def call(x, w):
        hidden = torch.where(x > 0, x, 0.5 * x) + torch.nn.functional.embedding(target, w)
        loss, lse = linear_cross_entropy_with_lse(hidden, w, target, reduction="none", softcap=9.0)
        mean = linear_cross_entropy(hidden, w, target)
        return 2 * loss.mean() + 0.1 * lse.mean() + mean

    leaves = [t.detach().requires_grad_() for t in (x, w)]
    compiled = torch.compile(call, fullgraph=True)
    found, expected = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


# Autocast


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(native, reduction, compiles):
    """As of arguments that were cast; gradients are in their own dtypes, and sums in float32."""
    torch._dynamo.reset()
    inputs, call = inputs_of(), layer(reduction, with_lse=True)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=BFLOAT):
            return call(*tensors)

    def cast(x, w, target, bias, *others):
        return call(x.to(BFLOAT), w.to(BFLOAT), target, bias.to(BFLOAT), *others)

    run = torch.compile(under_autocast, backend="aot_eager", fullgraph=True) if compiles else under_autocast
    results = outputs_and_gradients(run, inputs)
    assert {t.dtype for t in results} == {FLOAT}
    assert_all_equal(results, outputs_and_gradients(cast, inputs))
    assert not torch.equal(results[1], outputs_and_gradients(call, inputs)[1])


def test_autocast_leaves_float64_alone(impl):
    x, w, target, *_ = (t.double() if t.is_floating_point() else t for t in inputs_of())
    expected = linear_cross_entropy(x, w, target, impl=impl)
    with torch.autocast(x.device.type, dtype=BFLOAT):
        assert torch.equal(linear_cross_entropy(x, w, target, impl=impl), expected)
    assert expected.dtype == DOUBLE


def test_autocast_of_the_reference_is_that_of_the_kernel(native):
    inputs = inputs_of((40, 24, 100))
    results = []
    for impl in (native, "reference"):
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        with torch.autocast("cpu", dtype=BFLOAT):
            loss = linear_cross_entropy(*leaves, inputs[2], impl=impl)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype == FLOAT
        # Gradients are rounded to bfloat16 once in either; the losses are sums in float32.
        budget = torch.finfo(BFLOAT if found.dim() else FLOAT).eps * (1 if found.dim() else 64)
        assert (found - expected).abs().max() <= budget * expected.abs().max()


def test_a_module_in_training_under_autocast(native):
    """With a scaler's large factor, of a tied weight in float32."""
    torch.manual_seed(0)
    embedding, inner = nn.Embedding(50, 16), nn.Linear(16, 16)
    ids = torch.randint(50, (3, 9))
    losses = []
    for op in (linear_cross_entropy, None):
        for parameter in (*embedding.parameters(), *inner.parameters()):
            parameter.grad = None
        with torch.autocast("cpu", dtype=BFLOAT):
            hidden = inner(embedding(ids[:, :-1]))
            if op is None:
                logits = hidden.double() @ embedding.weight.to(BFLOAT).double().T
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            else:
                loss = op(hidden, embedding.weight, ids[:, 1:])
        (1024 * loss).backward()
        losses.append([loss.detach().double(), embedding.weight.grad.double(), inner.weight.grad.double()])
    for found, expected in zip(*losses, strict=True):
        assert (found - expected).abs().max() <= 4 * torch.finfo(BFLOAT).eps * expected.abs().max()
