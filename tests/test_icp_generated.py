"""icp_epoch of generated arguments: a right answer, or a refusal in words."""

import math
import random

import pytest
import torch
from generated import (
    SIZES,
    Made,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    kinds_of,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops.icp import KERNELS, icp_epoch
from fastkit.reference import ICPEpoch
from fastkit.testing.icp import Inputs, assert_nearest, expected_maps, expected_mean

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

DTYPES = torch.float32, torch.float32, torch.float64
MAPS = *["map"] * 8, "normal", "zeros", "nan", "huge"
OPTIONS = {
    "lr": (1e-2, 1e-3, 1.0, 1, 1e-30, 1e30),
    "betas": ((0.5, 0.999), (0.0, 0.0), (0.9, 0.5), [0.5, 0], (1 - 2**-53, 0.5)),
    "eps": (1e-8, 1e-3, 1.0, 1e-300),
    "cycle_weight": (1e-2, 0.0, 1, 0.5),
}


def epoch_call(choose):
    dtype, n, m, D, R = (
        choose(DTYPES),
        choose(SIZES),
        choose(SIZES),
        choose((1, 2, 3, 4, 7, 8, 9, 17)),
        choose((1, 2, 3)),
    )
    mutual_only = choose((False, False, True))
    call = {
        "source": drawn(choose, n, D, dtype=dtype),
        "target": drawn(choose, m, D, dtype=dtype),
        "w_xy": drawn(choose, R, D, D, dtype=dtype, kind=MAPS),
        "w_yx": drawn(choose, R, D, D, dtype=dtype, kind=MAPS),
        "seeds": Made(
            (R,), torch.int64, values=tuple(choose((0, 1, -1, 2**63 - 1, -(2**63), 12345)) for _ in range(R))
        ),
        "epoch": choose((0, 0, 1, 2**32 - 1)),
        "batch_size": choose(
            (1, max(1, min(n, m) // 2), min(n, m), *([100, 2**31, 2**62] if mutual_only else []))
        ),
        "mutual_only": mutual_only,
    }
    for name, values in OPTIONS.items():
        if choose((False, False, True)):
            call[name] = choose(values)
    if choose(range(4)) == 3:
        rows = random.Random(choose(range(1000)))
        there, back = rows.choices(range(m), k=R * n), rows.choices(range(n), k=R * m)
        call["pairs"] = tuple(
            Made(shape, torch.int64, values=tuple(of)) for shape, of in (((R, n), there), ((R, m), back))
        )
    return icp_epoch, spoiled(choose, call)


def judge(op_and_call):
    return verdict(*op_and_call, check)


def check(call, found, plain):
    arguments = plain_values(found.arguments, None)
    inputs = Inputs(*(arguments[name] for name in Inputs._fields))
    kinds, results = kinds_of(call), ICPEpoch(**found.results)
    if "huge" in kinds:
        return
    others = ICPEpoch(**plain.results)
    assert torch.equal(results.cost.isinf(), others.cost.isinf())
    assert torch.equal(results.nearest_target < 0, others.nearest_target < 0)
    assert torch.equal(results.nearest_source < 0, others.nearest_source < 0)
    for r, (there, back) in enumerate(zip(results.nearest_target, results.nearest_source, strict=True)):
        if results.cost[r].isinf():
            for name in ("w_xy", "w_yx"):
                assert torch.equal(getattr(results, name)[r].nan_to_num(), arguments[name][r].nan_to_num())
        elif not kinds & {"nan", "inf", "large", "small", "subnormal"}:
            check_restart(call, inputs, results, r, there, back)


def check_restart(call, inputs, results, r, there, back):
    source, target, w_xy, w_yx, _ = inputs
    if call.get("pairs") is None:
        assert_nearest(there, source, target, w_yx[r])
        assert_nearest(back, target, source, w_xy[r])
    means = expected_mean(there, source, target, w_yx[r]), expected_mean(back, target, source, w_xy[r])
    value = torch.minimum(means[0].value, means[1].value)
    budget = torch.maximum(means[0].budget, means[1].budget) + torch.finfo(source.dtype).tiny
    assert_within(results.cost[r], value, budget, "cost")
    assert int(results.mutual[r]) == int((back[there] == torch.arange(len(there))).sum())
    options = {name: call[name] for name in (*OPTIONS, "batch_size", "mutual_only") if name in call}
    if (
        any(not 1e-9 <= (options.get(name) or 1.0) <= 1e9 for name in ("lr", "cycle_weight"))  # may overflow
        or options.get("eps") == 1e-300
        or (1 - 2**-53) in options.get("betas", ())
    ):
        return
    maps = expected_maps(inputs, results, r, epoch=call["epoch"], **options)
    for name, expected in zip(("w_xy", "w_yx"), maps, strict=True):
        value, budget = expected
        assert_within(getattr(results, name)[r], value, budget + torch.finfo(source.dtype).tiny, name)


def test_generated_calls():
    check_generated(epoch_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(epoch_call, judge, 10_000)


@pytest.mark.parametrize("seed", [0, 4])
def test_steps_without_a_memory_of_squares(seed):
    """What the first moment remembers may be any multiple of the last gradient, and so may a step."""
    call = {"source": Made((3, 17)), "target": Made((5, 17), seed=seed)}
    call |= {name: Made((1, 17, 17), kind="map") for name in ("w_xy", "w_yx")}
    call |= {"seeds": Made((1,), torch.int64, values=(0,)), "epoch": 0, "batch_size": 1, "betas": (0.5, 0.0)}
    assert judge((icp_epoch, call)) == "answer"


@pytest.mark.parametrize("option", ["lr", "eps", "cycle_weight"])
def test_an_int_that_no_float_has(option):
    maps = torch.eye(2).expand(1, 2, 2)
    arguments = torch.ones(3, 2), torch.ones(3, 2), maps, maps, torch.arange(1)
    with pytest.raises(ValueError, match=rf"^icp_epoch: {option} must be finite"):
        icp_epoch(*arguments, epoch=0, batch_size=1, **{option: 10**400})


def test_a_batch_that_no_int64_has():
    maps = torch.eye(2).expand(1, 2, 2)
    arguments = torch.ones(3, 2), torch.ones(3, 2), maps, maps, torch.arange(1)
    with pytest.raises(ValueError, match=r"^icp_epoch: batch_size must be below 2\^63"):
        icp_epoch(*arguments, epoch=0, batch_size=2**63, mutual_only=True)


# The raw op


def raw_call(choose):
    dtype, n, m, D, R = (
        choose(DTYPES),
        choose(SIZES),
        choose(SIZES),
        choose((1, 2, 3, 8, 17)),
        choose((1, 2, 0)),
    )

    def of(*shape):
        return drawn(choose, *shape, dtype=dtype, kind="normal")

    nearest = None, None
    if choose((False, True)):  # some of them are outside the tables
        nearest = [
            drawn(choose, R, rows, dtype=torch.int64, kind=choose(("+normal", "integers"))) for rows in (n, m)
        ]
    call = {
        "source": of(n, D),
        "target": of(m, D),
        "w_xy": drawn(choose, R, D, D, dtype=dtype, kind="map"),
        "w_yx": drawn(choose, R, D, D, dtype=dtype, kind="map"),
        "seeds": drawn(choose, R, dtype=torch.int64),
        "nearest_target": nearest[0],
        "nearest_source": nearest[1],
        "epoch": choose((0, 1)),
        "batch_size": choose((1, 2, min(n, m), 100)),
        "lr": choose((0.01, math.nan)),
        "beta1": 0.5,
        "beta2": 0.999,
        "eps": 1e-8,
        "cycle_weight": 0.01,
        "mutual_only": choose((False, True)),
    }
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return "icp_epoch_fwd", list(call.values())


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
