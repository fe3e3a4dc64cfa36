"""mtadam against its reference in float64: inputs, and budgets derived from the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.testing import Expected, assert_matches_reference

# Of the elements of each term's gradients, in turn.
SIZES = 1.0, 300.0, 0.02, 7.0, 1e-3

# The defaults, nearly: float32 has these, and 1 - beta. A rounded constant takes all elements the same way.
BETAS: tuple[float, float, float] = tuple(
    torch.tensor([0.9, 0.999, 0.9], dtype=torch.float32, device="cpu").tolist()
)
LR = 2.0**-7

SUM_ROUNDINGS = 132  # what ``mtadam_square_sums`` promises of a sum, in halves of eps

PIECE = 1024  # elements that are compared at a time: those of a tensor share the error of a factor


class Inputs(NamedTuple):
    """The tensors of a call, and amsgrad's maxima."""

    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grad_norms: Tensor
    steps: Tensor
    max_exp_avg_sqs: list[Tensor] | None = None

    @property
    def terms(self) -> int:
        return self.grad_norms.shape[1]

    def results(self) -> dict[str, Tensor]:
        """What a call writes to."""
        lists = {
            "params": self.params,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "max_exp_avg_sqs": self.max_exp_avg_sqs or [],
        }
        each = {f"{name}[{j}]": t for name, tensors in lists.items() for j, t in enumerate(tensors)}
        return each | {"grad_norms": self.grad_norms, "steps": self.steps}


class Options(NamedTuple):
    """Those of a call."""

    lr: float | Tensor = LR
    betas: tuple[float, float, float] = BETAS
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    ranks: Sequence[float] | None = None
    anchor: int = 0
    alive_eps: float = 1e-10
    max_scale: float | None = None
    nonfinite: str = "skip"
    square_sums: Tensor | None = None
    grad_scales: Tensor | None = None
    found_inf: Tensor | None = None


def make_inputs(
    shapes: Sequence[tuple[int, ...]],
    L: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sizes: Sequence[float] = SIZES,
    missing: Collection[tuple[int, int]] = (),
    amsgrad: bool = False,
    steps: int = 0,
) -> Inputs:
    """Noise. After ``steps`` steps, whose moments and norms are noise of the size that they would have.

    ``sizes``: of the gradients of each term, in turn; ``missing``: the pairs (term, tensor) without one.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = make_grads(params, L, seed=seed + 1, sizes=sizes, missing=missing)

    def moments(count: int, *, square: bool) -> list[Tensor]:
        noise = [torch.zeros_like(p, dtype=state) for _ in range(count) for p in params]
        for tensor in noise if steps else ():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * sizes[0])
        return [t.square_() if square else t for t in noise]

    norms = torch.zeros(len(params), L, dtype=state)
    if steps:
        for i, param in enumerate(params):
            of_terms = [sizes[term % len(sizes)] * math.sqrt(param.numel()) for term in range(L)]
            norms[i] = torch.tensor(of_terms) * (0.5 + torch.rand(L, generator=generator))
    return Inputs(
        params,
        grads,
        moments(1, square=False),
        moments(L, square=True),
        norms,
        torch.full((len(params),), steps, dtype=state),
        moments(1, square=True) if amsgrad else None,
    )


def make_grads(
    params: Sequence[Tensor],
    L: int,
    *,
    seed: int,
    sizes: Sequence[float] = SIZES,
    missing: Collection[tuple[int, int]] = (),
) -> list[Tensor | None]:
    """As those of ``make_inputs``, for another step."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    grads: list[Tensor | None] = []
    for term in range(L):
        for i, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator) * sizes[term % len(sizes)]
            grads.append(None if (term, i) in missing else noise.to(param.dtype))
    return grads


def cloned(inputs: Inputs) -> Inputs:
    return _mapped(inputs, lambda t: t.detach().clone())


def raw_arguments(inputs: Inputs, **changed: Any) -> tuple[Any, ...]:
    """Of ``torch.ops.fastkit.mtadam_update_``, in its order."""
    rule = Options()
    arguments: dict[str, Any] = {
        "params": inputs.params,
        "grads": inputs.grads,
        "exp_avgs": inputs.exp_avgs,
        "exp_avg_sqs": inputs.exp_avg_sqs,
        "max_exp_avg_sqs": inputs.max_exp_avg_sqs or [],
        "grad_norms": inputs.grad_norms,
        "steps": inputs.steps,
        "square_sums": None,
        "lr": rule.lr,
        "lr_tensor": None,
        "betas": rule.betas,
        "eps": rule.eps,
        "weight_decay": rule.weight_decay,
        "decoupled": rule.decoupled,
        "ranks": (),
        "anchor": rule.anchor,
        "alive_eps": rule.alive_eps,
        "max_scale": math.inf,
        "nonfinite": rule.nonfinite,
        "grad_scales": None,
        "found_inf": None,
        "first": 0,
        "applies": True,
    }
    return tuple((arguments | changed).values())


def square_sum_budget(square_sum: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Of the square sum of as many elements: as many roundings, but no more than a block has.

    A square below the smallest normal number may be zero.
    """
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    return min(numel + 1, SUM_ROUNDINGS) * info.eps / 2 * square_sum + numel * info.tiny


def expected_results(inputs: Inputs, **options: Any) -> dict[str, Expected]:
    """What ``ops.mtadam_update_`` makes of the inputs: ``params[0]``, ..., ``grad_norms``, ``steps``.

    Values are those of the reference on float64 copies of the same numbers. Budgets follow the formula once,
    with u half the eps of the arithmetic, and tiny its smallest normal number, below which a result may be
    zero:

    - a norm: half of what its square sum may err by, relatively, times 1 - b3 unless it is the first, and u,
      for norms are stored;
    - a factor: what both of its norms may err by, relatively, and u; nothing of norms for the anchor, which
      is divided by itself;
    - a moment: what its gradients may err by, with that of h twice in h^2, and its own roundings. A step
      in pieces rounds m after each of them, therefore L more;
    - the step, m / D, with D the square root and eps: an error e of D takes it by |m / D| e / (D - e). A v of
      tiny numbers, as the first gradients leave it, may be zero, but its root, sqrt(tiny), is small against
      eps. Where it is not, nothing bounds the step, which is a ValueError;
    - a parameter: its own roundings, and that of its storage.

    A tensor that the step leaves as it is has budgets of zero. Norms must not be so near to ``alive_eps``,
    nor squares to zero or to the largest number, that rounding decides what is alive, or finite.
    """
    rule = Options(**options)
    scales, given, found_inf = (
        None if t is None else t.cpu() for t in (rule.grad_scales, rule.square_sums, rule.found_inf)
    )
    lr = rule.lr.item() if isinstance(rule.lr, Tensor) else rule.lr
    rule = rule._replace(lr=lr, grad_scales=scales, square_sums=given, found_inf=found_inf)
    before, after = (_mapped(inputs, lambda t: t.detach().cpu().double().clone()) for _ in range(2))
    cpu = torch.device("cpu")
    # The default as it is: to say so makes every call slower.
    with contextlib.nullcontext() if torch.get_default_device() == cpu else cpu:
        _run(reference.mtadam_update_, after, rule)
        if given is None:
            given = reference.mtadam_square_sums(before.grads, len(before.params))
        budgets = {name: torch.zeros_like(t) for name, t in after.results().items()}
        for i, param in enumerate(inputs.params):
            if after.steps[i] != before.steps[i]:
                budgets |= _budgets(i, before, after, given[i], rule, param.dtype, budgets["grad_norms"])
    doubled = 2 if inputs.steps.dtype == torch.float64 else 1  # the oracle errs as well
    expected = {}
    for name, value in after.results().items():
        if (budgets[name].isinf() & value.isfinite()).any():
            raise ValueError(f"{name}: eps is too small for these gradients, nothing bounds the denominator")
        expected[name] = Expected(value, doubled * budgets[name])
    return expected


def check(inputs: Inputs, *, impl: Impl | None = None, **options: Any) -> None:
    """Runs ``ops.mtadam_update_``, in place. AssertionError, unless each result is within its budget."""
    expected = expected_results(inputs, **options)
    _run(ops.mtadam_update_, inputs, Options(**options), impl=impl)
    compare(inputs, expected)


def compare(inputs: Inputs, expected: Mapping[str, Expected]) -> None:
    """AssertionError, unless each is within its budget."""
    results = inputs.results()
    for name, (value, budget) in expected.items():
        got = results[name]
        if got.shape != value.shape:
            raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(value.shape)}")
        pieces = zip(*(t.reshape(-1).split(PIECE) for t in (got, value, budget)), strict=True)
        for k, piece in enumerate(pieces):
            place = f"{name}, from element {k * PIECE} on" if k else name
            assert_matches_reference(*piece, name=place)


def _budgets(
    i: int,
    before: Inputs,
    after: Inputs,
    sums: Tensor,  # (L,)
    rule: Options,
    stored: torch.dtype,
    norm_budgets: Tensor,  # (n, L), whose row is written
) -> dict[str, Tensor]:
    """Those of one tensor that is updated."""
    n, L = after.grad_norms.shape
    info = torch.finfo(torch.float64 if stored == torch.float64 else torch.float32)
    u, tiny, u64 = info.eps / 2, info.tiny, torch.finfo(torch.float64).eps / 2
    beta1, beta2, beta3 = rule.betas
    t, old = float(after.steps[i]), before.params[i]
    assert isinstance(rule.lr, float)

    # Norms and factors.
    scales = torch.ones(L).double() if rule.grad_scales is None else rule.grad_scales.double()
    raws = sums.sqrt() / scales
    left_out = ~raws.isfinite() if rule.nonfinite == "skip_term" else torch.zeros(L, dtype=torch.bool)
    error = torch.zeros_like(sums)
    if rule.square_sums is None:
        error = square_sum_budget(sums, old.numel(), stored).masked_fill(
            torch.tensor([g is None for g in before.grads[i::n]]), 0.0
        )
    error = (_root_error(sums, error) / scales + 3 * u64 * raws).masked_fill(left_out, 0.0)
    norms, share = after.grad_norms[i], torch.where(before.grad_norms[i] > rule.alive_eps, 1 - beta3, 1.0)
    norm_budgets[i] = share * error + (u + 3 * u64) * norms + tiny
    relative = norm_budgets[i] / norms
    alive = [term for term in (rule.anchor, *range(L)) if norms[term] > rule.alive_eps]

    # Moments.
    decay = 0.0 if rule.decoupled else rule.weight_decay
    budgets: dict[str, Tensor] = {}
    total, total_error = torch.zeros_like(old), torch.zeros_like(old)  # of absolute values
    most, most_error = torch.zeros_like(old), torch.zeros_like(old)
    for term, grad in enumerate(before.grads[i::n]):
        h, h_error = decay * old, 3 * u * decay * old.abs() + tiny
        if grad is not None and not left_out[term]:
            factor, factor_error = 1 / scales[term], u
            if term in alive:
                ratio, of_ratio = norms[alive[0]] / norms[term], float(relative[alive[0]] + relative[term])
                if term == alive[0]:
                    of_ratio = 0.0
                if rule.max_scale is not None and ratio > rule.max_scale:
                    of_ratio = of_ratio if ratio * (1 - of_ratio) < rule.max_scale else 0.0
                    ratio = torch.tensor(rule.max_scale).double()
                factor = (1.0 if rule.ranks is None else rule.ranks[term]) * ratio / scales[term]
                factor_error = of_ratio + u + 4 * u64 if factor != 0 else 0.0
            h = h + factor * grad
            h_error = h_error + (factor_error + 3 * u) * (factor * grad).abs() + factor * tiny
        name = f"exp_avg_sqs[{term * n + i}]"
        square_error = 2 * h.abs() * h_error + h_error.square() + 4 * u * h.square()
        kept = 3 * u * beta2 * before.exp_avg_sqs[term * n + i]
        budgets[name] = kept + (1 - beta2) * square_error + 4 * tiny
        total, total_error = total + h.abs(), total_error + h_error
        most = torch.maximum(most, after.exp_avg_sqs[term * n + i])
        most_error = torch.maximum(most_error, budgets[name])
    moment_error = (L + 3) * u * (beta1 * before.exp_avgs[i].abs() + (1 - beta1) * total)
    moment_error = moment_error + (1 - beta1) * (total_error + L * u * total) + 4 * tiny
    budgets[f"exp_avgs[{i}]"] = moment_error
    if after.max_exp_avg_sqs is not None:
        most = after.max_exp_avg_sqs[i]
        budgets[f"max_exp_avg_sqs[{i}]"] = most_error

    # The parameter.
    root = most.sqrt() / math.sqrt(1 - beta2**t)
    denominator = root + rule.eps
    denominator_error = _root_error(most, most_error) / math.sqrt(1 - beta2**t) + 4 * u * root
    denominator_error = denominator_error + 2 * u * rule.eps
    least = (denominator - denominator_error).clamp(min=0.0)  # 0: a budget of inf
    step, quotient = rule.lr / (1 - beta1**t), (after.exp_avgs[i] / denominator).abs()
    step_error = step * ((moment_error + quotient * denominator_error) / least + 4 * u * quotient)
    kept = old.abs() * (abs(1 - rule.lr * rule.weight_decay) if rule.decoupled else 1.0)
    budget = step_error + tiny / least + 3 * u * kept + tiny
    if stored.itemsize == 2:
        half = torch.finfo(stored)
        budget = budget + half.eps / 2 * (after.params[i].abs() + half.tiny)
    budgets[f"params[{i}]"] = budget
    return budgets


def _root_error(x: Tensor, error: Tensor) -> Tensor:
    """How far the square root of x can be from that of x with an error."""
    return torch.minimum(error / (x.sqrt() + (x - error).clamp(min=0.0).sqrt()), error.sqrt()).nan_to_num(0.0)


def _run(op: Callable[..., None], inputs: Inputs, rule: Options, **more: Any) -> None:
    *tensors, maxima = inputs
    op(*tensors, max_exp_avg_sqs=maxima, **rule._asdict(), **more)


def _mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [None if t is None else function(t) for t in value]
        return None if value is None else function(value)

    return Inputs(*map(of, inputs))
