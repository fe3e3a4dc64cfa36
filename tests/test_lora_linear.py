"""ops.lora_linear in every implementation that runs here, against float64."""

import contextlib
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastkit import reference
from fastkit._dispatch import choose
from fastkit._threads import threads
from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS, low_rank
from fastkit.testing import LinearSize, assert_matches_reference, sizes
from fastkit.testing.lora_linear import SCALE, check, expected_results, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
SOME = LinearSize(25, 31, 20, 5)
NAMES = "x", "weight", "bias", "lora_a", "lora_b", "lora_x"


def skip_uncovered(impl, dtype):
    if impl != "reference" and dtype not in KERNELS[impl]:
        pytest.skip(f"{impl} has no {dtype}")


def results_of(inputs, wanted=NAMES, op=lora_linear_with_stats, context=None, **options):
    """y, the statistic, and the gradients to what is wanted, by name; forward in a context."""
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted)
        for name in NAMES
        if (tensor := getattr(inputs, name)) is not None
    }
    x, weight, bias, a, b = (leaves.get(name) for name in NAMES[:5])
    lora_x = leaves.get("lora_x")
    with context or contextlib.nullcontext():
        y, square_sum = op(x, weight, bias, a, b, SCALE, mask=inputs.mask, lora_x=lora_x, **options)
    results = {"y": y.detach(), "square_sum": square_sum}
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if differentiated:
        y.backward(inputs.gy)
    return results | {f"g{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_all_equal(results, expected):
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(results[name], want), name


# Matches the reference


# (x, A and B) -> flags of mask, lora_x, bias, which every pair of values of meets.
DTYPES = {
    (FLOAT, FLOAT): [(1, 0, 1), (0, 1, 0)],
    (DOUBLE, DOUBLE): [(1, 1, 1), (0, 0, 0)],
    (BFLOAT, BFLOAT): [(1, 1, 0), (0, 0, 1)],
    (BFLOAT, FLOAT): [(1, 0, 0), (0, 1, 1)],
    (HALF, HALF): [(1, 0, 1), (0, 1, 0)],
    (HALF, FLOAT): [(1, 1, 1), (0, 0, 0)],
}


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("size", sizes("lora_linear"), ids=str)
def test_matches_reference(impl, size, dtypes):
    dtype, adapter = dtypes
    skip_uncovered(impl, dtype)
    for mask, lora_x, bias in DTYPES[dtypes]:
        inputs = make_inputs(
            size, mask=bool(mask), lora_x=bool(lora_x), bias=bool(bias), dtype=dtype, adapter=adapter
        )
        results = check(inputs, impl=impl)
        of_adapter = {name: results[name].dtype for name in ("glora_a", "glora_b")}
        assert of_adapter == {"glora_a": adapter, "glora_b": adapter}
        assert {results[name].dtype for name in ("y", "gx", "gweight")} == {dtype}
        assert results["square_sum"].dtype == FLOAT


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8, 11, 15, 16, 23, 25, 31, 32, 40, 65])
def test_every_number_of_vectors_of_ranks(impl, rank):
    """Kernels take three, two or one vector of ranks at a time."""
    check(make_inputs(LinearSize(29, 13, 11, rank), lora_x=rank % 2 == 0), impl=impl)


@pytest.mark.parametrize("tokens", range(1, 27))
def test_every_number_of_tokens_of_a_block(native, tokens):
    for dtype in (FLOAT, DOUBLE):
        check(make_inputs(LinearSize(tokens, 17, 10, 6), dtype=dtype), impl=native)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_number_of_threads(native, dtype, count):
    """Enough products for four, each with tokens of its own."""
    inputs = make_inputs(LinearSize(2001, 100, 97, 9), lora_x=dtype == BFLOAT, dtype=dtype)
    with threads(count):
        check(inputs, impl=native)


def test_the_default_is_the_kernel_where_one_covers_the_dtype(native):
    dtypes = FLOAT, DOUBLE, HALF, BFLOAT, torch.int32
    chosen = [choose("lora_linear", None, torch.zeros(1, dtype=d), KERNELS) for d in dtypes]
    assert chosen == ["cpu", "cpu", "cpu", "cpu", "reference"]
    inputs = make_inputs(SOME)
    assert_all_equal(results_of(inputs), results_of(inputs, impl=native))


@pytest.mark.parametrize("scale", [0, 2, -1.5, 1e-3])
def test_any_scale(impl, scale):
    """As one of ``SCALE``, whose budgets are known, with B so much larger."""
    inputs = make_inputs(SOME, bias=False)
    x, weight, _, a, b, mask, _, _ = inputs
    y = lora_linear(x, weight, None, a, b, scale, mask=mask, impl=impl)
    value, budget = expected_results(inputs._replace(lora_b=b.double() * (scale / SCALE)))["y"]
    assert_matches_reference(y, value, budget)
    if scale == 0:
        assert torch.equal(y, nn.functional.linear(x, weight))


# Shapes and strides


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (1, 24, 1)], ids=str)
def test_any_axes_before_the_last_are_tokens(impl, shape):
    inputs = make_inputs(LinearSize(24, 13, 7, 3), lora_x=True)
    shaped = inputs._replace(
        **{name: getattr(inputs, name).unflatten(0, shape) for name in ("x", "lora_x", "gy")}
    )
    expected = results_of(inputs, impl=impl)
    for name in ("y", "gx", "glora_x"):
        expected[name] = expected[name].unflatten(0, shape)
    assert_all_equal(results_of(shaped, impl=impl), expected)


def test_one_token_without_an_axis(impl):
    inputs = make_inputs(LinearSize(1, 13, 7, 3))
    one = inputs._replace(x=inputs.x[0], gy=inputs.gy[0])
    results = check(inputs, impl=impl)
    for name in ("y", "gx"):
        results[name] = results[name][0]
    assert_all_equal(results_of(one, impl=impl), results)


def test_an_axis_of_no_token(impl):
    x, weight, bias, a, b, mask, *_ = make_inputs(LinearSize(1, 5, 4, 2))
    x = x.new_empty(3, 0, 5)
    leaves = [t.requires_grad_() for t in (x, weight, bias, a, b)]
    y, square_sum = lora_linear_with_stats(*leaves, SCALE, mask=mask, impl=impl)
    assert y.shape == (3, 0, 4) and torch.equal(square_sum, torch.zeros(5))
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.T.contiguous().T,
    "every_other_row": lambda t: torch.stack([t, 9 + t], 1).flatten(0, 1)[::2],
    "every_other_column": lambda t: torch.stack([t, 9 + t], 2).flatten(1, 2)[:, ::2],
    "slice_of_columns": lambda t: nn.functional.pad(t, (3, 2), value=9.0)[:, 3:-2],
    "slice_of_rows": lambda t: nn.functional.pad(t, (0, 0, 1, 2), value=9.0)[1:-2],
    "storage_offset": lambda t: nn.functional.pad(t.flatten(), (1, 0))[1:].view(t.shape),
    "reversed": lambda t: t.flip(0, 1).contiguous().flip(0, 1),
}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("argument", ["x", "lora_x", "weight", "lora_a", "lora_b", "mask", "gy", "all"])
def test_layout(native, argument, layout):
    for dtype, lora_x in itertools.product((FLOAT, BFLOAT), (False, True)):
        inputs = make_inputs(SOME, lora_x=lora_x, dtype=dtype)
        changed = {
            name: LAYOUTS[layout](t) if t.dtype != torch.bool else LAYOUTS[layout](t.byte()).bool()
            for name, t in inputs._asdict().items()
            if t is not None and t.dim() == 2 and argument in (name, "all")
        }
        if changed:
            check(inputs._replace(**changed), impl=native)


def test_layout_on_every_implementation(impl):
    inputs = make_inputs(SOME, lora_x=True)
    for layout in LAYOUTS.values():
        check(inputs._replace(x=layout(inputs.x), gy=layout(inputs.gy)), impl=impl)
        check(inputs._replace(lora_x=layout(inputs.lora_x), weight=layout(inputs.weight)), impl=impl)


EXPANDED = {
    "tokens": lambda t: t[:1].expand(t.shape),
    "columns": lambda t: t[:, :1].expand(t.shape),
    "one_number": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("expanded", EXPANDED)
@pytest.mark.parametrize("argument", ["x", "lora_x", "gy", "weight", "lora_a", "lora_b"])
def test_expanded(impl, argument, expanded):
    """As dense copies give, within budgets: errors of equal elements are equal and may lean one way."""
    inputs = make_inputs(SOME, lora_x=True)
    inputs = inputs._replace(**{argument: EXPANDED[expanded](getattr(inputs, argument))})
    results, expected = results_of(inputs, impl=impl), expected_results(inputs)
    assert results.keys() == expected.keys()
    for name, (value, budget) in expected.items():
        assert ((results[name].cpu() - value).abs() <= budget).all(), name


def test_the_cotangent_of_a_sum(impl):
    inputs = make_inputs(SOME)
    one = torch.ones(()).expand(inputs.gy.shape)
    results = results_of(inputs._replace(gy=one), impl=impl)
    for name, (value, budget) in expected_results(inputs._replace(gy=one)).items():
        assert ((results[name].cpu() - value).abs() <= budget).all(), name


def test_the_weight_of_a_conv1d(impl):
    """(D, O), passed as its transpose; its gradient comes back through that."""
    inputs = make_inputs(SOME)
    of_conv = inputs.weight.T.contiguous().requires_grad_()
    results = check(inputs._replace(weight=of_conv.detach().T), impl=impl)
    x, _, bias, a, b, mask, *_ = inputs
    lora_linear(x, of_conv.T, bias, a, b, SCALE, mask=mask, impl=impl).backward(inputs.gy)
    assert torch.equal(of_conv.grad, results["gweight"].T)


def test_the_statistic_is_of_x_where_lora_x_begins_at_the_same_address(impl):
    inputs = make_inputs(SOME, lora_x=True)
    both = torch.cat([inputs.x, inputs.lora_x])
    check(inputs._replace(x=both[::2], lora_x=both[: SOME.N]), impl=impl)


def test_lora_x_may_be_x(impl):
    """Then the gradient to x is of two parts, which autograd adds up."""
    inputs = make_inputs(SOME)
    leaf = inputs.x.requires_grad_()
    x, weight, bias, a, b, mask, _, gy = inputs
    y = lora_linear(x, weight, bias, a, b, SCALE, mask=mask, lora_x=leaf, impl=impl)
    (gradient,) = torch.autograd.grad(y, leaf, gy)
    expected = expected_results(inputs)
    assert_matches_reference(y, *expected["y"])
    assert_matches_reference(gradient, *expected["gx"])


class TestOffsetsBeyond32Bits:
    """Rows that lie more than 2**31 elements apart, in a file that is one hole."""

    @pytest.fixture
    def elements(self, tmp_path):
        hole = tmp_path / "hole"
        try:
            elements = torch.from_file(str(hole), shared=True, size=2**31 + 2**29)
        except RuntimeError as error:
            pytest.skip(f"no sparse file of 10 GiB: {error}")
        yield elements
        hole.unlink()

    def test_rows(self, native, elements):
        inputs = make_inputs(LinearSize(3, 33, 20, 5), lora_x=True)
        strided = {
            name: elements.as_strided(t.shape, (2**30 + 64, 1), 2**20 * i).copy_(t)
            for i, (name, t) in enumerate(inputs._asdict().items())
            if name in ("x", "lora_x", "gy")
        }
        check(inputs._replace(**strided), impl=native)


# Which gradients are computed


SUBSETS = [
    *((name,) for name in NAMES),
    ("lora_a", "lora_b"), ("x", "lora_a", "lora_b"), ("x", "lora_x"), ("weight", "bias"), ("x", "lora_b"),
    ("bias", "lora_a", "lora_x"),
]  # fmt: skip


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_only_some_gradients(impl, wanted, lora_x):
    """A frozen weight, an adapter alone, the first layer's x: bit for bit what all of them are."""
    if wanted == ("lora_x",) and not lora_x:
        return
    inputs = make_inputs(SOME, lora_x=lora_x)
    every = results_of(inputs, impl=impl)
    results = results_of(inputs, wanted, impl=impl)
    kept = {"y", "square_sum", *(f"g{name}" for name in wanted)} & every.keys()
    assert_all_equal(results, {name: every[name] for name in every if name in kept})


def test_without_gradients(impl):
    inputs = make_inputs(SOME, lora_x=True)
    every = results_of(inputs, impl=impl)
    results = results_of(inputs, (), impl=impl)
    assert_all_equal(results, {name: every[name] for name in ("y", "square_sum")})
    with torch.inference_mode():
        assert_all_equal(results_of(inputs, (), impl=impl), results)


def test_the_statistic_has_no_gradient(impl):
    x, weight, bias, a, b, *_ = make_inputs(SOME)
    y, square_sum = lora_linear_with_stats(x.requires_grad_(), weight, bias, a, b, SCALE, impl=impl)
    assert y.requires_grad and not square_sum.requires_grad


def test_selective_checkpointing_takes_again_what_linear_gave(impl):
    """Of which it keeps the tensor itself."""
    inputs = make_inputs(SOME)
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default

    def policy(context, op, *args, **options):
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def layers(x, weight, bias, a, b):
        return lora_linear(x, weight, bias, a, b, SCALE, mask=inputs.mask, impl=impl).sin()

    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    expected = torch.autograd.grad(layers(*leaves), leaves, inputs.gy)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(layers, *leaves, use_reentrant=False, context_fn=contexts)
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, inputs.gy), expected))


def test_a_change_of_a_before_backward_is_noticed(native):
    """It is kept by reference."""
    x, weight, bias, a, b, *_ = make_inputs(SOME)
    y = lora_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), SCALE, impl=native)
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_arguments_are_not_written_to(impl):
    inputs = make_inputs(SOME, lora_x=True)
    before = [t.clone() for t in inputs]
    results_of(inputs, impl=impl)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


# Pruning


def test_a_row_that_is_pruned_whole(impl):
    """Its rank is as if it were not there."""
    inputs = make_inputs(SOME, mask=False)
    mask = torch.ones_like(inputs.lora_a, dtype=torch.bool)
    mask[2] = False
    results = check(inputs._replace(mask=mask), impl=impl)
    assert not results["glora_a"][2].any() and not results["glora_b"][:, 2].any()
    assert results["glora_a"][mask].all() and results["glora_b"][:, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("lora_x", [False, True])
def test_all_of_a_pruned_is_the_frozen_layer(impl, lora_x):
    inputs = make_inputs(SOME, mask=False, lora_x=lora_x)
    x, weight, bias = (t.detach().requires_grad_() for t in inputs[:3])
    y = nn.functional.linear(x, weight, bias)
    gx, gweight, _ = torch.autograd.grad(y, (x, weight, bias), inputs.gy)
    results = results_of(inputs._replace(mask=torch.zeros_like(inputs.lora_a, dtype=torch.bool)), impl=impl)
    assert torch.equal(results["y"], y) and torch.equal(results["gx"], gx)
    assert_matches_reference(results["gweight"], *expected_results(inputs)["gweight"])
    assert torch.equal(results["gweight"], gweight)
    for name in ("glora_a", "glora_b", *(["glora_x"] if lora_x else [])):
        assert not results[name].any(), name


def test_what_is_pruned_has_no_say(impl):
    """Whatever numbers A holds there, NaN and inf too."""
    inputs = make_inputs(SOME)
    expected = results_of(inputs, impl=impl)
    assert not expected["glora_a"][~inputs.mask].any()
    for value in (7.0, torch.nan, torch.inf):
        a = inputs.lora_a.masked_fill(~inputs.mask, value)
        assert_all_equal(results_of(inputs._replace(lora_a=a), impl=impl), expected)


# Autocast


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("adapter", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast(native, impl, dtype, adapter, lora_x):
    """The same call on x, weight, bias and lora_x in its dtype, A and B in float32."""
    inputs = make_inputs(SOME, lora_x=lora_x, adapter=adapter)
    autocast = torch.autocast("cpu", dtype=dtype)
    results = results_of(inputs._replace(gy=inputs.gy.to(dtype)), context=autocast, impl=impl)
    cast = {
        name: t if t is None or t.dtype == torch.bool else t.to(FLOAT if name.startswith("lora_") else dtype)
        for name, t in inputs._asdict().items()
    }
    if lora_x:
        cast["lora_x"] = inputs.lora_x.to(dtype)
    expected = results_of(inputs._replace(**cast), impl=impl)
    assert results["y"].dtype == dtype and results["square_sum"].dtype == FLOAT
    for name in ("gx", "gweight", "gbias", "glora_a", "glora_b", *(["glora_x"] if lora_x else [])):
        leaf = getattr(inputs, name.removeprefix("g"))
        assert results[name].dtype == leaf.dtype, name
        expected[name] = expected[name].to(leaf.dtype)
    assert_all_equal(results, expected)


def test_autocast_takes_layers_as_they_come(native):
    """Half-precision activations from the layer before, a float32 weight."""
    inputs = make_inputs(SOME)
    x, weight, bias, a, b, mask, *_ = inputs
    with torch.autocast("cpu", dtype=BFLOAT):
        y = lora_linear(x.to(BFLOAT), weight, bias, a, b, SCALE, mask=mask)
        assert torch.equal(y, lora_linear(x, weight, bias, a, b, SCALE, mask=mask))
        with torch.autocast("cpu", enabled=False):
            assert lora_linear(x, weight, bias, a, b, SCALE, mask=mask).dtype == FLOAT


@pytest.mark.parametrize("lora_x", [False, True])
def test_backward_under_an_autocast_that_was_off_in_forward(native, lora_x):
    inputs = make_inputs(SOME, lora_x=lora_x)
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)]
    y = lora_linear(*leaves[:2], None, *leaves[2:], SCALE, mask=inputs.mask, lora_x=inputs.lora_x)
    expected = torch.autograd.grad(y, leaves, inputs.gy, retain_graph=True)
    with torch.autocast("cpu", BFLOAT):
        results = torch.autograd.grad(y, leaves, inputs.gy)
    assert all(map(torch.equal, results, expected))


def test_autocast_leaves_float64(impl):
    skip_uncovered(impl, DOUBLE)
    inputs = make_inputs(SOME, dtype=DOUBLE)
    with torch.autocast("cpu", dtype=BFLOAT):
        results = results_of(inputs, impl=impl)
    assert_all_equal(results, results_of(inputs, impl=impl))


# Memory


def allocations(call):
    """The size in bytes of each block that PyTorch allocates in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = p.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def large_allocations(layer, inputs, wanted):
    """Those of more than a quarter of x or y, in the forward pass and in the backward pass."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in wanted}
    x, weight, bias, a, b, mask, lora_x, gy = inputs._replace(**leaves)
    outputs = []

    def forward():
        outputs.append(layer(x, weight, bias, a, b, SCALE, mask=mask, lora_x=lora_x))

    def backward():
        torch.autograd.grad(outputs[0], list(leaves.values()), gy)

    limit = x.itemsize * min(x.numel(), gy.numel()) // 4
    return [sorted(n for n in allocations(call) if n > limit) for call in (forward, backward)]


def with_stats(*args, **options):
    return lora_linear_with_stats(*args, **options).y


def plain(x, weight, bias, a, b, scale, *, mask, lora_x):
    y = nn.functional.linear(x, weight, bias)
    low = (x if lora_x is None else lora_x) @ (a * mask).to(x.dtype).T @ b.to(x.dtype).T
    return y + scale * low


def alone(x, weight, bias, a, b, scale, *, mask, lora_x):
    return nn.functional.linear(x, weight, bias)


BIG = LinearSize(4096, 96, 64, 8)


@pytest.mark.parametrize(
    ("wanted", "lora_x"),
    [
        (("lora_a", "lora_b"), False),
        (("x", "lora_a", "lora_b"), False),
        (("x", "weight", "bias", "lora_a", "lora_b"), False),
        (("x", "lora_x", "lora_a", "lora_b"), True),
        (("lora_x", "lora_a", "lora_b"), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_nothing_of_the_size_of_x_is_allocated_but_results(native, dtype, wanted, lora_x):
    inputs = make_inputs(BIG, lora_x=lora_x, dtype=dtype, adapter=FLOAT)
    y, gx = (4096 * n * dtype.itemsize for n in (64, 96))
    # On some CPUs PyTorch's own layer, a part of this one, takes room beside its results in bfloat16.
    of_layer = [name for name in ("x", "weight", "bias") if name in wanted]
    forward, backward = large_allocations(alone, inputs, of_layer or ["x"])
    forward.remove(y)
    backward = backward if of_layer else []
    if "x" in of_layer:
        backward.remove(gx)
    results = [gx] * len({"x", "lora_x"} & {*wanted})
    expected = [sorted([y, *forward]), sorted([*results, *backward])]
    for layer in (lora_linear, with_stats):
        assert large_allocations(layer, inputs, wanted) == expected
    assert len(large_allocations(plain, inputs, wanted)[0]) > 1


def test_every_other_row_of_x_is_not_copied_and_other_columns_are(native):
    """A view of (tokens, columns) with stride 1 along columns is read as it is."""
    inputs = make_inputs(BIG)
    y, x = BIG.N * BIG.O * 4, BIG.N * BIG.D * 4
    rows = inputs._replace(x=LAYOUTS["every_other_row"](inputs.x))
    assert large_allocations(lora_linear, rows, ["lora_a"]) == [[y], []]
    columns = inputs._replace(x=LAYOUTS["every_other_column"](inputs.x))
    forward, _ = large_allocations(lora_linear, columns, ["lora_a"])
    assert set(forward) == {y, x}


@pytest.mark.parametrize("lora_x", [False, True])
def test_arguments_are_kept_for_backward_by_reference(native, lora_x):
    inputs = make_inputs(SOME, lora_x=lora_x)
    leaves = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()]
    x, weight, bias, a, b, mask, lora_x, _ = inputs
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_with_stats(x, weight, bias, a, b, SCALE, mask=mask, lora_x=lora_x, impl=native)
    arguments = {t.untyped_storage().data_ptr() for t in (*leaves, mask)}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in arguments]
    assert [tuple(t.shape) for t in others] == [(SOME.N, SOME.R)]


# The addition alone


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other_column"])
@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_low_rank_is_the_layer_whose_weight_is_zero(native, dtype, lora_x, layout):
    inputs = make_inputs(SOME, bias=False, lora_x=lora_x, dtype=dtype)
    inputs = inputs._replace(weight=torch.zeros_like(inputs.weight), x=LAYOUTS[layout](inputs.x))
    if lora_x:
        inputs = inputs._replace(lora_x=LAYOUTS[layout](inputs.lora_x))

    def alone(x, weight, bias, a, b, scale, **options):
        return low_rank(x, a, b, scale, stats=True, **options)

    wanted = [name for name in NAMES if name not in ("weight", "bias")]
    results, expected = results_of(inputs, wanted, op=alone), expected_results(inputs)
    del expected["gweight"]
    assert results.keys() == expected.keys()
    for name, (value, budget) in expected.items():
        assert_matches_reference(results[name], value, budget, name=name)
    x, _, _, a, b, mask, xl, _ = inputs
    assert torch.equal(low_rank(x, a, b, SCALE, mask=mask, lora_x=xl).y, results["y"])


def test_low_rank_in_transforms_is_the_reference():
    x, _, _, a, b, mask, *_ = make_inputs(LinearSize(4, 5, 3, 2), dtype=DOUBLE)
    found = torch.vmap(lambda row: low_rank(row, a, b, SCALE, mask=mask).y)(x)
    expected = reference.lora_linear(x, x.new_zeros(3, 5), None, a, b, SCALE, mask=mask)
    torch.testing.assert_close(found, expected)


def test_low_rank_refuses_in_the_name_of_the_layer():
    x, _, _, a, b, *_ = make_inputs(LinearSize(4, 5, 3, 2))
    with pytest.raises(ValueError) as caught:
        low_rank(x, a, b[0], SCALE)
    assert str(caught.value) == "lora_linear: lora_b must have shape (O, R) = (-1, 2), got (2,)"


# Instruction sets


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import itertools, json, torch
        from fastkit.testing import sizes
        from fastkit.testing.lora_linear import check, make_inputs
        import fastkit.ops
        torch.set_num_threads(1)
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for i, size in enumerate(sizes("lora_linear")[:: 1 if dtype == torch.float32 else 2]):
                for odd in (False, True):
                    mask, lora_x, bias = odd, bool(i & 1) ^ odd, bool(i & 2) ^ odd
                    inputs = make_inputs(size, mask=mask, lora_x=lora_x, bias=bias, dtype=dtype)
                    check(inputs, impl="cpu")
                    check(inputs._replace(x=inputs.x.T.contiguous().T), impl="cpu")
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
