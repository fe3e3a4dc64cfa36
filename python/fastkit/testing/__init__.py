"""What the tests of every op share: the comparison with an oracle, awkward sizes, devices.

``fastkit.testing.<stem>`` derives the budgets of one op from its arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def devices() -> list[torch.device]:
    """The devices that tests run on: the CPU, and a GPU where there is one."""
    gpu = [torch.device("cuda")] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpu]


class Size(NamedTuple):
    """The shape of one call; its str is a test id such as ``B3-C5-T257-chunk16``."""

    B: int
    C: int
    T: int
    chunk: int | None

    def __str__(self) -> str:
        return f"B{self.B}-C{self.C}-T{self.T}-chunk{self.chunk}"


class LinearSize(NamedTuple):
    """The shape of one call of a linear layer with a low-rank addition; str as of ``Size``."""

    N: int
    D: int
    O: int  # noqa: E741
    R: int

    def __str__(self) -> str:
        return f"N{self.N}-D{self.D}-O{self.O}-R{self.R}"


_SIZES: dict[str, list[Any]] = {
    # Rows around the widths of vectors (1, 15, 16, 17, 33), every T up to 9 and T around tiles, chunks that
    # divide T, that do not, and that exceed it.
    "iir_scan": [
        Size(1, 1, 1, None),
        Size(1, 1, 2, 1),
        Size(1, 2, 3, None),
        Size(3, 5, 4, 3),
        Size(1, 16, 5, 16),
        Size(17, 1, 6, 1),
        Size(3, 11, 7, 3),
        Size(2, 8, 8, 2),
        Size(1, 15, 9, None),
        Size(1, 17, 31, 16),
        Size(2, 8, 33, 3),
        Size(3, 11, 33, 128),
        Size(1, 1, 257, 128),
        Size(3, 5, 257, 2),
        Size(1, 16, 257, 1),
        Size(1, 17, 257, None),
        Size(1, 2, 1000, 128),
    ],
    # Tokens around blocks (24) and what kernels take of them at a time (4, 6, 12), columns around vectors
    # (4, 8) and tiles (12, 24, 96), ranks that fill vectors and that do not.
    "lora_linear": [
        LinearSize(0, 3, 2, 1),
        LinearSize(1, 1, 1, 1),
        LinearSize(1, 33, 7, 2),
        LinearSize(2, 8, 24, 3),
        LinearSize(5, 7, 9, 4),
        LinearSize(7, 25, 12, 5),
        LinearSize(12, 96, 97, 8),
        LinearSize(13, 95, 23, 9),
        LinearSize(23, 11, 100, 12),
        LinearSize(24, 24, 24, 16),
        LinearSize(25, 100, 33, 17),
        LinearSize(49, 5, 48, 24),
        LinearSize(100, 65, 40, 33),
        LinearSize(31, 20, 20, 64),
        LinearSize(2500, 16, 15, 8),
    ],
}


def sizes(op: str) -> list[Any]:
    """The awkward sizes at which an op is compared with its reference."""
    return _SIZES[op]


class Expected(NamedTuple):
    """A result in float64, and how far from it rounding may take each element."""

    value: Tensor
    budget: Tensor


def assert_matches_reference(
    actual: Tensor, expected: Tensor, budget: Tensor, *, name: str = "result"
) -> None:
    """Raise unless each element errs by at most its budget, and the errors do not lean one way.

    Args:
        actual: the result under test.
        expected: the same result in float64, on the same inputs.
        budget: the largest error that rounding explains, element by element.
        name: what to call the result in the message.

    Rounding errors differ in sign, so their mean, in units of the budgets and along the signs of
    ``expected``, shrinks with the number n of elements: it stays below 1 / sqrt(n), as errors that neighbours
    share widen the budget too. A mean beyond 8 times that (for a kernel may round a power of a coefficient
    once and use it throughout) is a bias, as of a wrong gain, even where each element is within its budget.
    This takes random inputs: a constant signal is rounded one way.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    got = actual.detach().to("cpu", torch.float64)
    want, budget = expected.cpu(), budget.cpu()
    error = (got - want).masked_fill((got == want) | (got.isnan() & want.isnan()), 0.0)
    over = ~(error.abs() <= budget) & (error != 0)  # an error of NaN is over
    if over.any():
        excess = (error.abs() / budget).nan_to_num(nan=torch.inf)
        worst = torch.where(over, excess, -1.0).argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, want.shape))
        raise AssertionError(
            f"{name}: {int(over.sum())} of {over.numel()} elements are over budget; worst at {index}:"
            f" got {got[index]:.9g}, expected {want[index]:.9g}, error {error[index]:.3g},"
            f" budget {budget[index]:.3g}"
        )
    lean = (error / budget * want.sign()).nan_to_num().mean()  # 0 / 0 where nothing is rounded
    allowed = 8 / max(1, error.numel()) ** 0.5
    if lean.abs() > allowed:
        raise AssertionError(
            f"{name}: each element is within its budget, but the errors lean one way: they take {lean:.2g} of"
            f" their budgets on average, away from zero if positive; {allowed:.2g} could be chance"
        )
