"""What icp_epoch promises: the modes of the table on its page.

``python tests/test_icp_contract.py`` writes the table into docs/ops/icp.md.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from fastkit._dispatch import IMPLS, unavailable
from fastkit._threads import threads
from fastkit.ops.icp import KERNELS, icp_epoch
from fastkit.reference import ICPEpoch
from fastkit.testing.contract import BEGIN, END
from fastkit.testing.icp import Inputs, alone, assert_equal, check, make_inputs

PAGE = Path(__file__).parents[1] / "docs" / "ops" / "icp.md"

native = pytest.mark.native
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp
]


# The rows: options of a call

SIZE = 24, 19, 5
PAIRS = tuple(
    torch.tensor([[random.Random(f"{r} {i} {most}").randrange(most) for i in range(rows)] for r in range(2)])
    for rows, most in ((24, 19), (19, 24))
)
MODES = {
    "search": {},
    "search, mutual_only": {"mutual_only": True},
    "pairs": {"pairs": PAIRS},
    "pairs, mutual_only": {"pairs": PAIRS, "mutual_only": True},
}


def inputs_of(dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(*SIZE, dtype=dtype)


def call(options: dict, impl: str) -> Callable[..., ICPEpoch]:
    return partial(icp_epoch, epoch=2, batch_size=4, impl=impl, **options)


# The columns: checks of a row


def oracle(dtype: torch.dtype, options: dict, impl: str) -> None:
    check(inputs_of(dtype), epoch=2, batch_size=4, impl=impl, **options)


def half(options: dict, impl: str) -> None:
    call(options, impl)(*inputs_of(torch.bfloat16))


def restarts(options: dict, impl: str) -> None:
    """A restart alone has the bits that it has beside others."""
    inputs = inputs_of()
    found = call(options, impl)(*inputs)
    for r in range(2):
        one = {name: tuple(t[r : r + 1] for t in o) if name == "pairs" else o for name, o in options.items()}
        assert_equal(call(one, impl)(*alone(inputs, r)), ICPEpoch(*(t[r : r + 1] for t in found)))


def any_threads(options: dict, impl: str) -> None:
    found = call(options, impl)(*inputs_of())
    with threads(2):
        assert_equal(call(options, impl)(*inputs_of()), found)


def signs(options: dict, impl: str) -> None:
    """Maps diag(s) are a target with the signs s, bit for bit."""
    source, target, _, _, seeds = inputs_of()
    s = torch.tensor([1.0, -1, -1, 1, -1])
    identity, diagonal = torch.eye(5).expand(2, 5, 5), torch.diag(s).expand(2, 5, 5)
    found = call(options, impl)(source, target, diagonal, diagonal, seeds)
    turned = call(options, impl)(source, target * s, identity, identity, seeds)
    assert_equal(turned._replace(w_xy=diagonal @ turned.w_xy, w_yx=turned.w_yx @ diagonal), found)


def no_gradient(options: dict, impl: str) -> None:
    inputs = inputs_of()
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    found = call(options, impl)(*leaves)
    assert not any(t.requires_grad for t in found)
    assert_equal(found, call(options, impl)(*inputs))


def autocast(options: dict, impl: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(options, impl)(*inputs_of())
    assert_equal(found, call(options, impl)(*inputs_of()))


def func(options: dict, impl: str) -> None:
    inputs = inputs_of()
    torch.vmap(lambda source: call(options, impl)(source, *inputs[1:]))(inputs.source[None])


def compiled(options: dict, impl: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(call(options, impl), backend="aot_eager", fullgraph=True)
    assert_equal(run(*inputs_of()), call(options, impl)(*inputs_of()))


COLUMNS: dict[str, Callable[[dict, str], None]] = {
    "float64": partial(oracle, torch.float64),
    "float32": partial(oracle, torch.float32),
    "half": half,
    "restarts": restarts,
    "threads": any_threads,
    "signs": signs,
    "no gradient": no_gradient,
    "autocast": autocast,
    "func": func,
    "compile": compiled,
}

# Of all rows; a text, and the implementations that refuse with it.
BOTH = "cpu", "reference"
REFUSALS = {
    "half": (TypeError, "icp_epoch: source must be torch.float32 or torch.float64, got torch.bfloat16", BOTH),
    "func": (RuntimeError, "icp_epoch: has no derivative, and no rule for torch.func transforms", BOTH),
    "compile": (RuntimeError, "data-dependent", ("reference",)),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "every mode, of CUDA tensors",
    "triton": "no: this op has no such implementation",
}
RUNNING = [impl for impl, answer in IMPLEMENTATIONS.items() if answer == "yes"]


@native
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("impl", RUNNING)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("mode", MODES)
def test_cell(mode, column, impl):
    reason = unavailable(impl, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    error, text, refusing = REFUSALS.get(column, (None, "", ()))
    if error is None or impl not in refusing:
        COLUMNS[column](MODES[mode], impl)
        return
    with pytest.raises(error) as caught:
        COLUMNS[column](MODES[mode], impl)
    assert text in str(caught.value).lower() if column == "compile" else text in str(caught.value)


@native
def test_the_table_has_every_implementation():
    assert set(IMPLEMENTATIONS) == set(IMPLS)
    for impl in IMPLS:
        if impl != "reference" and impl not in KERNELS:
            assert unavailable(impl, KERNELS) in IMPLEMENTATIONS[impl]


# The page


def aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]


def table() -> str:
    """In Markdown."""
    numbers = {column: f"({i})" for i, column in enumerate(REFUSALS, 1)}
    row = [numbers.get(column, "yes") for column in COLUMNS]
    lines = [*aligned([["", *COLUMNS], *([mode, *row] for mode in MODES)]), ""]
    for i, (error, text, refusing) in enumerate(REFUSALS.values(), 1):
        others = "".join(f"; `{impl}` says yes" for impl in RUNNING if impl not in refusing)
        lines += [f"{i}. {' and '.join(f'`{impl}`' for impl in refusing)}: {error.__name__}"]
        lines += [f'   "{text}"{others}']
    answers = [[f"`{impl}`", answer] for impl, answer in IMPLEMENTATIONS.items()]
    return "\n".join([*lines, "", *aligned([["`impl`", "runs"], *answers])])


def on_page(text: str) -> str:
    """A page with the table as it is now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def test_page_has_the_table():
    if not PAGE.is_file():
        pytest.skip("the tests are here without the documentation")
    text = PAGE.read_text()
    assert text == on_page(text), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    PAGE.write_text(on_page(PAGE.read_text()))
