"""ops.multihead_loss in every implementation that runs here, against float64."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from fastkit._threads import threads
from fastkit.ops import multihead_loss
from fastkit.ops.multihead_loss import KERNELS
from fastkit.testing.multihead_loss import check, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = DOUBLE, FLOAT, BFLOAT, HALF
PROBLEMS = "single_label", "multi_label", "regression"
TENSORS = "class_weight", "ignored", "inactive"
RAW = torch.ops.fastkit

# Rows around the widths of vectors; any two of the values of rows, heads and classes meet.
ROWS, HEADS, CLASSES, COLUMNS = (1, 7, 33, 64), (1, 5, 130, 300), (1, 2, 3, 17, 150), (1, 8, 33)
SIZES = [
    (B, HEADS[(i + j) % 4], C, COLUMNS[(i + 2 * j) % 3])
    for i, C in enumerate(CLASSES)
    for j, B in enumerate(ROWS)
]


def run(size, problem, dtype, impl, **case):
    """Whether the call agrees with float64. ``case``: tensors that there are, and the options."""
    B, H, C, D = size
    classes = {"single_label": max(C, 2), "multi_label": C, "regression": 1}[problem]
    tensors = {name: case.get(name, False) for name in TENSORS}
    options = {name: value for name, value in case.items() if name not in TENSORS}
    inputs = make_inputs(B, H, classes, D, problem=problem, dtype=dtype, **tensors)
    return check(inputs, {"problem": problem, **options}, impl=impl)


def everything(problem):
    """All that a problem may have."""
    case = {"inactive": True}
    if problem != "regression":
        case |= {"class_weight": True}
    if problem == "single_label":
        case |= {"ignored": True, "label_smoothing": 0.1}
    return case


def results_of(impl, x, weight, bias, target, **options):
    """loss, correct, count, and the gradients of a sum of losses in which each head has another part."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    found = multihead_loss(*leaves, target, impl=impl, **options)
    cotangent = torch.linspace(1, 2, len(weight), dtype=found.loss.dtype)
    return (
        found.loss.detach(),
        found.correct,
        found.count,
        *torch.autograd.grad(found.loss, leaves, cotangent),
    )


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


@pytest.mark.parametrize(
    ("problem", "size"),
    # A regression has one class, whatever the size says.
    [(p, size) for p in PROBLEMS for size in SIZES if p != "regression" or size[2] < 3],
    ids=str,
)
def test_sizes(problem, size):
    for dtype in (DOUBLE, FLOAT):
        run(size, problem, dtype, "cpu")
        run(size, problem, dtype, "cpu", **everything(problem))


@pytest.mark.parametrize("size", [(1, 1, 2, 1), (7, 5, 3, 8), (33, 130, 17, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dtypes(problem, dtype, size, impl):
    run(size, problem, dtype, impl)
    run(size, problem, dtype, impl, **everything(problem))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_every_number_of_rows(dtype, problem):
    """Whole vectors, and what is left."""
    for B in (*range(1, 36), 63, 65):
        run((B, 3, 4, 5), problem, dtype, "cpu", **everything(problem))


CASES = list(itertools.product((False, True), (0.0, 0.3), (False, True), (False, True)))


@pytest.mark.parametrize(("class_weight", "smoothing", "ignored", "inactive"), CASES)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_options_of_a_single_label(dtype, class_weight, smoothing, ignored, inactive, impl):
    run(
        (19, 5, 6, 8), "single_label", dtype, impl, class_weight=class_weight, label_smoothing=smoothing,
        ignored=ignored, inactive=inactive,
    )  # fmt: skip


@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("inactive", [False, True])
def test_options_of_several_labels(class_weight, inactive, impl):
    run((19, 5, 6, 8), "multi_label", DOUBLE, impl, class_weight=class_weight, inactive=inactive)


def test_more_threads():
    with threads(2):
        for problem in PROBLEMS:
            run((64, 130, 17, 33), problem, FLOAT, "cpu", **everything(problem))


# Arguments as they come


@pytest.mark.parametrize("problem", PROBLEMS)
def test_strides(problem, impl):
    """Transposed, with gaps, expanded, and in another order."""
    x, weight, bias, target, *_ = make_inputs(
        12, 5, 1 if problem == "regression" else 4, 6, problem=problem, dtype=DOUBLE
    )
    options = {"problem": problem, "active": torch.tensor([True, False, True, True, False])}
    options |= {} if problem == "regression" else {"class_weight": torch.rand(4, dtype=DOUBLE)}
    expected = results_of(impl, x, weight, bias, target, **options)

    def gaps(t):
        return torch.stack([t, t], -1)[..., 0]

    def transposed(t):
        return t.mT.contiguous().mT if t.dim() > 1 else gaps(t)

    def permuted(t):
        return t.permute(2, 0, 1).contiguous().permute(1, 2, 0) if t.dim() == 3 else transposed(t)

    for change in (gaps, transposed, permuted):
        moved = {k: gaps(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        tensors = [change(t) for t in (x, weight, bias, target)]
        assert not tensors[1].is_contiguous() or 1 in weight.shape
        found = results_of(impl, *tensors, **moved)
        for result, want in zip(found, expected, strict=True):
            torch.testing.assert_close(result, want, rtol=1e-12, atol=1e-14)
    for place, t in (
        (0, x[:1].expand_as(x)),
        (1, weight[:1].expand_as(weight)),
        (2, bias[:1].expand_as(bias)),
    ):
        tensors = [x, weight, bias, target]
        dense = [*tensors[:place], t.contiguous(), *tensors[place + 1 :]]
        tensors[place] = t
        found, want = (results_of(impl, *given, **options) for given in (tensors, dense))
        for result, value in zip(found, want, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-14)


def test_targets_in_int32(impl):
    """Of which an ignore_index that int32 has not is none."""
    x, weight, bias, target, *_ = make_inputs(12, 5, 4, 6)
    target[::4] = -100
    for ignore_index in (-100, 2**40):
        if ignore_index > 0:
            target = target.clamp(min=0)
        options = {"ignore_index": ignore_index, "label_smoothing": 0.1}
        expected = results_of(impl, x, weight, bias, target, **options)
        assert expected[2] == (9 if ignore_index < 0 else 12)
        assert_all_equal(results_of(impl, x, weight, bias, target.int(), **options), expected)


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_targets_in_other_dtypes(problem, impl):
    x, weight, bias, target, *_ = make_inputs(12, 5, 1, 6, problem=problem)
    target = target.to(BFLOAT)
    expected = results_of(impl, x, weight, bias, target.float(), problem=problem)
    for dtype in (BFLOAT, DOUBLE):
        assert_all_equal(results_of(impl, x, weight, bias, target.to(dtype), problem=problem), expected)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_a_bias_in_float32_beside_half_precision(dtype, impl):
    inputs = make_inputs(19, 5, 6, 8, dtype=dtype, class_weight=True)
    inputs = inputs._replace(bias=inputs.bias.float() / 3, class_weight=inputs.class_weight.to(dtype))
    check(inputs, {}, impl=impl)


# Rows and heads that take no part


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_an_ignored_row_holds_does_not_matter(smoothing, bad, impl):
    x, weight, bias, target, *_ = make_inputs(19, 5, 6, 8)
    target[1::3] = -100
    options = {"label_smoothing": smoothing, "class_weight": torch.rand(6)}
    clean = results_of(impl, x, weight, bias, target, **options)
    poisoned = results_of(impl, x.masked_fill((target < 0)[:, None], bad), weight, bias, target, **options)
    assert_all_equal(poisoned, clean)
    assert not clean[3][target < 0].any() and clean[3][target >= 0].any(1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_an_inactive_head_holds_does_not_matter(problem, bad, impl):
    x, weight, bias, target, *_ = make_inputs(19, 5, 1 if problem == "regression" else 6, 8, problem=problem)
    on = torch.tensor([True, False, True, True, False])
    off = ~on
    clean = results_of(impl, x, weight, bias, target, problem=problem, active=on)
    weight, bias = weight.masked_fill(off[:, None, None], bad), bias.masked_fill(off[:, None], bad)
    poisoned = results_of(impl, x, weight, bias, target, problem=problem, active=on)
    assert_all_equal(poisoned, clean)
    loss, correct, count, of_x, of_weight, of_bias = poisoned
    assert not loss[off].any() and not correct[off].any() and loss[on].all()
    assert not of_weight[off].any() and not of_bias[off].any()
    assert count == {"single_label": 19, "multi_label": 19 * 6, "regression": 19}[problem]
    assert of_x.isfinite().all()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_head_is_active(problem, impl):
    x, weight, bias, target, *_ = make_inputs(7, 5, 1 if problem == "regression" else 3, 4, problem=problem)
    none = torch.zeros(5, dtype=torch.bool)
    loss, correct, count, *gradients = results_of(
        impl, x, weight * torch.nan, bias, target, problem=problem, active=none
    )
    assert not loss.any() and not correct.any() and not any(g.any() for g in gradients)
    assert count == target.numel() and [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_of_no_row_the_loss_is_0(weighted, smoothing, impl):
    """Where PyTorch has NaN."""
    x, weight, bias, target, *_ = make_inputs(7, 5, 3, 4)
    target = torch.full_like(target, -100)
    options = {"label_smoothing": smoothing, "class_weight": torch.rand(3) if weighted else None}
    loss, correct, count, *gradients = results_of(impl, x * torch.nan, weight, bias, target, **options)
    assert not loss.any() and not correct.any() and count == 0
    assert not any(g.any() for g in gradients)


def test_an_ignore_index_that_is_a_class(impl):
    inputs = make_inputs(33, 5, 3, 8, dtype=DOUBLE)
    found = check(inputs, {"ignore_index": 1}, impl=impl)
    z = linear(inputs.x, inputs.weight[2], inputs.bias[2])
    torch.testing.assert_close(found["loss"][2], cross_entropy(z, inputs.target, ignore_index=1))
    assert found["count"] == (inputs.target != 1).sum() < 33
    right = (z.argmax(1) == inputs.target) & (inputs.target != 1)
    assert found["correct"][2] == right.sum() < (z.argmax(1) == inputs.target).sum()


@pytest.mark.parametrize("class_weight", [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_class_that_weighs_nothing_still_counts(smoothing, class_weight, impl, request):
    """Its rows have no loss; that they are right is no matter of weights."""
    x, weight, bias, target, *_ = make_inputs(33, 5, 3, 8, dtype=DOUBLE)
    target[::4] = -100
    options = {"label_smoothing": smoothing, "class_weight": torch.tensor(class_weight, dtype=DOUBLE)}
    found = results_of(impl, x, weight, bias, target, **options)
    plain = results_of(impl, x, weight, bias, target)
    assert torch.equal(found[1], plain[1]) and torch.equal(found[2], plain[2])
    assert found[0].isfinite().all() and (found[0] > 0).all() == any(class_weight)


# Values at the edge


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_of_equal_logits_the_first_class_is_right(dtype, impl):
    """In every lane; and of a target that ties with a class after it, not with one before."""
    B = 37
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [1, 2, 2, 0], [-1, -1, -2, -1], [3, 3, 1, 3], [-0.0, 0, -0.0, 0]], dtype=dtype
    )
    x, weight = torch.zeros(B, 2, dtype=dtype), torch.zeros(5, 4, 2, dtype=dtype)
    for target in range(4):
        found = multihead_loss(x, weight, logits, torch.full((B,), target), impl=impl)
        assert found.correct.tolist() == [B * (int(first) == target) for first in (0, 1, 0, 0, 0)]
    # z = 0 is no answer of yes, and neither is a half of a target.
    wanted = torch.tensor([0.0, 0.5, 0.6, 1.0], dtype=dtype).expand(B, 4)
    found = multihead_loss(x, weight[:2], logits[:2], wanted, problem="multi_label", impl=impl)
    assert found.correct.tolist() == [B * 2, B * (0 + 0 + 1 + 0)] and found.count == 4 * B


SPECIAL = [
    [torch.inf, 0.0, 0.0],
    [0.0, torch.inf, 0.0],
    [0.0, 0.0, torch.inf],
    [-torch.inf, 0.0, 0.0],
    [0.0, -torch.inf, 0.0],
    [-torch.inf] * 3,
    [torch.nan, 0.0, 0.0],
    [0.0, torch.nan, 0.0],
    [0.0, 0.0, torch.nan],
    [torch.inf, torch.inf, 0.0],
    [torch.inf, -torch.inf, 0.0],
    [torch.nan, torch.inf, 0.0],
    [torch.inf, torch.nan, -torch.inf],
]


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_that_are_not_finite(smoothing, dtype, impl):
    """Loss and correct are the reference's; gradients too, but that where it has a NaN all may be."""
    bias = torch.tensor([[1.0, 0.5, 2.0], *SPECIAL], dtype=dtype)
    x, weight = torch.ones(19, 2, dtype=dtype), torch.zeros(len(bias), 3, 2, dtype=dtype)
    target = torch.arange(19) % 3
    target[4:7] = 0
    for picked in (target, torch.zeros_like(target), torch.ones_like(target)):
        results = [
            results_of(one, x, weight, bias, picked, label_smoothing=smoothing) for one in (impl, "reference")
        ]
        torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
        assert_all_equal(results[0][1:3], results[1][1:3])
        for found, expected in zip(results[0][4:], results[1][4:], strict=True):
            finite = found.isfinite()
            torch.testing.assert_close(found[finite], expected[finite])
            assert finite.flatten(1).all(1)[results[0][0].isfinite()].all() and finite[0].all()


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_logits_of_several_labels_that_are_not_finite(dtype, impl):
    """Loss is the reference's, but for one of infinity that is NaN there; so are correct and gradients."""
    bias = torch.tensor([[1.0, 0.5, 2.0], *SPECIAL], dtype=dtype)
    x, weight = torch.ones(19, 2, dtype=dtype), torch.zeros(len(bias), 3, 2, dtype=dtype)
    for value in (0.0, 0.5, 1.0):
        wanted = torch.full((19, 3), value, dtype=dtype)
        found, expected = (
            results_of(one, x, weight, bias, wanted, problem="multi_label") for one in (impl, "reference")
        )
        right = expected[0].isfinite()
        torch.testing.assert_close(found[0][right], expected[0][right])
        assert torch.equal(found[0].isfinite(), right) and right[0]
        assert_all_equal(found[1:3], expected[1:3])
        torch.testing.assert_close(found[4:], expected[4:], equal_nan=True)


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_large_and_distant_logits(dtype, impl):
    bias = torch.tensor([[1e4, -1e4, 9990.0], [-3e4, -3e4 + 1, -1e5], [80.0, -80, 0]], dtype=dtype)
    x, weight = torch.zeros(3, 1, dtype=dtype), torch.zeros(3, 3, 1, dtype=dtype)
    target = torch.tensor([0, 1, 2])
    found = results_of(impl, x, weight, bias, target)
    leaf = bias.double().requires_grad_()
    expected = torch.stack([cross_entropy(z.expand(3, 3), target) for z in leaf])
    cotangent = torch.linspace(1, 2, 3, dtype=DOUBLE)
    torch.testing.assert_close(found[0], expected.detach().to(dtype), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(expected, leaf, cotangent)
    # The reference takes a share by a difference from the logarithm, which is as large as the logits.
    of_lse = 3e4 * torch.finfo(dtype).eps if impl == "reference" else 0.0
    torch.testing.assert_close(found[5], gradient.to(dtype), rtol=1e-5, atol=1e-6 + of_lse)
    several = results_of(impl, x, weight, bias, torch.eye(3, dtype=dtype), problem="multi_label")
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    wanted = torch.stack([binary(z.expand(3, 3), torch.eye(3, dtype=DOUBLE)) for z in leaf])
    torch.testing.assert_close(several[0], wanted.detach().to(dtype), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in (*found[3:], *several[3:]))


def test_a_loss_is_hardly_negative():
    """The target's logit and the logarithm come of one product."""
    x, target = torch.eye(64), torch.arange(64)
    loss = multihead_loss(x, 1e3 * torch.eye(64)[None], torch.zeros(1, 64), target, impl="cpu").loss
    assert loss.item() >= -2 * torch.finfo(FLOAT).eps * 1e3
    assert loss.item() <= 2 * torch.finfo(FLOAT).eps * 1e3


# Bits and memory


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, BFLOAT], ids=str)
def test_the_same_call_gives_the_same_bits(dtype, problem, impl):
    x, weight, bias, target, *_ = make_inputs(
        33, 130, 1 if problem == "regression" else 17, 33, problem=problem, dtype=dtype
    )
    expected = results_of(impl, x, weight, bias, target, problem=problem)
    for _ in range(3):
        assert_all_equal(results_of(impl, x, weight, bias, target, problem=problem), expected)
    with torch.no_grad():  # in which no gradient is formed
        assert_all_equal(multihead_loss(x, weight, bias, target, problem=problem, impl=impl), expected[:3])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_arguments_are_not_written_to(problem, impl):
    inputs = make_inputs(
        19, 5, 1 if problem == "regression" else 6, 8, problem=problem, inactive=True,
        class_weight=problem != "regression", ignored=problem == "single_label",
    )  # fmt: skip
    copies = [None if t is None else t.clone() for t in inputs]
    check(inputs, {"problem": problem}, impl=impl)
    for t, copy in zip(inputs, copies, strict=True):
        assert t is None or torch.equal(t.nan_to_num(7), copy.nan_to_num(7))


def within(t, margin=67):
    """A dense copy amid a memory of sevens, and that memory."""
    memory = torch.full((t.numel() + 2 * margin,), 7, dtype=t.dtype)
    return memory[margin : margin + t.numel()].view(t.shape).copy_(t), memory


def raw_call(problem, dtype, size, gradient, seed=0):
    """Arguments of the kernel, of noise; those of a single label have ignored rows and class weights."""
    H, C, B, D = size
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator).to(dtype)

    target = wanted = None
    if problem == "single_label":
        target = torch.randint(C, (B,), generator=generator)
        target[::3] = -100
    else:
        wanted = rand(C, B)
    return {
        "x": 4 * rand(B, D) - 2, "weight": rand(H, C, D) - 0.5, "bias": rand(H, C), "target": target,
        "wanted": wanted, "class_weight": None if problem == "regression" else rand(C), "problem": problem,
        "label_smoothing": 0.1, "ignore_index": -100, "gradient": gradient,
        "z": torch.empty(H, C, B, dtype=dtype), "loss": torch.empty(H, dtype=dtype),
        "correct": torch.empty(H, dtype=torch.int64), "count": torch.empty((), dtype=torch.int64),
    }  # fmt: skip


def raw_backward_call(forward):
    """After a forward call with a gradient."""
    x, weight = forward["x"], forward["weight"]
    return {
        "g_loss": torch.arange(len(weight)).to(x.dtype) - 1, "dz": forward["z"], "x": x, "weight": weight,
        "target": forward["target"], "ignore_index": -100, "g_x": torch.empty_like(x),
        "g_weight": torch.empty_like(weight), "g_bias": torch.empty_like(forward["bias"]),
    }  # fmt: skip


def writes_to(op, call, names):
    """That these arguments are written to, each number of them, and nothing else, in them or beside them."""
    placed = {n: within(t) if isinstance(t, torch.Tensor) else (t, None) for n, t in call.items()}
    op(*(t for t, _ in placed.values()))
    moved = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in call.items()}
    for name in names:
        moved[name].fill_(5)
    op(*moved.values())
    for name, (t, memory) in placed.items():
        if memory is not None:
            assert (memory[:67] == 7).all() and (memory[-67:] == 7).all(), name
            assert torch.equal(t, moved[name] if name in names else call[name]), name


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_kernels_write_to_what_is_their_own(native, problem, dtype):
    """Losses, right rows, logits; the gradients that are wanted; nothing beside them."""
    for B, H, D in itertools.product((1, 3, 4, 8, 15, 17, 33, 65), (1, 3), (1, 8, 33, 70)):
        for gradient in (False, True):
            call = raw_call(problem, dtype, (H, 5, B, D), gradient)
            writes_to(RAW.multihead_loss_fwd_, call, ("z", "loss", "correct", "count"))
        RAW.multihead_loss_fwd_(*call.values())
        back = raw_backward_call(call)
        writes_to(RAW.multihead_loss_bwd_, back, ("g_x", "g_weight", "g_bias"))
        for name in ("g_x", "g_weight", "g_bias"):
            one = back | dict.fromkeys({"g_x", "g_weight", "g_bias"} - {name})
            writes_to(RAW.multihead_loss_bwd_, one, (name,))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_the_number_of_threads_changes_no_bit_of_the_kernels(native, dtype, problem):
    results = []
    for count in (1, 2, 3, 2):
        call = raw_call(problem, dtype, (50, 17, 33, 300), True)
        back = raw_backward_call(call)
        with threads(count):
            RAW.multihead_loss_fwd_(*call.values())
            RAW.multihead_loss_bwd_(*back.values())
        results.append(
            [call["z"], call["loss"], call["correct"], back["g_x"], back["g_weight"], back["g_bias"]]
        )
    for other in results[1:]:
        assert_all_equal(other, results[0])


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 2, 800), (9, 300, 2, 31), (500, 7, 3, 65), (35, 20, 40, 33)], ids=str
)
def test_more_logits_and_rows_than_are_packed_at_a_time(dtype, size):
    for problem in PROBLEMS:
        run(size, problem, dtype, "cpu", inactive=size[1] > 1, ignored=problem == "single_label")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_memory_that_a_graph_keeps(native, problem):
    """Arguments, and one number for each logit of an active head or not."""
    H, C = 6, 1 if problem == "regression" else 4
    x, weight, bias, target, *_ = make_inputs(9, H, C, 5, problem=problem)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        multihead_loss(*leaves, target, problem=problem, impl=native)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in (*leaves, target)) + 9 * H * C
    assert not any(t.untyped_storage().nbytes() > t.nbytes for t in kept)


def test_kernels_cover_what_the_page_says():
    assert KERNELS["cpu"] == (FLOAT, DOUBLE, HALF, BFLOAT)


def test_every_instruction_set(run_script, isa):
    script = f"""if True:
        import json
        import torch
        from fastkit.testing.multihead_loss import check, make_inputs

        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for problem in {PROBLEMS!r}:
            single, classes = problem == "single_label", problem != "regression"
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for B in (1, 3, 7, 16, 33):
                    inputs = make_inputs(
                        B, 5, 6 if classes else 1, 9, problem=problem, dtype=dtype, class_weight=classes,
                        ignored=single, inactive=True,
                    )
                    check(inputs, {{"problem": problem, "label_smoothing": 0.1 * single}}, impl="cpu")
        print("agrees")
    """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr
