"""Adding up what forwards have seen, once each.

A forward that is run again in backward, as that of a checkpointed segment is, adds nothing. It is an op, so
that a compiled layer too looks when it runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("fastkit", "FRAGMENT")
_library.define("count_once_(Tensor(a!) total, Tensor sum) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _count_once_(total: Tensor, sum: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # pyright: ignore[reportPrivateUsage]
        total.add_(sum)


_library.impl("count_once_", _count_once_, "CompositeExplicitAutograd")


@torch.library.register_fake("fastkit::count_once_", lib=_library)
def _(total: Tensor, sum: Tensor) -> None:
    pass


count_: Callable[[Tensor, Tensor], None] = torch.ops.fastkit.count_once_.default
