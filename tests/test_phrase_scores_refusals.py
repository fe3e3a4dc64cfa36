"""What phrase_scores, select_phrases and the raw ops refuse, and in which words."""

import math

import numpy as np
import pytest
import torch

from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.phrase_scores import make_image_set, stacked

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

RAW = torch.ops.fastkit
NAMES = "candidates", "centroid", "scatter", "chosen", "prior"


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


# m = 5, D = 4, S = 2, G = 3
INPUTS = {
    "candidates": torch.ones(5, 4), "centroid": torch.ones(4), "scatter": torch.eye(4),
    "chosen": torch.ones(2, 4), "prior": torch.zeros(5),
}  # fmt: skip
CANDIDATES, CENTROID, SCATTER, CHOSEN, PRIOR = INPUTS.values()


def of_sets(name, G=3):
    return INPUTS[name].expand(G, *INPUTS[name].shape)


def changed(name, place, value, sets=False):
    tensor = (of_sets(name) if sets else INPUTS[name]).clone()
    tensor[place] = value
    return {name: tensor}


def refusal(error, op, arguments):
    options = dict(arguments)
    if op is select_phrases:
        options = {"k": 2, **options}
    with pytest.raises(error) as caught:
        op(**options)
    return str(caught.value)


IN_FRONT = "or with the image sets in front, where"

# Of both ops, but what is chosen.
COMMON = [
    # What is no dense tensor.
    *((TypeError, {name: [1.0]}, f"{name} must be a tensor, got list") for name in NAMES),
    *((TypeError, {name: 1.0}, f"{name} must be a tensor, got float") for name in NAMES),
    *((TypeError, {name: None}, f"{name} must be a tensor, got NoneType") for name in NAMES[:3]),
    (TypeError, {"scatter": SCATTER.numpy()}, "scatter must be a tensor, got ndarray"),
    *(
        (
            TypeError,
            {name: INPUTS[name].as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name in NAMES
    ),
    (
        TypeError,
        {"candidates": CANDIDATES.to_sparse()},
        "candidates must be dense, got torch.sparse_coo; pass candidates.to_dense()",
    ),
    # dtypes and devices
    *(
        (
            TypeError,
            {"candidates": CANDIDATES.to(dtype)},
            f"candidates must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool)
    ),
    *(
        (
            TypeError,
            {name: INPUTS[name].to(dtype)},
            f"{name} must be torch.float32 for candidates of torch.float32, got {dtype};"
            f" cast it with {name}.to(candidates.dtype)",
        )
        for name in NAMES[1:]
        for dtype in (torch.float64, torch.bfloat16, torch.int64)
    ),
    (
        TypeError,
        {"candidates": CANDIDATES.half(), "centroid": CENTROID.bfloat16()},
        "centroid must be torch.float16 or torch.float32 for candidates of torch.float16, got torch.bfloat16;"
        " cast it with centroid.to(candidates.dtype)",
    ),
    *(
        (
            RuntimeError,
            {name: INPUTS[name].to("meta")},
            f"{name} must be on the device of candidates, cpu, got meta;"
            f" move it with {name}.to(candidates.device)",
        )
        for name in NAMES[1:]
    ),
    # Shapes
    *(
        (
            ValueError,
            {"candidates": candidates},
            "candidates must have shape (m, D), or (G, m, D) for G image sets, with a candidate and a column"
            f" at least, got {tuple(candidates.shape)}",
        )
        for candidates in (
            CANDIDATES[0], CANDIDATES[0, 0], CANDIDATES[:0], CANDIDATES[:, :0], CANDIDATES[None, None],
            CANDIDATES[None, :0],
        )
    ),
    *(
        (
            ValueError,
            {"centroid": centroid},
            f"centroid must have shape (D,), {IN_FRONT} D = 4, got {tuple(centroid.shape)}",
        )
        for centroid in (CENTROID[:3], CENTROID[0], CENTROID[:, None], CENTROID[None, None])
    ),
    *(
        (
            ValueError,
            {"scatter": scatter},
            f"scatter must have shape (D, D), {IN_FRONT} D = 4, got {tuple(scatter.shape)}",
        )
        for scatter in (SCATTER[0], SCATTER[:3], SCATTER[:, :3], SCATTER[None, None], SCATTER[0, 0])
    ),
    *(
        (
            ValueError,
            {"chosen": chosen},
            f"chosen must have shape (S, D), {IN_FRONT} D = 4, got {tuple(chosen.shape)}",
        )
        for chosen in (CHOSEN[0], CHOSEN[:, :3], CHOSEN.T, CHOSEN[None, None])
    ),
    *(
        (
            ValueError,
            {"prior": prior},
            f"prior must have shape (m,), {IN_FRONT} m = 5, got {tuple(prior.shape)}",
        )
        for prior in (PRIOR[:4], PRIOR[0], PRIOR[:, None], PRIOR[None, None])
    ),
    # Numbers of image sets
    *(
        (
            ValueError,
            {"candidates": of_sets("candidates"), name: of_sets(name, G)},
            f"{name} must be of as many image sets as the arguments before, 3, or of none in particular,"
            f" got {G}",
        )
        for name in NAMES[1:]
        for G in (1, 2)
    ),
    (
        ValueError,
        {"centroid": of_sets("centroid", 2), "scatter": of_sets("scatter", 3)},
        "scatter must be of as many image sets as the arguments before, 2, or of none in particular, got 3",
    ),
    *(
        (ValueError, {name: of_sets(name, 0)}, "there must be an image set at least, got none")
        for name in NAMES
    ),
    # What has no direction
    *(
        (
            RuntimeError,
            changed(name, place, value, sets),
            f"{name} must be finite and not all zeros, got {what} that has no direction; leave it out",
        )
        for value in (0.0, math.nan, math.inf, -math.inf, 1e-40)  # the last one is subnormal
        for name, place, sets, what in (
            ("candidates", 3, False, "row 3"), ("candidates", (2, 1), True, "row (2, 1)"),
            ("centroid", ..., False, "the vector"), ("centroid", 1, True, "row 1"),
            ("chosen", 1, False, "row 1"), ("chosen", (0, 1), True, "row (0, 1)"),
        )
    ),
    (
        RuntimeError,
        changed("candidates", (4, 2), math.nan),
        "candidates must be finite and not all zeros, got row 4 that has no direction; leave it out",
    ),
    # What is not finite
    *(
        (RuntimeError, changed(name, place, value, sets), f"{name} must be finite, got {value:g} at {place}")
        for value in (math.nan, math.inf, -math.inf)
        for name, place, sets in (
            ("scatter", (1, 2), False), ("scatter", (2, 1, 2), True),
            ("prior", 4, False), ("prior", (1, 0), True),
        )
    ),
    # Weights
    *(
        (TypeError, {name: weight}, f"{name} must be a number, got {kind}; pass float({name})")
        for name in ("variance_weight", "orthogonality_weight", "prior_weight")
        for weight, kind in (
            ("1", "str"), (None, "NoneType"), (True, "bool"), (torch.tensor(1.0), "Tensor"), (1j, "complex"),
        )
    ),
    *(
        (ValueError, {name: weight}, f"{name} must be finite and not negative, got {weight}")
        for name in ("variance_weight", "orthogonality_weight")
        for weight in (-1, -0.5, math.nan, math.inf, 10**400)
    ),
    *(
        (ValueError, {"prior_weight": weight}, f"prior_weight must be finite, got {weight}")
        for weight in (math.nan, math.inf, -math.inf, -(10**400))
    ),
    # impl
    *(
        (
            ValueError,
            {"impl": impl},
            f"impl must be one of reference, cpu, cuda, triton or None, got {impl!r}",
        )
        for impl in ("gpu", "", 1)
    ),
]  # fmt: skip

SELECTIONS = [
    *(
        (TypeError, {"k": k}, f"k must be an int, got {name}; pass int(k)")
        for k, name in [
            (2.0, "float"), (None, "NoneType"), (True, "bool"), ("2", "str"), (np.int64(2), "int64"),
            (torch.tensor(2), "Tensor"),
        ]
    ),
    *(
        (ValueError, {"k": k}, f"k must be between 1 and the number of candidates, 5, got {k}")
        for k in (0, -1, 6, 2**70)
    ),
    *(
        (
            ValueError,
            {"orthogonality": kind},
            f"orthogonality must be 'penalty' or 'deflate', got {kind!r}",
        )
        for kind in ("hard", None, True, ["penalty"])
    ),
]  # fmt: skip

REFUSALS = [
    *((phrase_scores, *case) for case in COMMON),
    *((select_phrases, *case) for case in COMMON if "chosen" not in case[1]),
    *((select_phrases, *case) for case in SELECTIONS),
]


@pytest.mark.parametrize(("op", "error", "arguments", "message"), REFUSALS)
def test_refuses(op, error, arguments, message):
    names = NAMES if op is phrase_scores else [name for name in NAMES if name != "chosen"]
    options = {name: INPUTS[name] for name in names} | arguments
    assert refusal(error, op, options) == f"{op.__name__}: {message}"


@pytest.mark.parametrize("name", NAMES)
def test_refuses_numbers_that_need_gradients_in_the_same_words(name):
    options = changed(name, 0, math.nan)
    words = refusal(RuntimeError, phrase_scores, INPUTS | options)
    assert "must be finite" in words
    options[name].requires_grad_()
    assert refusal(RuntimeError, phrase_scores, INPUTS | options) == words


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("op", [phrase_scores, select_phrases])
def test_refuses_a_kernel_that_is_not_there(op, impl):
    options = {name: INPUTS[name] for name in NAMES[:3]}
    message = refusal(RuntimeError, op, {**options, "impl": impl})
    assert message.startswith(f'{op.__name__}: impl="{impl}" cannot run')


def test_a_selection_takes_nothing_chosen():
    with pytest.raises(TypeError, match="chosen"):
        select_phrases(CANDIDATES, SCATTER, 2, centroid=CENTROID, chosen=CHOSEN)
    with pytest.raises(TypeError, match="centroid"):
        select_phrases(CANDIDATES, SCATTER, 2)


def test_a_nested_tensor():
    nested = torch.nested.nested_tensor([CENTROID, CENTROID], layout=torch.jagged)
    message = refusal(TypeError, phrase_scores, {**INPUTS, "centroid": nested})
    assert message == (
        "phrase_scores: centroid must be dense, got a nested tensor; pass its tensors one by one"
    )


def test_what_the_messages_advise_works(impl):
    found = phrase_scores(CANDIDATES.double().to(torch.float32), CENTROID, SCATTER, impl=impl)
    assert found.score.shape == (5,)
    few = CANDIDATES.clone()
    few[3] = 0
    few = few[few.abs().amax(1) > 0]
    picks = select_phrases(few, SCATTER, int(2.0), centroid=CENTROID, impl=impl)
    assert picks.indices.tolist() == [0, 1]


# The raw ops, which a graph may call with whatever there is


def raw(op, change=None, options=None):
    inputs = {name: t.unsqueeze(0).contiguous() for name, t in INPUTS.items()} | (change or {})
    candidates, centroid, scatter, chosen, prior = inputs.values()
    if op == "phrase_scores":
        return RAW.phrase_scores_fwd(candidates, centroid, scatter, chosen, prior, 10.0, 80.0, 8.0)
    k, deflate = options or (2, False)
    return RAW.select_phrases_fwd(candidates, centroid, scatter, prior, k, deflate, 10.0, 80.0, 8.0)


DENSE = "must be dense, on the CPU, in the dtype of candidates"
OF_RAW = [
    *(
        ({"candidates": t}, "candidates must have shape (G, m, D), on the CPU")
        for t in (CANDIDATES, CENTROID, CANDIDATES[None, None], torch.tensor(1.0))
    ),
    *(
        ({"candidates": torch.ones(1, 5, 4, dtype=dtype)}, "candidates must be float32 or float64")
        for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool)
    ),
    ({"candidates": torch.ones(1, 4, 5).mT}, f"candidates {DENSE}"),
    *(({name: INPUTS[name].double()[None]}, f"{name} {DENSE}") for name in NAMES[1:]),
    *(({name: of_sets(name)}, f"{name} {DENSE}") for name in NAMES),  # expanded
    ({"centroid": torch.tensor(1.0)}, f"centroid {DENSE}"),
    ({"prior": torch.tensor(1.0)}, f"prior {DENSE}"),
    *(
        ({"candidates": torch.ones(3, 5, 4), name: torch.ones(2, *INPUTS[name].shape)},
         f"{name} must be of one set, or of 3")
        for name in NAMES[1:]
    ),
    ({"centroid": torch.ones(1, 5)}, "centroid must have 4 numbers for each set"),
    ({"scatter": torch.ones(1, 4, 3)}, "scatter must have 16 numbers for each set"),
    ({"scatter": torch.ones(4, 4)}, "scatter must have 16 numbers for each set"),
    ({"prior": torch.ones(1, 4)}, "prior must have 5 numbers for each set"),
    ({"chosen": torch.ones(1, 2, 3)}, "chosen must have 8 numbers for each set"),
    ({"chosen": CHOSEN}, "chosen must have shape (G, S, D)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), OF_RAW)
def test_the_raw_ops_refuse(native, change, message):
    for op in ("phrase_scores", "select_phrases"):
        if op == "select_phrases" and "chosen" in change:
            continue
        with pytest.raises(RuntimeError) as caught:
            raw(op, change)
        assert f"{op}: {message}" in str(caught.value)


@pytest.mark.parametrize("k", [-1, 6, 2**62, -(2**63)])
def test_the_raw_selection_refuses_more_than_there_are(native, k):
    with pytest.raises(RuntimeError, match="select_phrases: k must be from 0 to the number of candidates, 5"):
        raw("select_phrases", options=(k, False))


@pytest.mark.parametrize("name", NAMES)
def test_the_raw_ops_refuse_two_devices(native, name):
    for op in ("phrase_scores", "select_phrases"):
        if op == "select_phrases" and name == "chosen":
            continue
        with pytest.raises(RuntimeError, match=f"{op}: tensors must be on one device"):
            raw(op, {name: INPUTS[name].unsqueeze(0).to("meta")})


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 3e38])
@pytest.mark.parametrize("name", ["candidates", "centroid", "scatter", "prior"])
def test_a_graph_chooses_each_once_whatever_the_numbers(native, name, value, deflate):
    """Whose values are not looked at: indices are rows of the candidates, and no memory besides is read."""
    inputs = stacked([make_image_set(9, 4, prior=True, seed=seed) for seed in range(2)])
    options = [9, deflate, 10.0, 80.0, 8.0]
    for rows in (slice(0, 1), slice(3, 5), slice(None)):
        tensor = getattr(inputs, name).clone()
        tensor[:, rows] = value
        candidates, centroid, scatter, _, prior = inputs._replace(**{name: tensor})
        found = RAW.select_phrases_fwd(candidates, centroid, scatter, prior, *options)
        assert found[0].sort(dim=1).values.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 3e38])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_scores_whatever_the_numbers(native, name, value):
    """A candidate that is no number spoils its own scores."""
    inputs = make_image_set(9, 4, 3, prior=True)
    tensor = getattr(inputs, name).clone()
    tensor[0] = value
    changed = [t.unsqueeze(0) for t in inputs._replace(**{name: tensor})]
    found = RAW.phrase_scores_fwd(*changed, 10.0, 80.0, 8.0)
    assert [t.shape for t in found] == [(1, 9)] * 3
    if name in ("candidates", "prior"):
        expected = phrase_scores(*inputs[:4], prior=inputs.prior, impl=native)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[0, 1:], other[1:])
