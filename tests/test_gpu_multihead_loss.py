"""multihead_loss and orthogonality_penalty on a GPU, and what is built on them: small calls that reach each
kernel, for compute-sanitizer (benchmarks/gpu.sh); launches, memory, streams, graphs, equal bits, and no wait
for the device.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from contexts import waits_are_errors

from fastkit._dispatch import unavailable
from fastkit.methods.multiverse import HeadEliminator
from fastkit.nn import MultiverseHead
from fastkit.ops import multihead_loss, orthogonality_penalty
from fastkit.ops import multihead_loss_penalty_products as penalty_products
from fastkit.ops.multihead_loss import KERNELS
from fastkit.testing.multihead_loss import Heads, Inputs, check, check_penalty, make_heads, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.gpu]

DEVICE = "cuda"
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
PROBLEMS = "single_label", "multi_label", "regression"
KINDS = "abs", "squared", "cos_abs", "cos_squared", "huber"
COUNT = {"single_label": 1, "multi_label": 3, "regression": 1}  # of 3 classes, what a row counts


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def inputs_of(B, H, C, D, *, problem="single_label", **options) -> Inputs:
    C = {"single_label": max(C, 2), "multi_label": C, "regression": 1}[problem]
    with torch.device(DEVICE):
        return make_inputs(B, H, C, D, problem=problem, **options)


def heads_of(*size, **options) -> Heads:
    with torch.device(DEVICE):
        return make_heads(*size, **options)


def everything(problem) -> tuple[dict[str, bool], dict[str, Any]]:
    """All the tensors that a problem may have, and its options."""
    tensors, options = {"inactive": True}, {"problem": problem}
    if problem != "regression":
        tensors |= {"class_weight": True}
    if problem == "single_label":
        tensors, options = tensors | {"ignored": True}, options | {"label_smoothing": 0.1}
    return tensors, options


def results_of(inputs, impl, **options):
    """loss, correct, count, and the gradients for the cotangent of the losses."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    options |= {"active": inputs.active, "class_weight": inputs.class_weight, "impl": impl}
    loss, correct, count = multihead_loss(*leaves, inputs.target, **options)
    return loss.detach(), correct, count, *torch.autograd.grad(loss, leaves, inputs.g_loss)


def penalty_of(heads, impl, **options):
    """The penalty, and its gradient."""
    weight = heads.weight.detach().requires_grad_()
    penalty = orthogonality_penalty(weight, active=heads.active, impl=impl, **options)
    return penalty.detach(), *torch.autograd.grad(penalty, weight, heads.g)


def assert_all_equal(results, expected):
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, value), i


# Agreement

# B, H, C, D: one of each; around tiles of rows (16), of classes (16, 64) and of columns (64), classes in
# several tiles; and of GLUE.
SIZES = [
    (1, 1, 1, 1), (7, 3, 3, 70), (15, 5, 16, 63), (16, 2, 17, 64), (17, 33, 64, 5), (33, 4, 65, 65),
    (70, 2, 150, 130), (32, 128, 3, 768),
]  # fmt: skip

# Each size in one dtype, bare or with everything, under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(
        problem, size, dtype, full, marks=[pytest.mark.sanitize] if i % 3 == j and (i + p) % 2 == full else []
    )
    for p, problem in enumerate(PROBLEMS)
    for i, size in enumerate(SIZES)
    for j, dtype in enumerate(DTYPES)
    for full in (False, True)
    if problem != "regression" or size[2] < 17  # it has one class, whatever the size says
]


@pytest.mark.parametrize(("problem", "size", "dtype", "full"), CALLS, ids=str)
def test_every_kernel(triton, problem, size, dtype, full):
    tensors, options = everything(problem) if full else ({}, {"problem": problem})
    check(inputs_of(*size, problem=problem, dtype=dtype, **tensors), options, impl=triton)


CASES = list(itertools.product((False, True), (0.0, 0.3), (False, True), (False, True)))


@pytest.mark.parametrize(("class_weight", "smoothing", "ignored", "inactive"), CASES)
@pytest.mark.parametrize("C", [3, 150])
def test_options_of_a_single_label(triton, C, class_weight, smoothing, ignored, inactive):
    inputs = inputs_of(19, 5, C, 8, class_weight=class_weight, ignored=ignored, inactive=inactive)
    check(inputs, {"label_smoothing": smoothing}, impl=triton)


def test_an_ignore_index_that_is_a_class(triton):
    inputs = inputs_of(33, 5, 3, 8)
    found = check(inputs, {"ignore_index": 1}, impl=triton)
    assert found["count"] == (inputs.target != 1).sum() < 33


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_may_have_bias_and_class_weights_of_float32(triton, dtype):
    inputs = inputs_of(19, 5, 6, 8, dtype=dtype, class_weight=True)
    check(inputs._replace(bias=inputs.bias.float() / 3), {}, impl=triton)
    check(inputs._replace(class_weight=inputs.class_weight.to(dtype)), {}, impl=triton)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_targets_in_other_dtypes(triton, problem):
    inputs = inputs_of(19, 5, 3, 8, problem=problem)
    single = problem == "single_label"
    target = inputs.target if single else inputs.target.to(BFLOAT).float()
    expected = results_of(inputs._replace(target=target), triton, problem=problem)
    for dtype in (torch.int32,) if single else (BFLOAT, torch.float64):
        moved = inputs._replace(target=target.to(dtype))
        assert_all_equal(results_of(moved, triton, problem=problem), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("problem", PROBLEMS)
def test_strides(triton, problem):
    """Transposed and with gaps, which hold NaN."""
    tensors, options = everything(problem)
    inputs = inputs_of(12, 5, 4, 6, problem=problem, **tensors)
    expected = results_of(inputs, triton, **options)

    def gaps(t):
        memory = torch.full((*t.shape, 2), 1).to(t) * (torch.nan if t.is_floating_point() else True)
        memory[..., 0] = t
        return memory[..., 0]

    def transposed(t):
        return t.mT.contiguous().mT if t.dim() > 1 else gaps(t)

    for change in (gaps, transposed):
        moved = Inputs(*(None if t is None else change(t) for t in inputs))
        assert not moved.x.is_contiguous()
        assert_all_equal(results_of(moved, triton, **options), expected)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_only_some_gradients(triton, problem):
    tensors, options = everything(problem)
    inputs = inputs_of(33, 5, 17, 70, problem=problem, **tensors)
    expected = results_of(inputs, triton, **options)
    options |= {"active": inputs.active, "class_weight": inputs.class_weight, "impl": triton}
    with torch.no_grad():  # in which no gradient is formed
        assert_all_equal(multihead_loss(*inputs[:4], **options), expected[:3])
    for place in range(3):
        leaves = [t.detach().requires_grad_(i == place) for i, t in enumerate(inputs[:3])]
        loss = multihead_loss(*leaves, inputs.target, **options).loss
        (gradient,) = torch.autograd.grad(loss, leaves[place], inputs.g_loss)
        assert torch.equal(gradient, expected[3 + place]), place


# The penalty

# H, C, D, with centered classes or not: one head, few, many, more than a program takes at a time (1024). Of
# long rows rounding would decide the signs of too many products.
PENALTIES = [
    ((1, 1, 1), False), ((2, 3, 5), True), ((33, 2, 17), False), ((130, 2, 33), True), ((128, 3, 64), False),
    ((1030, 1, 9), False),
]  # fmt: skip

# As above: each size in one dtype, and each kind in one or two sizes.
PENALTY_CALLS = [
    pytest.param(
        kind, size, centers, dtype, marks=[pytest.mark.sanitize] if i % 3 == j and (i + k) % 3 == 0 else []
    )
    for k, kind in enumerate(KINDS)
    for i, (size, centers) in enumerate(PENALTIES)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("kind", "size", "centers", "dtype"), PENALTY_CALLS, ids=str)
def test_every_penalty(triton, kind, size, centers, dtype):
    for inactive in (False, True):
        heads = heads_of(*size, dtype=dtype, inactive=inactive)
        check_penalty(heads, {"kind": kind, "center_classes": centers}, impl=triton)


@pytest.mark.parametrize("kind", ["squared", "cos_squared"])
def test_rows_of_bert(triton, kind):
    """Whose slopes rounding cannot turn round: the sign of a sum of 768 products it may."""
    for centers in (False, True):
        heads = heads_of(128, 3, 768, inactive=True)
        check_penalty(heads, {"kind": kind, "center_classes": centers}, impl=triton)


@pytest.mark.parametrize("width", [1e-3, 0.7, 5.0])
def test_widths_of_huber(triton, width):
    check_penalty(heads_of(20, 3, 8), {"kind": "huber", "huber_width": width}, impl=triton)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_heads(triton, kind, monkeypatch):
    """Of three heads with all, of which the last is short, and whose own memory is not that of all."""
    monkeypatch.setattr(penalty_products, "_GRAM_BYTES", 4 * 2 * 11 * 3)
    heads = heads_of(11, 2, 7, inactive=True)
    check_penalty(heads, {"kind": kind, "center_classes": True}, impl=triton)
    with torch.no_grad():
        options = {"kind": kind, "active": heads.active, "impl": triton}
        found = orthogonality_penalty(heads.weight, **options)
    torch.testing.assert_close(found, penalty_of(heads, triton, kind=kind)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_heads(triton, kind):
    heads = heads_of(33, 3, 20)
    expected = penalty_of(heads, triton, kind=kind)
    weight = heads.weight
    for moved in (
        torch.stack([weight, weight * torch.nan], -1)[..., 0],
        weight.mT.contiguous().mT,
        weight.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not moved.is_contiguous()
        found = penalty_of(heads._replace(weight=moved), triton, kind=kind)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # products are other ones


# What takes no part


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_heads_that_are_not_active_take_no_part(triton, problem, dtype):
    """Not even where they hold NaN: no bit is another, and theirs are 0."""
    inputs = inputs_of(19, 7, 3, 40, problem=problem, dtype=dtype)
    on = torch.arange(7, device=DEVICE) % 3 != 1
    clean = results_of(inputs._replace(active=on), triton, problem=problem)
    weight = inputs.weight.masked_fill(~on[:, None, None], torch.nan)
    bias = inputs.bias.masked_fill(~on[:, None], torch.inf)
    spoilt = inputs._replace(weight=weight, bias=bias, active=on)
    found = results_of(spoilt, triton, problem=problem)
    assert_all_equal(found, clean)
    loss, correct, count, _, of_weight, of_bias = found
    assert not any(t[~on].any() for t in (loss, correct, of_weight, of_bias)) and loss[on].all()
    assert count == 19 * COUNT[problem]
    none = results_of(spoilt._replace(active=torch.zeros_like(on)), triton, problem=problem)
    assert not any(t.any() for t in (*none[:2], *none[3:])) and none[2] == count


@pytest.mark.sanitize
@pytest.mark.parametrize("centers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_penalty_neither(triton, kind, centers):
    heads = heads_of(40, 3, 20)
    on = torch.arange(40, device=DEVICE) % 4 != 2
    options = {"kind": kind, "center_classes": centers}
    clean = penalty_of(heads._replace(active=on), triton, **options)
    weight = heads.weight.masked_fill(~on[:, None, None], torch.nan)
    found = penalty_of(Heads(weight, on, heads.g), triton, **options)
    assert_all_equal(found, clean)
    assert found[0] > 0 and not found[1][~on].any() and found[1][on].any(2).all()
    few = torch.arange(40, device=DEVICE) == 3
    for active in (few, ~(few | ~few)):
        found = penalty_of(Heads(weight, active, heads.g), triton, **options)
        assert not any(t.any() for t in found)


@pytest.mark.sanitize
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_take_no_part(triton, dtype, smoothing):
    inputs = inputs_of(40, 5, 6, 70, dtype=dtype, class_weight=True)
    inputs.target[1::3] = -100
    ignored = inputs.target < 0
    options = {"label_smoothing": smoothing}
    expected = results_of(inputs, triton, **options)
    for bad in (torch.nan, torch.inf):
        spoilt = inputs._replace(x=inputs.x.masked_fill(ignored[:, None], bad))
        assert_all_equal(results_of(spoilt, triton, **options), expected)
    assert not expected[3][ignored].any() and expected[2] == 40 - ignored.sum()
    nothing = inputs._replace(target=torch.full_like(inputs.target, -100))
    loss, correct, count, *gradients = results_of(nothing, triton, **options)
    assert count == 0 and not any(t.any() for t in (loss, correct, *gradients))


@pytest.mark.sanitize
@pytest.mark.parametrize("C", [3, 150])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_targets_that_are_no_classes(triton, dtype, C):
    """Make all losses NaN, of active heads, and the gradient of their row; nothing is read out of bounds."""
    inputs = inputs_of(20, 4, C, 16, class_weight=True)
    active = torch.tensor([True, True, False, True], device=DEVICE)
    most = torch.iinfo(dtype)
    for bad in (-1, C, -(2**20), most.min, most.max):
        target = inputs.target.to(dtype)
        target[5] = bad
        spoilt = inputs._replace(target=target, active=active)
        loss, correct, count, of_x, of_weight, _ = results_of(spoilt, triton)
        assert loss.isnan().tolist() == [True, True, False, True] and loss[2] == 0
        assert count == 20 and (correct[active] <= 19).all()
        assert of_x[5].isnan().all() and of_weight[active].isnan().all() and not of_weight[2].any()
        assert multihead_loss(*spoilt[:4], impl=triton).loss.isnan().all()


def test_nan_stays_in_its_head(triton):
    inputs = inputs_of(19, 5, 3, 40)
    inputs.bias[2, 1] = torch.nan
    loss, correct, _, _, of_weight, _ = results_of(inputs, triton)
    expected = torch.arange(5, device=DEVICE) == 2
    assert torch.equal(loss.isnan(), expected) and correct[2] == 0
    assert torch.equal(of_weight.flatten(1).isnan().any(1), expected)


# Bits, waits, streams


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(triton, dtype):
    for problem in PROBLEMS:
        tensors, options = everything(problem)
        inputs = inputs_of(300, 70, 17, 100, problem=problem, dtype=dtype, **tensors)
        first = results_of(inputs, triton, **options)
        for _ in range(3):
            assert_all_equal(results_of(inputs, triton, **options), first)
    heads = heads_of(600, 3, 96, dtype=dtype, inactive=True)
    for kind in KINDS:
        first = penalty_of(heads, triton, kind=kind)
        for _ in range(3):
            assert_all_equal(penalty_of(heads, triton, kind=kind), first)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_nothing_waits_for_the_device(triton, problem):
    tensors, options = everything(problem)
    inputs = inputs_of(70, 20, 17, 40, problem=problem, **tensors)
    results_of(inputs, triton, **options)
    with waits_are_errors():
        results_of(inputs, triton, **options)
        if inputs.class_weight is not None:  # whose values are not looked at
            results_of(inputs._replace(class_weight=-inputs.class_weight), triton, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_does_not_wait_either(triton, kind):
    heads = heads_of(70, 3, 40, inactive=True)
    options = {"kind": kind, "center_classes": True}
    penalty_of(heads, triton, **options)
    with waits_are_errors():
        penalty_of(heads, triton, **options)


def both(inputs, impl):
    """Loss and penalty of the same heads, and all their gradients."""
    heads = Heads(inputs.weight, inputs.active, inputs.g_loss[0])
    return *results_of(inputs, impl), *penalty_of(heads, impl)


def test_kernels_run_on_the_current_stream(triton):
    """The weight is written on it, late; a kernel on another stream would read what was there before."""
    inputs = inputs_of(70, 30, 3, 400)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = both(inputs, triton)
    late = inputs._replace(weight=torch.zeros_like(inputs.weight))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.weight.copy_(inputs.weight)
        found = both(late, triton)
    stream.synchronize()
    assert_all_equal(found, expected)


# Launches and graphs


def captured(run):
    """A graph of ``run``, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    return graph, results


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_a_graph_replays_a_call_with_new_inputs(triton, dtype, problem):
    """Forward and backward; the target and the mask of heads too are those of the moment."""
    tensors, options = everything(problem)
    inputs = inputs_of(32, 12, 3, 70, problem=problem, dtype=dtype, **tensors)
    graph, results = captured(lambda: results_of(inputs, triton, **options))
    for seed in (1, 2):
        others = inputs_of(32, 12, 3, 70, problem=problem, dtype=dtype, seed=seed, **tensors)
        others = others._replace(active=torch.arange(12, device=DEVICE) % (2 + seed) == 0)
        others.weight.nan_to_num_(0.5)
        others.bias.nan_to_num_(0.5)
        for tensor, other in zip(inputs, others, strict=True):
            if tensor is not None:
                tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(results, results_of(others, triton, **options))
        assert torch.equal(results[0] != 0, others.active)


@pytest.mark.parametrize("centers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_a_penalty_with_new_heads(triton, kind, centers):
    heads = heads_of(40, 3, 70, inactive=True)
    options = {"kind": kind, "center_classes": centers}
    graph, results = captured(lambda: penalty_of(heads, triton, **options))
    others = heads_of(40, 3, 70, seed=1)._replace(active=torch.arange(40, device=DEVICE) % 5 != 0)
    for tensor, other in zip(heads, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_all_equal(results, penalty_of(others, triton, **options))


def kernels_of(run):
    """The names of the kernels that a call launches, in order."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, where a counter is not to be had
def test_launches_of_loss_and_penalty(triton):
    """Forward and backward of 128 heads of BERT, of MNLI: 9 at most, without the sum of the two gradients."""
    inputs = inputs_of(32, 128, 3, 768)
    kernels = kernels_of(lambda: both(inputs, triton))
    print(f"{len(kernels)} launches:", *kernels, sep="\n  ")
    own = [name.split("_")[2] for name in kernels if name.startswith("multihead_loss_")]
    assert own == ["forward", "inputs", "weights", "slopes"]
    assert len(kernels) <= 9


# Memory


SPARE = 2**22  # what the allocator may add to four large tensors


def peak_of(run):
    """Bytes beyond those that there were before, at most, and the results."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def test_half_precision_is_not_widened(triton):
    """Of x and weight there is no copy: beside gradients, of float32 and as they are stored, the logits'."""
    B, H, C, D = 64, 512, 3, 4096
    inputs = inputs_of(B, H, C, D, dtype=BFLOAT)
    peak, _ = peak_of(lambda: results_of(inputs, triton))
    assert peak <= 6 * (B * D + H * C * D) + 4 * B * H * C + SPARE
    leaves = [t.requires_grad_(False) for t in inputs[:3]]
    peak, _ = peak_of(lambda: multihead_loss(*leaves, inputs.target, impl=triton))
    assert peak <= 2**16  # not even logits


def test_heads_that_are_not_active_are_not_copied_apart(triton):
    """The active ones are not gathered."""
    inputs = inputs_of(64, 2000, 3, 1024, inactive=True)
    peak, results = peak_of(lambda: results_of(inputs, triton))
    outputs = sum(t.nbytes for t in results)
    assert peak <= outputs + 4 * 64 * 2000 * 3 + SPARE


def test_no_matrix_of_all_pairs_is_kept(triton):
    """Products of some heads with all are 64 MB, those of two blocks may be there; of all, 588 MB."""
    heads = heads_of(7000, 3, 64)
    peak, results = peak_of(lambda: penalty_of(heads, triton))
    # The gradient, that of a block before it is put in its place, and times the cotangent.
    assert peak <= 3 * results[1].nbytes + 2 * penalty_products._GRAM_BYTES + SPARE


# As PyTorch's users call it


def test_autocast(triton):
    """The loss as of tensors that were cast, its gradients in the dtypes of the arguments; the penalty as
    without."""
    inputs = inputs_of(33, 5, 3, 40)
    heads = Heads(inputs.weight, None, torch.ones((), device=DEVICE))
    expected = penalty_of(heads, triton)
    with torch.autocast(DEVICE, dtype=BFLOAT):
        found, penalty = results_of(inputs, triton), penalty_of(heads, triton)
    assert_all_equal(penalty, expected)
    lowered = inputs._replace(**{name: getattr(inputs, name).to(BFLOAT) for name in ("x", "weight", "bias")})
    for result, value in zip(found, results_of(lowered, triton), strict=True):
        assert result.dtype in (FLOAT, torch.int64)
        assert torch.equal(result, value.to(result.dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile
@pytest.mark.parametrize("problem", PROBLEMS)
def test_compiled(triton, problem):
    """In one graph forward and one backward, with the same bits."""
    tensors, options = everything(problem)
    inputs = inputs_of(33, 7, 3, 40, problem=problem, **tensors)
    options |= {"active": inputs.active, "class_weight": inputs.class_weight, "impl": triton}

    def call(x, weight, bias):
        found = multihead_loss(x, weight, bias, inputs.target, **options)
        penalty = orthogonality_penalty(weight, active=inputs.active, kind="cos_abs", impl=triton)
        return found.loss, penalty, found.correct, found.count

    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        loss, penalty, *others = function(*leaves)
        gradients = torch.autograd.grad((loss, penalty), leaves, (inputs.g_loss, 0.1 * penalty.detach()))
        results.append((loss.detach(), penalty.detach(), *others, *gradients))
    assert_all_equal(*results)


def test_the_default_is_the_kernel(triton):
    """But for float64, of which Triton has none."""
    inputs = inputs_of(19, 5, 3, 40)
    heads = Heads(inputs.weight, None, torch.ones((), device=DEVICE))
    assert_all_equal(results_of(inputs, None), results_of(inputs, triton))
    assert_all_equal(penalty_of(heads, None), penalty_of(heads, triton))
    wide = inputs_of(19, 5, 3, 40, dtype=torch.float64)
    check(wide, {})
    check_penalty(heads_of(19, 3, 8, dtype=torch.float64), {})
    with pytest.raises(RuntimeError, match="float64"):
        multihead_loss(*wide[:4], impl=triton)


# What is built on them


def pair_of_heads(**options):
    """The same on the CPU and on the device, with two heads that are out."""
    torch.manual_seed(0)
    head = MultiverseHead(40, options.pop("num_classes", 3), 12, ortho_weight=0.05, **options)
    with torch.no_grad():
        head.weight.normal_(std=0.2)
        head.bias.normal_()
    head.eliminate([1, 7])
    return head, copy.deepcopy(head).to(DEVICE)


def batch(problem):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 40, generator=generator)
    if problem == "single_label":
        return x, torch.randint(3, (30,), generator=generator)
    return x, torch.rand((30, 3) if problem == "multi_label" else 30, generator=generator).round()


@pytest.mark.parametrize("kind", ["abs", "cos_squared", "huber", None])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_multiverse_head_is_what_it_is_on_a_cpu(triton, problem, kind):
    classes = 1 if problem == "regression" else 3
    pair = pair_of_heads(problem=problem, ortho=kind, num_classes=classes)
    x, target = batch(problem)
    results = []
    for head, device in zip(pair, ("cpu", DEVICE), strict=True):
        found = head.loss(x.to(device), target.to(device))
        gradients = torch.autograd.grad(found.loss, list(head.parameters()))
        said = [head(x.to(device)), head.fold()(x.to(device))]
        results.append([t.detach().cpu() for t in (*found, *gradients, *said)])
        assert not any(g[[1, 7]].any() for g in gradients)
    for found, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_leave_on_the_device(triton):
    """For good: neither momentum nor weight decay moves them again, and the optimizer waits for nothing."""
    _, head = pair_of_heads()
    optimizer = torch.optim.AdamW(head.parameters(), 0.1, weight_decay=0.1)
    x, target = (t.to(DEVICE) for t in batch("single_label"))

    def step():
        optimizer.zero_grad()
        found = head.loss(x, target)
        found.loss.backward()
        optimizer.step()
        return found

    first = step()
    head.eliminate([0, 4], optimizer)
    with waits_are_errors():
        for _ in range(3):
            last = step()
    out = [0, 1, 4, 7]
    assert head.num_active == 8 and (~head.active).nonzero()[:, 0].tolist() == out
    assert not head.weight[out].any() and not head.bias[out].any() and not last.head_losses[out].any()
    kept = [h for h in range(12) if h not in out]
    assert (last.head_losses[kept] < first.head_losses[kept]).all()


def test_a_graph_replays_a_step_of_a_head_and_sees_who_has_left(triton):
    _, head = pair_of_heads()
    x, target = (t.to(DEVICE) for t in batch("single_label"))

    def run():
        found = head.loss(x, target)
        return *(t.detach() for t in found), *torch.autograd.grad(found.loss, list(head.parameters()))

    graph, results = captured(run)
    head.eliminate([0, 4])
    x.mul_(-0.5)
    target.copy_(target.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert_all_equal(results, run())
    assert not results[1][[0, 1, 4, 7]].any() and (results[1] != 0).sum() == 8


@pytest.mark.parametrize("score", ["loss", "accuracy"])
def test_an_eliminator_drops_what_it_drops_on_a_cpu(score):
    """What is added waits for nothing; the step alone does, and what is saved lies on the CPU."""
    options = {"total_steps": 40, "interval": 5, "policy": "fraction", "fraction": 0.3, "score": score}
    on_cpu, on_gpu = (HeadEliminator(12, **options) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(12, generator=generator)
    dropped = []
    for step in range(40):
        added = [
            (level + torch.rand(12, generator=generator), torch.randint(9, (12,), generator=generator))
            for _ in range(2)
        ]
        moved = [[t.to(DEVICE) for t in pair] for pair in added]
        count = torch.tensor(8, device=DEVICE)
        for pair in added:
            on_cpu.add(*pair, 8)
        with waits_are_errors():
            on_gpu.add(*moved[0], count)
            on_gpu.add(*moved[1], 8)
        if step == 20:  # what is pending too is on the CPU, and goes on from there
            state = on_gpu.state_dict()
            assert not any(t.is_cuda for t in state.values() if isinstance(t, torch.Tensor))
            on_gpu = HeadEliminator(12, **options)
            on_gpu.load_state_dict(state)
        dropped.append(on_gpu.step())
        assert dropped[-1] == on_cpu.step()
    assert sum(map(len, dropped)) >= 3
    torch.testing.assert_close(on_gpu.scores(), on_cpu.scores(), rtol=1e-12, atol=0)


def small_model(transformers, **options):
    from fastkit.methods.multiverse import MultiverseConfig, MultiverseForSequenceClassification

    torch.manual_seed(0)
    base = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=60,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = MultiverseConfig(base=base, num_labels=3, num_heads=8, ortho_weight=0.05, **options)
    return MultiverseForSequenceClassification(config)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_training_of_a_model(triton, autocast):
    """As on a CPU, but under autocast, where it stays near; an eliminator takes what it has found."""
    transformers = pytest.importorskip("transformers")
    model = small_model(transformers).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (6, 7), generator=generator)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    results = []
    for device, casts in (("cpu", False), (DEVICE, autocast)):
        trained = copy.deepcopy(model).to(device)
        optimizer = torch.optim.SGD(trained.parameters(), 0.5)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=BFLOAT, enabled=casts):
                found = trained(input_ids=ids.to(device), labels=labels.to(device))
            found.loss.backward()
            optimizer.step()
            losses.append(found.loss.detach())
        eliminator = HeadEliminator(
            8, total_steps=2, interval=1, start=1, stop=2, policy="fraction", fraction=0.3
        )
        eliminator.add(*trained.take_sums())
        out = eliminator.step()
        assert len(out) == 2
        trained.head.eliminate(out, optimizer)
        assert trained.head.num_active == 6 and trained(input_ids=ids.to(device)).logits.isfinite().all()
        assert found.loss.dtype == FLOAT and losses[1] < losses[0]
        parameters = {name: p.detach().cpu() for name, p in trained.named_parameters() if "head." not in name}
        results.append((torch.stack(losses).cpu(), parameters))
    (expected, of_cpu), (found, of_gpu) = results
    bound = 2e-2 if autocast else 1e-4
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    for name, parameter in of_cpu.items():
        torch.testing.assert_close(of_gpu[name], parameter, rtol=bound, atol=bound)
