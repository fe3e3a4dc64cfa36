"""mtadam_update_ and memory: strides, views, threads, pieces of a step, which change no bit; and graphs."""

from itertools import pairwise, product

import pytest
import torch
from mtadam_steps import DTYPES, LAYOUTS, SHAPES, SHARED, assert_same_bits, update
from torch.library import opcheck

from fastkit import ops
from fastkit._threads import threads
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.mtadam import update_
from fastkit.testing.mtadam import (
    Options,
    check,
    cloned,
    compare,
    expected_results,
    make_inputs,
    raw_arguments,
)

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

RAW = torch.ops.fastkit
CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long


@pytest.mark.parametrize("of_param", [name for name in LAYOUTS if name != "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(impl, dtype, of_param):
    """Of parameters, of gradients, and of state that has not those of its parameter."""
    for of_grad, of_state in product(LAYOUTS, ("its own", "dense")):
        inputs = make_inputs([(4, 6, 5, 7)], 2, dtype=dtype)
        param = LAYOUTS[of_param](inputs.params[0])
        grads = [LAYOUTS[of_grad](inputs.grads[0]), inputs.grads[1]]
        like = param if of_state == "its own" else inputs.params[0]
        zeros = [torch.zeros_like(like, dtype=torch.float32) for _ in range(3)]
        base = param if param._base is None else param._base
        before = base.clone()
        inputs = inputs._replace(
            params=[param], grads=grads, exp_avgs=zeros[:1], exp_avg_sqs=zeros[1:], max_exp_avg_sqs=None
        )
        check(inputs, impl=impl, weight_decay=2.0**-4)
        torch.as_strided(before, param.shape, param.stride(), param.storage_offset()).copy_(param)
        assert torch.equal(base, before)  # nothing beside it was written to


def test_an_expanded_gradient(impl):
    """Of a sum, as autograd gives it: one number for all."""
    for shape in ((4099,), (3, 5), ()):
        inputs = make_inputs([shape], 2)
        one = torch.tensor(0.3)
        wanted = update(
            cloned(inputs)._replace(grads=[one.expand(shape).clone(), *inputs.grads[1:]]), impl=impl
        )
        update(inputs._replace(grads=[one.expand(shape), *inputs.grads[1:]]), impl=impl)
        assert_same_bits(inputs, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_slices(impl, dtype):
    """Give the same bits, and nothing beside them is written to."""
    for offset in (1, 2, 3):
        inputs = make_inputs([(4, 5), (67,), (4099,)], 2, dtype=dtype, steps=1, amsgrad=True)
        wanted = update(cloned(inputs), impl=impl)
        memory = []

        def sliced(tensors, memory=memory, offset=offset):
            for t in tensors:
                memory.append(torch.full((t.numel() + offset + 5,), 7.0, dtype=t.dtype))
                part = memory[-1][offset : offset + t.numel()].view(t.shape)
                yield part.copy_(t)

        moved = inputs._replace(
            **{
                name: list(sliced(tensors))
                for name, tensors in inputs._asdict().items()
                if isinstance(tensors, list)
            },
            grad_norms=next(sliced([inputs.grad_norms])),
            steps=next(sliced([inputs.steps])),
        )
        update(moved, impl=impl)
        assert_same_bits(moved, wanted)
        assert all((whole[:offset] == 7).all() and (whole[-5:] == 7).all() for whole in memory)


def test_gradients_are_not_written_to(impl):
    inputs = make_inputs(SHAPES, 2)
    grads = [g.clone() for g in inputs.grads]
    update(inputs, impl=impl, weight_decay=0.1)
    assert all(map(torch.equal, inputs.grads, grads))


def test_negated_views_are_read_as_they_are_meant(impl):
    """As autograd gives them through the imaginary part of a conjugate."""
    inputs = make_inputs([(33,)], 2)
    negated = torch.complex(torch.zeros(33), -inputs.grads[1]).conj().imag
    assert negated.is_neg() and torch.equal(negated, inputs.grads[1])
    wanted = update(cloned(inputs), impl=impl)
    update(inputs._replace(grads=[inputs.grads[0], negated]), impl=impl)
    assert_same_bits(inputs, wanted)


# Bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(native, dtype):
    inputs = make_inputs(SHARED, 3, dtype=dtype, steps=1, amsgrad=True)
    wanted = update(cloned(inputs), impl=native)
    sums = ops.mtadam_square_sums(inputs.grads, len(SHARED), impl=native)
    for count in (1, 2, 3):
        with threads(count):
            for _ in range(2):
                assert_same_bits(update(cloned(inputs), impl=native), wanted)
                again = ops.mtadam_square_sums(inputs.grads, len(SHARED), impl=native)
                assert torch.equal(again, sums)


def test_the_same_call_gives_the_same_bits(impl):
    inputs = make_inputs(SHAPES, 3, steps=1)
    wanted = update(cloned(inputs), impl=impl)
    for _ in range(5):
        assert_same_bits(update(cloned(inputs), impl=impl), wanted)


@pytest.mark.parametrize("cuts", [(0, 3, 3), (0, 2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_a_step(impl, dtype, cuts):
    """The same bits, but for m, which is rounded between them, and what follows from it."""
    options = Options(weight_decay=2.0**-4, ranks=(1.0, 0.5, 2.0), anchor=cuts[1] - 1)._asdict()
    inputs = make_inputs([(9,), (4, 5), (4097,)], 3, dtype=dtype, steps=2, amsgrad=True, missing=[(1, 1)])
    once = update(cloned(inputs), impl=impl, **options)
    expected = expected_results(inputs, **options)
    n = len(inputs.params)
    for first, end in pairwise(cuts):
        *tensors, maxima = inputs._replace(grads=inputs.grads[n * first : n * end])
        more = {"impl": impl, "first": first, "applies": (first, end) == cuts[-2:]}
        update_(*tensors, max_exp_avg_sqs=maxima, **options, **more)
    assert_same_bits(inputs, once, {"exp_avg_sqs", "max_exp_avg_sqs", "grad_norms", "steps"})
    if cuts == (0, 3, 3):
        assert_same_bits(inputs, once)
    compare(inputs, expected)


def test_terms_that_are_in_no_piece_count(impl):
    """Their moments stay, in the denominator too: wherever the last piece ends."""
    for first, end in ((0, 2), (1, 2), (1, 3), (3, 3)):
        inputs = make_inputs([(33,)], 3, steps=2, amsgrad=True)
        largest = 0 if first else 2
        inputs.exp_avg_sqs[largest].fill_(1e6)
        *tensors, maxima = inputs._replace(grads=inputs.grads[first:end])
        more = {"impl": impl, "first": first, "applies": True}
        update_(*tensors, max_exp_avg_sqs=maxima, **Options()._asdict(), **more)
        assert (inputs.exp_avg_sqs[largest] == 1e6).all() and (maxima[0] == 1e6).all(), (first, end)


# Graphs


def test_parameters_that_require_gradients(impl):
    inputs = make_inputs([(9,), (4, 5)], 2)
    wanted = update(cloned(inputs), impl=impl)
    params = [torch.nn.Parameter(inputs.params[0].clone()), inputs.params[1].clone().requires_grad_()]
    update(inputs._replace(params=params), impl=impl)
    assert all(map(torch.equal, params, wanted.params))
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in params)
    twice = params[0] * 2
    grads = [g.clone().requires_grad_() for g in inputs.grads]
    update(inputs._replace(params=[twice, params[1]], grads=grads), impl=impl)
    assert not inputs.exp_avgs[0].requires_grad
    assert not ops.mtadam_square_sums(grads, 2, impl=impl).requires_grad


def test_a_graph_that_saved_a_parameter_refuses_to_run_backward(impl):
    inputs = make_inputs([(9,), (7,)], 2)
    params = [p.requires_grad_() for p in inputs.params]
    y = sum(p.square().sum() for p in params)
    versions = [p._version for p in params]
    update(inputs, impl=impl)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode(impl):
    outside = make_inputs([(9,), (7,)], 2)
    wanted = update(cloned(outside), impl=impl)
    with torch.inference_mode():
        inside = make_inputs([(9,), (7,)], 2)
        assert inside.params[0].is_inference() and not outside.params[0].is_inference()
        sums = ops.mtadam_square_sums(inside.grads, 2, impl=impl)
        update(inside, impl=impl, square_sums=sums)
        update(outside, impl=impl)
    for inputs in (inside, outside):
        assert_same_bits(inputs, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(native, dtype):
    tests = TRACED if dtype == torch.float32 else CHECKS
    inputs = make_inputs([(9,), (4, 5)], 2, dtype=dtype, missing=[(1, 0)], amsgrad=True)
    opcheck(RAW.mtadam_square_sums.default, (inputs.grads, 2), test_utils=tests)
    more = {"lr_tensor": torch.tensor(0.1, dtype=torch.float64), "grad_scales": torch.ones(2)}
    for changed in ({}, more):
        opcheck(RAW.mtadam_update_.default, raw_arguments(inputs, **changed), test_utils=tests)


def test_compiles_to_one_graph(native):
    def step(inputs, lr, scales):
        sums = ops.mtadam_square_sums(inputs.grads, len(inputs.params), impl=native)
        options = {"lr": lr, "grad_scales": scales, "square_sums": sums, "impl": native}
        update(inputs, weight_decay=0.1, ranks=(1.0, 0.5), **options)
        return sums, inputs.params[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    lr, scales = torch.tensor(0.1), torch.tensor([1.0, 2.0])
    for shapes in ([(9,), (4, 5)], [(33,), (7, 2)]):
        inputs = make_inputs(shapes, 2, missing=[(1, 0)], amsgrad=True)
        inputs.params[1].requires_grad_()
        others = cloned(inputs)
        with torch.no_grad():
            for _ in range(2):
                results, wanted = compiled(inputs, lr, scales), step(others, lr, scales)
                assert all(map(torch.equal, results, wanted))
        assert_same_bits(inputs, others)
