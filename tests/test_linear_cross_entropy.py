"""ops.linear_cross_entropy in every implementation that runs here, against float64."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from fastkit._threads import threads
from fastkit.ops import linear_cross_entropy, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS
from fastkit.testing.linear_cross_entropy import check, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
TENSORS = "linear_bias", "weight", "token_weight", "ignored"
EVERYTHING = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}

# Of each option its values; every pair of values of two of them is met.
CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0.0, 0.3),
    "softcap": (None, 3.0),
    "z_loss": (0.0, 0.1),
    "linear_bias": (False, True),
    "weight": (False, True),
    "token_weight": (False, True),
    "ignored": (False, True),
    "with_lse": (False, True),
}


def pairs():
    plain = {name: values[0] for name, values in CHOICES.items()}
    seen = []
    for (a, of_a), (b, of_b) in itertools.combinations(CHOICES.items(), 2):
        for x, y in itertools.product(of_a, of_b):
            case = plain | {a: x, b: y}
            if case not in seen:
                seen.append(case)
    everything = {name: values[-1] for name, values in CHOICES.items()}
    return [*seen, *(everything | {"reduction": reduction} for reduction in CHOICES["reduction"])]


def name_of(case):
    return "-".join(f"{k}={v}" for k, v in case.items() if v not in (False, None, 0.0)) or "plain"


def run(N, V, D, case, dtype, impl):
    """Whether the call agrees with float64."""
    tensors = {name: case.get(name, False) for name in TENSORS}
    options = {k: v for k, v in case.items() if k not in (*TENSORS, "with_lse")}
    reduction = options.get("reduction", "mean")
    inputs = make_inputs(N, V, D, dtype=dtype, reduction=reduction, **tensors)
    return check(inputs, options, with_lse=case.get("with_lse", False), impl=impl)


@pytest.mark.parametrize("case", pairs(), ids=name_of)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_every_pair_of_options(case, dtype, impl):
    run(7, 11, 8, case, dtype, impl)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("N", "V", "D"),
    [
        (N, V, D)
        for N, V, D in itertools.product((0, 1, 7, 129), (1, 11, 50257), (8, 200))
        if V != 50257 or D == 8
    ],
)
def test_sizes(N, V, D, everything):
    case = EVERYTHING | dict.fromkeys(TENSORS, True) if everything else {}
    case |= {"reduction": "sum" if N == 0 else "mean"}
    run(N, V, D, case, DOUBLE if V < 50257 else FLOAT, "cpu")


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_every_number_of_classes(dtype, everything):
    case = EVERYTHING | dict.fromkeys(TENSORS, True) if everything else {}
    for V in (*range(1, 36), *range(60, 70), 127, 129):
        run(3, V, 5, case, dtype, "cpu")


@pytest.mark.slow
def test_a_width_of_768():
    run(129, 50257, 768, EVERYTHING | dict.fromkeys(TENSORS, True), FLOAT, "cpu")


@pytest.mark.parametrize("case", [{}, EVERYTHING | dict.fromkeys(TENSORS, True)], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_half_precision(dtype, reduction, case, impl):
    run(50, 301, 24, case | {"reduction": reduction}, dtype, impl)


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("V", [2100, 4099])
def test_blocks_of_tokens_and_classes(dtype, V, monkeypatch):
    products = pytest.importorskip("fastkit.ops.linear_cross_entropy_products")
    monkeypatch.setattr(products, "_BLOCK_TOKENS", 100)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 100 * 4 * 1000)
    monkeypatch.setattr(products, "_KEPT_BYTES", 100 * 4 * V)
    monkeypatch.setattr(products, "_KEPT_TOKENS", 1)
    for reduction in ("mean", "none"):
        run(250, V, 16, EVERYTHING | {"reduction": reduction, "ignored": True}, dtype, "cpu")


def test_more_threads():
    with threads(2):
        run(300, 5000, 32, EVERYTHING, FLOAT, "cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions_and_strides(reduction, impl):
    inputs = make_inputs(12, 30, 8, dtype=DOUBLE, token_weight=True)
    hidden = inputs.input.view(3, 4, 8)
    expected = linear_cross_entropy_with_lse(
        inputs.input, inputs.linear_weight, inputs.target, token_weight=inputs.token_weight,
        reduction=reduction, impl="reference",
    )  # fmt: skip
    strided = [
        hidden.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([hidden, hidden], -1)[..., 0],
    ]
    weight = inputs.linear_weight.T.contiguous().T
    target = torch.stack([inputs.target, inputs.target])[1].to(torch.int32).view(3, 4)
    for h in strided:
        loss, lse = linear_cross_entropy_with_lse(
            h, weight, target, token_weight=inputs.token_weight.view(3, 4), reduction=reduction, impl=impl
        )
        assert lse.shape == (3, 4) and loss.shape == (() if reduction == "mean" else (3, 4))
        torch.testing.assert_close(lse.flatten(), expected.lse, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(loss.flatten(), expected.loss.flatten(), rtol=1e-13, atol=1e-13)
    one = linear_cross_entropy(hidden[0, 0], weight, target[0, 0], impl=impl)
    assert one.shape == ()


# Values at the edge


def test_of_no_token_the_mean_is_nan_and_gradients_are_0(impl):
    weight = torch.randn(5, 3, requires_grad=True)
    none = torch.full((4,), -100)
    for hidden, target in ((torch.randn(0, 3), none[:0]), (torch.randn(4, 3), none)):
        hidden.requires_grad_()
        assert linear_cross_entropy(hidden, weight, target, impl=impl).isnan()
        loss, lse = linear_cross_entropy_with_lse(hidden, weight, target, reduction="sum", impl=impl)
        assert loss == 0 and not lse.any()
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_an_ignored_token_holds_does_not_matter(bad, reduction, impl):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.tensor([1, -100, 3, -100, 8, 0])
    poisoned = hidden.detach().masked_fill((target == -100)[:, None], bad).requires_grad_()
    results = []
    for h in (hidden, poisoned):
        loss = linear_cross_entropy(h, weight, target, reduction=reduction, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (h, weight))))
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
    assert not results[1][1][target == -100].any()


def test_an_ignore_index_that_is_a_class(impl):
    hidden, weight = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    target = torch.tensor([0, 1, 2, 1, 0, 2])
    loss = linear_cross_entropy(hidden, weight, target, ignore_index=1, impl=impl)
    torch.testing.assert_close(loss, cross_entropy(linear(hidden, weight), target, ignore_index=1))


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_a_bias_of_minus_infinity_leaves_classes_out(dtype, impl):
    hidden, weight = torch.randn(5, 4, dtype=dtype), torch.randn(40, 4, dtype=dtype, requires_grad=True)
    bias = torch.zeros(40, dtype=dtype)
    bias[[0, 17, 39]] = -torch.inf
    target = torch.tensor([1, 2, 3, 16, 38])
    kept = bias == 0
    loss, lse = linear_cross_entropy_with_lse(hidden, weight, target, linear_bias=bias, impl=impl)
    rest, new = weight.detach()[kept], kept.cumsum(0)[target] - 1
    torch.testing.assert_close(loss, cross_entropy(linear(hidden, rest), new))
    torch.testing.assert_close(lse, linear(hidden, rest).logsumexp(1))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert not gradient[~kept].any() and gradient[kept].any()
    excluded = linear_cross_entropy(hidden, weight, torch.full((5,), 17), linear_bias=bias, impl=impl)
    assert excluded == torch.inf


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("V", [3, 33, 100])
def test_logits_that_are_not_finite(dtype, V, impl):
    values = torch.zeros(6, V, dtype=dtype)
    values[0, -1] = torch.nan
    values[1, 1] = torch.inf
    values[2, :] = -torch.inf
    values[3, :] = -torch.inf
    values[3, 2] = torch.nan
    values[4, 0], values[4, -1] = torch.inf, torch.nan
    hidden, weight = torch.eye(6, dtype=dtype), torch.zeros(V, 6, dtype=dtype)
    target = torch.zeros(6, dtype=torch.int64)
    for row in range(6):  # of each the logits are a bias: a product of inf and 0 is NaN
        lse = linear_cross_entropy_with_lse(
            hidden[row : row + 1], weight, target[:1], linear_bias=values[row], impl=impl
        ).lse
        torch.testing.assert_close(lse, values[row : row + 1].logsumexp(1), equal_nan=True)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_large_and_distant_logits(dtype, impl):
    weight = torch.tensor([[1e4], [-1e4], [9990.0]], dtype=dtype, requires_grad=True)
    hidden = torch.ones(3, 1, dtype=dtype)
    target = torch.tensor([0, 1, 2])
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl)
    expected = cross_entropy(linear(hidden.double(), weight.double()), target, reduction="none").to(dtype)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-3 if dtype == FLOAT else 1e-11)
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert gradient.isfinite().all()


def test_label_smoothing_is_not_passed_over(impl):
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(7, 5), torch.randn(9, 5), torch.randint(9, (7,))
    smooth = linear_cross_entropy(hidden, weight, target, label_smoothing=0.2, impl=impl)
    torch.testing.assert_close(smooth, cross_entropy(linear(hidden, weight), target, label_smoothing=0.2))
    assert abs(smooth - linear_cross_entropy(hidden, weight, target, impl=impl)) > 1e-2


def test_a_mask_after_reduction_none_masks_the_gradients(impl):
    hidden = torch.randn(8, 5, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(11, 5, dtype=DOUBLE, requires_grad=True)
    target, mask = torch.randint(11, (8,)), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0], dtype=DOUBLE)
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl)
    gradients = torch.autograd.grad((losses * mask).sum() / mask.sum(), (hidden, weight))
    expected = cross_entropy(linear(hidden, weight), target, reduction="none")
    wanted = torch.autograd.grad((expected * mask).sum() / mask.sum(), (hidden, weight))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)
    assert not gradients[0][mask == 0].any()


def test_a_loss_is_hardly_negative():
    """The target's logit and lse come of one product."""
    hidden = torch.eye(64)
    weight = 1e3 * torch.eye(64)
    losses = linear_cross_entropy(hidden, weight, torch.arange(64), reduction="none", impl="cpu")
    assert (losses >= -2 * torch.finfo(FLOAT).eps * 1e3).all()


def test_kernels_cover_what_the_page_says():
    assert KERNELS["cpu"] == (FLOAT, DOUBLE, HALF, BFLOAT)
    assert set(KERNELS["triton"]) == {FLOAT, HALF, BFLOAT}


def test_every_instruction_set(run_script, isa):
    script = f"""if True:
        import json
        import torch
        from fastkit.testing.linear_cross_entropy import check, make_inputs

        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for V in (1, 7, 16, 33, 500):
                for options in ({{}}, {EVERYTHING!r}):
                    tensors = dict.fromkeys({TENSORS!r}, bool(options))
                    check(make_inputs(20, V, 9, dtype=dtype, **tensors), options, impl="cpu")
        print("agrees")
    """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr
