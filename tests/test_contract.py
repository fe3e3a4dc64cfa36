"""fastkit.testing.contract accepts an honest op and rejects planted faults, and shows what it did."""

import pytest
import torch

from fastkit.testing.contract import BEGIN, CAPABILITIES, END, Contract, Mode, Refusal, arithmetic_of

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp
]


def contract(function, refusals=None):
    """Of an op x a^2, a number for each row, beside the sum of x, through which no gradient flows."""

    def inputs(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        x, a = torch.randn(4, 3, generator=generator), torch.rand(4, 1, generator=generator) + 1
        return x.to(dtype), a.to(arithmetic_of(dtype))

    def reference(x, a):
        return (x * a.square()).to(x.dtype), x.detach().float().sum(0)

    mode = Mode(
        inputs, lambda impl: reference if impl is None else function, lambda dtype: (dtype, torch.float32)
    )
    return Contract({"mode": mode}, {"cpu": "yes", "reference": "yes", "cuda": "no"}, refusals or {})


def honest(x, a):
    return (a * x * a).to(x.dtype), x.detach().to(torch.float32).sum(0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_honest_op_passes(capability):
    contract(honest).check("mode", capability, "cpu")


def biased(x, a):
    y, total = honest(x, a)
    return y * (1 + 1e-2), total


def of_another_dtype(x, a):
    y, total = honest(x, a)
    return y.to(torch.float64 if x.dtype == torch.float32 else torch.float32), total


def differentiable_statistic(x, a):
    return honest(x, a)[0], x.float().sum(0)


def wrong_gradient(x, a):
    y, total = honest(x, a)
    return y + 0.1 * (a - a.detach()).to(x.dtype), total


def wrong_third(x, a):
    y, total = honest(x, a)
    return y + 0.1 * (a - a.detach()).pow(3).to(x.dtype), total


class _Constant(torch.autograd.Function):
    """x a^2, with gradients that are constants, which forward mode does not know."""

    @staticmethod
    def forward(x, a):
        return (x * a.square()).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        with torch.no_grad():
            of_x, of_a = g * a.square(), (2 * g * x * a).sum(1, keepdim=True)
        return of_x.to(x.dtype), of_a.to(a.dtype)


def constant_gradients(x, a):
    return _Constant.apply(x, a), honest(x, a)[1]


def graph_break(x, a):
    return honest(x, a) if x.sum() > -1e9 else (x, x)


FAULTS = [
    (biased, ("float64", "float32", "float16", "jvp", "vmap", "compile")),
    (of_another_dtype, ("float64", "float32", "bfloat16", "float16")),
    (differentiable_statistic, ("float64", "float32", "bfloat16", "float16")),
    (wrong_gradient, ("float64", "float32", "1st", "jvp", "vmap", "compile")),
    (wrong_third, ("3rd",)),
    (constant_gradients, ("2nd", "jvp", "hvp", "vmap")),
    (graph_break, ("vmap", "compile")),
]


@pytest.mark.parametrize(
    ("fault", "capability"),
    [pytest.param(f, name, id=f"{f.__name__}-{name}") for f, names in FAULTS for name in names],
)
def test_a_fault_is_seen(fault, capability):
    with pytest.raises((AssertionError, RuntimeError)):
        contract(fault).check("mode", capability, "cpu")


def test_a_refusal_is_what_the_table_says():
    refused = {("mode", "jvp"): Refusal("not forward", ("cpu",))}

    def refusing(x, a):
        raise RuntimeError("op: not forward mode")

    contract(refusing, refused).check("mode", "jvp", "cpu")
    with pytest.raises(RuntimeError, match="not forward mode"):
        contract(refusing, {("mode", "jvp"): Refusal("not backward")}).check("mode", "jvp", "cpu")
    with pytest.raises(AssertionError, match="mode, jvp: cpu says yes"):
        contract(honest, refused).check("mode", "jvp", "cpu")
    contract(honest, refused).check("mode", "jvp", "reference")


def test_the_table():
    of_refusals = contract(honest, {("mode", "vmap"): Refusal("no batches", ("cpu",))})
    header, _, row, blank, note, text, *rest = of_refusals.table().splitlines()
    assert header.split("|")[2:-1] == [f" {name:{max(3, len(name))}} " for name in CAPABILITIES]
    assert row.replace(" ", "") == "|mode|yes|yes|yes|yes|yes|yes|yes|yes|yes|(1)|yes|"
    assert (blank, note, text) == ("", "1. `cpu`: RuntimeError", '   "no batches"; `reference` says yes')
    assert rest[:2] == ["", "| `impl`      | runs |"]
    assert contract(honest).table().count("\n\n") == 1
    page = of_refusals.on_page(f"before\n{BEGIN}\nold\n{END}\nafter")
    assert page.startswith(f"before\n{BEGIN}\n\n| ") and page.endswith(f"|\n\n{END}\nafter")
    assert of_refusals.on_page(page) == page
