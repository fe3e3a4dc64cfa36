"""HeadEliminator: which heads are dropped and when, against a replay of the rules in NumPy."""

import io
import math
import re

import numpy as np
import pytest
import torch
from contexts import waits_are_errors

from fastkit.methods.multiverse import HeadEliminator

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

INF, NAN = math.inf, math.nan


def refuses(error, message):
    return pytest.raises(error, match=f"^{re.escape(f'HeadEliminator: {message}')}$")


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def run(eliminator, losses, count=1, correct=None):
    """A step of each row of losses; what each has dropped."""
    dropped = []
    for loss in losses:
        loss = torch.as_tensor(loss, dtype=torch.float64)
        eliminator.add(loss, torch.zeros_like(loss) if correct is None else correct, count)
        dropped.append(eliminator.step())
    return dropped


# The rules once more


def replay(
    losses, corrects, counts, total, *, score="loss", beta=None, policy="margin", margin=0.1, fraction=0.1,
    interval=None, start=None, stop=None, min_heads=1,
):  # fmt: skip
    """What each step drops, and the estimates after it; of sums per step (T, H), (T, H) and (T,).

    It ends with None where no active head has a finite estimate.
    """
    heads = losses.shape[1]
    beta = beta if beta is not None else 0.99 if total >= 1000 else 0.9
    every = interval if interval is not None else max(10, math.floor(total / 50))
    active, average, updates = np.ones(heads, bool), np.zeros(heads), 0
    dropped, estimates = [], []
    for t, (loss, correct, count) in enumerate(zip(losses, corrects, counts, strict=True), 1):
        out = []
        if count > 0:
            found = loss / count if score == "loss" else 1 - correct / count
            average = beta * average + (1 - beta) * found
            updates += 1
            estimate = average / (1 - beta**updates)
            estimate[~np.isfinite(estimate)] = np.inf
            begun = t >= start if start is not None else 10 * t >= total
            ended = t > stop if stop is not None else 10 * t > 9 * total
            if policy != "none" and begun and not ended and t % every == 0:
                left = int(active.sum())
                if np.isinf(estimate[active]).all():
                    dropped.append(None)
                    break
                limit = (1 + margin) * estimate[active].min() + 1e-3
                if policy == "margin":
                    candidates = np.flatnonzero(active & (estimate > limit))
                    most = min(len(candidates), int(np.ceil(fraction * left)))
                else:
                    candidates, most = np.flatnonzero(active), int(np.floor(fraction * left))
                order = np.lexsort((-candidates, -estimate[candidates]))  # the last key counts first
                out = candidates[order][: min(most, left - min_heads)].tolist()
                active[out] = False
        dropped.append(out)
        now = average / (1 - beta**updates) if updates else np.full(heads, np.inf)
        estimates.append(np.where(active & np.isfinite(now), now, np.inf))
    return dropped, np.array(estimates)


def check_replayed(losses, corrects, counts, total, **options):
    """Rows of losses are means, of steps with that count."""
    sums = np.where(counts[:, None] > 0, losses * counts[:, None], 0)
    expected, estimates = replay(sums, corrects, counts, total, **options)
    eliminator = HeadEliminator(losses.shape[1], total_steps=total, **options)
    active = set(range(losses.shape[1]))
    for t, row in enumerate(losses[: len(expected)]):
        eliminator.add(torch.from_numpy(row), torch.from_numpy(corrects[t]), int(counts[t]))
        if expected[t] is None:
            with pytest.raises(RuntimeError, match="scores must be finite"):
                eliminator.step()
            break
        found = eliminator.step()
        assert found == expected[t], f"step {t + 1}"
        active -= set(found)
        assert set(np.flatnonzero(eliminator.active)) == active
        assert eliminator.num_active == len(active)
        # 1 - beta^n is a difference in the replay: 1e-16 / (1 - beta), and as much in each step
        np.testing.assert_allclose(eliminator.scores().numpy(), estimates[t], rtol=1e-12)
    assert eliminator.steps == len(estimates)
    return expected


@pytest.mark.parametrize("score", ["loss", "accuracy"])
@pytest.mark.parametrize("policy", ["margin", "fraction"])
@pytest.mark.parametrize("total", [233, 1010])
def test_runs_with_the_defaults_are_those_of_the_rules(total, policy, score):
    generator = np.random.default_rng(total)
    heads = 24
    worse = np.linspace(0, 0.7, heads)[generator.permutation(heads)]
    losses = np.abs(0.5 + worse + 0.2 * generator.standard_normal((total, heads)))
    counts = generator.integers(1, 33, total)
    corrects = generator.binomial(counts[:, None], 1 - 0.8 * worse, (total, heads)).astype(float)
    expected = check_replayed(losses, corrects, counts, total, policy=policy, score=score)
    events = [t for t, out in enumerate(expected, 1) if out]
    assert len(events) > 5 and sum(map(len, expected)) > 8  # else nothing was compared
    every = 10 if total == 233 else 20
    assert all(t % every == 0 and 0.1 * total <= t <= 0.9 * total for t in events)


def test_generated_runs_are_those_of_the_rules():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = pytest.importorskip("hypothesis.strategies")
    events = []

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        seed=strategies.integers(0, 2**32 - 1),
        heads=strategies.sampled_from([12, 7, 5, 2, 1]),
        steps=strategies.sampled_from([40, 25, 9]),
        min_heads=strategies.sampled_from([1, 2, 4]),
        options=strategies.fixed_dictionaries(
            {
                "score": strategies.sampled_from(["loss", "accuracy"]),
                "policy": strategies.sampled_from(["margin", "fraction", "none"]),
                "beta": strategies.sampled_from([0.0, 0.5, 0.9, None]),
                "margin": strategies.sampled_from([0.0, 0.1, 0.5, 2.0]),
                "fraction": strategies.sampled_from([0.05, 0.3, 0.5, 1.0]),
                "interval": strategies.integers(1, 4),
                "start": strategies.integers(0, 3),
                "stop": strategies.sampled_from([40, 20, 4]),
            }
        ),
    )
    def check(seed, heads, steps, min_heads, options):
        generator = np.random.default_rng(seed)
        counts = generator.choice([0, 1, 2, 4, 8], steps)
        # Few values, so that there are ties, and now and then one that is not finite.
        losses = generator.integers(0, 5, (steps, heads)) / 4
        corrects = generator.binomial(counts[:, None], 0.5, (steps, heads)).astype(float)
        corrects = np.where(generator.random((steps, heads)) < 0.02, NAN, corrects)
        losses = np.where(generator.random((steps, heads)) < 0.02, NAN, losses)
        options = {**options, "min_heads": min(min_heads, heads)}
        events.extend(check_replayed(losses, corrects, counts, 40, **options))

    check()
    assert sum(map(bool, events)) > 40 and None in events


# What is dropped, by hand


def test_the_margin_is_over_the_best_and_the_worst_go_first():
    options = {"total_steps": 10, "interval": 1, "start": 1, "stop": 10, "beta": 0.0}
    limit = 1.1 * 0.5 + 1e-3
    losses = [[0.9, 0.5, limit, math.nextafter(limit, 1), 0.7]]
    for fraction, expected in ((1.0, [0, 4, 3]), (0.4, [0, 4]), (0.2, [0]), (0.21, [0, 4])):
        assert run(HeadEliminator(5, fraction=fraction, **options), losses) == [expected]
    assert run(HeadEliminator(5, fraction=1.0, min_heads=3, **options), losses) == [[0, 4]]
    assert run(HeadEliminator(5, fraction=1.0, min_heads=5, **options), losses) == [[]]
    assert run(HeadEliminator(5, fraction=1.0, margin=0.5, **options), losses) == [[0]]


@pytest.mark.parametrize(
    ("policy", "expected"), [("margin", [[4, 3], [1, 0], []]), ("fraction", [[4, 3], [1], []])]
)
def test_of_equal_heads_the_higher_index_goes_first(policy, expected):
    eliminator = HeadEliminator(5, total_steps=3, policy=policy, interval=1, fraction=0.4, start=1, stop=3)
    assert run(eliminator, [[1.0, 2.0, 0.5, 2.0, 2.0]] * 3) == expected


def test_without_a_policy_nothing_is_dropped():
    eliminator = HeadEliminator(3, total_steps=10, policy="none", interval=1)
    assert run(eliminator, [[1.0, 2.0, NAN]] * 10 + [[NAN] * 3]) == [[]] * 11
    assert eliminator.num_active == 3


def test_the_default_schedule():
    def found(total, **options):
        eliminator = HeadEliminator(2, total_steps=total, **options)
        return eliminator.beta, eliminator.interval, eliminator.start, eliminator.stop

    assert found(233) == (0.9, 10, 24, 209)
    assert found(999) == (0.9, 19, 100, 899)
    assert found(1000) == (0.99, 20, 100, 900)
    assert found(1) == (0.9, 10, 1, 0)  # a run of few steps is taken, and has no check
    assert found(1000, beta=0, interval=7, start=0, stop=2000) == (0, 7, 0, 2000)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [10, 20, 30]),
        ({"start": 11}, [20, 30]),
        ({"stop": 29}, [10, 20]),
        ({"interval": 7}, [7, 14, 21, 28]),
        ({"interval": 4, "start": 8, "stop": 16}, [8, 12, 16]),
        ({"interval": 12, "start": 0, "stop": 40}, [12, 24, 36]),
    ],
)
def test_steps_with_a_check(options, expected):
    eliminator = HeadEliminator(9, total_steps=36, policy="fraction", **options)
    dropped = run(eliminator, [list(range(9))] * 40)
    assert [t for t, out in enumerate(dropped, 1) if out] == []  # a tenth of nine heads is none
    eliminator = HeadEliminator(9, total_steps=36, policy="fraction", fraction=0.25, **options)
    dropped = run(eliminator, [list(range(9))] * 40)
    assert [t for t, out in enumerate(dropped, 1) if out] == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("margin", [[4, 2, 1], [0, 5], []]), ("fraction", [[4, 2], [1], [0]])],
)
def test_what_is_not_finite_goes_first(policy, expected):
    eliminator = HeadEliminator(6, total_steps=4, policy=policy, interval=1, fraction=0.4, beta=0.5)
    losses = [[9.0, NAN, INF, 1.0, -INF, 2.0], [9.0, 1.0, 1.0, 1.0, 1.0, 2.0], [9.0, 1.0, 1.0, 1.0, NAN, 2.0]]
    # It stays so, whatever comes later, and NaN of a head that is out does no harm.
    assert run(eliminator, losses) == expected
    assert eliminator.scores().isinf().tolist() == eliminator.active.logical_not().tolist()


def test_that_no_head_is_finite_is_refused_and_changes_nothing():
    eliminator = HeadEliminator(3, total_steps=10, interval=2, start=2, stop=8, beta=0.5)
    run(eliminator, [[1.0, 2.0, 3.0]])
    eliminator.add(vector(NAN, INF, NAN), torch.zeros(3), 4)
    before = eliminator.state_dict()
    for _ in range(2):
        with refuses(
            RuntimeError,
            "step: scores must be finite in some active head, got none of 3 at step 2; look for NaN in the"
            " inputs, or lower the learning rate",
        ):
            eliminator.step()
        assert_same(eliminator.state_dict(), before)


# What counts


@pytest.mark.parametrize("score", ["loss", "accuracy"])
def test_micro_batches_are_the_joint_batch(score):
    generator = np.random.default_rng(0)
    options = {"total_steps": 60, "interval": 3, "score": score, "fraction": 0.3}
    joint, parts, first = (HeadEliminator(7, **options) for _ in range(3))
    sequences = [], [], []
    for _ in range(60):
        rows = generator.random((11, 7)) * np.linspace(1, 2, 7)
        right = (rows < 0.6).astype(np.int64)
        for eliminator, borders in ((joint, []), (parts, [2, 3, 9]), (first, None)):
            for some, of_some in zip(
                [rows[:2]] if borders is None else np.split(rows, borders),
                [right[:2]] if borders is None else np.split(right, borders),
                strict=True,
            ):
                count = torch.tensor(len(some))
                eliminator.add(torch.from_numpy(some.mean(0)), torch.from_numpy(of_some.sum(0)), count)
        for eliminator, sequence in zip((joint, parts, first), sequences, strict=True):
            sequence.append(eliminator.step())
    assert sequences[0] == sequences[1] != sequences[2]
    assert sum(map(len, sequences[0])) >= 3
    torch.testing.assert_close(parts.scores(), joint.scores(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [3, torch.tensor(3), torch.tensor(3.0)])
def test_dtypes(dtype, count):
    eliminator = HeadEliminator(2, total_steps=10)
    loss = torch.tensor([0.1, 2.5], dtype=dtype, requires_grad=True)
    eliminator.add(loss, torch.tensor([1, 2], dtype=torch.int32), count)
    eliminator.step()
    # Of the numbers as they are in their dtype; times 3, times 0.1, and over both.
    torch.testing.assert_close(eliminator.scores(), loss.detach().double(), rtol=1e-15, atol=0)
    assert not eliminator.scores().requires_grad


def test_steps_without_rows_leave_the_average_and_have_no_check():
    options = {"total_steps": 10, "interval": 2, "start": 2, "stop": 10}
    eliminator = HeadEliminator(2, **options)
    assert eliminator.scores().tolist() == [INF, INF]
    assert eliminator.step() == []
    assert eliminator.scores().tolist() == [INF, INF]
    assert run(eliminator, [[1.0, 2.0]]) == [[1]]

    eliminator = HeadEliminator(2, **options)
    run(eliminator, [[1.0, 2.0]])
    before = eliminator.state_dict()
    assert run(eliminator, [[NAN, NAN]], count=torch.tensor(0)) == [
        []
    ]  # step 2, at which there would be a check
    assert_same(eliminator.state_dict(), {**before, "steps": 2})
    eliminator.add(vector(NAN, NAN), vector(NAN, NAN), 0)  # of rows that are all ignored, beside others
    assert run(eliminator, [[1.0, 2.0], [1.0, 2.0]]) == [[], [1]]
    assert eliminator.scores().tolist() == [1, INF]


def test_one_step_drops_once():
    eliminator = HeadEliminator(4, total_steps=10, interval=1, fraction=0.25, policy="fraction")
    assert run(eliminator, [[1.0, 2.0, 3.0, 4.0]]) == [[3]]
    assert [eliminator.step() for _ in range(3)] == [[], [], []]
    assert eliminator.num_active == 3


@pytest.mark.parametrize("score", ["loss", "accuracy", "dev"])
def test_what_is_said_of_a_dropped_head_is_not_kept(score):
    """So that processes which say different things of it are alike."""

    def state(last):
        eliminator = HeadEliminator(2, total_steps=10, interval=1, score=score)
        for x in (1.0, last):
            eliminator.add(vector(0.5, x), vector(2, 2 - x), 2)
            if score == "dev":
                eliminator.add_dev_scores(vector(0.5, 1 - x))
            eliminator.step()
        assert eliminator.active.tolist() == [True, False]
        return eliminator.state_dict()

    assert_same(state(NAN), state(0.25))


def test_what_readers_do_changes_nothing():
    eliminator = HeadEliminator(2, total_steps=10)
    run(eliminator, [[1.0, 2.0]])
    loss = vector(1.0, 2.0)
    eliminator.add(loss, torch.zeros(2), 1)
    before = eliminator.state_dict()
    for tensor in (loss, eliminator.active, eliminator.scores(), *eliminator.state_dict().values()):
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    assert_same(eliminator.state_dict(), before)
    eliminator.load_state_dict(before)
    before["pending"].zero_()
    assert eliminator.state_dict()["pending"].tolist() == [1, 2, 0, 0, 1]


# Scores of a development set


def test_dev_scores_are_used_as_they_are():
    eliminator = HeadEliminator(4, total_steps=10, score="dev", interval=2, fraction=0.5, stop=8)
    assert eliminator.scores().tolist() == [INF] * 4
    eliminator.add_dev_scores(vector(0.0, 0.0, 0.0, 0.0))
    eliminator.add_dev_scores(torch.tensor([0.75, 0.5, NAN, 0.25], dtype=torch.float32))
    assert eliminator.scores().tolist() == [0.25, 0.5, INF, 0.75]
    eliminator.add(vector(1.0, 2.0, 3.0, 4.0), torch.zeros(4), 8)  # may be told, and has no effect
    assert (eliminator.step(), eliminator.step()) == ([], [2, 3])
    assert eliminator.scores().tolist() == [0.25, 0.5, INF, INF]
    eliminator.step()
    before = eliminator.state_dict()
    with refuses(
        RuntimeError,
        "step: dev scores must be new at each check, got none before that of step 4; call add_dev_scores()"
        " first, or pass interval=, the steps from one evaluation to the next",
    ):
        eliminator.step()
    assert_same(eliminator.state_dict(), before)
    eliminator.add_dev_scores(vector(-0.5, 1.0, 99.0, 0.0))  # of a head that is out it may be anything
    assert eliminator.step() == [0]
    assert eliminator.scores().tolist() == [INF, 0, INF, INF]
    quiet = HeadEliminator(4, total_steps=10, score="dev", interval=2, policy="none")
    assert [quiet.step() for _ in range(10)] == [[]] * 10


def test_dev_scores_that_are_not():
    eliminator = HeadEliminator(2, total_steps=10, score="dev")
    with refuses(
        ValueError, "add_dev_scores: scores must be at most 1, got [85.0, 0.5]; divide percentages by 100"
    ):
        eliminator.add_dev_scores(vector(85, 0.5))
    with refuses(
        ValueError, "add_dev_scores: scores must have shape (2,), got (3,); pass one number for each head"
    ):
        eliminator.add_dev_scores(torch.zeros(3))
    with refuses(TypeError, "add_dev_scores: scores must be a tensor, got list"):
        eliminator.add_dev_scores([0.5, 0.5])
    with refuses(
        ValueError,
        "add_dev_scores: score must be 'dev', got 'loss'; pass score='dev' to HeadEliminator",
    ):
        HeadEliminator(2, total_steps=10).add_dev_scores(torch.zeros(2))


# Going on


def assert_same(found, expected):
    """Bit for bit, but that NaN is NaN."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert found[name] == value and type(found[name]) is type(value), name


@pytest.mark.parametrize(
    "options",
    [{}, {"score": "accuracy", "policy": "fraction"}, {"score": "dev"}, {"min_heads": 3, "beta": 0.5}],
    ids=str,
)
def test_a_run_that_is_resumed_anywhere_goes_on_bit_for_bit(options):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(30, 3, 6, generator=generator) + torch.linspace(0, 2, 6)
    losses[7, 1, 2] = NAN
    correct = torch.randint(5, (30, 3, 6), generator=generator)

    def make():
        return HeadEliminator(6, total_steps=30, interval=4, fraction=0.25, **options)

    def actions():
        for t in range(30):
            for i in range(3):
                yield lambda e, t=t, i=i: e.add(losses[t, i], correct[t, i], torch.tensor(4 + i))
            if options.get("score") == "dev" and t % 4 == 1:
                yield lambda e, t=t: e.add_dev_scores(1 - losses[t, 0])
            yield lambda e: e.step()

    whole, states, dropped = make(), [], []
    for action in actions():
        states.append(whole.state_dict())
        dropped.append(action(whole))
    assert len([out for out in dropped if out]) >= 2
    for begin in range(0, len(states), 3):  # which is between micro-batches, and after a step
        file = io.BytesIO()
        torch.save(states[begin], file)
        file.seek(0)
        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert_same(resumed.state_dict(), states[begin])
        assert [action(resumed) for action in list(actions())[begin:]] == dropped[begin:]
        assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"format": 2}, ValueError, "format must be 1, got 2; is it of another version?"),
        ({"format": None}, ValueError, "format must be 1, got None; is it of another version?"),
        (
            {"num_heads": 4},
            ValueError,
            "num_heads must be 3, got 4; make the HeadEliminator with the options of the state",
        ),
        (
            {"policy": "none"},
            ValueError,
            "policy must be 'margin', got 'none'; make the HeadEliminator with the options of the state",
        ),
        (
            {"beta": 0.5},
            ValueError,
            "beta must be 0.9, got 0.5; make the HeadEliminator with the options of the state",
        ),
        (
            {"active": torch.ones(4, dtype=torch.bool)},
            ValueError,
            "active must be torch.bool of shape (3,), got torch.bool of shape (4,); pass what state_dict()"
            " gave",
        ),
        (
            {"average": torch.zeros(3)},
            ValueError,
            "average must be torch.float64 of shape (3,), got torch.float32 of shape (3,); pass what"
            " state_dict() gave",
        ),
        (
            {"pending": torch.zeros(6, dtype=torch.float64)},
            ValueError,
            "pending must be torch.float64 of shape (7,), got torch.float64 of shape (6,); pass what"
            " state_dict() gave",
        ),
        ({"average": [0.0] * 3}, TypeError, "average must be a tensor, got list"),
        (
            {"active": torch.tensor([False, True, False])},
            ValueError,
            "active must have min_heads, 2, or more, got 1",
        ),
        (
            {"active": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            "active must have min_heads, 2, or more, got 0",
        ),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, got 1.0"),
        ({"weight": 1.5}, ValueError, "weight must be in [0, 1], got 1.5"),
        ({"weight": NAN}, ValueError, "weight must be in [0, 1], got nan"),
        ({"has_new_scores": "yes"}, ValueError, "has_new_scores must be one of False, True, got 'yes'"),
    ],
)
def test_states_that_are_not(changed, error, message):
    eliminator = HeadEliminator(3, total_steps=50, min_heads=2)
    run(eliminator, [[1.0, 2.0, 3.0]])
    eliminator.add(vector(1.0, 2.0, 3.0), torch.zeros(3), 1)
    state = eliminator.state_dict()
    with refuses(error, f"load_state_dict: {message}"):
        eliminator.load_state_dict({**state, **changed})
    assert_same(eliminator.state_dict(), state)
    name = next(iter(changed))
    del state[name]
    with refuses(
        ValueError,
        "load_state_dict: format must be 1, got None; is it of another version?"
        if name == "format"
        else f"load_state_dict: state must have {name}, got none; pass what state_dict() gave",
    ):
        eliminator.load_state_dict(state)


def test_a_state_that_is_no_mapping():
    with refuses(TypeError, "load_state_dict: state must be what state_dict() gave, got list"):
        HeadEliminator(3, total_steps=50).load_state_dict([1.0])


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got 2.0"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"score": "f1"}, ValueError, "score must be one of 'loss', 'accuracy', 'dev', got 'f1'"),
        ({"policy": "dev"}, ValueError, "policy must be one of 'margin', 'fraction', 'none', got 'dev'"),
        ({"beta": 1}, ValueError, "beta must be in [0, 1), got 1"),
        ({"beta": -0.1}, ValueError, "beta must be in [0, 1), got -0.1"),
        ({"beta": NAN}, ValueError, "beta must be in [0, 1), got nan"),
        ({"beta": "0.9"}, TypeError, "beta must be a number, got '0.9'"),
        ({"margin": -0.1}, ValueError, "margin must be finite and not negative, got -0.1"),
        ({"margin": INF}, ValueError, "margin must be finite and not negative, got inf"),
        ({"margin": 10**400}, ValueError, f"margin must be finite and not negative, got {10**400}"),
        ({"fraction": 0}, ValueError, "fraction must be in (0, 1], got 0"),
        ({"fraction": 1.5}, ValueError, "fraction must be in (0, 1], got 1.5"),
        ({"fraction": NAN}, ValueError, "fraction must be in (0, 1], got nan"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"stop": True}, TypeError, "stop must be an integer, got True"),
        (
            {"start": 60, "stop": 59},
            ValueError,
            "stop must leave a check, got stop=59 with start=60 and interval=10; raise it, or pass"
            " policy='none'",
        ),
        (
            {"interval": 91},
            ValueError,
            "stop must leave a check, got stop=90 with start=10 and interval=91; raise it, or pass"
            " policy='none'",
        ),
        ({"min_heads": 0}, ValueError, "min_heads must be at least 1, got 0"),
        ({"min_heads": 5}, ValueError, "min_heads must be at most num_heads, 4, got 5"),
        (
            {"process_group": "all"},
            TypeError,
            "process_group must be a torch.distributed.ProcessGroup, 'default' or None, got str",
        ),
    ],
)
def test_options_that_are_not(options, error, message):
    with refuses(error, message):
        HeadEliminator(**{"num_heads": 4, "total_steps": 100, **options})


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (
            (torch.zeros(2), torch.zeros(3), 1),
            ValueError,
            "loss must have shape (3,), got (2,); pass one number for each head",
        ),
        (
            (torch.zeros(3), torch.zeros(3, 1), 1),
            ValueError,
            "correct must have shape (3,), got (3, 1); pass one number for each head",
        ),
        (([0.0] * 3, torch.zeros(3), 1), TypeError, "loss must be a tensor, got list"),
        (
            (torch.zeros(3, dtype=torch.int64), torch.zeros(3), 1),
            TypeError,
            "loss must be floating point, got torch.int64",
        ),
        (
            (torch.zeros(3), torch.zeros(3, dtype=torch.complex64), 1),
            TypeError,
            "correct must be real, got torch.complex64",
        ),
        (
            (torch.zeros(3), torch.zeros(3), torch.tensor(1j)),
            TypeError,
            "count must be real, got torch.complex64",
        ),
        ((torch.zeros(3), torch.zeros(3), -1), ValueError, "count must be at least 0, got -1"),
        ((torch.zeros(3), torch.zeros(3), 1.0), TypeError, "count must be an integer, got 1.0"),
        (
            (torch.zeros(3), torch.zeros(3), torch.ones(1)),
            ValueError,
            "count must be a 0-d tensor, got shape (1,)",
        ),
    ],
)
def test_findings_that_are_not(found, error, message):
    eliminator = HeadEliminator(3, total_steps=10)
    before = eliminator.state_dict()
    with refuses(error, f"add: {message}"):
        eliminator.add(*found)
    assert_same(eliminator.state_dict(), before)


@pytest.mark.parametrize("count", [torch.tensor(-1), torch.tensor(NAN), torch.tensor(INF)])
def test_a_tensor_of_a_negative_count_is_found_by_the_step(count):
    eliminator = HeadEliminator(2, total_steps=10)
    eliminator.add(torch.zeros(2), torch.zeros(2), 5)  # which would make up for it
    eliminator.add(torch.zeros(2), torch.zeros(2), count)
    with refuses(
        ValueError,
        "step: count must be finite and not negative, got another in add(); pass the number of rows that"
        " count",
    ):
        eliminator.step()
    assert eliminator.steps == 0


def test_a_negative_score_has_no_margin():
    options = {"total_steps": 10, "interval": 1}
    losses = [[1.0, -0.25, 0.0]]
    with refuses(
        ValueError,
        "step: scores must not be negative with policy='margin', got -0.25 of head 1 at step 1; pass"
        " policy='fraction'",
    ):
        run(HeadEliminator(3, beta=0, **options), losses)
    assert run(HeadEliminator(3, policy="fraction", fraction=0.7, **options), losses) == [[0, 2]]


# On other devices


@pytest.mark.gpu
def test_on_a_gpu_adding_waits_for_nothing_and_the_same_heads_are_dropped():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(40, 2, 5, generator=generator) + torch.linspace(0, 1, 5)
    correct = torch.randint(9, (40, 2, 5), generator=generator)
    on_cpu, on_gpu = (HeadEliminator(5, total_steps=40, interval=4, fraction=0.3) for _ in range(2))
    of_gpu, right, count = losses.cuda(), correct.cuda(), torch.tensor(8, device="cuda")
    for t in range(40):
        on_cpu.add(losses[t, 0], correct[t, 0], 8)
        on_cpu.add(losses[t, 1], correct[t, 1], 8)
        with waits_are_errors():
            on_gpu.add(of_gpu[t, 0], right[t, 0], 8)
            on_gpu.add(of_gpu[t, 1], right[t, 1], count)
        if t == 20:  # what a saved state has is on the CPU
            on_gpu.load_state_dict(on_gpu.state_dict())
        assert on_gpu.step() == on_cpu.step()
    assert on_gpu.num_active < 4
    assert_same(on_gpu.state_dict(), on_cpu.state_dict())
