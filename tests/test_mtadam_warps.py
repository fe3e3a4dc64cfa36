"""mtadam's GPU kernels on NumPy arrays, by the threads of a team in turn."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastkit.reference.mtadam import mtadam_square_sums, mtadam_update_
from fastkit.testing import assert_matches_reference

host = pytest.importorskip(
    "fastkit._host", reason="fastkit._host is built in editable installs where Python.h exists"
)

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
CHUNK, THREADS = 8192, 128
SIZES = 0, 1, 3, 31, 33, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3001
OPTIONS = {
    "square_sums": None,
    "lr": 0.125,
    "betas": (0.75, 0.875, 0.5),  # exact in float32: a rounded one would push all errors to one side
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": False,
    "ranks": None,
    "anchor": 0,
    "alive_eps": 1e-10,
    "max_scale": None,
    "nonfinite": "skip",
    "grad_scales": None,
    "found_inf": None,
    "first": 0,
    "applies": True,
}
MODES = "skip", "skip_term", "propagate"


def arithmetic_of(dtype):
    return torch.float32 if dtype.itemsize == 2 else dtype


def array(t):
    """Its memory as NumPy, half precision as bits."""
    return t.view(torch.uint16).numpy() if t.dtype.itemsize == 2 else t.numpy()


def arrays(tensors):
    return [None if t is None else array(t) for t in tensors]


class Guarded:
    """Tensors that lie within others; ``check`` finds what was written around them."""

    def __init__(self):
        self.around = []

    def __call__(self, values, offset):
        around = torch.full((values.numel() + 64,), 7.0).to(values.dtype)
        inner = around[offset : offset + values.numel()]
        inner.copy_(values)
        self.around.append((around, offset, values.numel()))
        return inner

    def check(self):
        for around, offset, n in self.around:
            assert (around[:offset] == 7).all() and (around[offset + n :] == 7).all()


class State(NamedTuple):
    """The arguments of mtadam_update_."""

    params: list[Tensor]
    grads: list[Tensor | None]  # term-major, like exp_avg_sqs
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grad_norms: Tensor
    steps: Tensor
    max_exp_avg_sqs: list[Tensor]

    def clone(self, dtype=None):
        """With all in one dtype where it is given."""

        def cloned(x):
            if isinstance(x, list):
                return [cloned(y) for y in x]
            return x if x is None else x.clone() if dtype is None else x.to(dtype, copy=True)

        return State(*map(cloned, self))

    def moments(self):
        """And norms: all that a step at once has in common with one in pieces, bit for bit."""
        return [*self.exp_avg_sqs, *self.max_exp_avg_sqs, self.grad_norms, self.steps]

    def tensors(self):
        return [*self.params, *self.exp_avgs, *self.moments()]


def make(sizes, L, dtype, *, amsgrad=False, missing=(), offset=lambda i: 32, fresh=False, seed=0):
    """``missing``: pairs (term, tensor) without a gradient; ``offset`` of a tensor i from aligned memory."""
    generator = torch.Generator().manual_seed(seed)
    guarded, T, n = Guarded(), arithmetic_of(dtype), len(sizes)

    def draw(kind, scale=1.0, state=False):
        values = [torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in sizes]
        if state:
            values = [torch.zeros_like(x) if fresh else x.abs() if state == "square" else x for x in values]
        return [guarded(x.to(kind), offset(i)) for i, x in enumerate(values)]

    grads = [g for k in range(L) for g in draw(dtype, 0.1 * 3.0 ** (k % 4))]
    for k, i in missing:
        grads[k * n + i] = None
    norms = torch.rand(n, L, generator=generator, dtype=torch.float64).to(T)
    state = State(
        draw(dtype),
        grads,
        draw(T, state="mean"),
        [v for _ in range(L) for v in draw(T, state="square")],
        guarded(norms.flatten() * (0 if fresh else 1), 32).view(n, L),
        guarded(torch.arange(n).to(T) * (0 if fresh else 1), 32),
        draw(T, 2.0, state="square") if amsgrad else [],
    )
    return state, guarded


def run(state, **options):
    """The kernels, in place."""
    o = OPTIONS | options
    name = "mtadam_update_" + str(state.params[0].dtype).removeprefix("torch.")
    getattr(host, name)(
        arrays(state.params),
        arrays(state.grads),
        arrays(state.exp_avgs),
        arrays(state.exp_avg_sqs),
        arrays(state.max_exp_avg_sqs),
        array(state.grad_norms),
        array(state.steps),
        None if o["square_sums"] is None else array(o["square_sums"]),
        0.0 if isinstance(o["lr"], Tensor) else o["lr"],
        array(o["lr"].view(1)) if isinstance(o["lr"], Tensor) else None,
        list(o["betas"]),
        o["eps"],
        o["weight_decay"],
        o["decoupled"],
        list(o["ranks"] or []),
        o["anchor"],
        o["alive_eps"],
        math.inf if o["max_scale"] is None else o["max_scale"],
        MODES.index(o["nonfinite"]),
        None if o["grad_scales"] is None else array(o["grad_scales"]),
        None if o["found_inf"] is None else array(o["found_inf"].view(1)),
        o["first"],
        o["applies"],
    )


def specified(state, **options):
    """What the reference makes of it, in float64."""
    after = state.clone(torch.float64)
    *arguments, max_exp_avg_sqs = after
    mtadam_update_(*arguments, max_exp_avg_sqs=max_exp_avg_sqs or None, **(OPTIONS | options))
    return after


def check(state, guarded=None, **options):
    """Runs the kernels, in place, and compares."""
    before, after = state.clone(torch.float64), specified(state, **options)
    run(state, **options)
    compare(state, before, after, **options)
    if guarded is not None:
        guarded.check()


def compare(state, before, after, **options):
    """Each within its budget. A thread sums CHUNK / THREADS squares, the rest is double, and the root halves
    the error. A factor has the errors of two norms, and h three roundings more. Sums err with the magnitudes
    of their terms: |h| is that which v was folded with, and what weight decay may have taken from it.
    """
    o = OPTIONS | options
    dtype, n = state.params[0].dtype, len(state.params)
    T = arithmetic_of(dtype)
    eps, element = torch.finfo(T).eps, torch.finfo(dtype)
    if dtype == torch.float64:
        eps *= 2  # the oracle errs too
    tiny = torch.finfo(T).tiny
    beta1, beta2, _ = o["betas"]
    L = len(state.exp_avg_sqs) // n
    of_norm = (CHUNK / THREADS / 4 + 3) * eps
    of_h = 2 * of_norm + 3 * eps

    def same(name, got, want, budget):
        assert_matches_reference(got, want, budget + tiny, name=name)

    same("grad_norms", state.grad_norms, after.grad_norms, of_norm * after.grad_norms.abs())
    assert torch.equal(state.steps.double(), after.steps)
    for i in range(n):
        p, m = before.params[i], before.exp_avgs[i]
        decay = 0.0 if o["decoupled"] else o["weight_decay"]
        total, errors = torch.zeros_like(m), []
        for was, now in zip(before.exp_avg_sqs[i::n], after.exp_avg_sqs[i::n], strict=True):
            h = ((now - beta2 * was) / (1 - beta2)).clamp(min=0).sqrt() + 2 * (decay * p).abs()
            total += h
            errors.append(3 * eps * now + (1 - beta2) * 2 * of_h * h.square())
        for k, error in enumerate(errors):
            at = k * n + i
            same(f"exp_avg_sqs[{at}]", state.exp_avg_sqs[at], after.exp_avg_sqs[at], error)
        m_error = (of_h + (2 * L + 3) * eps) * ((beta1 * m).abs() + (1 - beta1) * total)
        same(f"exp_avgs[{i}]", state.exp_avgs[i], after.exp_avgs[i], m_error)
        most = torch.stack(after.exp_avg_sqs[i::n]).amax(0)
        most_error = torch.stack(errors).amax(0) + tiny
        if state.max_exp_avg_sqs:
            most = after.max_exp_avg_sqs[i]
            same(f"max_exp_avg_sqs[{i}]", state.max_exp_avg_sqs[i], most, most_error)
        step = float(after.steps[i])
        if not o["applies"] or step == 0:
            assert torch.equal(state.params[i].double(), p)
            continue
        correction = 1 / math.sqrt(1 - beta2**step)
        root = most.sqrt() * correction + o["eps"]
        root_error = (most + most_error).sqrt() - (most - most_error).clamp(min=0).sqrt()
        root_error = correction * root_error + 4 * eps * root
        least = (root - root_error).clamp(min=0)
        move = float(o["lr"]) / (1 - beta1**step)
        u = move * after.exp_avgs[i].abs() / root
        u_error = u * root_error / least + move * m_error / least + 4 * eps * u
        stored = element.eps / 2 * after.params[i].abs() + element.eps * element.tiny
        same(f"params[{i}]", state.params[i], after.params[i], u_error + 3 * eps * (p.abs() + u) + stored)


def unaligned(i):
    return 32 + (0, 1, 0, 3)[i % 4]


@pytest.mark.parametrize("L", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, L):
    for offset in (lambda i: 32, unaligned):
        check(*make(SIZES, L, dtype, offset=offset, amsgrad=L % 2 == 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_state_and_missing_gradients(dtype):
    L, n = 5, len(SIZES)
    missing = [(k, i) for k in range(L) for i in range(n) if (k + 2 * i) % 3 == 0 or i in (4, 8)]
    state, guarded = make(SIZES, L, dtype, missing=missing, offset=unaligned, fresh=True)
    check(state, guarded)
    assert not state.steps[4] and not state.exp_avgs[8].any()  # no term reaches them
    check(state, guarded, weight_decay=0.125)


CASES = {
    "coupled": {"weight_decay": 0.375},
    "decoupled": {"weight_decay": 0.375, "decoupled": True},
    "ranks": {"ranks": [0.5, 2.0, 1.0, 3.0, 0.25, 1.0]},
    "anchor": {"anchor": 4},
    "anchor without gradients": {"anchor": 3},
    "max_scale": {"max_scale": 1.5},
    "all are dead": {"alive_eps": 1e6},
    "some are dead": {"alive_eps": 20.0, "anchor": 1},
    "eps": {"eps": 0.1},
    "grad_scales": {"grad_scales": torch.tensor([1.0, 2.0, 1024.0, 0.125, 65536.0, 1.0])},
    "lr of a tensor": {"lr": torch.tensor(0.05).double(), "weight_decay": 0.375, "decoupled": True},
    "found_inf = 0": {"found_inf": torch.zeros(())},
    "betas of 0": {"betas": (0.0, 0.0, 0.0)},
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_options(case, amsgrad):
    for dtype in (torch.float32, torch.bfloat16):
        missing = [(3, i) for i in range(4)] + [(0, 1)]
        state, guarded = make((1, 100, 515, CHUNK + 5), 6, dtype, missing=missing, amsgrad=amsgrad)
        state.grad_norms[:, 3] = 0  # so that term is not alive
        for _ in range(2):
            check(state, guarded, **CASES[case])


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite(nonfinite, value):
    for dtype in (torch.float32, torch.float16):
        for bad in ([0], [1], [0, 2]):
            state, guarded = make((40, 300, 5), 3, dtype, amsgrad=True)
            untouched = state.clone()
            for k in bad:
                state.grads[3 * k + 1][7] = value
            check(state, guarded, nonfinite=nonfinite, weight_decay=0.125)
            if nonfinite == "skip":
                assert torch.equal(state.params[1], untouched.params[1])
                assert state.steps[1] == untouched.steps[1]
            elif nonfinite == "skip_term":
                assert all(t.isfinite().all() for t in state.tensors())
            assert not torch.equal(state.params[0], untouched.params[0])


def test_found_inf_stops_all_writing():
    state, guarded = make(SIZES, 3, torch.float32, amsgrad=True)
    before = state.clone()
    run(state, found_inf=torch.ones(()), weight_decay=0.125)
    assert all(map(torch.equal, state.tensors(), before.tensors()))
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sums(dtype):
    n, L = len(SIZES), 3
    missing = [(1, i) for i in range(n)] + [(0, 5)]
    for offset in (lambda i: 32, unaligned):
        state, _ = make(SIZES, L, dtype, missing=missing, offset=offset)
        name = "mtadam_square_sums_" + str(dtype).removeprefix("torch.")
        sums = torch.from_numpy(getattr(host, name)(arrays(state.grads), n))
        expected = mtadam_square_sums(state.grads, n)
        eps = torch.finfo(arithmetic_of(dtype)).eps
        torch.testing.assert_close(sums, expected, rtol=(CHUNK / THREADS + 2) * eps, atol=0.0)
        given = state.clone()
        run(state)
        run(given, square_sums=sums)
        assert all(map(torch.equal, state.tensors(), given.tensors()))
        check(state, square_sums=4 * expected)  # those that are given, and no others


@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_pieces(amsgrad):
    """Moments and norms are those of the step at once; sums of gradients are rounded in other places."""
    sizes, L = (1, 33, 1000, CHUNK + 1, 70), 7
    n, decay = len(sizes), {"weight_decay": 0.25}
    missing = [(k, 4) for k in range(1, L)] + [(1, 1), (2, 1), (5, 2)]  # the first piece reaches all
    for dtype in (torch.float32, torch.bfloat16):
        (state, guarded), (at_once, _) = (
            make(sizes, L, dtype, missing=missing, amsgrad=amsgrad, offset=unaligned) for _ in range(2)
        )
        before, after = state.clone(torch.float64), specified(state, **decay)
        for first, end in ((0, 1), (1, 6), (6, 6), (6, 7)):
            piece = state._replace(grads=state.grads[first * n : end * n])
            options = decay | {"first": first, "applies": end == L}
            check(piece.clone(), **options)
            run(piece, **options)
        compare(state, before, after, **decay)
        run(at_once, **decay)
        assert all(map(torch.equal, state.moments(), at_once.moments()))
        guarded.check()


def test_more_tensors_than_a_launch_takes():
    sizes = [i % 40 for i in range(1100)]
    check(*make(sizes, 1, torch.float32))
    check(*make(sizes[:500], 5, torch.bfloat16, amsgrad=True, offset=unaligned))


def test_as_many_terms_as_there_may_be():
    state, guarded = make((3, 40), 1024, torch.float32)
    check(state, guarded, ranks=[1 + k / 1024 for k in range(1024)])


def test_the_same_call_gives_the_same_bits():
    state, _ = make(SIZES, 3, torch.float32)
    again = state.clone()
    for call in (state, again):
        run(call, weight_decay=0.125)
    assert all(map(torch.equal, state.tensors(), again.tensors()))
