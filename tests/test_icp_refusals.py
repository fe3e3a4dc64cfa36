"""What icp_epoch refuses, in which words, and misuse of its raw op."""

import math

import pytest
import torch

from fastkit import _native
from fastkit.ops.icp import KERNELS, icp_epoch
from fastkit.testing.icp import assert_equal, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

NAN, INF = math.nan, math.inf


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def good():
    """n = 6, m = 5, D = 3, R = 2."""
    arguments = make_inputs(6, 5, 3)._asdict()
    return arguments | {"epoch": 0, "batch_size": 4}


def pairs(dtype=torch.int64):
    return zeros(2, 6, dtype=dtype), zeros(2, 5, dtype=dtype)


def pairs_with(which, value):
    both = pairs()
    both[which][1, 3] = value
    return both


def refusal(error, changed, **options):
    with pytest.raises(error) as caught:
        icp_epoch(**(good() | changed), **options)
    return str(caught.value)


ROWS = "source", "target"
MAPS = "w_xy", "w_yx"
NO_NUMBER = [("0.1", "str"), (True, "bool"), (None, "NoneType"), (torch.tensor(0.1), "Tensor")]

# (error, what is changed, how the text goes on after the op's name)
REFUSALS = [
    # What is no dense tensor
    *(
        (TypeError, {name: value}, f"{name} must be a tensor, got {got}")
        for name in (*ROWS, *MAPS, "seeds")
        for value, got in ((None, "NoneType"), ([[1.0]], "list"))
    ),
    *(
        (
            TypeError,
            {name: good()[name].as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name in (*ROWS, *MAPS, "seeds")
    ),
    (
        TypeError,
        {"source": zeros(6, 3).to_sparse()},
        "source must be dense, got torch.sparse_coo; pass source.to_dense()",
    ),
    # Dtypes and devices
    *(
        (
            TypeError,
            {"source": zeros(6, 3, dtype=dtype)},
            f"source must be torch.float32 or torch.float64, got {dtype}; cast it {cure}",
        )
        for dtype, cure in (
            (torch.float16, "with source.float()"),
            (torch.bfloat16, "with source.float()"),
            (torch.int64, "to torch.float32"),
            (torch.bool, "to torch.float32"),
            (torch.complex64, "to torch.float32"),
        )
    ),
    *(
        (
            TypeError,
            {name: good()[name].double()},
            f"{name} must have the dtype of source, torch.float32, got torch.float64;"
            f" cast it with {name}.to(source.dtype)",
        )
        for name in ("target", *MAPS)
    ),
    *(
        (
            RuntimeError,
            {name: good()[name].to("meta")},
            f"{name} must be on the device of source, cpu, got meta; move it with {name}.to(source.device)",
        )
        for name in ("target", *MAPS, "seeds")
    ),
    (
        TypeError,
        {"seeds": zeros(2, dtype=torch.int32)},
        "seeds must be torch.int64, got torch.int32; cast it",
    ),
    (
        TypeError,
        {"seeds": zeros(2)},
        "seeds must be torch.int64, got torch.float32; cast it with seeds.long()",
    ),
    # Shapes
    (ValueError, {"source": zeros(3)}, "source must have shape (n, D), got (3,)"),
    (ValueError, {"source": zeros(1, 6, 3)}, "source must have shape (n, D), got (1, 6, 3)"),
    (ValueError, {"source": zeros(0, 3)}, "source must have n >= 1 and D >= 1, got (0, 3)"),
    (ValueError, {"source": zeros(6, 0)}, "source must have n >= 1 and D >= 1, got (6, 0)"),
    (ValueError, {"target": zeros(5)}, "target must have shape (m, D), got (5,)"),
    (ValueError, {"target": zeros(0, 3)}, "target must have m >= 1 and D >= 1, got (0, 3)"),
    (
        ValueError,
        {"target": zeros(5, 4)},
        "target must have shape (m, D) with D = 3, as source has, got (5, 4); bring both tables to one width",
    ),
    *(
        (
            ValueError,
            {name: zeros(1, 1).expand(2**31, 3)},
            f"{name} must have fewer than 2^31 rows, got (2147483648, 3)",
        )
        for name in ROWS
    ),
    *(
        (
            ValueError,
            {name: zeros(*size)},
            f"{name} must have shape (R, D, D) with D = 3, got {size}; a single map is passed",
        )
        for name in MAPS
        for size in ((3, 3), (2, 3, 4), (2, 4, 3), (1, 2, 3, 3))
    ),
    (
        ValueError,
        {"w_xy": zeros(0, 3, 3), "w_yx": zeros(0, 3, 3), "seeds": zeros(0, dtype=torch.int64)},
        "w_xy must have R >= 1 restarts, got (0, 3, 3); skip the call for R = 0",
    ),
    (ValueError, {"w_yx": zeros(3, 3, 3)}, "w_yx must have the R of w_xy, 2, got (3, 3, 3); a restart has"),
    *(
        (
            ValueError,
            {"seeds": zeros(*size, dtype=torch.int64)},
            f"seeds must have shape (R,) = (2,), got {size}; torch.arange(R) will do",
        )
        for size in ((3,), (), (2, 1))
    ),
    # Numbers
    *(
        (TypeError, {name: value}, f"{name} must be an int, got {got}; pass int({name})")
        for name in ("epoch", "batch_size")
        for value, got in ((True, "bool"), (1.0, "float"), (None, "NoneType"), (torch.tensor(1), "Tensor"))
    ),
    *(
        (ValueError, {"epoch": value}, f"epoch must be at least 0 and below 2^32, got {value}; count from 0")
        for value in (-1, 2**32, 2**70)
    ),
    *(
        (ValueError, {"batch_size": value}, f"batch_size must be at least 1, got {value}")
        for value in (0, -3)
    ),
    (
        ValueError,
        {"batch_size": 6},
        "batch_size must be at most the rows of the smaller table, 5, got 6; pass min(batch_size,",
    ),
    (ValueError, {"batch_size": 0, "mutual_only": True}, "batch_size must be at least 1, got 0"),
    *(
        (TypeError, {name: value}, f"{name} must be a number, got {got}; pass float({name})")
        for name in ("lr", "eps", "cycle_weight")
        for value, got in NO_NUMBER
    ),
    *(
        (ValueError, {"lr": value}, f"lr must be finite and greater than 0, got {value}")
        for value in (0, -1e-3, INF, NAN)
    ),
    *(
        (ValueError, {"eps": value}, f"eps must be finite and greater than 0, got {value}; without it")
        for value in (0.0, -1e-8, INF, NAN)
    ),
    *(
        (ValueError, {"cycle_weight": value}, f"cycle_weight must be finite and not negative, got {value}")
        for value in (-1e-9, INF, NAN)
    ),
    *(
        (TypeError, {"betas": value}, f"betas must be two numbers, those of Adam's moments, got {value!r}")
        for value in (0.9, (0.9,), (0.5, 0.9, 0.9), None)
    ),
    *(
        (TypeError, {"betas": (0.5, value)}, f"betas[1] must be a number, got {got}; pass float(betas[1])")
        for value, got in NO_NUMBER
    ),
    *(
        (ValueError, {"betas": (value, 0.9)}, f"betas[0] must be in [0, 1), got {value}")
        for value in (1, 1.5, -0.1, NAN, INF)
    ),
    *(
        (TypeError, {"mutual_only": value}, f"mutual_only must be a bool, got {got}")
        for value, got in ((1, "int"), (None, "NoneType"), (torch.tensor(True), "Tensor"))
    ),
    # Pairs
    *(
        (
            TypeError,
            {"pairs": value},
            f"pairs must be two tensors, nearest_target and nearest_source, or None, got {got}",
        )
        for value, got in (
            (zeros(2, 6, dtype=torch.int64), "Tensor"),
            (pairs()[:1], "1 of them"),
            ((*pairs(), None), "3 of them"),
            (True, "bool"),
        )
    ),
    (TypeError, {"pairs": (None, pairs()[1])}, "pairs[0] must be a tensor, got NoneType"),
    (TypeError, {"pairs": (pairs()[0], [0])}, "pairs[1] must be a tensor, got list"),
    (
        TypeError,
        {"pairs": (pairs()[0], pairs()[1].as_subclass(DTensor))},
        "pairs[1] is a DTensor; pass pairs[1].to_local() or pairs[1].full_tensor()",
    ),
    (
        TypeError,
        {"pairs": pairs(torch.int32)},
        "pairs[0] must be torch.int64, got torch.int32; cast it with pairs[0].long()",
    ),
    (
        RuntimeError,
        {"pairs": (pairs()[0], pairs()[1].to("meta"))},
        "pairs[1] must be on the device of source, cpu, got meta; move it with pairs[1].to(source.device)",
    ),
    *(
        (
            ValueError,
            {"pairs": value},
            f"pairs[{i}] must have shape (R, {size}) = {want}, got {got}; one row for all",
        )
        for value, i, size, want, got in (
            ((zeros(6, dtype=torch.int64), pairs()[1]), 0, "n", (2, 6), (6,)),
            (pairs()[::-1], 0, "n", (2, 6), (2, 5)),
            ((pairs()[0], pairs()[1][:1]), 1, "m", (2, 5), (1, 5)),
        )
    ),
    *(
        (
            ValueError,
            {"pairs": pairs_with(i, value)},
            f"pairs[{i}] must be rows of {name}, at least 0 and below {count}, got {value} at index (1, 3);"
            " leave out restarts that have found no pairs",
        )
        for i, name, count in ((0, "target", 5), (1, "source", 6))
        for value in (-1, count, 2**40, -(2**63))
    ),
]


@pytest.mark.parametrize(("error", "changed", "words"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusal(error, changed, words):
    assert refusal(error, changed).startswith(f"icp_epoch: {words}")
    if "pairs" in changed:  # at whose values an implementation looks itself
        assert refusal(error, changed, impl="reference").startswith(f"icp_epoch: {words}")


def test_what_is_at_the_edge_is_not_refused():
    icp_epoch(**good() | {"batch_size": 5, "betas": [0, 0.0], "cycle_weight": 0, "lr": 1, "epoch": 2**32 - 1})
    icp_epoch(**good() | {"batch_size": 10**6, "mutual_only": True})
    both = pairs()
    both[0][0, 0], both[1][0, 0] = 4, 5
    icp_epoch(**good() | {"pairs": list(both)})


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="positional"):
        icp_epoch(*good().values())  # pyright: ignore[reportCallIssue]


def test_impl():
    assert refusal(ValueError, {}, impl="gpu").startswith("icp_epoch: impl must be one of reference, cpu")
    for impl in ("cuda", "triton"):
        if impl not in KERNELS:
            assert "this op has no such implementation" in refusal(RuntimeError, {}, impl=impl)


def test_without_the_library(monkeypatch):
    """The reference runs, with one warning; ``impl="cpu"`` is refused."""
    reason = "the library is missing; rebuild it"
    monkeypatch.setattr(_native, "REASON", reason)
    monkeypatch.setattr(_native, "_warned", False)
    assert refusal(RuntimeError, {}, impl="cpu").startswith(
        f'icp_epoch: impl="cpu" cannot run: {reason}; use impl="reference"'
    )
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        found = [icp_epoch(**good()) for _ in range(2)]
    assert len(caught) == 1
    assert_equal(found[0], icp_epoch(**good(), impl="reference"))


def transformed(transform):
    """The op under a transform of torch.func, by source."""
    arguments = good()
    source = arguments.pop("source")

    def run(source):
        return icp_epoch(source, **arguments).cost.sum()

    if transform == "vmap":
        return torch.vmap(run)(source[None])
    if transform == "jvp":
        return torch.func.jvp(run, (source,), (source,))
    return torch.func.grad(run)(source)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch.func
@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_transforms(transform):
    with pytest.raises(RuntimeError) as caught:
        transformed(transform)
    assert str(caught.value).startswith("icp_epoch: has no derivative, and no rule for torch.func transforms")
    assert str(caught.value).endswith("pass what vmap would batch as restarts")


def test_forward_mode():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="or forward mode"):
        icp_epoch(**good())


# The raw op checks what memory safety needs.

RAW = {
    "half": {"source": zeros(6, 3).half()},
    "other dtype": {"target": zeros(5, 3).double()},
    "other width": {"target": zeros(5, 4)},
    "no rows": {"source": zeros(0, 3)},
    "flat": {"target": zeros(5)},
    "other maps": {"w_yx": zeros(3, 3, 3)},
    "maps of another width": {"w_xy": zeros(2, 4, 4)},
    "few seeds": {"seeds": zeros(1, dtype=torch.int64)},
    "seeds of int32": {"seeds": zeros(2, dtype=torch.int32)},
    "one of two pairs": {"nearest_target": pairs()[0]},
    "pairs of another shape": {"nearest_target": pairs()[1], "nearest_source": pairs()[0]},
    "pairs of int32": dict(zip(("nearest_target", "nearest_source"), pairs(torch.int32), strict=True)),
    "batch of none": {"batch_size": 0},
    "epoch": {"epoch": 2**32},
    "negative epoch": {"epoch": -1},
}


def raw(**changed):
    arguments = good() | {"nearest_target": None, "nearest_source": None}
    numbers = {"lr": 1e-2, "beta1": 0.5, "beta2": 0.999, "eps": 1e-8, "cycle_weight": 1e-2}
    return torch.ops.fastkit.icp_epoch_fwd(**(arguments | numbers | {"mutual_only": False} | changed))


@pytest.mark.parametrize("name", RAW)
def test_misuse_of_the_raw_op(name, native):
    with pytest.raises(RuntimeError, match="icp_epoch: "):
        raw(**RAW[name])


def test_the_raw_op_reads_nothing_outside_the_tables(native):
    """Pairs from elsewhere are none: the cost is inf, and maps are as they were."""
    outside = pairs_with(0, 5)[0], pairs_with(1, -7)[1]
    found = raw(nearest_target=outside[0], nearest_source=outside[1])
    assert found[4].tolist()[1] == INF and torch.equal(found[0][1], good()["w_xy"][1])
    expected = icp_epoch(**good() | {"pairs": pairs()})
    assert_equal(type(expected)(*(t[:1] for t in found)), type(expected)(*(t[:1] for t in expected)))
