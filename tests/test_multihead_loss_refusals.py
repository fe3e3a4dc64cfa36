"""What multihead_loss and orthogonality_penalty refuse, and in which words."""

import numpy as np
import pytest
import torch

from fastkit.ops import multihead_loss, orthogonality_penalty

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
]


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


# Three rows, two heads, five classes, four columns.
X, WEIGHT, BIAS, TARGET = zeros(3, 4), zeros(2, 5, 4), zeros(2, 5), zeros(3, dtype=torch.int64)
ACTIVE, PER_CLASS = torch.ones(2, dtype=torch.bool), zeros(5)
TENSORS = {"x": X, "weight": WEIGHT, "bias": BIAS, "target": TARGET}
OPTIONAL = {"active": ACTIVE, "class_weight": PER_CLASS}
SEVERAL = {"problem": "multi_label", "target": zeros(3, 5)}
REGRESSION = {"problem": "regression", "target": zeros(3), "weight": zeros(2, 1, 4), "bias": zeros(2, 1)}
CAST = "cast it with {}.to(x.dtype), or run under torch.autocast"


def of_no_dense_tensor(tensors, optional):
    """Words of every op, for tensors that must be there and for those that may be None."""
    both = tensors | optional
    return [
        *((TypeError, {name: [1.0]}, f"{name} must be a tensor, got list") for name in both),
        *((TypeError, {name: None}, f"{name} must be a tensor, got NoneType") for name in tensors),
        *(
            (
                TypeError,
                {name: t.as_subclass(DTensor)},
                f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
            )
            for name, t in both.items()
        ),
        *(
            (
                TypeError,
                {name: t.to_sparse()},
                f"{name} must be dense, got torch.sparse_coo; pass {name}.to_dense()",
            )
            for name, t in both.items()
        ),
        *(
            (
                TypeError,
                {name: torch.nested.nested_tensor([t, t], layout=torch.jagged)},
                f"{name} must be dense, got a nested tensor; pass its tensors one by one",
            )
            for name, t in both.items()
        ),
    ]


OF_ACTIVE = [
    (
        TypeError,
        {"active": ACTIVE.to(torch.uint8)},
        "active must be bool, True for a head that takes part, got torch.uint8; pass active.bool()",
    ),
    *(
        (
            ValueError,
            {"active": bad},
            f"active must have shape (H,) = (2,), as weight has, got {tuple(bad.shape)}",
        )
        for bad in (ACTIVE[:1], ACTIVE[None], ACTIVE[0])
    ),
    (
        RuntimeError,
        {"active": ACTIVE.to("meta")},
        "active must be on the device of weight, cpu, got meta; move it with active.to(weight.device)",
    ),
]


OF_WEIGHT_SHAPE = "weight must have shape (H, C, D), with a head, a class and a feature at least, got {}"
IMPL = [
    (ValueError, {"impl": "gpu"}, "impl must be one of reference, cpu, cuda, triton or None, got 'gpu'"),
    (
        RuntimeError,
        {"impl": "cuda"},
        'impl="cuda" cannot run: this op has no such implementation; use impl="reference"',
    ),
]

REFUSALS = [
    *of_no_dense_tensor(TENSORS, OPTIONAL),
    # x
    *(
        (
            TypeError,
            {"x": X.to(dtype)},
            f"x must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (ValueError, {"x": bad}, f"x must have shape (B, D) with a row at least, got {tuple(bad.shape)}")
        for bad in (X[0], X[None], X[:0], X[:, :0], X[0, 0])
    ),
    # weight
    *(
        (
            TypeError,
            {"x": X.to(of_x), "weight": WEIGHT.to(of_weight)},
            f"weight must have the dtype of x, {of_x}, got {of_weight}; {CAST.format('weight')}",
        )
        for of_x, of_weight in [
            (torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.int8),
        ]
    ),
    *(
        (ValueError, {"weight": bad}, OF_WEIGHT_SHAPE.format(tuple(bad.shape)))
        for bad in (WEIGHT[0], WEIGHT[None], WEIGHT[:0], WEIGHT[:, :0], WEIGHT[..., :0])
    ),
    *(
        (
            ValueError,
            {"weight": bad},
            f"weight must have shape (H, C, D) with D = 4, as x has, got {tuple(bad.shape)}",
        )
        for bad in (WEIGHT[..., :3], WEIGHT.mT)
    ),
    # bias
    *(
        (
            ValueError,
            {"bias": bad},
            f"bias must have shape (H, C) = (2, 5), as weight has, got {tuple(bad.shape)}",
        )
        for bad in (BIAS[0], BIAS[:1], BIAS[:, :4], BIAS.T, BIAS[None])
    ),
    (
        TypeError,
        {"bias": BIAS.double()},
        f"bias must be torch.float32 for x of torch.float32, got torch.float64; {CAST.format('bias')}",
    ),
    (
        TypeError,
        {"x": X.half(), "weight": WEIGHT.half(), "bias": BIAS.bfloat16()},
        "bias must be torch.float16 or torch.float32 for x of torch.float16, got torch.bfloat16;"
        f" {CAST.format('bias')}",
    ),
    # devices
    *(
        (
            RuntimeError,
            {name: t.to("meta")},
            f"{name} must be on the device of x, cpu, got meta; move it with {name}.to(x.device)",
        )
        for name, t in (TENSORS | {"class_weight": PER_CLASS}).items()
        if name != "x"
    ),
    *OF_ACTIVE,
    # problem and target
    *(
        (
            ValueError,
            {"problem": bad},
            f"problem must be one of single_label, multi_label, regression, got {bad!r}",
        )
        for bad in ("single_label_classification", None, 1)
    ),
    (
        ValueError,
        {"weight": WEIGHT[:, :1], "bias": BIAS[:, :1]},
        'weight must have two classes at least with problem="single_label", got one; take'
        ' problem="multi_label" or "regression"',
    ),
    *(
        (
            TypeError,
            {"target": TARGET.to(dtype)},
            f'target must be int64 or int32 with problem="single_label", got {dtype}',
        )
        for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16)
    ),
    *(
        (
            TypeError,
            options | {"target": options["target"].to(dtype)},
            f"target must be floating point with problem={options['problem']!r}, got {dtype}; pass"
            " target.to(x.dtype)",
        )
        for options in (SEVERAL, REGRESSION)
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    *(
        (
            ValueError,
            options | {"target": options["target"].clone().requires_grad_()},
            "target must not require grad, no gradient is formed for it; pass target.detach()",
        )
        for options in (SEVERAL, REGRESSION)
    ),
    (
        ValueError,
        REGRESSION | {"weight": WEIGHT, "bias": BIAS},
        'weight must have one class with problem="regression", got 5',
    ),
    *(
        (
            ValueError,
            options | {"target": bad},
            f"target must have shape {words} with problem={options.get('problem', 'single_label')!r}, got"
            f" {tuple(bad.shape)}",
        )
        for options, words, shapes in [
            ({}, "(B,) = (3,)", [TARGET[:2], TARGET[None], TARGET[0]]),
            (SEVERAL, "(B, C) = (3, 5)", [zeros(3), zeros(3, 4), zeros(5, 3), zeros(1, 3, 5)]),
            (REGRESSION, "(B,) = (3,)", [zeros(3, 1), zeros(2), zeros()]),
        ]
        for bad in shapes
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
        {"target": torch.tensor([0, 7, 9], dtype=torch.int32), "ignore_index": 9},
        "target must be in [0, 5) or ignore_index = 9, got 7 at index 1;"
        " give a token without one ignore_index",
    ),
    # class_weight
    *(
        (
            ValueError,
            {"class_weight": bad},
            f"class_weight must have shape (C,) = (5,), as weight has, got {tuple(bad.shape)}",
        )
        for bad in (PER_CLASS[:4], PER_CLASS[None], PER_CLASS[0])
    ),
    (
        TypeError,
        {"class_weight": PER_CLASS.double()},
        "class_weight must be torch.float32 for x of torch.float32, got torch.float64; cast it",
    ),
    (
        ValueError,
        REGRESSION | {"class_weight": zeros(1)},
        'class_weight must be None with problem="regression", which has no classes',
    ),
    *(
        (
            ValueError,
            options | {"class_weight": PER_CLASS.clone().requires_grad_()},
            "class_weight must not require grad, no gradient is formed for it; pass class_weight.detach()",
        )
        for options in ({}, SEVERAL)
    ),
    *(
        (
            RuntimeError,
            options | {"class_weight": torch.tensor([1.0, bad, 1, 1, 1])},
            f"class_weight must be finite and not negative, got {bad:g} at index 1; they are weights of the"
            " classes",
        )
        for options in ({}, SEVERAL)
        for bad in (-1.0, float("inf"), float("nan"))
    ),
    # numbers
    *(
        (ValueError, {"label_smoothing": bad}, f"label_smoothing must be in [0, 1), got {bad}")
        for bad in (1.0, 1, -0.1, float("nan"))
    ),
    *(
        (
            ValueError,
            options | {"label_smoothing": 0.1},
            f"label_smoothing must be 0 with problem={options['problem']!r}, got 0.1; smooth the target",
        )
        for options in (SEVERAL, REGRESSION)
    ),
    *(
        (
            TypeError,
            {"label_smoothing": bad},
            f"label_smoothing must be a number, got {kind}; pass float(label_smoothing)",
        )
        for bad, kind in [("0.1", "str"), (torch.tensor(0.1), "Tensor"), (True, "bool"), (None, "NoneType")]
    ),
    *(
        (TypeError, {"ignore_index": bad}, f"ignore_index must be an int, got {name}; pass int(ignore_index)")
        for bad, name in [(None, "NoneType"), (1.0, "float"), (True, "bool"), (np.int64(1), "int64")]
    ),
    *(
        (
            ValueError,
            {"ignore_index": bad},
            f"ignore_index must be a number that int64 has, got one of {bits} bits",
        )
        for bad, bits in [(2**63, 64), (-(2**63) - 1, 64), (10**100, 333)]
    ),
    *IMPL,
]  # fmt: skip

PENALTY_REFUSALS = [
    *of_no_dense_tensor({"weight": WEIGHT}, {"active": ACTIVE}),
    *(
        (
            TypeError,
            {"weight": WEIGHT.to(dtype)},
            f"weight must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (ValueError, {"weight": bad}, OF_WEIGHT_SHAPE.format(tuple(bad.shape)))
        for bad in (WEIGHT[0], WEIGHT[None], WEIGHT[:0], WEIGHT[:, :0], WEIGHT[..., :0], WEIGHT[0, 0, 0])
    ),
    *(
        (
            ValueError,
            {"kind": bad},
            f"kind must be one of abs, squared, cos_abs, cos_squared, huber, got {bad!r}",
        )
        for bad in ("cosine", None, "Abs", 1)
    ),
    *(
        (
            ValueError,
            {"huber_width": bad, "kind": kind},
            f"huber_width must be positive and finite, got {bad}",
        )
        for kind in ("huber", "abs")
        for bad in (0.0, 0, -1e-2, float("inf"), float("nan"), 10**400)
    ),
    *(
        (
            ValueError,
            {"huber_width": bad, "weight": WEIGHT.to(dtype)},
            f'huber_width must be {least} at least for {arithmetic}, got {bad}; take kind="abs"',
        )
        for bad, dtype, least, arithmetic in [
            (1e-38, torch.float32, "1.17549e-38", torch.float32),
            (1e-45, torch.bfloat16, "1.17549e-38", torch.float32),
            (1e-50, torch.float16, "1.17549e-38", torch.float32),
            (1e-310, torch.float64, "2.22507e-308", torch.float64),
        ]
    ),
    *(
        (
            TypeError,
            {"huber_width": bad},
            f"huber_width must be a number, got {kind}; pass float(huber_width)",
        )
        for bad, kind in [("0.1", "str"), (torch.tensor(0.1), "Tensor"), (True, "bool"), (None, "NoneType")]
    ),
    *OF_ACTIVE,
    *(
        (TypeError, {"center_classes": bad}, f"center_classes must be True or False, got {kind}")
        for bad, kind in [(1, "int"), (None, "NoneType"), ("yes", "str")]
    ),
    (
        ValueError,
        {"center_classes": True, "weight": WEIGHT[:, :1]},
        "center_classes must be False for one class, whose mean is itself, got weight of shape (2, 1, 4)",
    ),
    *IMPL,
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case[2][:60])
def test_refuses(case):
    error, changes, words = case
    with pytest.raises(error) as caught:
        multihead_loss(**(TENSORS | changes))
    assert str(caught.value) == f"multihead_loss: {words}"


@pytest.mark.parametrize("case", PENALTY_REFUSALS, ids=lambda case: case[2][:60])
def test_the_penalty_refuses(case):
    error, changes, words = case
    with pytest.raises(error) as caught:
        orthogonality_penalty(**({"weight": WEIGHT} | changes))
    assert str(caught.value) == f"orthogonality_penalty: {words}"


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_takes_what_is_not_refused(impl):
    assert multihead_loss(*TENSORS.values(), impl=impl).loss.tolist() == pytest.approx([np.log(5)] * 2)
    halves = {name: t.half() for name, t in TENSORS.items() if name != "target"}
    for bias in (BIAS, BIAS.half()):
        mixed = TENSORS | halves | {"bias": bias, "class_weight": PER_CLASS + 1, "label_smoothing": 0}
        assert multihead_loss(**mixed, impl=impl).loss[0] > 1
    for options in (SEVERAL, REGRESSION):
        assert multihead_loss(**(TENSORS | options), active=ACTIVE, impl=impl).loss.isfinite().all()
    with torch.no_grad():  # in which no gradient can be lost
        weights = PER_CLASS.clone().requires_grad_()
        assert not multihead_loss(*TENSORS.values(), class_weight=weights, impl=impl).loss.any()
    for index in (2**63 - 1, -(2**63)):
        assert multihead_loss(*TENSORS.values(), ignore_index=index, impl=impl).count == 3
    for width in (1.2e-38, 1, 1e308):
        penalty = orthogonality_penalty(WEIGHT + 1, kind="huber", huber_width=width, impl=impl)
        assert penalty.isfinite() and penalty >= 0
    assert orthogonality_penalty(WEIGHT[:, :1], center_classes=False, impl=impl) == 0


# The raw kernels check what memory safety needs.

RAW = torch.ops.fastkit


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def forward_call(problem):
    single = problem == "single_label"
    return {
        "x": zeros(3, 4), "weight": zeros(2, 5, 4), "bias": zeros(2, 5),
        "target": integers(3) if single else None, "wanted": None if single else zeros(5, 3),
        "class_weight": zeros(5), "problem": problem, "label_smoothing": 0.0, "ignore_index": -100,
        "gradient": True, "z": zeros(2, 5, 3), "loss": zeros(2), "correct": integers(2), "count": integers(),
    }  # fmt: skip


def backward_call():
    return {
        "g_loss": zeros(2), "dz": zeros(2, 5, 3), "x": zeros(3, 4), "weight": zeros(2, 5, 4),
        "target": integers(3), "ignore_index": -100, "g_x": zeros(3, 4), "g_weight": zeros(2, 5, 4),
        "g_bias": zeros(2, 5),
    }  # fmt: skip


def dense(name, numel):
    return f"{name} must be dense, on the CPU, of {numel} elements of the dtype"


def not_dense(t):
    """Tensors of as many numbers, or of as many bytes, that are not what it must be."""
    yield torch.cat([t.flatten(), t.flatten()[:1]])
    yield t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)
    if t.numel() > 1:
        yield t.new_zeros(2 * t.numel())[::2].view(-1)


X_WORDS = r"x must have shape \(B, D\), on the CPU, where the features of a row are neighbours"


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_the_raw_kernels_refuse_what_is_not_dense(problem):
    for op, call in (
        (RAW.multihead_loss_fwd_, forward_call(problem)),
        (RAW.multihead_loss_bwd_, backward_call()),
    ):
        for name, t in call.items():
            if name != "x" and isinstance(t, torch.Tensor):
                for other in not_dense(t):
                    words = f"({dense(name, t.numel())}|weight must have shape)"
                    with pytest.raises(RuntimeError, match=f"multihead_loss: {words}"):
                        op(*(call | {name: other}).values())
        for wrong, words in (
            (zeros(3, 4, dtype=torch.bfloat16), "x must be float32 or float64"),
            (zeros(3, 4, dtype=torch.int32), "x must be float32 or float64"),
            (zeros(3), X_WORDS),
            (zeros(4, 3).T, X_WORDS),
            (zeros(3, 5), dense("weight", 50)),
            (zeros(3, 4, dtype=torch.float64), dense("weight", 40)),
        ):
            with pytest.raises(RuntimeError, match=f"multihead_loss: {words}"):
                op(*(call | {"x": wrong}).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": None}, "a single label has target, the other two have wanted"),
        ({"wanted": zeros(5, 3)}, "a single label has target, the other two have wanted"),
        ({"problem": "regression"}, "a single label has target, the other two have wanted"),
        ({"problem": "several"}, "problem must be one of three"),
        ({"problem": ""}, "problem must be one of three"),
    ],
)
def test_the_raw_forward_refuses_what_a_problem_has_not(changes, words):
    with pytest.raises(RuntimeError, match=f"multihead_loss: {words}"):
        RAW.multihead_loss_fwd_(*(forward_call("single_label") | changes).values())


ROWS_WORDS = r"rows must have shape \(H, C, D\), on the CPU, where the features of a row are neighbours"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": zeros(3)}, ROWS_WORDS),
        ({"rows": zeros(3, 5, 2).mT}, ROWS_WORDS),
        ({"rows": zeros(3, 2, 5, dtype=torch.float16)}, "rows must be float32 or float64"),
        ({"sums": zeros(5)}, dense("sums", 6)),
        ({"sums": zeros(12)[::2]}, dense("sums", 6)),
        ({"sums": zeros(6, dtype=torch.float64)}, dense("sums", 6)),
        ({"gradient": zeros(29)}, dense("gradient", 30)),
        ({"gradient": zeros(2, 3, 5).transpose(0, 1)}, dense("gradient", 30)),
        ({"gradient": zeros(3, 2, 5, dtype=torch.float64)}, dense("gradient", 30)),
        ({"kind": "cos_abs"}, "kind must be abs, squared, or huber with a width"),
        ({"kind": "huber", "width": 0.0}, "kind must be abs, squared, or huber with a width"),
        ({"kind": "huber", "width": -1.0}, "kind must be abs, squared, or huber with a width"),
        ({"kind": "huber", "width": float("nan")}, "kind must be abs, squared, or huber with a width"),
    ],
)
def test_the_raw_penalty_refuses_what_is_not_safe(changes, words):
    call = {
        "rows": zeros(3, 2, 5),
        "kind": "abs",
        "width": 1.0,
        "sums": zeros(2, 3),
        "gradient": zeros(3, 2, 5),
    }
    with pytest.raises(RuntimeError, match=f"orthogonality_penalty: {words}"):
        RAW.multihead_loss_penalty_(*(call | changes).values())


def test_raw_kernels_take_nothing_at_all():
    """No head, class, row or feature: no memory is touched, losses of no row are 0, as are the gradients."""
    for problem in ("single_label", "multi_label", "regression"):
        for H, C, B, D in ((0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)):
            single = problem == "single_label"
            call = forward_call(problem) | {
                "x": zeros(B, D), "weight": zeros(H, C, D), "bias": zeros(H, C), "class_weight": None,
                "target": torch.full((B,), -100) if single else None,
                "wanted": None if single else zeros(C, B), "z": zeros(H, C, B), "loss": torch.full((H,), 7.0),
                "correct": torch.full((H,), 7, dtype=torch.int64),
            }  # fmt: skip
            RAW.multihead_loss_fwd_(*call.values())
            if D > 0 or problem != "multi_label":  # where logits of 0 have a loss
                assert not call["loss"].any()
            assert call["count"] == (0 if single else B * C)
            gradients = [torch.full(shape, 7.0) for shape in ((B, D), (H, C, D), (H, C))]
            RAW.multihead_loss_bwd_(
                zeros(H), zeros(H, C, B), call["x"], call["weight"], call["target"], -100, *gradients
            )
            assert not any(t.any() for t in gradients)
    for H, C, D in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        sums, gradient = torch.full((C, H), 7.0), torch.full((H, C, D), 7.0)
        RAW.multihead_loss_penalty_(zeros(H, C, D), "abs", 1.0, sums, gradient)
        assert not sums.any() and not gradient.any()
