"""What mtadam_update_ and mtadam_square_sums refuse, in which words, and misuse of their raw ops."""

import math

import pytest
import torch

from fastkit import ops
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.mtadam import Inputs, cloned, make_inputs, raw_arguments

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

RAW = torch.ops.fastkit
NAN, INF = math.nan, math.inf


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


def inputs():
    """Of two tensors under two terms."""
    with torch.device("cpu"):
        return make_inputs([(2, 3), (4,)], 2, steps=1, amsgrad=True)


def at(j, change):
    """Of a list, entry j changed; or put in its place."""
    return lambda tensors: [
        *tensors[:j],
        change(tensors[j]) if callable(change) else change,
        *tensors[j + 1 :],
    ]


def dropped(tensors):
    return tensors[:-1]


LISTS = "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"
NUMBERS = "grad_norms", "steps"
APART = "tensors of each device are for a call of their own"
NUMBER = [
    (TypeError, "0.1", "must be a number, got str"),
    (TypeError, True, "must be a number, got bool"),
    (TypeError, None, "must be a number, got NoneType"),
    (ValueError, -0.1, "must be finite and not negative, got -0.1"),
    (ValueError, NAN, "must be finite and not negative, got nan"),
    (ValueError, INF, "must be finite and not negative, got inf"),
]

# (error, what is changed, text); a function is of what there was.
REFUSALS = [
    # What is no dense tensor.
    *(
        (TypeError, {name: at(j, value)}, f"{name}[{j}] must be a tensor, got {of}")
        for name in LISTS
        for j, value, of in ((0, [1.0], "list"), (1, 2.0, "float"))
    ),
    *(
        (TypeError, {name: at(j, None)}, f"{name}[{j}] must be a tensor, got NoneType")
        for name in LISTS
        for j in (0, 1)
        if name != "grads"
    ),
    *((TypeError, {name: None}, f"{name} must be a tensor, got NoneType") for name in NUMBERS),
    *(
        (
            TypeError,
            {name: at(1, torch.Tensor.to_sparse)},
            f"{name}[1] must be dense, got torch.sparse_coo; pass {name}[1].to_dense()",
        )
        for name in LISTS
    ),
    *(
        (
            TypeError,
            {name: at(1, lambda t: t.as_subclass(DTensor))},
            f"{name}[1] is a DTensor; pass {name}[1].to_local() or {name}[1].full_tensor()",
        )
        for name in LISTS
    ),
    *(
        (
            TypeError,
            {name: lambda t: t.as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name in NUMBERS
    ),
    # Dtypes.
    *(
        (
            TypeError,
            {"params": at(0, lambda t, dtype=dtype: t.to(dtype))},
            f"params[0] must be floating point and real, got {dtype}",
        )
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (
            TypeError,
            {name: at(1, lambda t, dtype=dtype: t.to(dtype))},
            f"{name}[1] must be torch.float32, got {dtype}; cast it",
        )
        for name in LISTS
        for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.complex64)
    ),
    *(
        (TypeError, {name: torch.Tensor.double}, f"{name} must be torch.float32, got torch.float64; cast it")
        for name in NUMBERS
    ),
    (
        TypeError,
        {"params": lambda ts: [t.half() for t in ts]},
        "grads[0] must be torch.float16, got torch.float32; cast it",
    ),
    (
        TypeError,
        {"params": lambda ts: [t.double() for t in ts]},
        "grad_norms must be torch.float64, got torch.float32; cast it",
    ),
    # Devices.
    *(
        (
            RuntimeError,
            {name: at(1, lambda t: t.to("meta"))},
            f"{name}[1] must be on the device of the parameters, cpu, got meta; {APART}",
        )
        for name in LISTS
    ),
    *(
        (
            RuntimeError,
            {name: lambda t: t.to("meta")},
            f"{name} must be on the device of the parameters, cpu, got meta; {APART}",
        )
        for name in NUMBERS
    ),
    # Lists and shapes.
    *(
        (
            ValueError,
            {"grad_norms": norms},
            f"grad_norms must be dense, of shape (n, L) with n = 2, got {tuple(norms.shape)}",
        )
        for norms in (zeros(3, 2), zeros(2), zeros(2, 2, 1), zeros(2, 4)[:, ::2])
    ),
    *(
        (
            ValueError,
            {"steps": steps},
            f"steps must be dense, of shape (n,) = (2,), got {tuple(steps.shape)}",
        )
        for steps in (zeros(3), zeros(2, 1), zeros(), zeros(4)[::2])
    ),
    (ValueError, {"grad_norms": zeros(2, 0)}, "there must be 1 to 1024 terms, got 0"),
    (ValueError, {"grad_norms": zeros(2, 1025)}, "there must be 1 to 1024 terms, got 1025"),
    *(
        (
            ValueError,
            {name: change},
            f"{name} must be {of} tensors (n = 2, L = 2), got {got}",
        )
        for name, of, count in (
            ("grads", "L n = 4", 4),
            ("exp_avgs", "n = 2", 2),
            ("exp_avg_sqs", "L n = 4", 4),
            ("max_exp_avg_sqs", "n = 2", 2),
        )
        for change, got in ((dropped, count - 1), (lambda ts: [*ts, ts[0]], count + 1))
    ),
    (
        ValueError,
        {"params": dropped},
        "grad_norms must be dense, of shape (n, L) with n = 1, got (2, 2)",
    ),
    *(
        (
            ValueError,
            {name: at(0, lambda t, s=shape: zeros(*s))},
            f"{name}[0] must have the shape of its parameter, (2, 3), got {shape}",
        )
        for name in LISTS[1:]
        for shape in ((3, 2), (6,), (2, 3, 1), (1, 3))
    ),
    # Memory.
    (
        ValueError,
        {"params": at(0, lambda t: t[:1].expand(2, 3))},
        "params[0] must have its own memory for each entry, got an expanded tensor of shape (2, 3);"
        " pass params[0].clone()",
    ),
    (
        ValueError,
        {"params": at(1, zeros(1).expand(4))},
        "params[1] must have its own memory for each entry, got an expanded tensor of shape (4,);"
        " pass params[1].clone()",
    ),
    (
        ValueError,
        {"params": lambda ts: [ts[0], ts[0].view(-1)[:4]]},
        "params must not share memory, got params[1] at the address of params[0]; list each once",
    ),
    *(
        (
            ValueError,
            {name: at(0, lambda t: t.T.contiguous().T)},
            f"the moments of params[0] must be dense and have strides in common, got {got} and {own};"
            " make them by torch.zeros_like",
        )
        for name, got, own in (
            ("exp_avgs", "(3, 1)", "(1, 2)"),  # the second moments have not those of the first
            ("exp_avg_sqs", "(1, 2)", "(3, 1)"),
            ("max_exp_avg_sqs", "(1, 2)", "(3, 1)"),
        )
    ),
    *(
        (
            ValueError,
            {name: at(1, zeros(8)[::2])},
            "the moments of params[1] must be dense and have strides in common, got (2,) and"
            f" {'(2,)' if name == 'exp_avgs' else '(1,)'}; make them by torch.zeros_like",
        )
        for name in LISTS[2:]
    ),
    # Options.
    *(
        (error, {name: value}, f"{name} {text}")
        for name in ("lr", "eps", "weight_decay", "alive_eps")
        for error, value, text in NUMBER
    ),
    (ValueError, {"lr": zeros(2)}, "lr must be a number or a tensor of one, got shape (2,)"),
    (ValueError, {"lr": zeros(0)}, "lr must be a number or a tensor of one, got shape (0,)"),
    *(
        (
            ValueError,
            {"betas": betas},
            f"betas must be three numbers: of the two moments, and of the norms, got {betas!r}",
        )
        for betas in ((0.9, 0.999), (0.9, 0.999, 0.9, 0.9), 0.9, None)
    ),
    *(
        (
            ValueError,
            {"betas": tuple(beta if j == i else 0.9 for j in range(3))},
            f"betas[{i}] must be in [0, 1), got {beta!r}",
        )
        for i in range(3)
        for beta in (1.0, -0.1, NAN, "0.9", True)
    ),
    (TypeError, {"ranks": zeros(2)}, "ranks must be a list of numbers, got Tensor; pass ranks.tolist()"),
    (
        TypeError,
        {"ranks": {1.0: 2.0}.values()},
        "ranks must be a list of numbers, got dict_values; pass ranks.tolist()",
    ),
    (ValueError, {"ranks": [1.0]}, "ranks must be one for each of the 2 terms, got 1"),
    (ValueError, {"ranks": (1.0, 1.0, 1.0)}, "ranks must be one for each of the 2 terms, got 3"),
    *((error, {"ranks": [1.0, value]}, f"ranks[1] {text}") for error, value, text in NUMBER),
    *(
        (
            ValueError,
            {"anchor": anchor},
            f"anchor must be the index of one of the 2 terms, got {anchor!r}",
        )
        for anchor in (-1, 2, 0.0, None, "first")
    ),
    *((error, {"max_scale": v}, f"max_scale {text}") for error, v, text in NUMBER if v is not None),
    (ValueError, {"max_scale": 0}, "max_scale must be positive or None, got 0"),
    *(
        (
            ValueError,
            {"nonfinite": nonfinite},
            f"nonfinite must be skip, skip_term or propagate, got {nonfinite!r}",
        )
        for nonfinite in ("skip_step", None)
    ),
    # Numbers beside.
    *(
        (error, {name: value}, f"{name} {text}")
        for name, dtype, other, wanted, wrong in (
            ("square_sums", torch.float64, torch.float32, (2, 2), (2, 1)),
            ("grad_scales", torch.float32, torch.float64, (2,), (3,)),
        )
        for error, value, text in (
            (TypeError, [1.0], "must be a tensor, got list"),
            (TypeError, zeros(*wanted, dtype=other), f"must be {dtype}, got {other}; cast it"),
            (
                RuntimeError,
                zeros(*wanted, dtype=dtype).to("meta"),
                f"must be on the device of the parameters, cpu, got meta; {APART}",
            ),
            (ValueError, zeros(*wrong, dtype=dtype), f"must be dense, of shape {wanted}, got {wrong}"),
            (
                ValueError,
                zeros(*wanted, 2, dtype=dtype)[..., 0],
                f"must be dense, of shape {wanted}, got {wanted}",
            ),
        )
    ),
    (TypeError, {"found_inf": 1.0}, "found_inf must be a tensor, got float"),
    (
        TypeError,
        {"found_inf": zeros(dtype=torch.bool)},
        "found_inf must be torch.float32, got torch.bool; cast it",
    ),
    (
        RuntimeError,
        {"found_inf": zeros().to("meta")},
        f"found_inf must be on the device of the parameters, cpu, got meta; {APART}",
    ),
    (ValueError, {"found_inf": zeros(2)}, "found_inf must be of one element, got (2,)"),
    # Implementations.
    (ValueError, {"impl": "best"}, "impl must be one of reference, cpu, cuda, triton or None, got 'best'"),
    (
        RuntimeError,
        {"impl": "triton"},
        'impl="triton" cannot run: this op has no such implementation; use impl="reference"',
    ),
]


def call(of, changed):
    changed = {n: c(getattr(of, n)) if n in Inputs._fields and callable(c) else c for n, c in changed.items()}
    tensors = {n: changed.pop(n, t) for n, t in of._asdict().items()}
    maxima = tensors.pop("max_exp_avg_sqs")
    ops.mtadam_update_(*tensors.values(), max_exp_avg_sqs=maxima, **{"lr": 0.1, **changed})


@pytest.mark.parametrize(
    ("error", "changed", "text"), REFUSALS, ids=[f"{k}-{text[:40]}" for k, (*_, text) in enumerate(REFUSALS)]
)
def test_refusals(error, changed, text):
    of = inputs()
    before = cloned(of)
    with pytest.raises(error) as caught:
        call(of, changed)
    assert str(caught.value) == f"mtadam_update_: {text}"
    assert all(map(torch.equal, of.results().values(), before.results().values()))  # nothing was written


def test_what_is_not_refused():
    """Other lists, no maxima, missing gradients, numbers at their limits."""
    call(inputs(), dict.fromkeys(LISTS, tuple))
    call(inputs(), {"max_exp_avg_sqs": None, "grads": at(3, None)})
    call(inputs(), {"max_exp_avg_sqs": []})
    limits = {"lr": 0, "eps": 0, "weight_decay": 0, "alive_eps": 0, "betas": [0, 0, 0], "max_scale": 1e-300}
    call(inputs(), {**limits, "ranks": [0, 0], "anchor": 1})
    of = inputs()
    call(of, {"params": lambda ts: [torch.nn.Parameter(t) for t in ts], "lr": zeros(1, 1)})
    many = Inputs([zeros(2)], [zeros(2)] * 1024, [zeros(2)], [zeros(2)] * 1024, zeros(1, 1024), zeros(1))
    call(many, {})
    assert many.steps == 1


SUMS = [
    *(
        (
            ValueError,
            ([zeros(2)] * count, n),
            f"grads must be n for each term, n >= 1, got {count} of n = {n!r}",
        )
        for count, n in ((3, 2), (2, 0), (2, -1), (2, 4), (0, 1), (2, "2"), (2, 1.0))
    ),
    (ValueError, ([zeros(2)] * 1025, 1), "there must be 1 to 1024 terms, got 1025"),
    (
        ValueError,
        ([None, None], 1),
        "grads must have a tensor among them, got None alone; leave the step out",
    ),
    (TypeError, ([None, 1.0], 1), "grads[1] must be a tensor, got float"),
    (
        TypeError,
        ([zeros(2).to_sparse()], 1),
        "grads[0] must be dense, got torch.sparse_coo; pass grads[0].to_dense()",
    ),
    (
        TypeError,
        ([zeros(2).as_subclass(DTensor)], 1),
        "grads[0] is a DTensor; pass grads[0].to_local() or grads[0].full_tensor()",
    ),
    *(
        (TypeError, ([None, zeros(2, dtype=d)], 1), f"grads[1] must be floating point and real, got {d}")
        for d in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (
            TypeError,
            ([zeros(2), zeros(2, dtype=d)], 2),
            f"grads[1] must be torch.float32, got {d}; cast it",
        )
        for d in (torch.float64, torch.float16, torch.int32)
    ),
    (
        RuntimeError,
        ([zeros(2), zeros(2).to("meta")], 1),
        f"grads[1] must be on the device of the others, cpu, got meta; {APART}",
    ),
    (
        ValueError,
        ([zeros(2), zeros(3), None, zeros(2)], 2),
        "grads[3] must have the shape of the tensor's other gradients, (3,), got (2,)",
    ),
]


@pytest.mark.parametrize(("error", "arguments", "text"), SUMS, ids=[text[:45] for *_, text in SUMS])
def test_refusals_of_square_sums(error, arguments, text):
    with pytest.raises(error) as caught:
        ops.mtadam_square_sums(*arguments)
    assert str(caught.value) == f"mtadam_square_sums: {text}"


# The raw ops, of whose callers nothing is known


STATE = "must be dense and have the dtype of the others"
STRIDES = "must have the shape and the strides of the first moment of its parameter"
LENGTHS = "there must be one of exp_avgs, L of exp_avg_sqs and one or no max_exp_avg_sqs for each param"
PIECES = "grads must be n for each term from `first` on"
NORMS = r"grad_norms must have shape \(n, L\) and steps \(n,\), dense"
RAW_REFUSALS = [
    ({"params": dropped}, NORMS),
    ({"params": at(1, torch.Tensor.double)}, rf"params\[1\] {STATE}"),
    ({"params": lambda ts: [t.int() for t in ts]}, STATE),
    ({"params": lambda ts: [t.double() for t in ts]}, STATE),
    ({"params": at(1, torch.Tensor.to_sparse)}, "SparseCPU"),
    ({"grads": dropped}, PIECES),
    ({"grads": lambda ts: ts + ts[:2]}, PIECES),
    ({"grads": lambda ts: ts[:1]}, PIECES),
    ({"grads": at(2, zeros(3, 2))}, r"grads\[2\] must have the shape of its parameter"),
    ({"grads": at(2, zeros(2, 3, 1))}, r"grads\[2\] must have the shape of its parameter"),
    ({"grads": at(3, torch.Tensor.double)}, rf"grads\[3\] {STATE}"),
    ({"grads": at(3, torch.Tensor.to_sparse)}, "SparseCPU"),
    ({"exp_avgs": dropped}, LENGTHS),
    ({"exp_avgs": at(1, torch.Tensor.half)}, rf"exp_avgs\[1\] {STATE}"),
    ({"exp_avgs": at(1, zeros(3))}, r"exp_avgs\[1\] must be dense and have the shape of its parameter"),
    ({"exp_avgs": at(1, zeros(8)[::2])}, r"exp_avgs\[1\] must be dense and have the shape"),
    ({"exp_avgs": at(0, zeros(1, 3).expand(2, 3))}, r"exp_avgs\[0\] must be dense and have the shape"),
    ({"exp_avg_sqs": dropped}, LENGTHS),
    ({"exp_avg_sqs": lambda ts: [*ts, ts[0]]}, LENGTHS),
    ({"exp_avg_sqs": at(3, zeros(5))}, rf"exp_avg_sqs\[3\] {STRIDES}"),
    ({"exp_avg_sqs": at(0, zeros(3, 2).T)}, rf"exp_avg_sqs\[0\] {STRIDES}"),
    ({"exp_avg_sqs": at(2, torch.Tensor.double)}, rf"exp_avg_sqs\[2\] {STATE}"),
    ({"max_exp_avg_sqs": dropped}, LENGTHS),
    ({"max_exp_avg_sqs": at(1, zeros(3))}, rf"max_exp_avg_sqs\[1\] {STRIDES}"),
    ({"max_exp_avg_sqs": at(1, torch.Tensor.half)}, rf"max_exp_avg_sqs\[1\] {STATE}"),
    ({"grad_norms": zeros(2, 4)[:, ::2]}, NORMS),
    ({"grad_norms": zeros(4)}, NORMS),
    ({"grad_norms": zeros(1, 2)}, NORMS),
    ({"grad_norms": zeros(2, 2, dtype=torch.float64)}, rf"grad_norms\[0\] {STATE}"),
    ({"grad_norms": zeros(2, 0), "grads": [], "exp_avg_sqs": []}, PIECES),
    ({"grad_norms": zeros(2, 1025)}, PIECES),
    ({"grad_norms": zeros(2, 3)}, LENGTHS),
    ({"steps": zeros(1)}, NORMS),
    ({"steps": zeros(4)[::2]}, NORMS),
    ({"steps": zeros(2, dtype=torch.int64)}, rf"steps\[0\] {STATE}"),
    ({"square_sums": zeros(2, 2)}, rf"square_sums\[0\] {STATE}"),
    ({"square_sums": zeros(2, 1, dtype=torch.float64)}, "square_sums must be 4 numbers, dense"),
    ({"square_sums": zeros(2, 4, dtype=torch.float64)[:, ::2]}, "square_sums must be 4 numbers, dense"),
    ({"lr_tensor": zeros()}, rf"lr\[0\] {STATE}"),
    ({"lr_tensor": zeros(2, dtype=torch.float64)}, "lr must be 1 numbers, dense"),
    ({"lr_tensor": zeros(0, dtype=torch.float64)}, "lr must be 1 numbers, dense"),
    ({"grad_scales": zeros(2, dtype=torch.float64)}, rf"grad_scales\[0\] {STATE}"),
    ({"grad_scales": zeros(1)}, "grad_scales must be 2 numbers, dense"),
    ({"found_inf": zeros(dtype=torch.bool)}, rf"found_inf\[0\] {STATE}"),
    ({"found_inf": zeros(0)}, "found_inf must be 1 numbers, dense"),
    ({"betas": (0.9, 0.999)}, "betas must be three numbers, and ranks L"),
    ({"betas": ()}, "betas must be three numbers, and ranks L"),
    ({"ranks": (1.0,)}, "betas must be three numbers, and ranks L"),
    ({"ranks": (1.0, 1.0, 1.0)}, "betas must be three numbers, and ranks L"),
    ({"anchor": -1}, PIECES),
    ({"anchor": 2}, PIECES),
    ({"anchor": 2**33}, PIECES),
    ({"first": -1}, PIECES),
    ({"first": 1}, PIECES),
    ({"first": 2**32}, PIECES),
    ({"nonfinite": "none"}, "nonfinite must be skip, skip_term or propagate, got none"),
    ({"nonfinite": ""}, "nonfinite must be skip, skip_term or propagate, got "),
]


@pytest.mark.parametrize(
    ("changed", "text"), RAW_REFUSALS, ids=[f"{k}-{next(iter(c))}" for k, (c, _) in enumerate(RAW_REFUSALS)]
)
def test_misuse_of_the_raw_op_is_refused(native, changed, text):
    of = inputs()
    before = cloned(of)
    changed = {n: c(getattr(of, n)) if callable(c) else c for n, c in changed.items()}
    with pytest.raises(RuntimeError, match=text):
        RAW.mtadam_update_(*raw_arguments(of, **changed))
    assert all(map(torch.equal, of.results().values(), before.results().values()))


def test_a_first_term_beyond_all_numbers_is_refused(native):
    """first + L has no place in 64 bits. Gradients are NaN, that nothing is written whatever happens."""
    of = inputs()
    for grad in of.grads:
        grad.fill_(NAN)
    for first in (2**63 - 1, 2**63 - 2):
        with pytest.raises(RuntimeError, match=PIECES):
            RAW.mtadam_update_(*raw_arguments(of, first=first))


def test_the_raw_op_cannot_write_to_an_expanded_parameter(native):
    of = inputs()
    params = [of.params[0][:1].expand(2, 3), of.params[1]]
    with pytest.raises(RuntimeError, match=r"copy_"):
        RAW.mtadam_update_(*raw_arguments(of, params=params))


def test_memory_that_entries_share_is_safe(native):
    of = inputs()
    memory = zeros(6)
    params = [memory.as_strided((2, 3), (1, 1)), of.params[1]]
    RAW.mtadam_update_(*raw_arguments(of, params=params))
    assert not memory[4:].any() and memory[:4].all()


def test_numbers_of_any_value_are_safe(native):
    """NaN and infinity in options, and steps that are none."""
    for value in (NAN, INF, -INF, -1.0):
        names = "lr", "eps", "weight_decay", "alive_eps", "max_scale"
        RAW.mtadam_update_(*raw_arguments(inputs(), betas=(value,) * 3, **dict.fromkeys(names, value)))
        of = inputs()
        of.steps.fill_(value), of.grad_norms.fill_(value)
        RAW.mtadam_update_(*raw_arguments(of, ranks=(value,) * 2))


def test_no_parameters_are_nothing_to_do(native):
    of = inputs()
    before = cloned(of)
    RAW.mtadam_update_(*raw_arguments(of, params=[]))
    assert all(map(torch.equal, of.results().values(), before.results().values()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([zeros(2)] * 3, 2), "grads must be n for each term, and one of them a tensor"),
        (([zeros(2)] * 2, 0), "grads must be n for each term"),
        (([zeros(2)] * 2, -1), "grads must be n for each term"),
        (([zeros(2)] * 2, 2**62), "grads must be n for each term"),
        (([None, None], 1), "no tensor arguments"),
        (([], 1), "no tensor arguments"),
        (([zeros(2)] * 1025, 1), "at most 1024 terms"),
        (([zeros(2).int()], 1), "float32, float64, bfloat16 or float16"),
        (([zeros(2).to_sparse()], 1), "SparseCPU"),
        (([zeros(2), zeros(2).double()], 1), rf"grads\[1\] {STATE}"),
        (([zeros(2), zeros(3)], 1), r"grads\[1\] must have the shape of its tensor's other gradients"),
        (([zeros(2), None, zeros(2, 1), zeros(1)], 2), r"grads\[2\] must have the shape of its tensor"),
    ],
)
def test_misuse_of_the_raw_square_sums_is_refused(native, arguments, text):
    with pytest.raises(RuntimeError, match=text):
        RAW.mtadam_square_sums(*arguments)
