"""What lora_linear refuses, in which words, and misuse of its raw ops."""

import numpy as np
import pytest
import torch

from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.lora_linear import low_rank
from fastkit.testing import LinearSize
from fastkit.testing.lora_linear import SCALE, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


def refusal(error, op, *args, **options):
    with pytest.raises(error) as caught:
        op(*args, **options)
    return str(caught.value)


X, WEIGHT, BIAS, A, B = zeros(2, 3, 4), zeros(5, 4), zeros(5), zeros(2, 4), zeros(5, 2)
MASK = torch.ones(2, 4, dtype=torch.bool, device="cpu")
ARGUMENTS = {"x": X, "weight": WEIGHT, "bias": BIAS, "lora_a": A, "lora_b": B, "scale": SCALE}
HALVES = {name: t.bfloat16() for name, t in {"x": X, "weight": WEIGHT, "bias": BIAS}.items()}
AUTOCAST = "or run under torch.autocast"

REFUSALS = [
    # What is no dense tensor.
    *(
        (TypeError, {name: [1.0]}, f"{name} must be a tensor, got list")
        for name in ("x", "weight", "bias", "lora_a", "lora_b", "mask", "lora_x")
    ),
    *(
        (TypeError, {name: None}, f"{name} must be a tensor, got NoneType")
        for name in ("x", "weight", "lora_a", "lora_b")
    ),
    *(
        (
            TypeError,
            {name: ARGUMENTS[name].as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name in ("x", "weight", "bias", "lora_a", "lora_b")
    ),
    (
        TypeError,
        {"mask": MASK.as_subclass(DTensor)},
        "mask is a DTensor; pass mask.to_local() or mask.full_tensor()",
    ),
    (
        TypeError,
        {"lora_x": X.as_subclass(DTensor)},
        "lora_x is a DTensor; pass lora_x.to_local() or lora_x.full_tensor()",
    ),
    (
        TypeError,
        {"weight": WEIGHT.to_sparse()},
        "weight must be dense, got torch.sparse_coo; pass weight.to_dense()",
    ),
    (TypeError, {"mask": MASK.to_sparse()}, "mask must be dense, got torch.sparse_coo; pass mask.to_dense()"),
    # x
    *(
        (
            TypeError,
            {"x": X.to(dtype)},
            f"x must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ),
    (ValueError, {"x": X[0, 0, 0]}, "x must have shape (..., D), got a number; pass x[None]"),
    (ValueError, {"x": X[..., :0]}, "x must have D >= 1, got (2, 3, 0); skip the call for D = 0"),
    # scale
    *(
        (TypeError, {"scale": scale}, f"scale must be a number, got {name}; pass float(scale)")
        for scale, name in [
            (torch.tensor(2.0), "Tensor"), (np.float32(2), "float32"), ("2", "str"), (None, "NoneType"),
            (True, "bool"), (1j, "complex"),
        ]
    ),
    # weight
    *(
        (
            ValueError,
            {"weight": weight},
            f"weight must have shape (O, D) with D = 4, got {tuple(weight.shape)};"
            " a transposed weight, as of Conv1D, is passed as weight.T",
        )
        for weight in (WEIGHT.T, WEIGHT[0], WEIGHT[None], WEIGHT[:, :3])
    ),
    (
        TypeError,
        {"weight": WEIGHT.double()},
        "weight must have the dtype of x, torch.float32, got torch.float64;"
        f" cast it with weight.to(x.dtype), {AUTOCAST}",
    ),
    (
        TypeError,
        {"x": X.bfloat16()},
        "weight must have the dtype of x, torch.bfloat16, got torch.float32;"
        f" cast it with weight.to(x.dtype), {AUTOCAST}",
    ),
    (
        TypeError,
        {"weight": WEIGHT.to(torch.int8)},
        "weight must have the dtype of x, torch.float32, got torch.int8;"
        f" cast it with weight.to(x.dtype), {AUTOCAST}",
    ),
    # bias
    *(
        (ValueError, {"bias": bias}, f"bias must have shape (O,) = (5,), got {tuple(bias.shape)}")
        for bias in (BIAS[:4], BIAS[None], BIAS[0], BIAS[:1])
    ),
    (
        TypeError,
        {"bias": BIAS.half()},
        "bias must have the dtype of x, torch.float32, got torch.float16;"
        f" cast it with bias.to(x.dtype), {AUTOCAST}",
    ),
    # lora_a
    *(
        (
            ValueError,
            {"lora_a": a},
            f"lora_a must have shape (R, D) with R >= 1 and D = 4, got {tuple(a.shape)}",
        )
        for a in (A.T, A[0], A[None], A[:0], A[:, :3])
    ),
    (
        TypeError,
        {"lora_a": A.bfloat16()},
        "lora_a must be torch.float32 for x of torch.float32, got torch.bfloat16;"
        f" cast it with lora_a.to(x.dtype), {AUTOCAST}",
    ),
    (
        TypeError,
        {**HALVES, "lora_a": A.half()},
        "lora_a must be torch.bfloat16 or torch.float32 for x of torch.bfloat16, got torch.float16;"
        f" cast it with lora_a.to(x.dtype), {AUTOCAST}",
    ),
    # lora_b
    *(
        (ValueError, {"lora_b": b}, f"lora_b must have shape (O, R) = (5, 2), got {tuple(b.shape)}")
        for b in (B.T, B[0], B[None], B[:4], B[:, :1])
    ),
    (
        TypeError,
        {"lora_b": B.double()},
        "lora_b must be torch.float32 for x of torch.float32, got torch.float64;"
        f" cast it with lora_b.to(x.dtype), {AUTOCAST}",
    ),
    (
        TypeError,
        {**HALVES, "lora_b": B.double()},
        "lora_b must be torch.bfloat16 or torch.float32 for x of torch.bfloat16, got torch.float64;"
        f" cast it with lora_b.to(x.dtype), {AUTOCAST}",
    ),
    # mask
    *(
        (
            TypeError,
            {"mask": MASK.to(dtype)},
            f"mask must be bool, True where A is kept, got {dtype}; pass mask != 0",
        )
        for dtype in (torch.float32, torch.uint8)
    ),
    *(
        (
            ValueError,
            {"mask": mask},
            f"mask must have the shape of lora_a, (2, 4), got {tuple(mask.shape)};"
            " expand one that is shared by rows",
        )
        for mask in (MASK[0], MASK[:1], MASK.T)
    ),
    # lora_x
    *(
        (
            ValueError,
            {"lora_x": lora_x},
            f"lora_x must have the shape of x, (2, 3, 4), got {tuple(lora_x.shape)}; it is x after dropout",
        )
        for lora_x in (X[0], X.flatten(0, 1), X[..., :3])
    ),
    (
        TypeError,
        {"lora_x": X.half()},
        "lora_x must have the dtype of x, torch.float32, got torch.float16;"
        f" cast it with lora_x.to(x.dtype), {AUTOCAST}",
    ),
    # devices
    *(
        (
            RuntimeError,
            {name: tensor.to("meta")},
            f"{name} must be on the device of x, cpu, got meta; move it with {name}.to(x.device)",
        )
        for name, tensor in {
            "weight": WEIGHT, "bias": BIAS, "lora_a": A, "lora_b": B, "mask": MASK, "lora_x": X,
        }.items()
    ),
    (
        RuntimeError,
        {"x": X.to("meta")},
        "weight must be on the device of x, meta, got cpu; move it with weight.to(x.device)",
    ),
    (ValueError, {"impl": "numpy"}, "impl must be one of reference, cpu, cuda, triton or None, got 'numpy'"),
    (
        RuntimeError,
        {"impl": "cuda"},
        'impl="cuda" cannot run: this op has no such implementation; use impl="reference"',
    ),
]  # fmt: skip


@pytest.mark.parametrize("op", [lora_linear, lora_linear_with_stats])
@pytest.mark.parametrize(("error", "arguments", "message"), REFUSALS)
def test_refuses(error, arguments, message, op):
    options = {**ARGUMENTS, **arguments}
    positional = [options.pop(name) for name in ARGUMENTS]
    assert refusal(error, op, *positional, **options) == f"{op.__name__}: {message}"


def test_refuses_the_kernel_of_another_device(native):
    tensors = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in ARGUMENTS.values()]
    message = refusal(RuntimeError, lora_linear, *tensors, impl=native)
    assert message == 'lora_linear: impl="cpu" cannot run on a meta tensor; use impl=None'
    message = refusal(RuntimeError, lora_linear, *ARGUMENTS.values(), impl="triton")
    assert message.startswith('lora_linear: impl="triton" cannot run')


def test_refuses_mixed_dtypes_and_autocast_does_not(native):
    """What the messages advise works."""
    x, weight, bias, a, b, _ = ARGUMENTS.values()
    assert refusal(TypeError, lora_linear, x.bfloat16(), weight, bias, a, b, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x.bfloat16(), weight, bias.half(), a.half(), b, SCALE)
        assert refusal(TypeError, lora_linear, x.double(), weight, bias, a, b, SCALE)
    assert y.dtype == torch.bfloat16


def test_refusals_of_the_addition_alone():
    """As of the layer, in its name; O is that of lora_b."""
    assert refusal(TypeError, low_rank, [1.0], A, B, SCALE) == "lora_linear: x must be a tensor, got list"
    assert refusal(ValueError, low_rank, X, A[:, :3], B, SCALE) == (
        "lora_linear: lora_a must have shape (R, D) with R >= 1 and D = 4, got (2, 3)"
    )
    assert refusal(ValueError, low_rank, X, A, B[:, :1], SCALE) == (
        "lora_linear: lora_b must have shape (O, R) = (5, 2), got (5, 1)"
    )


@pytest.mark.parametrize("op", [lora_linear, lora_linear_with_stats])
def test_the_meta_device_has_shapes(op):
    """Nothing is computed: the reference, on tensors without storage."""
    tensors = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in ARGUMENTS.values()]
    tensors[3].requires_grad_()
    out = op(*tensors, mask=MASK.to("meta"), lora_x=X.to("meta"))
    y = out if op is lora_linear else out.y
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 5), torch.float32)
    if op is lora_linear_with_stats:
        assert (out.square_sum.device.type, out.square_sum.shape) == ("meta", (4,))
    (of_a,) = torch.autograd.grad(y.sum(), tensors[3])
    assert of_a.shape == (2, 4)


# The raw ops: whatever they are given, they raise and do not crash


FORWARD = ["y", "x", "lora_x", "a", "mask", "b", "scale", "needs_square_sum"]
BACKWARD = ["gx", "gy", "x", "h", "a", "mask", "b", "scale", "adds", "needs_adapter", "needs_bias"]


def raw_calls(dtype=torch.float32):
    x, _, _, a, b, mask, lora_x, gy = make_inputs(LinearSize(50, 33, 20, 4), lora_x=True, dtype=dtype)
    forward = [gy.clone(), x, lora_x, a, mask, b, SCALE, True]
    h, _ = torch.ops.fastkit.lora_linear_fwd_(*forward)
    return forward, [x.clone(), gy, lora_x, h, a, mask, b, SCALE, True, True, True]


def longer(dim):
    """One more along a dimension."""
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim)


def shorter(dim):
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


SHAPES = {
    "0d": lambda t: t[0, 0], "1d": lambda t: t[0], "3d": lambda t: t[None], "row-short": shorter(0),
    "column-short": shorter(1), "row-long": longer(0), "column-long": longer(1), "transposed": lambda t: t.T,
    "none-of-it": lambda t: t[:0, :0],
}  # fmt: skip
OTHERS = {
    "int": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
}


@pytest.mark.parametrize("change", [*SHAPES, *OTHERS])
@pytest.mark.parametrize("name", [*FORWARD[:6], "gx", "gy", "h"])
def test_raw_ops_misused(native, name, change):
    """One argument of another shape or dtype."""
    change = (SHAPES | OTHERS)[change]
    forward, backward = raw_calls()
    for op, names, call in (("fwd_", FORWARD, forward), ("bwd_", BACKWARD, backward)):
        if name in names:
            at = names.index(name)
            call[at] = change(call[at])
            with pytest.raises(RuntimeError, match="lora_linear: "):
                getattr(torch.ops.fastkit, f"lora_linear_{op}")(*call)


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_raw_ops_refuse_other_ranks_of_one_factor(native, rank):
    forward, backward = raw_calls()
    other = torch.zeros(rank, 33)
    for op, call, a, mask in (("fwd_", forward, 3, 4), ("bwd_", backward, 4, 5)):
        call[a], call[mask] = other, None
        with pytest.raises(RuntimeError, match="lora_linear: "):
            getattr(torch.ops.fastkit, f"lora_linear_{op}")(*call)


def test_raw_ops_refuse_no_rank(native):
    forward, _ = raw_calls()
    forward[3:6] = torch.zeros(0, 33), None, torch.zeros(20, 0)
    with pytest.raises(RuntimeError, match="with R >= 1"):
        torch.ops.fastkit.lora_linear_fwd_(*forward)


def test_raw_ops_write_to_rows_alone(native):
    """Whose columns have stride 1; rows may lie apart, and what is between is not touched."""
    forward, backward = raw_calls()
    expected = forward[0].clone(), backward[0].clone()
    torch.ops.fastkit.lora_linear_fwd_(expected[0], *forward[1:])
    torch.ops.fastkit.lora_linear_bwd_(expected[1], *backward[1:])
    for op, call, want in (("fwd_", forward, expected[0]), ("bwd_", backward, expected[1])):
        raw = getattr(torch.ops.fastkit, f"lora_linear_{op}")
        result = call[0].clone()
        with pytest.raises(RuntimeError, match="must have stride 1"):
            raw(result.T.contiguous().T, *call[1:])
        wide = torch.full((100, result.shape[1] + 9), 7.0)
        inside = wide[::2, 4:-5]
        inside.copy_(result)
        raw(inside, *call[1:])
        assert torch.equal(inside, want)
        inside.fill_(7.0)
        assert (wide == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_raw_ops_refuse_adapters_in_half_precision(native, dtype):
    """Where x is not; and float64 ones of a half-precision x."""
    for x_dtype, other in ((dtype, torch.bfloat16), (torch.bfloat16, torch.float64)):
        for name in ("a", "b"):
            forward, backward = raw_calls(x_dtype)
            for op, names, call in (("fwd_", FORWARD, forward), ("bwd_", BACKWARD, backward)):
                call[names.index(name)] = call[names.index(name)].to(other)
                with pytest.raises(RuntimeError, match=f"lora_linear: lora_{name} must be"):
                    getattr(torch.ops.fastkit, f"lora_linear_{op}")(*call)


def test_raw_ops_refuse_tensors_of_two_devices(native):
    """One on the meta device takes the call to the fake implementation, which computes nothing."""
    forward, backward = raw_calls()
    for op, call in (("fwd_", forward), ("bwd_", backward)):
        for at in (i for i, t in enumerate(call) if isinstance(t, torch.Tensor)):
            mixed = [t.to("meta") if i == at else t for i, t in enumerate(call)]
            with pytest.raises(RuntimeError, match="lora_linear: tensors must be on one device"):
                getattr(torch.ops.fastkit, f"lora_linear_{op}")(*mixed)
