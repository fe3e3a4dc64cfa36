"""ops.orthogonality_penalty in every implementation that runs here, against float64."""

import itertools
import sys

import pytest
import torch

from fastkit._threads import threads
from fastkit.ops import orthogonality_penalty
from fastkit.ops.multihead_loss_penalty import PENALTY_KERNELS as KERNELS
from fastkit.testing.multihead_loss import check_penalty, make_heads

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = DOUBLE, FLOAT, BFLOAT, HALF
KINDS = "abs", "squared", "cos_abs", "cos_squared", "huber"
RAW = torch.ops.fastkit

# Heads around the kernel's block of 128 rows.
SIZES = [
    (H, C, D)
    for i, H in enumerate((1, 2, 127, 128, 129, 300))
    for C, D in zip((1, 2, 3), ((1, 8, 33) * 2)[i % 3 : i % 3 + 3], strict=True)
] + [(2, 150, 8), (7, 150, 33), (128, 17, 33), (129, 17, 1)]


def run(size, kind, dtype, impl, *, inactive=False, **options):
    """Whether the call agrees with float64."""
    heads = make_heads(*size, dtype=dtype, inactive=inactive)
    return check_penalty(heads, {"kind": kind, **options}, impl=impl)


def results_of(impl, weight, **options):
    """The penalty, and its gradient."""
    weight = weight.detach().requires_grad_()
    penalty = orthogonality_penalty(weight, impl=impl, **options)
    return penalty.detach(), *torch.autograd.grad(penalty, weight)


def noise(*shape, dtype=DOUBLE, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, size):
    for dtype, inactive in itertools.product((DOUBLE, FLOAT), (False, True)):
        # Of many centered classes there is a sign in doubt in every head.
        for centers in {False, size[1] in (2, 3) or (size[0] < 10 and size[1] > 1)}:
            run(size, kind, dtype, "cpu", inactive=inactive, center_classes=centers)


@pytest.mark.parametrize("size", [(1, 2, 3), (5, 3, 8), (130, 2, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype, size, impl):
    for inactive, centers in itertools.product((False, True), (False, True)):
        run(size, kind, dtype, impl, inactive=inactive, center_classes=centers)


@pytest.mark.parametrize("kind", ["abs", "huber", "cos_squared"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_every_number_of_heads(dtype, kind):
    """Tiles before, on and after the diagonal, whole and not; one block of rows and several."""
    for H in (*range(1, 36), 63, 65, *range(143, 147), 191, 192, 193, 256, 257, 385):
        run((H, 1, 5), kind, dtype, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_no_head_of_any_strides(kind, impl):
    """Where none is active, what is left of the weight has strides that say nothing."""
    weight = noise(1, 2, 3).flip(0, 1, 2).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    penalty = orthogonality_penalty(weight, kind=kind, active=torch.tensor([False]), impl=impl)
    penalty.backward()
    assert penalty == 0 and not weight.grad.any()


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_classes_that_are_not_worked_on_together(dtype):
    """In 4 MiB there is room for one or two of these, with their slopes."""
    for gradient in (False, True):
        weight = noise(400, 3, 700, dtype=dtype).requires_grad_(gradient)
        found = orthogonality_penalty(weight, kind="squared", impl="cpu")
        by_class = weight.detach().double().transpose(0, 1)
        gram = by_class @ by_class.mT
        expected = gram.square().triu(1).sum()
        torch.testing.assert_close(found.double(), expected, rtol=700 * torch.finfo(dtype).eps, atol=0)
    found.backward()
    of_weight = (2 * gram.diagonal_scatter(torch.zeros(3, 400), 0, 1, 2) @ by_class).transpose(0, 1)
    bound = 1100 * torch.finfo(dtype).eps * float(of_weight.abs().max())
    torch.testing.assert_close(weight.grad.double(), of_weight, rtol=0, atol=bound)


@pytest.mark.parametrize("width", [1e-30, 1e-3, 0.7, 5.0, 1e30])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_widths_of_huber(dtype, width, impl):
    """From abs to squared."""
    size = (20, 3, 8)
    found = run(size, "huber", dtype, impl, huber_width=width)
    if width == 1e-30:
        torch.testing.assert_close(found, run(size, "abs", dtype, impl), rtol=1e-5, atol=0)
    if width == 1e30:
        for name, t in run(size, "squared", dtype, impl).items():
            expected = t.double() / (2 * width)
            bound = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=bound)


def test_more_threads():
    with threads(2):
        for kind in KINDS:
            run((300, 3, 33), kind, FLOAT, "cpu", center_classes=True)


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind, impl):
    """Transposed, with gaps, expanded, and in another order."""
    weight = noise(9, 3, 5)
    active = torch.arange(9) % 4 != 2
    options = {"kind": kind, "center_classes": True}
    for on in (None, active):
        expected = results_of(impl, weight, active=on, **options)
        on = None if on is None else torch.stack([on, ~on], 1)[:, 0]
        for moved in (
            torch.stack([weight, weight], -1)[..., 0],
            weight.mT.contiguous().mT,
            weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            weight.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            assert not moved.is_contiguous()
            found = results_of(impl, moved, active=on, **options)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for shared in (weight[:1].expand_as(weight), weight[..., :1].expand_as(weight)):
        options["center_classes"] = False
        found, want = (results_of(impl, w, **options) for w in (shared, shared.contiguous()))
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [False, True])
def test_what_an_inactive_head_holds_does_not_matter(centers, kind, bad, impl):
    weight = noise(9, 3, 5, dtype=FLOAT)
    on = torch.arange(9) % 4 != 2
    options = {"kind": kind, "center_classes": centers, "active": on}
    clean = results_of(impl, weight, **options)
    poisoned = results_of(impl, weight.masked_fill(~on[:, None, None], bad), **options)
    assert all(map(torch.equal, clean, poisoned))
    penalty, gradient = poisoned
    assert penalty > 0 and not gradient[~on].any() and gradient[on].any(2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_one_head_or_none_it_is_zero(dtype, kind, impl):
    weight = noise(5, 3, 4, dtype=dtype)
    active = torch.zeros(5, dtype=torch.bool)
    for on in range(2):
        active[:on] = True
        penalty, gradient = results_of(impl, weight, kind=kind, active=active)
        assert penalty == 0 and gradient.shape == weight.shape and not gradient.any()
    penalty, gradient = results_of(impl, weight[:1], kind=kind, center_classes=True)
    assert penalty == 0 and not gradient.any()


# Values at the edge


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_exactly_orthogonal_has_neither_penalty_nor_gradient(dtype, kind, impl):
    """More heads than a block has; each has another coordinate, and another sign and size."""
    H = 150
    size = torch.tensor([0.25, -3.0, 1e-2])[torch.arange(H) % 3]
    weight = torch.diag(size)[:, None].expand(H, 2, H).to(dtype)
    penalty, gradient = results_of(impl, weight, kind=kind)
    assert penalty == 0 and not gradient.any()
    moved = weight.clone()
    moved[140, 1, 3] = 0.5  # no longer orthogonal to one of another block
    penalty, gradient = results_of(impl, moved, kind=kind)
    assert penalty > 0 and gradient.any(2).nonzero().tolist() == [[3, 1], [140, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [False, True])
def test_rows_of_zeros(centers, kind, dtype, impl):
    """Add nothing, and have finite gradients: none, where they are not centered."""
    weight = noise(150, 3, 5, dtype=dtype)
    weight[[4, 140]] = 0
    weight[7, 1] = 0
    penalty, gradient = results_of(impl, weight, kind=kind, center_classes=centers)
    assert penalty.isfinite() and gradient.isfinite().all()
    without, others = results_of(
        impl, weight, kind=kind, center_classes=centers, active=weight.flatten(1).any(1)
    )
    eps = torch.finfo(penalty.dtype).eps
    torch.testing.assert_close(penalty, without, rtol=64 * eps, atol=0)
    torch.testing.assert_close(gradient, others, rtol=64 * torch.finfo(dtype).eps, atol=1e3 * eps)
    assert not gradient[[4, 140]].any()
    all_zero = results_of(impl, torch.zeros_like(weight), kind=kind, center_classes=centers)
    assert not any(t.any() for t in all_zero)


@pytest.mark.parametrize("kind", ["cos_abs", "cos_squared"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_rows_shorter_than_the_least_norm(dtype, kind, impl):
    """Are divided by it, and so have cosines that grow with them."""
    weight = noise(6, 2, 4, dtype=dtype)
    weight[2] *= 1e-14 / torch.linalg.vector_norm(weight[2], dim=1, keepdim=True)
    check_penalty(make_heads(6, 2, 4, dtype=dtype)._replace(weight=weight), {"kind": kind}, impl=impl)
    half, whole = (
        results_of(impl, weight[[0, 2]] * torch.tensor([1, f], dtype=dtype)[:, None, None], kind=kind)[0]
        for f in (0.5, 1.0)
    )
    torch.testing.assert_close(whole, (2 if kind == "cos_abs" else 4) * half, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_have_a_penalty_that_is_not(bad, kind, impl):
    """No number stands for what is none; as the reference has it."""
    weight = noise(150, 2, 4, dtype=FLOAT)
    weight[140, 1, 2] = bad
    penalty, gradient = results_of(impl, weight, kind=kind)
    expected, wanted = results_of("reference", weight, kind=kind)
    assert torch.equal(penalty.isnan(), expected.isnan()) and not penalty.isfinite()
    assert not gradient[:, 1].isfinite().all()
    if kind != "huber":  # whose slope is a sign far from 0; PyTorch multiplies the other branch by 0
        assert not (gradient.isfinite() & ~wanted.isfinite()).any()
    torch.testing.assert_close(gradient[:, 0], wanted[:, 0], rtol=1e-3, atol=1e-3)  # the other class


# What it does not see


@pytest.mark.parametrize("kind", ["cos_abs", "cos_squared"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_cosines_do_not_see_the_sizes_of_rows(dtype, kind, impl):
    """Powers of two change no bit of them; the gradient, at right angles to each row, shrinks as it grows."""
    weight = noise(140, 3, 8, dtype=dtype)
    size = torch.exp2(torch.arange(140 * 3, dtype=dtype).view(140, 3, 1) % 11 - 5)
    penalty, gradient = results_of(impl, weight, kind=kind)
    scaled, of_scaled = results_of(impl, weight * size, kind=kind)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(scaled, penalty, rtol=16 * eps, atol=0)
    torch.testing.assert_close(
        of_scaled * size, gradient, rtol=0, atol=256 * eps * float(gradient.abs().max())
    )
    along = (gradient * weight).sum(2).abs()
    assert (along <= 256 * eps * (gradient.abs() * weight.abs()).sum(2).max()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [False, True])
def test_the_order_of_heads_and_of_classes_is_no_matter(centers, kind, impl):
    weight = noise(150, 3, 8)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    heads, classes = torch.randperm(150, generator=generator), torch.tensor([2, 0, 1])
    penalty, gradient = results_of(impl, weight, kind=kind, center_classes=centers)
    moved = results_of(impl, weight[heads][:, classes], kind=kind, center_classes=centers)
    torch.testing.assert_close(moved[0], penalty, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved[1], gradient[heads][:, classes], rtol=1e-9, atol=1e-9)


def test_what_classes_have_in_common_is_not_seen_where_they_are_centered(impl):
    weight = noise(20, 3, 8)
    common = weight + 3 * noise(20, 1, 8, seed=1)
    for kind in KINDS:
        one, other = (results_of(impl, w, kind=kind, center_classes=True) for w in (weight, common))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert one[1].sum(1).abs().max() <= 1e-12 * one[1].abs().max()  # no gradient along what is common
        assert (results_of(impl, common, kind=kind)[0] - one[0]).abs() > 0.05 * one[0]


# Bits and memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, BFLOAT], ids=str)
def test_the_same_call_gives_the_same_bits(dtype, kind, impl):
    weight = noise(150, 3, 33, dtype=dtype)
    expected = results_of(impl, weight, kind=kind)
    for _ in range(3):
        assert all(map(torch.equal, results_of(impl, weight, kind=kind), expected))
    with torch.no_grad():  # in which no gradient is formed
        assert torch.equal(orthogonality_penalty(weight, kind=kind, impl=impl), expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [False, True])
def test_the_weight_is_not_written_to(centers, kind, impl):
    for active in (None, torch.arange(20) % 3 != 1):
        weight = noise(20, 3, 8)
        results_of(impl, weight, kind=kind, active=active, center_classes=centers)
        assert torch.equal(weight, noise(20, 3, 8))


def raw_call(kind, dtype, size, gradient):
    """Arguments of the kernel: rows of noise, those of a head not beside those of the next."""
    H, C, D = size
    rows = noise(H, C + 1, D, dtype=dtype)[:, :C]
    return [
        rows,
        kind,
        0.7,
        torch.full((C, H), 5, dtype=dtype),
        torch.full(size, 5, dtype=dtype) if gradient else None,
    ]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
@pytest.mark.parametrize("kind", ["abs", "squared", "huber"])
def test_the_kernel_writes_to_what_is_its_own(native, kind, dtype, gradient):
    """Sums over later heads, and the gradient; nothing beside them."""
    margin = 67
    for H, D in itertools.product((1, 2, 7, 16, 33, 200), (1, 8, 33, 65)):
        rows, _, width, *outputs = raw_call(kind, dtype, (H, 2, D), gradient)
        memory = [
            None if t is None else torch.full((t.numel() + 2 * margin,), 7, dtype=dtype) for t in outputs
        ]
        placed = [
            m if m is None else m[margin:-margin].view(t.shape) for m, t in zip(memory, outputs, strict=True)
        ]
        copy = rows.clone()
        RAW.multihead_loss_penalty_(rows, kind, width, *placed)
        assert torch.equal(rows, copy)
        assert all((m[:margin] == 7).all() and (m[-margin:] == 7).all() for m in memory if m is not None)
        by_class = rows.double().transpose(0, 1)
        t = by_class @ by_class.mT
        if kind == "huber":
            rho = torch.where(t.abs() <= width, t * t / (2 * width), t.abs() - width / 2)
            slope = (t / width).clamp(-1, 1)
        else:
            rho, slope = (t.abs(), t.sign()) if kind == "abs" else (t * t, 2 * t)
        eps, sizes = torch.finfo(dtype).eps, by_class.abs() @ by_class.abs().mT
        far = 4 * (D + H) * eps
        bound = far * (sizes * (1 + 2 * t.abs() + sizes * eps)).triu(1).sum(2) + 1e-300
        assert ((placed[0].double() - rho.triu(1).sum(2)).abs() <= bound).all()
        if gradient:
            slope.diagonal(0, 1, 2).zero_()
            wrong = (t.abs() < far * sizes).double() if kind == "abs" else 2 * far * sizes  # in each slope
            expected = (slope @ by_class).transpose(0, 1)
            bound = (2 * wrong + far * slope.abs()) @ by_class.abs()
            assert ((placed[1].double() - expected).abs() <= bound.transpose(0, 1) + 1e-300).all()


@pytest.mark.parametrize("kind", ["abs", "squared", "huber"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_the_number_of_threads_changes_no_bit_of_the_kernel(native, dtype, kind):
    results = []
    for count in (1, 2, 3):
        call = raw_call(kind, dtype, (300, 2, 100), True)
        with threads(count):
            RAW.multihead_loss_penalty_(*call)
        results.append((call[3], call[4]))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


PEAK = """
import resource
import torch
from fastkit.ops import orthogonality_penalty

torch.set_num_threads(1)

def run(H, impl):
    weight = torch.randn(H, 3, 4, requires_grad=True)
    orthogonality_penalty(weight, kind={kind!r}, impl=impl).backward()

run(200, "cpu")  # what is loaded then counts not
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for impl in ("cpu", "reference"):
    before = peak()
    run(3000, impl)
    print((peak() - before) * 1024 / (3000 * 3000 * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units there")
@pytest.mark.parametrize("kind", ["abs", "cos_squared"])
def test_no_matrix_of_all_pairs_is_in_memory(native, kind, run_script):
    """In such matrices of one class, which a block of some 200 rows is a part of; the reference has some."""
    done = run_script(PEAK.format(kind=kind))
    assert done.returncode == 0, done.stderr
    ours, reference = map(float, done.stdout.split())
    assert ours < 0.25 and reference > 3, done.stdout


def test_the_memory_that_a_graph_keeps(native):
    """The weight, and its gradient."""
    weight, kept = noise(150, 3, 4).requires_grad_(), []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        orthogonality_penalty(weight, kind="cos_abs", center_classes=True, impl=native)
    assert sum(t.untyped_storage().nbytes() for t in kept) == 2 * weight.nbytes


def test_kernels_cover_what_the_page_says():
    assert KERNELS["cpu"] == (FLOAT, DOUBLE, HALF, BFLOAT)


def test_every_instruction_set(run_script, isa):
    script = f"""if True:
        import json
        import torch
        from fastkit.testing.multihead_loss import check_penalty, make_heads

        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for kind in {KINDS!r}:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for H in (2, 7, 33, 130):
                    check_penalty(make_heads(H, 2, 9, dtype=dtype), {{"kind": kind}}, impl="cpu")
        print("agrees")
    """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr
