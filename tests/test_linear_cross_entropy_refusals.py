"""What linear_cross_entropy refuses, and in which words."""

import numpy as np
import pytest
import torch

from fastkit.ops import linear_cross_entropy, linear_cross_entropy_with_lse

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


INPUT, WEIGHT, TARGET = zeros(3, 4), zeros(5, 4), zeros(3, dtype=torch.int64)
PER_CLASS, PER_TOKEN = zeros(5), zeros(3)
TENSORS = {"input": INPUT, "linear_weight": WEIGHT, "target": TARGET}
OPTIONAL = {"linear_bias": PER_CLASS, "weight": PER_CLASS, "token_weight": PER_TOKEN}

REFUSALS = [
    # What is no dense tensor.
    *((TypeError, {name: [1.0]}, f"{name} must be a tensor, got list") for name in (*TENSORS, *OPTIONAL)),
    *((TypeError, {name: None}, f"{name} must be a tensor, got NoneType") for name in TENSORS),
    *(
        (
            TypeError,
            {name: t.as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name, t in (TENSORS | OPTIONAL).items()
    ),
    (
        TypeError,
        {"linear_weight": WEIGHT.to_sparse()},
        "linear_weight must be dense, got torch.sparse_coo; pass linear_weight.to_dense()",
    ),
    # input
    *(
        (
            TypeError,
            {"input": INPUT.to(dtype)},
            f"input must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (ValueError, {"input": bad}, f"input must have shape (..., D) with D >= 1, got {tuple(bad.shape)}")
        for bad in (INPUT[0, 0], INPUT[:, :0])
    ),
    # linear_weight
    *(
        (
            ValueError,
            {"linear_weight": bad},
            "linear_weight must have shape (V, D) with V >= 1 and D = 4, as input has, got"
            f" {tuple(bad.shape)}; for an embedding of another width project the input first",
        )
        for bad in (WEIGHT.T, WEIGHT[:, :3], WEIGHT[0], WEIGHT[None], WEIGHT[:0])
    ),
    *(
        (
            TypeError,
            {"input": INPUT.to(of_input), "linear_weight": WEIGHT.to(of_weight)},
            f"linear_weight must have the dtype of input, {of_input}, got {of_weight};"
            " cast it with linear_weight.to(input.dtype), or run under torch.autocast",
        )
        for of_input, of_weight in [
            (torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.int8),
        ]
    ),
    (
        RuntimeError,
        {"linear_weight": WEIGHT.to("meta")},
        "linear_weight must be on the device of input, cpu, got meta;"
        " move it with linear_weight.to(input.device)",
    ),
    # target
    *(
        (
            TypeError,
            {"target": TARGET.to(dtype)},
            f"target must be int64 or int32, the index of a class, got {dtype}; probabilities of classes are"
            " not taken, use torch.nn.functional.cross_entropy for them",
        )
        for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16)
    ),
    *(
        (
            ValueError,
            {"target": bad},
            "target must have shape (...) = (3,), as input has before its last dimension, got"
            f" {tuple(bad.shape)}",
        )
        for bad in (TARGET[:2], TARGET[None], TARGET[0])
    ),
    (
        RuntimeError,
        {"target": TARGET.to("meta")},
        "target must be on the device of input, cpu, got meta; move it with target.to(input.device)",
    ),
    *(
        (
            RuntimeError,
            {"target": torch.tensor([0, 4, bad])},
            f"target must be in [0, 5) or ignore_index = -100, got {bad} at index 2;"
            " give a token without one ignore_index",
        )
        for bad in (5, -1, -101, 2**62, -(2**63))
    ),
    (
        RuntimeError,
        {"input": INPUT[None], "target": torch.tensor([[0, 7, 9]]), "ignore_index": 9},
        "target must be in [0, 5) or ignore_index = 9, got 7 at index (0, 1);"
        " give a token without one ignore_index",
    ),
    # Of the classes and the tokens.
    *(
        (ValueError, {name: bad}, f"{name} must have shape (V,) = (5,), got {tuple(bad.shape)}")
        for name in ("linear_bias", "weight")
        for bad in (PER_CLASS[:4], PER_CLASS[None], PER_CLASS[0])
    ),
    *(
        (
            ValueError,
            {"token_weight": bad},
            "token_weight must have shape (...) = (3,), as input has before its last dimension, got"
            f" {tuple(bad.shape)}",
        )
        for bad in (PER_TOKEN[:2], PER_TOKEN[:, None], PER_CLASS)
    ),
    *(
        (
            TypeError,
            {name: t.double()},
            f"{name} must be torch.float32 for input of torch.float32, got torch.float64; {cure}",
        )
        for name, t, cure in [
            (
                "linear_bias",
                PER_CLASS,
                "cast it with linear_bias.to(input.dtype), or run under torch.autocast",
            ),
            ("weight", PER_CLASS, "cast it"),
            ("token_weight", PER_TOKEN, "cast it"),
        ]
    ),
    *(
        (
            RuntimeError,
            {name: t.to("meta")},
            f"{name} must be on the device of input, cpu, got meta; move it with {name}.to(input.device)",
        )
        for name, t in OPTIONAL.items()
    ),
    *(
        (
            ValueError,
            {name: t.clone().requires_grad_()},
            f"{name} must not require grad, no gradient is formed for it; pass {name}.detach(), or weigh the"
            ' losses of reduction="none"',
        )
        for name, t in (("weight", PER_CLASS), ("token_weight", PER_TOKEN))
    ),
    *(
        (
            RuntimeError,
            {"weight": torch.tensor([1.0, bad, 1, 1, 1])},
            f"weight must be finite and not negative, got {bad:g} at index 1;"
            " they are weights of the classes",
        )
        for bad in (-1.0, float("inf"), float("nan"))
    ),
    # options
    *(
        (
            ValueError,
            {"reduction": bad},
            f"reduction must be one of none, sum, mean, got {bad!r}",
        )
        for bad in ("batchmean", None, "Mean", 1)
    ),
    *(
        (TypeError, {"ignore_index": bad}, f"ignore_index must be an int, got {name}; pass int(ignore_index)")
        for bad, name in [(None, "NoneType"), (1.0, "float"), (True, "bool"), (np.int64(1), "int64")]
    ),
    *(
        (ValueError, {"label_smoothing": bad}, f"label_smoothing must be in [0, 1), got {bad}")
        for bad in (1.0, 1, -0.1, float("nan"))
    ),
    *(
        (ValueError, {"z_loss": bad}, f"z_loss must be finite and not negative, got {bad}")
        for bad in (-1e-4, float("inf"), float("nan"))
    ),
    *(
        (ValueError, {"softcap": bad}, f"softcap must be positive and finite, or None, got {bad}")
        for bad in (0.0, 0, -30.0, float("inf"), float("nan"))
    ),
    *(
        (TypeError, {name: bad}, f"{name} must be a number, got {kind}; pass float({name})")
        for name in ("label_smoothing", "z_loss", "softcap")
        for bad, kind in [("0.1", "str"), (torch.tensor(0.1), "Tensor"), (True, "bool")]
    ),
    (TypeError, {"check": 1}, "check must be True or False, got int"),
    # impl
    (
        ValueError,
        {"impl": "gpu"},
        "impl must be one of reference, cpu, cuda, triton or None, got 'gpu'",
    ),
    (RuntimeError, {"impl": "cuda"}, 'impl="cuda" cannot run: this op has no such implementation; use'
     ' impl="reference"'),
]  # fmt: skip


def arguments(changes):
    args = TENSORS | {k: v for k, v in changes.items() if k in TENSORS}
    return list(args.values()), {k: v for k, v in changes.items() if k not in TENSORS}


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_with_lse])
@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case[2][:60])
def test_refuses(op, case):
    error, changes, words = case
    args, options = arguments(changes)
    with pytest.raises(error) as caught:
        op(*args, **options)
    assert str(caught.value) == f"{op.__name__}: {words}"


def test_takes_what_is_not_refused():
    assert linear_cross_entropy(INPUT, WEIGHT, TARGET).item() == pytest.approx(np.log(5))
    assert linear_cross_entropy(INPUT.half(), WEIGHT.half(), TARGET, linear_bias=PER_CLASS) > 1
    assert linear_cross_entropy(INPUT, WEIGHT, TARGET, label_smoothing=0, z_loss=0, softcap=1, check=True) > 1


def test_a_target_is_refused_where_a_compiler_hides_its_value():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")
    with pytest.raises(
        RuntimeError, match=r"linear_cross_entropy: target must be in \[0, 5\) or ignore_index = -100, got 5"
    ):
        compiled(INPUT, WEIGHT, torch.tensor([0, 1, 5]), impl="cpu")


def test_check_while_compiling_or_without_values():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="check=True reads values, and cannot be compiled"):
        compiled(INPUT, WEIGHT, TARGET, check=True)
    meta = [t.to("meta") for t in TENSORS.values()]
    with pytest.raises(RuntimeError, match="check=True reads values, got target on the meta device"):
        linear_cross_entropy(*meta, check=True)
    assert linear_cross_entropy(*meta).shape == ()


RAW = torch.ops.fastkit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": zeros(3, 5, dtype=torch.int32)}, "logits must be float32 or float64"),
        ({"logits": zeros(5, 3).T}, "logits must be on the CPU and have shape"),
        ({"target": TARGET[:2]}, "target must be int64, dense and have shape"),
        ({"target": TARGET.int()}, "target must be int64, dense and have shape"),
        ({"state": zeros(3, 3)}, "state must be dense"),
        ({"state": zeros(3, 4, dtype=torch.float64)}, "state must be dense"),
        ({"first": -1}, "first must not be negative, got -1"),
        ({"class_weight": zeros(4)}, "class_weight must have a number for each class"),
        ({"first": 3, "class_weight": zeros(7)}, "class_weight must have a number for each class"),
        ({"first": 2**63 - 1, "class_weight": zeros(7)}, "class_weight must have a number for each class"),
    ],
)
def test_the_raw_sums_refuse_what_is_not_safe(changes, words):
    call = {
        "state": zeros(3, 4), "logits": zeros(3, 5), "target": TARGET, "first": 0, "softcap": 0.0,
        "class_weight": None, "smooths": True,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        RAW.linear_cross_entropy_sums_(*(call | changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dz": zeros(3, 4)}, "dz must have the shape and dtype"),
        ({"dz": zeros(3, 5, dtype=torch.float64)}, "dz must have the shape and dtype"),
        ({"dz": zeros(1, 5).expand(3, 5)}, "dz must have the shape and dtype"),
        ({"lse": zeros(2)}, "lse must be dense"),
        ({"coefficients": zeros(3, 2)}, "coefficients must be dense"),
    ],
)
def test_the_raw_gradient_refuses_what_is_not_safe(changes, words):
    call = {
        "dz": zeros(3, 5), "logits": zeros(3, 5), "target": TARGET, "lse": zeros(3),
        "coefficients": zeros(3, 3), "first": 0, "softcap": 0.0, "class_weight": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        RAW.linear_cross_entropy_gradient_(*(call | changes).values())
