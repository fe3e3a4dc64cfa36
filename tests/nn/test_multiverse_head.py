"""MultiverseHead: what it computes, elimination that stays, folding, and what it refuses."""

import copy
import re

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from fastkit import reference
from fastkit.nn import MultiverseHead

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

D, C, H, B = 12, 3, 6, 7


def made(**options):
    torch.manual_seed(0)
    head = MultiverseHead(D, options.pop("num_classes", C), H, **options).double()
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
    return head


def inputs(problem="single_label"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    if problem == "single_label":
        return x, torch.randint(C, (B,), generator=generator)
    if problem == "multi_label":
        return x, torch.rand(B, C, generator=generator).round().double()
    return x, torch.randn(B, generator=generator, dtype=torch.float64)


def close(found, expected, bound=1e-12):
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["abs", "cos_squared", "huber", None])
@pytest.mark.parametrize("gone", [[], [0, 4]])
def test_the_loss_is_that_of_its_heads_and_the_penalty(reduction, kind, gone):
    head = made(head_reduction=reduction, ortho=kind, ortho_weight=0.3, huber_width=0.5, label_smoothing=0.1)
    head.eliminate(gone)
    x, target = inputs()
    weights = torch.tensor([0.5, 1.0, 2.0]).double()
    found = head.loss(x, target, class_weight=weights)
    kept = [h for h in range(H) if h not in gone]
    losses = [
        cross_entropy(linear(x, head.weight[h], head.bias[h]), target, weights, label_smoothing=0.1)
        for h in kept
    ]
    penalty = torch.zeros(()).double()
    if kind is not None:
        penalty = reference.orthogonality_penalty(head.weight[kept], kind=kind, huber_width=0.5)
    total = torch.stack(losses).sum() + 0.3 * penalty
    close(found.loss, total / len(kept) if reduction == "mean" else total)
    close(found.penalty, penalty)
    close(found.head_losses[kept], torch.stack(losses))
    assert not found.head_losses[gone].any() and not found.correct[gone].any()
    assert found.count == B
    found.loss.backward()
    assert not head.weight.grad[gone].any() and head.weight.grad[kept].abs().amin() > 0


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("inference", ["mean_logits", "mean_probs", "best"])
def test_what_heads_say_together(problem, inference):
    if problem == "regression" and inference == "mean_probs":
        return
    head = made(problem=problem, inference=inference, num_classes=1 if problem == "regression" else C)
    head.eliminate([2])
    head.scores.copy_(
        torch.tensor([0.5, 0.3, 0.1, 0.2, float("nan"), 0.4])
    )  # of those left the fourth is best
    x, target = inputs(problem)
    kept = [0, 1, 3, 4, 5]
    z = torch.stack([linear(x, head.weight[h], head.bias[h]) for h in kept])
    if inference == "mean_logits":
        expected = z.mean(0)
    elif inference == "best":
        expected = z[2]
    elif problem == "multi_label":
        expected = torch.logit(z.sigmoid().mean(0))
    else:
        expected = z.softmax(2).mean(0).log()
    close(head(x), expected, 1e-6 if inference == "mean_probs" else 1e-12)
    assert head.loss(x, target).loss.isfinite()
    assert head.head_logits(x).shape == (B, H, head.num_classes)
    close(head.head_logits(x)[:, kept], z.transpose(0, 1))


def test_probabilities_that_are_averaged_sum_to_one():
    head = made(inference="mean_probs")
    x, _ = inputs()
    close(head(x).exp().sum(1).double(), torch.ones(B).double(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_it_is_one_linear_layer_of_the_same_logits(dtype):
    head = made().to(dtype)
    head.eliminate([1, 5])
    x, _ = inputs()
    x = x.to(dtype)
    folded = head.fold()
    assert isinstance(folded, torch.nn.Linear) and folded.weight.dtype == dtype
    assert torch.equal(folded(x), head(x))
    mean = head.head_logits(x)[:, head.active].mean(1)
    close(folded(x), mean, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_head_that_is_eliminated_never_moves_again(optimizer):
    """And the others move as in a model that never had it."""
    head = made()
    kept = [0, 2, 3, 5]
    x, target = inputs()
    optim = OPTIMIZERS[optimizer](head.parameters())

    def step(head, optim):
        optim.zero_grad()
        head.loss(x, target).loss.backward()
        optim.step()

    for _ in range(3):
        step(head, optim)
    head.eliminate([1, 4], optim)
    assert head.active.tolist() == [h in kept for h in range(H)] and head.num_active == 4
    few = MultiverseHead(D, C, len(kept)).double()
    with torch.no_grad():
        few.weight.copy_(head.weight[kept])
        few.bias.copy_(head.bias[kept])
    of_few = OPTIMIZERS[optimizer](few.parameters())
    step(copy.deepcopy(few), of_few)  # makes no state: its parameters are others
    for one, other in zip(head.parameters(), few.parameters(), strict=True):
        of_few.state[other] = {
            name: value[kept].clone() if value.shape == one.shape else copy.deepcopy(value)
            for name, value in optim.state[one].items()
            if isinstance(value, torch.Tensor)
        }
    for _ in range(4):
        step(head, optim)
        step(few, of_few)
    assert not head.weight[[1, 4]].any() and not head.bias[[1, 4]].any()
    close(head.weight[kept], few.weight, 1e-10)


def test_the_mask_is_saved_loaded_and_copied():
    head = made()
    head.eliminate([0, 1])
    other = made()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.active, head.active) and copy.deepcopy(head).num_active == 4
    assert list(head.state_dict()) == ["weight", "bias", "active", "scores"]
    state = {**head.state_dict(), "active": torch.zeros(H, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="active must have a head that takes part, got a state without"):
        other.load_state_dict(state)
    assert other.num_active == 4  # as before
    wrong = {**head.state_dict(), "active": torch.ones(H + 1, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=r"size mismatch for active"):
        other.load_state_dict(wrong)


def test_orthogonal_heads_begin_orthogonal_and_as_long_as_others():
    torch.manual_seed(0)
    head = MultiverseHead(64, 3, 40, init="orthogonal")
    assert head.mean_abs_cosine() < 1e-6
    assert torch.allclose(head.weight.norm(dim=2), torch.tensor(0.02 * 64**0.5), rtol=1e-5)
    normal = MultiverseHead(64, 3, 40)
    assert normal.weight.std().item() == pytest.approx(0.02, rel=0.03) and not normal.bias.any()
    assert 0.05 < normal.mean_abs_cosine() < 0.15  # sqrt(2 / (pi 64)) = 0.0997


def test_training_makes_heads_orthogonal():
    """A property after many steps, with losses that pull all heads to the same direction."""
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    target = (x[:, 0] > 0).long()
    cosines = []
    for weight in (0.0, 0.5):
        head = MultiverseHead(16, 2, 8, ortho="huber", ortho_weight=weight)
        optimizer = torch.optim.Adam(head.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            head.loss(x, target).loss.backward()
            optimizer.step()
        cosines.append(head.mean_abs_cosine().item())
        assert ((head(x).argmax(1) == target).double().mean()) > 0.9
    assert cosines[0] > 0.6 > 0.1 > cosines[1]


def test_agreement_is_of_rows_on_which_all_active_heads_say_the_same():
    head = MultiverseHead(2, 2, 3, allow_overcomplete=True)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 2]], [[-1, 0], [0, -1]]]))
    x = torch.tensor([[1.0, 0.0], [1, 0.9], [0, 1], [1, 0.2]])
    assert head.agreement(x) == 0
    head.eliminate([2])
    assert head.agreement(x) == 0.75
    with pytest.raises(ValueError, match=r'agreement is of classes, and problem="regression" has none'):
        MultiverseHead(2, 1, 2, problem="regression").agreement(x)
    assert MultiverseHead(2, 2, 1).mean_abs_cosine() == 0


def test_under_autocast_the_loss_is_float32():
    head, (x, target) = MultiverseHead(D, C, H), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(x.bfloat16(), target)
    assert found.loss.dtype == torch.float32
    found.loss.backward()
    assert head.weight.grad.dtype == torch.float32


def test_it_compiles_whole_and_a_mask_that_changes_compiles_nothing_anew():
    head, (x, target) = made(), inputs()
    compiled = torch.compile(lambda x, t: head.loss(x, t).loss, fullgraph=True, backend="aot_eager")
    close(compiled(x, target), head.loss(x, target).loss)
    with torch._dynamo.config.patch(error_on_recompile=True):
        head.eliminate([2, 3])
        close(compiled(x, target), head.loss(x, target).loss)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 3), {}, "in_features must be at least 1, got 0"),
        ((8, 0), {}, "num_classes must be at least 1, got 0"),
        ((8, 3, 0), {}, "num_heads must be at least 1, got 0"),
        (
            (8, 3, 9),
            {},
            "num_heads must be at most in_features = 8, or their rows cannot be orthogonal, got 9; pass"
            " allow_overcomplete=True for more",
        ),
        ((8, 1, 2), {}, 'num_classes must be at least 2 with problem="single_label", got 1; take'),
        ((8, 2, 2), {"problem": "regression"}, 'num_classes must be 1 with problem="regression", got 2'),
        (
            (8, 2, 2),
            {"problem": "x"},
            "problem must be one of single_label, multi_label, regression, got 'x'",
        ),
        (
            (8, 2, 2),
            {"ortho": "x"},
            "ortho must be one of abs, squared, cos_abs, cos_squared, huber, None, got",
        ),
        ((8, 2, 2), {"head_reduction": "x"}, "head_reduction must be one of mean, sum, got 'x'"),
        (
            (8, 2, 2),
            {"inference": "all"},
            "inference must be one of mean_logits, mean_probs, best, got 'all'",
        ),
        ((8, 2, 2), {"init": "x"}, "init must be one of normal, orthogonal, got 'x'"),
        ((8, 2, 2), {"ortho_weight": -1.0}, "ortho_weight must be finite and not negative, got -1.0"),
        ((8, 2, 2), {"ortho_weight": float("inf")}, "ortho_weight must be finite and not negative, got inf"),
        ((8, 2, 2), {"huber_width": 0.0}, "huber_width must be positive and finite, got 0.0"),
        (
            (8, 1, 2),
            {"problem": "multi_label", "center_classes": True},
            "center_classes must be False for one class, whose mean is itself",
        ),
        (
            (8, 2, 2),
            {"problem": "multi_label", "label_smoothing": 0.1},
            "label_smoothing must be in [0, 1), and 0 but for a single label, got 0.1 with"
            " problem='multi_label'",
        ),
        (
            (8, 1, 2),
            {"problem": "regression", "inference": "mean_probs"},
            'inference must be "mean_logits" or "best" with problem="regression", got \'mean_probs\'; there'
            " are no probabilities",
        ),
    ],
)
def test_options_that_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=f"^MultiverseHead: {re.escape(message)}"):
        MultiverseHead(*arguments, **options)


def test_types_that_are_refused():
    for options, message in (
        ({"num_heads": 2.0}, "num_heads must be an int, got float"),
        ({"ortho_weight": "1"}, "ortho_weight must be a number, got str"),
        ({"center_classes": 1}, "center_classes must be True or False, got 1"),
        ({"dtype": torch.int64}, "dtype must be floating point and real, got torch.int64"),
    ):
        with pytest.raises(TypeError, match=f"MultiverseHead: {re.escape(message)}"):
            MultiverseHead(8, 3, **{"num_heads": 4, **options})
    head = MultiverseHead(8, 3, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 8\), got \(2, 3, 8\)"):
        head(torch.zeros(2, 3, 8))
    with pytest.raises(TypeError, match=r"x must have the dtype of weight, torch.float32, got torch.float64"):
        head.loss(torch.zeros(2, 8).double(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"heads must be in \[0, 4\), got 4"):
        head.eliminate([1, 4])
    head.eliminate([0, 1])
    with pytest.raises(ValueError, match=r"heads must leave one that is active, got all 2 of them"):
        head.eliminate([2, 3])
    assert head.num_active == 2 and head.weight[2].any()
    with pytest.raises(TypeError, match="MultiverseHead: x must be a tensor, got list"):
        head([[0.0] * 8])
    with pytest.raises(RuntimeError, match="x must be on the device of weight, cpu, got meta; move it with"):
        head(torch.zeros(2, 8, device="meta"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"got torch.int64; cast it"):
        head(torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([0, 3], RuntimeError, "target must be in [0, 3) or ignore_index = -100, got 3 at index 1"),
        ([-1, 0], RuntimeError, "target must be in [0, 3) or ignore_index = -100, got -1 at index 0"),
        ([0], ValueError, "target must have shape (B,) = (2,) with problem='single_label', got (1,)"),
        ([0.0, 1.0], TypeError, "target must be int64 or int32"),
    ],
)
def test_targets_that_are_refused(target, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MultiverseHead(8, 3, 4).loss(torch.zeros(2, 8), torch.tensor(target))


def test_no_rows_are_refused_and_rows_that_are_ignored_leave_the_penalty():
    head, (x, target) = made(), inputs()
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\) with a row at least, got \(0, 12\)"):
        head.loss(x[:0], target[:0])
    found = head.loss(x.requires_grad_(), torch.full_like(target, -100))
    assert found.count == 0 and not found.head_losses.any()
    close(found.loss, 0.005 * head.penalty() / H)
    found.loss.backward()
    assert not x.grad.any() and head.weight.grad.isfinite().all() and not head.bias.grad.any()


def test_a_gradient_that_is_there_does_not_move_what_is_eliminated():
    head, (x, target) = made(), inputs()
    optimizer = torch.optim.AdamW(head.parameters(), 0.1)
    head.loss(x, target).loss.backward()
    head.eliminate([1, 4], optimizer)
    optimizer.step()
    assert not head.weight[[1, 4]].any() and not head.bias[[1, 4]].any()
    assert head.weight.grad[[0, 2, 3, 5]].abs().amin() > 0
