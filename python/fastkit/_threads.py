"""How many threads calls of PyTorch run on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Generator[None]:
    """So many CPU threads inside, and afterwards as many as before.

    One is best for what is small: more are no faster, and wait for each other where other processes run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
