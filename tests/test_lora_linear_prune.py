"""column_norms, prune_rows_ and prune_rows_grouped_: against the reference, graphs, refusals."""

import math
import re

import pytest
import torch
from torch.library import opcheck

from fastkit import ops, reference
from fastkit._threads import threads
from fastkit.testing import assert_matches_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

RAW = torch.ops.fastkit


def masks_of(matrix):
    """What the raw op writes to."""
    return torch.zeros(matrix.shape, dtype=torch.bool)


CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
RATIOS = 0.0, 0.1, 0.3, 0.5, 0.9, math.nextafter(1.0, 0.0)
# Rows and columns around vectors (2 to 16) and what is counted at a time (8 to 64), a long row.
SHAPES = [(R, D) for R in (1, 3, 8) for D in (1, 2, 7, 8, 9, 31, 33, 100, 768)] + [(3, 4097)]
NAN, INF = float("nan"), float("inf")

LAYOUTS = {
    "dense": lambda a: a,
    "transposed": lambda a: a.T.contiguous().T,
    "columns_of_more": lambda a: torch.cat([a, a + 1], 1)[:, : a.shape[1]],
    "every_other": lambda a: torch.stack([a, a + 1], -1)[..., 0],
    "last_row_first": lambda a: torch.cat([a + 1, a])[a.shape[0] :],
}


def make(R, D, dtype=torch.float32, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    a = torch.randn(R, D, generator=generator).to(dtype)
    return a, torch.rand(D, generator=generator) * 10


def bits(t):
    return t.view(BITS[t.dtype.itemsize])


def check(a, norm, ratio, impl):
    """The mask, after a and the mask have been compared with the reference's, bit for bit."""
    want = a.detach().clone()
    want_mask = reference.prune_rows_(want, norm, ratio)
    mask = ops.prune_rows_(a, norm, ratio, impl=impl)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, want_mask)
    assert torch.equal(bits(a.detach().clone()), bits(want.clone()))
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(impl, dtype):
    for i, (R, D) in enumerate(SHAPES):
        for ratio in RATIOS:
            a, norm = make(R, D, dtype, seed=i)
            mask = check(a, norm, ratio, impl)
            assert ((~mask).sum(1) == math.floor(ratio * D)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(impl, layout):
    for dtype in DTYPES:
        for R, D in ((3, 33), (1, 8), (8, 100), (2, 1)):
            a, norm = make(R, D, dtype)
            a = LAYOUTS[layout](a)
            base = a if a._base is None else a._base
            before = base.clone()
            check(a, norm.repeat_interleave(2)[::2], 0.5, impl)
            a.copy_(torch.as_strided(before, a.shape, a.stride(), a.storage_offset()))
            assert torch.equal(base, before)  # nothing beside a was written to


def test_of_equal_scores_the_first_go(impl):
    for D in (1, 2, 9, 33, 100, 768):
        for ratio in RATIOS:
            pruned = math.floor(ratio * D)
            for a in (torch.ones(3, D), torch.zeros(3, D), -torch.ones(3, D)):
                mask = check(a, torch.full((D,), 2.0), ratio, impl)
                assert torch.equal(mask, (torch.arange(D) >= pruned).expand(3, D))


def test_few_values(impl):
    """Most thresholds are shared by some that go and some that stay."""
    for dtype in DTYPES:
        for seed in range(4):
            a, _ = make(8, 300, dtype, seed)
            a = a.mul(1.5).round()
            norm = torch.tensor([0.0, 1.0, 2.0, 4.0]).repeat(75)
            for ratio in RATIOS:
                check(a.clone(), norm, ratio, impl)


def test_zeros_and_subnormal_numbers(impl):
    a, norm = make(4, 100)
    a[:, ::3] = 0
    a[:, 1::3] = -0.0
    check(a.clone(), norm, 0.5, impl)
    check(a, torch.zeros(100), 0.5, impl)
    for dtype, tiny in (
        (torch.float32, 1e-40),
        (torch.float64, 1e-310),
        (torch.bfloat16, 1e-39),
        (torch.float16, 1e-6),
    ):
        for norm in (torch.ones(100), torch.rand(100) * 1e-3, torch.full((100,), -0.0)):
            check((make(4, 100)[0].double() * tiny).to(dtype), norm, 0.3, impl)
    check(torch.ones(2, 9), torch.full((9,), 1e-42) * torch.arange(9, 0, -1), 0.5, impl)  # of norms


def test_a_nan_is_greater_than_any_number(impl):
    for dtype in DTYPES:
        a, norm = make(5, 65, dtype)
        a[0, ::2] = NAN
        a[1] = NAN
        a[2, :40] = INF
        a[3, 5], a[3, 6] = -INF, NAN
        quiet_and_other = bits(a[4])
        quiet_and_other[:4] = bits(a[0, :1]) | 3
        quiet_and_other[4:8] = ~quiet_and_other[:4] | bits(a[0, :1])
        for ratio in RATIOS:
            check(a.clone(), norm, ratio, impl)
        norm[::3] = 0.0  # of infinity a product that is NaN
        check(a, norm, 0.5, impl)
        infinite = torch.full_like(norm, 3e38)
        check(make(5, 65, dtype)[0], infinite, 0.9, impl)


def test_grouped_equals_single(impl):
    shapes = [(R, D) for R in (1, 4, 12) for D in (1, 9, 100, 768)] * 6
    inputs = [make(R, D, DTYPES[i % 4], seed=i) for i, (R, D) in enumerate(shapes)]
    single = [a.clone() for a, _ in inputs]
    masks = ops.prune_rows_grouped_(*zip(*inputs, strict=True), 0.3, impl=impl)
    for mask, (a, norm), other in zip(masks, inputs, single, strict=True):
        assert torch.equal(mask, ops.prune_rows_(other, norm, 0.3, impl=impl))
        assert torch.equal(bits(a), bits(other))


def test_rows_are_shared_by_threads(native):
    inputs = [make(13, 4097, seed=i) for i in range(2)] + [make(40, 100)]  # enough for a second thread
    want = [a.clone() for a, _ in inputs]
    want_masks = reference.prune_rows_grouped_(want, [norm for _, norm in inputs], 0.5)
    for count in (1, 2, 3):
        got = [a.clone() for a, _ in inputs]
        with threads(count):
            masks = ops.prune_rows_grouped_(got, [norm for _, norm in inputs], 0.5, impl=native)
        assert all(map(torch.equal, got, want)) and all(map(torch.equal, masks, want_masks))


def test_nothing_to_do(impl):
    assert ops.prune_rows_grouped_([], [], 0.5, impl=impl) == []
    for R, D in ((0, 4), (4, 0), (0, 0)):
        assert ops.prune_rows_(torch.ones(R, D), torch.ones(D), 0.5, impl=impl).shape == (R, D)
    a = torch.ones(2, 3)
    assert ops.prune_rows_(a, torch.ones(3), 0.3, impl=impl).all()  # floor(0.9) = 0
    assert torch.equal(a, torch.ones(2, 3))


# Parameters, graphs


def test_a_parameter_is_written_to(impl):
    a, norm = make(3, 9)
    parameter = torch.nn.Parameter(a.clone())
    check(parameter, norm, 0.5, impl)
    assert parameter.is_leaf and parameter.grad_fn is None and parameter.requires_grad
    mask = ops.prune_rows_(parameter.T.contiguous().T, norm, 0.5, impl=impl)  # no leaf
    assert not mask.requires_grad


def test_a_graph_that_saved_it_refuses_to_run_backward(impl):
    a, norm = make(3, 9)
    a.requires_grad_()
    y = a.square().sum()
    version = a._version
    ops.prune_rows_grouped_([a], [norm], 0.5, impl=impl)
    assert a._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode(impl):
    a, norm = make(3, 9)
    with torch.inference_mode():
        check(a, norm, 0.5, impl)
        check(a.clone(), norm, 0.7, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(native, dtype):
    a, norm = make(3, 9, dtype)
    traced = dtype == torch.float32
    opcheck(RAW.column_square_sums.default, (a,), test_utils=TRACED if traced else CHECKS)
    arguments = [a, a.T.contiguous().T[:, :2]], [norm, norm[:2]], 0.3
    masks = [masks_of(matrix) for matrix in arguments[0]]
    opcheck(RAW.prune_rows_.default, (*arguments, masks), test_utils=TRACED if traced else CHECKS)


def test_compiles_to_one_graph(native):
    def prune(x, a, b):
        norm = ops.column_norms(x, impl=native)
        mask = ops.prune_rows_(a, norm, 0.5, impl=native)
        return norm, mask, *ops.prune_rows_grouped_([b], [norm * 2], 0.3, impl=native), a * 2

    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager", dynamic=True)
    for R, D in ((3, 9), (5, 33)):
        x = make(7, D)[0]
        inputs = [make(R, D, seed=1)[0].requires_grad_(), make(R, D, seed=2)[0]]
        others = [inputs[0].detach().clone().requires_grad_(), inputs[1].clone()]
        with torch.no_grad():
            results, expected = compiled(x, *inputs), prune(x, *others)
        assert all(map(torch.equal, results, expected))
        assert all(map(torch.equal, inputs, others))


# Column norms


def norm_budget(x, impl):
    """Of sqrt(sum of squares): half the sum's relative error, and what is rounded to float32."""
    rows = x.shape[0] if impl == "reference" else min(x.shape[0], 256)
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    square_sum = x.double().square().sum(0)
    error = (rows + 3) * eps / 2 * square_sum + x.shape[0] * torch.finfo(torch.float32).tiny
    norm = square_sum.sqrt()
    return norm, (error / norm.clamp(min=1e-19)).clamp(max=error.sqrt()) / 2 + torch.finfo(
        torch.float32
    ).eps * norm


def of_norms(impl):
    return None if impl == "cuda" else impl  # which Triton computes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_norms(impl, dtype):
    # Rows around what is taken at a time (8) and summed apart (256), columns around vectors and panels.
    for N, D in ((1, 1), (5, 7), (8, 33), (13, 100), (256, 9), (257, 31), (700, 64), (2, 4099), (7, 2051)):
        x = torch.randn(N, D, generator=torch.Generator(torch.get_default_device()).manual_seed(N)).to(dtype)
        norm = ops.column_norms(x, impl=of_norms(impl))
        assert norm.dtype == torch.float32
        assert_matches_reference(norm, *norm_budget(x, impl))


def test_column_norms_of_any_shape_and_strides(impl):
    x = torch.randn(4, 5, 6, 12)
    want = reference.column_norms(x)
    for other in (
        x.requires_grad_(),
        x.transpose(0, 2),
        torch.stack([x, x], -1)[..., 0],
        x.flatten(0, 2).T.contiguous().T,
    ):
        got = ops.column_norms(other, impl=of_norms(impl))
        assert not got.requires_grad
        torch.testing.assert_close(got, want)
    assert torch.equal(
        ops.column_norms(torch.tensor([3.0, -4.0]), impl=of_norms(impl)), torch.tensor([3.0, 4.0])
    )
    assert torch.equal(ops.column_norms(torch.ones(0, 3), impl=of_norms(impl)), torch.zeros(3))
    rows = torch.ones(1, 4).expand(100, 4)
    assert torch.equal(ops.column_norms(rows, impl=of_norms(impl)), torch.full((4,), 10.0))


def test_column_norms_that_are_not_finite(impl):
    for dtype in DTYPES:
        x = torch.ones(300, 40, dtype=dtype)
        x[7, 3], x[299, 4], x[0, 39] = NAN, INF, -INF
        norm = ops.column_norms(x, impl=of_norms(impl))
        assert norm.isnan().nonzero().tolist() == [[3]]
        assert norm.isinf().nonzero().tolist() == [[4], [39]]
    x = torch.full((4, 3), 300.0, dtype=torch.float16)  # whose squares float16 has not
    assert torch.equal(ops.column_norms(x, impl=of_norms(impl)), torch.full((3,), 600.0))


def test_the_number_of_threads_changes_no_bit(native):
    x = torch.randn(3000, 100)
    with threads(1):
        want = ops.column_norms(x, impl=native)
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(ops.column_norms(x, impl=native), want) for _ in range(5))


def test_vmap_runs_the_reference():
    x = torch.randn(3, 5, 4)
    want = torch.stack([reference.column_norms(rows) for rows in x])
    torch.testing.assert_close(torch.vmap(ops.column_norms)(x), want)


# Refusals


def cpu(*shape, **options):
    return torch.ones(shape, device="cpu", **options)


A, NORM = cpu(2, 3), cpu(3)
REFUSALS = [
    (TypeError, {"lora_a": [1.0]}, "lora_a must be a tensor, got list"),
    (
        TypeError,
        {"lora_a": A.to_sparse()},
        "lora_a must be dense, got torch.sparse_coo; pass lora_a.to_dense()",
    ),
    (TypeError, {"lora_a": A.int()}, "lora_a must be floating point and real, got torch.int32"),
    (ValueError, {"lora_a": A[0]}, "lora_a must have shape (R, D), got (3,)"),
    (
        ValueError,
        {"lora_a": A[:1].expand(2, 3)},
        "lora_a must have its own memory for each entry, got an expanded tensor of shape (2, 3);"
        " pass lora_a.clone()",
    ),
    (TypeError, {"input_norm": None}, "input_norm must be a tensor, got NoneType"),
    (
        TypeError,
        {"input_norm": NORM.double()},
        "input_norm must be torch.float32, got torch.float64; cast it",
    ),
    (
        ValueError,
        {"input_norm": cpu(4)},
        "input_norm must have shape (D,) = (3,), got (4,); column_norms(x) gives it",
    ),
    (
        RuntimeError,
        {"input_norm": NORM.to("meta")},
        "input_norm must be on the device of lora_a, cpu, got meta;"
        " move it with input_norm.to(lora_a.device)",
    ),
    (TypeError, {"ratio": "half"}, "ratio must be a number, got str; pass float(ratio)"),
    (TypeError, {"ratio": True}, "ratio must be a number, got bool; pass float(ratio)"),
    *(
        (
            ValueError,
            {"ratio": ratio},
            f"ratio must be in [0, 1), got {ratio}; it is the share of a row that is zeroed",
        )
        for ratio in (1.0, -0.1, NAN)
    ),
    (ValueError, {"impl": "best"}, "impl must be one of reference, cpu, cuda, triton or None, got 'best'"),
]


@pytest.mark.parametrize(("error", "changed", "text"), REFUSALS, ids=[text[:40] for *_, text in REFUSALS])
def test_refusals(error, changed, text):
    arguments = {"lora_a": A, "input_norm": NORM, "ratio": 0.5} | changed
    with pytest.raises(error) as caught:
        ops.prune_rows_(**arguments)
    assert str(caught.value) == f"prune_rows_: {text}"
    assert torch.equal(A, torch.ones(2, 3, device="cpu"))  # nothing has been written


GROUPED = [
    (TypeError, (A, [NORM]), "lora_as must be a list of tensors, got Tensor"),
    (TypeError, ([A], NORM), "input_norms must be a list of tensors, got Tensor"),
    (TypeError, (iter([A]), [NORM]), "lora_as must be a list of tensors, got list_iterator"),
    (ValueError, ([A, A.clone()], [NORM]), "input_norms must be one for each of the 2 matrices, got 1"),
    (
        ValueError,
        ([A, A.clone(), A[:1]], [NORM] * 3),
        "lora_as must not share memory, got lora_as[2] at the address of lora_as[0]; list each matrix once",
    ),
    (
        RuntimeError,
        ([A, A.to("meta")], [NORM] * 2),
        "lora_as[1] must be on the device of the first, cpu, got meta;"
        " prune those of each device by a call of their own",
    ),
    (ValueError, ([A, A[0]], [NORM] * 2), "lora_as[1] must have shape (R, D), got (3,)"),
    (TypeError, ([A], [NORM.half()]), "input_norms[0] must be torch.float32, got torch.float16; cast it"),
]


@pytest.mark.parametrize(("error", "lists", "text"), GROUPED, ids=[text[:40] for *_, text in GROUPED])
def test_refusals_of_lists(error, lists, text):
    with pytest.raises(error) as caught:
        ops.prune_rows_grouped_(*lists, 0.5)
    assert str(caught.value) == f"prune_rows_grouped_: {text}"


@pytest.mark.parametrize(
    ("error", "x", "text"),
    [
        (TypeError, None, "x must be a tensor, got NoneType"),
        (
            TypeError,
            cpu(3).int(),
            "x must be floating point and real, got torch.int32; cast it to torch.float32",
        ),
        (ValueError, torch.tensor(1.0), "x must have shape (..., D), got a number; pass x[None]"),
    ],
    ids=str,
)
def test_refusals_of_column_norms(error, x, text):
    with pytest.raises(error) as caught:
        ops.column_norms(x)
    assert str(caught.value) == f"column_norms: {text}"


def test_columns_of_a_matrix_may_be_listed_apart(impl):
    whole, norm = make(4, 10)
    apart = whole.clone()
    masks = ops.prune_rows_grouped_([apart[:, :5], apart[:, 5:]], [norm[:5], norm[5:]], 0.4, impl=impl)
    for mask, columns in zip(masks, (slice(5), slice(5, 10)), strict=True):
        assert torch.equal(mask, reference.prune_rows_(whole[:, columns], norm[columns], 0.4))
    assert torch.equal(whole, apart)


# The raw ops, of whose callers nothing is known


@pytest.mark.parametrize("value", [NAN, INF, -INF, -2.0])
def test_the_kernel_looks_at_the_values_of_norms(native, value):
    """And so does the reference; nothing is written."""
    a, norm = make(3, 33)
    norm[4:9] = value
    text = (
        f"prune_rows_: input_norm must be finite and not negative, got {value:g} at index 4;"
        " leave out batches whose statistic is not finite"
    )
    calls = [
        lambda: RAW.prune_rows_([a], [norm], 0.5, [masks_of(a)]),
        lambda: ops.prune_rows_(a, norm, 0.5, impl=native),
        lambda: ops.prune_rows_(a, norm, 0.5, impl="reference"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=re.escape(text)):
            call()
    assert torch.equal(a, make(3, 33)[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([A], [NORM, NORM], 0.5), "one of norms and of masks for each"),
        (([A], [cpu(2)], 0.5), r"shape \(D,\)"),
        (([A], [NORM.double()], 0.5), "float32"),
        (([A[0]], [NORM], 0.5), r"shape \(R, D\)"),
        (([A.int()], [NORM], 0.5), "must be float32, float64, bfloat16 or float16"),
        (([A[:1].expand(2, 3)], [NORM], 0.5), "expanded"),
        (([A], [NORM], 1.0), "ratio must be in"),
        (([A], [NORM], NAN), "ratio must be in"),
    ],
)
def test_misuse_of_the_raw_op_is_refused(native, arguments, text):
    with pytest.raises(RuntimeError, match=text):
        RAW.prune_rows_(*arguments, [masks_of(a) for a in arguments[0]])
    with pytest.raises(RuntimeError, match=r"shape \(N, D\)"):
        RAW.column_square_sums(A[0])


def test_memory_that_rows_share_is_safe(native):
    memory = torch.randn(12)
    a = torch.as_strided(memory, (8, 5), (1, 1))
    RAW.prune_rows_([a], [torch.ones(5)], 0.5, [masks_of(a)])
