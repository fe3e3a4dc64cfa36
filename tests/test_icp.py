"""ops.icp_epoch against its float64 oracle: shapes, ties, signs, restarts, pairs, NaN, layouts, compile."""

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from fastkit import ops
from fastkit._threads import threads
from fastkit.ops.icp import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.icp import icp_epoch
from fastkit.testing.icp import SIZES, Inputs, alone, assert_equal, check, expected_batches, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

FLOAT, DOUBLE = torch.float32, torch.float64
NAN, INF = math.nan, math.inf


def identity(restarts, D, dtype=FLOAT):
    return torch.eye(D, dtype=dtype).expand(restarts, D, D)


# Against the oracle


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 1.0, "lr": 0.5, "epoch": 2}, {"mutual_only": True, "cycle_weight": 1.0}],
    ids=["adam", "damped", "mutual"],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, options, dtype, impl):
    check(make_inputs(size.n, size.m, size.D, dtype=dtype), batch_size=size.B, impl=impl, **options)


@pytest.mark.parametrize("mutual_only", [False, True])
@pytest.mark.parametrize(("dtype", "eps", "lr"), [(DOUBLE, 1e-8, 1e-2), (FLOAT, 10.0, 1.0)])
@pytest.mark.parametrize(("n", "m", "D", "B"), [(130, 110, 7, 8), (300, 310, 25, 20)])
def test_many_steps(n, m, D, B, dtype, eps, lr, mutual_only, impl):
    """In float32 damped by eps: else a gradient below its error has a step of its own."""
    inputs = make_inputs(n, m, D, dtype=dtype, restarts=1)
    options = {"batch_size": B, "mutual_only": mutual_only}
    found = check(inputs, eps=eps, lr=lr, impl=impl, **options)
    assert len(expected_batches(found, inputs.seeds, 0, epoch=0, **options)) > 5


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 47, 48, 49])
def test_every_number_of_rows(n, impl):
    """Beside a fixed one: what is left of vectors and tiles."""
    check(make_inputs(n, 7, 3, restarts=1, seed=n), batch_size=1, impl=impl, mutual_only=True)
    check(make_inputs(9, n, 5, restarts=1, seed=n, dtype=DOUBLE), batch_size=min(n, 9), impl=impl)


@pytest.mark.parametrize("D", [*range(1, 20), 31, 32, 48, 64])
def test_every_number_of_columns(D, impl):
    for dtype in (FLOAT, DOUBLE):
        check(make_inputs(20, 21, D, restarts=1, dtype=dtype, seed=D), batch_size=10, impl=impl)


def test_adam_s_options(impl):
    inputs = make_inputs(30, 30, 4, dtype=DOUBLE)
    for options in (
        {"betas": (0.9, 0.99)},
        {"betas": (0.0, 0.0)},
        {"cycle_weight": 0.0},
        {"lr": 1, "eps": 2},
    ):
        check(inputs, batch_size=15, impl=impl, **options)


@pytest.mark.parametrize("epoch", [0, 1, 2**31, 2**32 - 1])
def test_seeds_and_epochs(epoch, impl):
    """All 64 bits of a seed count, and none of an epoch's is lost."""
    inputs = make_inputs(12, 12, 2, restarts=7, dtype=DOUBLE)
    same = [t[:1].expand(7, 2, 2) for t in (inputs.w_xy, inputs.w_yx)]
    seeds = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63), 1 - 2**32])
    found = check(Inputs(*inputs[:2], *same, seeds), epoch=epoch, batch_size=3, impl=impl)
    assert len({tuple(w.flatten().tolist()) for w in found.w_xy}) == 7
    again = icp_epoch(*inputs[:2], *same, seeds, epoch=epoch ^ 1, batch_size=3, impl=impl)
    assert (again.w_xy != found.w_xy).flatten(1).any(1).all()


def test_recovers_a_turned_copy(impl):
    """From maps that are near: all rows find themselves, and the cost goes to that of the last steps."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    source = torch.randn(120, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    order = torch.randperm(120, generator=generator)
    target = (source @ turn.T)[order]
    start = turn + 0.15 * torch.randn(3, 4, 4, generator=generator)
    w_xy, w_yx = start, start.mT
    costs = []
    for epoch in range(25):
        found = icp_epoch(
            source,
            target,
            w_xy,
            w_yx,
            torch.arange(3),
            epoch=epoch,
            batch_size=30,
            lr=3e-2 * 0.85**epoch,
            impl=impl,
        )
        w_xy, w_yx = found.w_xy, found.w_yx
        costs.append(found.cost)
    assert (found.mutual == 120).all()
    assert (found.nearest_source == order).all()
    assert (costs[-1] <= 1e-3).all() and (costs[-1] < costs[0] / 50).all()


# Ties


@pytest.mark.parametrize("D", [1, 2, 5])
def test_of_equal_distances_the_first_is_taken(D, impl):
    """Of whole numbers, whose sums are exact."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(D)
    source, target = (torch.randint(-3, 4, (n, D), generator=generator) for n in (40, 50))
    maps = torch.randint(-1, 2, (2, 3, D, D), generator=generator)
    found = icp_epoch(
        *(t.float() for t in (source, target, maps[0], maps[1])),
        torch.arange(3),
        epoch=0,
        batch_size=40,
        impl=impl,
    )
    for r, (w_xy, w_yx) in enumerate(zip(*maps.float(), strict=True)):
        for rows, keys, nearest in (
            (source, target.float() @ w_yx.T, found.nearest_target[r]),
            (target, source.float() @ w_xy.T, found.nearest_source[r]),
        ):
            distance = (rows.unsqueeze(1) - keys).square().sum(2)
            first = (distance == distance.amin(1, keepdim=True)).int().argmax(1)
            assert torch.equal(nearest, first)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_of_equal_rows_the_first_is_taken(dtype, impl):
    """Wherever in vectors and tiles they are: equal rows have equal scores, of any numbers."""
    source, target, *rest = make_inputs(70, 23, 9, dtype=dtype)
    target = target[torch.arange(115) % 23]
    source = source.repeat(2, 1)
    found = icp_epoch(source, target, *rest, epoch=0, batch_size=50, impl=impl)
    assert (found.nearest_target < 23).all() and (found.nearest_source < 70).all()
    assert torch.equal(found.nearest_target[:, :70], found.nearest_target[:, 70:])


# Signs, restarts, threads: bit for bit


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_a_pattern_of_signs_is_the_initial_map(dtype, impl):
    """Maps diag(s): what the identity makes of a target with the signs s, turned back, over epochs."""
    source, target, _, _, _ = make_inputs(90, 80, 6, dtype=dtype)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=3)), dtype=dtype).repeat(1, 2)
    seeds = torch.arange(len(signs)) // 2
    diagonal = torch.diag_embed(signs)
    w_xy = w_yx = diagonal
    turned = [identity(1, 6, dtype)] * len(signs), [identity(1, 6, dtype)] * len(signs)
    for epoch in range(3):
        options = {"epoch": epoch, "batch_size": 16, "mutual_only": epoch == 2, "impl": impl}
        found = icp_epoch(source, target, w_xy, w_yx, seeds, **options)
        w_xy, w_yx = found.w_xy, found.w_yx
        for r, s in enumerate(signs):
            there = icp_epoch(source, target * s, turned[0][r], turned[1][r], seeds[r : r + 1], **options)
            turned[0][r], turned[1][r] = there.w_xy, there.w_yx
            back = there._replace(w_xy=diagonal[r] @ there.w_xy, w_yx=there.w_yx @ diagonal[r])
            assert_equal(back, type(found)(*(t[r : r + 1] for t in found)))
    assert not torch.equal(w_xy[0], w_xy[1] @ diagonal[1])


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("D", [3, 25])
@pytest.mark.parametrize("mutual_only", [False, True])
def test_a_restart_is_the_same_in_any_company(D, dtype, mutual_only, impl):
    inputs = make_inputs(70, 90, D, restarts=5, dtype=dtype)
    options = {"epoch": 1, "batch_size": 20, "mutual_only": mutual_only, "impl": impl}
    found = icp_epoch(*inputs, **options)
    order = [3, 0, 4, 4]
    some = icp_epoch(*inputs[:2], *(t[order] for t in inputs[2:]), **options)
    assert_equal(some, type(found)(*(t[order] for t in found)))
    for r in range(5):
        one = icp_epoch(*alone(inputs, r), **options)
        assert_equal(one, type(found)(*(t[r : r + 1] for t in found)))


@pytest.mark.parametrize("restarts", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(restarts, impl):
    shapes, counts = (
        ([(150, 400, 25), (260, 250, 97)], (2, 4)) if impl != "reference" else ([(90, 99, 33)], (2,))
    )
    for n, m, D in shapes:
        inputs = make_inputs(n, m, D, restarts=restarts)
        found = icp_epoch(*inputs, epoch=0, batch_size=50, impl=impl)
        for count in counts:
            with threads(count):
                assert_equal(icp_epoch(*inputs, epoch=0, batch_size=50, impl=impl), found)


def test_ten_runs_give_the_same_bits(impl):
    inputs = make_inputs(50, 60, 9)
    first = icp_epoch(*inputs, epoch=0, batch_size=10, impl=impl)
    with threads(2):
        for _ in range(10):
            assert_equal(icp_epoch(*inputs, epoch=0, batch_size=10, impl=impl), first)


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        from fastkit.testing.icp import SIZES, check, make_inputs
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        torch.set_num_threads(1)
        for dtype in (torch.float32, torch.float64):
            for size in SIZES:
                inputs = make_inputs(size.n, size.m, size.D, dtype=dtype, restarts=1)
                check(inputs, batch_size=size.B, impl="cpu")
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


# Pairs


def test_given_pairs_take_the_place_of_the_search(impl):
    inputs = make_inputs(40, 30, 5)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    pairs = (
        torch.randint(30, (2, 40), generator=generator),
        torch.randint(40, (2, 30), generator=generator),
    )
    for mutual_only in (False, True):
        check(inputs, batch_size=8, pairs=pairs, mutual_only=mutual_only, impl=impl)


def test_the_search_s_own_pairs_give_the_same_bits(impl):
    inputs = make_inputs(40, 30, 5)
    options = {"epoch": 4, "batch_size": 8, "impl": impl}
    found = icp_epoch(*inputs, **options)
    pairs = found.nearest_target, found.nearest_source
    again = icp_epoch(*inputs, **options, pairs=pairs)
    assert_equal(again, found)
    assert again.nearest_target.data_ptr() != pairs[0].data_ptr()
    assert again.nearest_source.data_ptr() != pairs[1].data_ptr()


def test_pairs_of_one_restart_serve_all(impl):
    inputs = make_inputs(40, 30, 5, restarts=3)
    found = icp_epoch(*alone(inputs, 0), epoch=0, batch_size=8, impl=impl)
    pairs = found.nearest_target.expand(3, -1), found.nearest_source.expand(3, -1)
    again = check(inputs, batch_size=8, pairs=pairs, impl=impl)
    assert torch.equal(again.w_xy[:1], found.w_xy)


# Mutual pairs


def pairs_with(mutual, n=10):
    """Of n rows each, where so many are mutual."""
    there = torch.arange(n)
    back = torch.arange(n)
    back[mutual:] = (torch.arange(mutual, n) - mutual + 1) % (n - mutual) + mutual if n - mutual > 1 else 0
    return there[None], back[None]


@pytest.mark.parametrize(
    ("mutual", "batch_size", "sizes"),
    [(0, 4, []), (1, 4, [1]), (3, 4, [3]), (4, 4, [4]), (7, 3, [3, 3]), (3, 500, [3]), (10, 500, [10])],
)
def test_only_mutual_pairs_are_visited(mutual, batch_size, sizes, impl):
    """In whole batches; where there is none, in one of all that there are."""
    inputs = make_inputs(10, 10, 3, restarts=1, dtype=DOUBLE)
    options = {"batch_size": batch_size, "mutual_only": True}
    found = check(inputs, pairs=pairs_with(mutual), impl=impl, **options)
    assert int(found.mutual) == mutual
    assert [len(x) for x, _ in expected_batches(found, inputs.seeds, 0, epoch=0, **options)] == sizes
    assert torch.equal(found.w_xy, inputs.w_xy) is (mutual == 0)
    if mutual:
        assert not torch.equal(found.w_yx, inputs.w_yx)


def test_what_is_not_mutual_has_no_part(impl):
    """Rows that are not may be anything, as long as they are not."""
    inputs = make_inputs(10, 10, 3, restarts=1)
    options = {"epoch": 0, "batch_size": 2, "mutual_only": True, "pairs": pairs_with(6), "impl": impl}
    found = icp_epoch(*inputs, **options)
    source, target = inputs.source.clone(), inputs.target.clone()
    source[6:], target[6:] = 100.0, -7.0
    other = icp_epoch(source, target, *inputs[2:], **options)
    assert torch.equal(other.w_xy, found.w_xy) and torch.equal(other.w_yx, found.w_yx)


# What is not finite


def clean_and(impl, **changed):
    """Of three restarts, before and after entries are changed: inputs, and results."""
    inputs = make_inputs(40, 30, 5, restarts=3)
    options = {"epoch": 0, "batch_size": 8, "impl": impl}
    bad = inputs._replace(**{name: change(getattr(inputs, name).clone()) for name, change in changed.items()})
    return bad, icp_epoch(*inputs, **options), icp_epoch(*bad, **options)


def entry(value, *at):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


def assert_left_alone(found, inputs, restart=slice(None)):
    assert (found.cost[restart] == INF).all()
    for name in ("w_xy", "w_yx"):
        after, before = getattr(found, name)[restart], getattr(inputs, name)[restart]
        assert torch.equal(after.view(torch.int32), before.view(torch.int32))  # of NaN too


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_is_not_chosen_and_nothing_moves(bad, impl):
    inputs, clean, found = clean_and(impl, source=entry(bad, 17, 2))
    assert_left_alone(found, inputs)
    assert (found.nearest_source != 17).all()
    others = torch.arange(40) != 17
    assert torch.equal(found.nearest_target[:, others], clean.nearest_target[:, others])
    kept = clean.nearest_source != 17
    assert torch.equal(found.nearest_source[kept], clean.nearest_source[kept])
    assert ((found.nearest_source >= 0) & (found.nearest_source < 40)).all()
    if math.isnan(bad):
        assert (found.nearest_target[:, 17] == -1).all()
    assert ((found.nearest_target >= -1) & (found.nearest_target < 30)).all()
    for r in range(3):  # -1 is nobody's nearest
        there, back = found.nearest_target[r], found.nearest_source[r]
        mutual = sum(int(j) >= 0 and int(back[j]) == i for i, j in enumerate(there))
        assert int(found.mutual[r]) == mutual > 0

    inputs, clean, found = clean_and(impl, target=entry(bad, 3, 0))
    assert_left_alone(found, inputs)
    assert (found.nearest_target != 3).all() and (found.nearest_target >= 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["w_xy", "w_yx"])
def test_a_map_that_is_not_finite_touches_no_other_restart(name, bad, impl):
    inputs, clean, found = clean_and(impl, **{name: entry(bad, 1, 4, 2)})
    assert_left_alone(found, inputs, 1)
    for r in (0, 2):
        assert_equal(*(type(found)(*(t[r] for t in result)) for result in (found, clean)))
    unharmed = "nearest_target" if name == "w_xy" else "nearest_source"
    harmed = "nearest_source" if name == "w_xy" else "nearest_target"
    assert torch.equal(getattr(found, unharmed), getattr(clean, unharmed))
    if math.isnan(bad):
        assert (getattr(found, harmed)[1] == -1).all() and found.mutual[1] == 0


def test_nothing_but_nan(impl):
    inputs = make_inputs(6, 5, 2)
    inputs = inputs._replace(target=torch.full_like(inputs.target, NAN))
    for mutual_only in (False, True):
        found = icp_epoch(*inputs, epoch=0, batch_size=5, mutual_only=mutual_only, impl=impl)
        assert_left_alone(found, inputs)
        assert (found.nearest_target == -1).all() and (found.nearest_source == -1).all()
        assert (found.mutual == 0).all()


def test_squares_that_overflow(impl):
    inputs = make_inputs(6, 5, 2)
    inputs = inputs._replace(source=inputs.source * 1e30, target=inputs.target * 1e30)
    assert_left_alone(icp_epoch(*inputs, epoch=0, batch_size=5, impl=impl), inputs)


def test_given_pairs_with_a_map_that_is_not_finite(impl):
    inputs = make_inputs(10, 10, 3, restarts=1)
    inputs.w_yx[0, 0, 0] = NAN
    found = icp_epoch(*inputs, epoch=0, batch_size=2, pairs=pairs_with(6), impl=impl)
    assert_left_alone(found, inputs)
    assert int(found.mutual) == 6 and torch.equal(found.nearest_target, pairs_with(6)[0])


def test_a_map_that_flies_away_is_left_there(impl):
    """What a rate beyond reason makes is the caller's; the next epoch says so by its cost."""
    inputs = make_inputs(10, 10, 3)
    found = icp_epoch(*inputs, epoch=0, batch_size=2, lr=1e38, impl=impl)
    assert found.cost.isfinite().all()
    then = inputs._replace(w_xy=found.w_xy, w_yx=found.w_yx)
    assert_left_alone(icp_epoch(*then, epoch=1, batch_size=2, impl=impl), then)


# Layouts, and what is done to arguments


def test_strides(impl):
    inputs = make_inputs(40, 30, 5, restarts=3)
    pairs = torch.randint(30, (3, 40)), torch.randint(40, (3, 30))
    wide = torch.randn(41, 11)
    wide[1:, 1::2] = inputs.source
    laid_out = Inputs(
        wide[1:, 1::2],
        inputs.target.T.contiguous().T,
        inputs.w_xy.mT.contiguous().mT,
        inputs.w_yx.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        inputs.seeds.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in laid_out)
    options = {"epoch": 0, "batch_size": 8, "impl": impl}
    assert_equal(icp_epoch(*laid_out, **options), icp_epoch(*inputs, **options))
    columns = tuple(t.T.contiguous().T for t in pairs)
    assert_equal(icp_epoch(*laid_out, **options, pairs=columns), icp_epoch(*inputs, **options, pairs=pairs))


def test_expanded_maps(impl):
    inputs = make_inputs(40, 30, 5, restarts=2)
    one = [t[:1].expand(2, 5, 5) for t in inputs[2:4]]
    found = icp_epoch(*inputs[:2], *one, inputs.seeds[:1].expand(2), epoch=0, batch_size=8, impl=impl)
    assert torch.equal(found.w_xy[0], found.w_xy[1])
    assert_equal(
        type(found)(*(t[:1] for t in found)), icp_epoch(*alone(inputs, 0), epoch=0, batch_size=8, impl=impl)
    )


def test_arguments_are_not_written_to(impl):
    inputs = make_inputs(40, 30, 5)
    copies = [t.clone() for t in inputs]
    found = icp_epoch(*inputs, epoch=0, batch_size=8, impl=impl)
    for result in (found, icp_epoch(*inputs, epoch=0, batch_size=8, pairs=found[2:4], impl=impl)):
        result.w_xy.zero_(), result.w_yx.zero_()
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))


def test_nothing_is_differentiable(impl):
    inputs = make_inputs(40, 30, 5)
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    options = {"epoch": 0, "batch_size": 8, "impl": impl}
    found = icp_epoch(*leaves, inputs.seeds, **options)
    assert not any(t.requires_grad for t in found)
    assert_equal(found, icp_epoch(*inputs, **options))
    parameters = [torch.nn.Parameter(t) for t in inputs[:4]]
    with torch.inference_mode():
        assert_equal(icp_epoch(*parameters, inputs.seeds, **options), found)


def test_autocast_changes_nothing(impl):
    inputs = make_inputs(40, 30, 5)
    options = {"epoch": 0, "batch_size": 8, "impl": impl}
    with torch.autocast(inputs.source.device.type, dtype=torch.bfloat16):
        found = icp_epoch(*inputs, **options)
    assert_equal(found, icp_epoch(*inputs, **options))


def test_the_result_is_named(impl):
    found = icp_epoch(*make_inputs(2, 2, 1), epoch=0, batch_size=1, impl=impl)
    assert type(found) is ops.ICPEpoch
    assert found._fields == ("w_xy", "w_yx", "nearest_target", "nearest_source", "cost", "mutual")


# Compilation, the raw op


def test_compiles_in_one_graph(native):
    inputs = make_inputs(20, 30, 4)

    def run(*tensors):
        return icp_epoch(*tensors, epoch=3, batch_size=5)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = compiled(*inputs)
    assert_equal(found, run(*inputs))
    with torch.no_grad():
        assert_equal(compiled(*(t.clone().requires_grad_(t.is_floating_point()) for t in inputs)), found)


def test_unchecked_pairs_of_a_compiled_call_are_no_pairs(native):
    """Their values are not looked at there; nothing outside the tables is read."""
    inputs = make_inputs(20, 30, 4)
    pairs = torch.full((2, 20), 2**40), torch.full((2, 30), -5)

    def run(*tensors):
        return icp_epoch(*tensors, epoch=3, batch_size=5, pairs=pairs, impl="cpu")

    found = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    assert_left_alone(found, inputs)
    assert (found.mutual == 0).all()


def test_opcheck(native):
    inputs = make_inputs(9, 7, 3)
    numbers = 1, 4, 1e-2, 0.5, 0.999, 1e-8, 1e-2
    pairs = torch.randint(7, (2, 9)), torch.randint(9, (2, 7))
    for nearest, mutual_only in (((None, None), False), (pairs, True)):
        opcheck(torch.ops.fastkit.icp_epoch_fwd.default, (*inputs, *nearest, *numbers, mutual_only))


def test_the_meta_device_has_shapes():
    inputs = Inputs(*(t.to("meta") for t in make_inputs(9, 7, 3)))
    found = icp_epoch(*inputs, epoch=0, batch_size=4)
    real = icp_epoch(*make_inputs(9, 7, 3), epoch=0, batch_size=4, impl="reference")
    for one, other in zip(found, real, strict=True):
        assert one.is_meta and one.shape == other.shape and one.dtype == other.dtype
