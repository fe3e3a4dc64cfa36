"""Projection regularisation: a matrix between a model and its output embedding, which is kept small."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastkit.methods._options import check_integer, check_number, check_one_of, check_positive
from fastkit.ops._checks import FLOATING, widened

PRNorm = Literal["code", "paper"]
_WEIGHTS: dict[PRNorm, float] = {"code": 1 / 6.5, "paper": 0.15}


def projection_penalty(
    weight: Tensor,  # (H, H)
    tokens: float = 1,
    *,
    pr_norm: PRNorm = "code",
    pr_weight: float | None = None,
) -> Tensor:  # ()
    """What a projection P adds to the loss of a step, for its size.

    With lambda the ``pr_weight`` and |P| the Frobenius norm::

        "code":   lambda / tokens * 1/2 |P|^2          lambda = 1 / 6.5
        "paper":  lambda |P|                           lambda = 0.15

    The paper prints the second, unsquared. The code that was published with it has the first, on a loss that
    is summed over tokens, both divided by the rows of the batch; so 0.15 is relative to a sum, and P is
    pulled to 0 in proportion to its size. A loss is trained as loss + penalty, and reported without.

    Args:
        weight: P, ``(H, H)``, floating point.
        tokens: what the sum of the tokens' losses was divided by, to which ``"code"`` is held: the number of
            tokens for a mean, the rows of the batch for the sum that the paper's code divides by them, 1 for
            the sum itself. For a mean over 20 rows of 20 steps that is 3.85e-4 times 1/2 |P|^2.
            ``"paper"`` is added to the loss as it stands, whatever that was divided by.
        pr_norm: which of the two.
        pr_weight: lambda. Default: as above.

    Returns:
        The penalty, in float32 for half precision, else in the dtype of ``weight``. At P = 0 the gradient of
        ``"paper"`` is 0.

    Raises:
        ValueError: ``weight`` is not square, an option is not as above, or a number is not positive.
        TypeError: ``weight`` is no tensor of floating point, or a number is none.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017, and the code
    published with it.
    """
    op = "projection_penalty"
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: weight must be a floating-point tensor, got {got}")
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight must have shape (H, H), got {tuple(weight.shape)}; it goes from the width of the"
            " hidden state to that of the embedding, which are one"
        )
    check_positive(op, "tokens", tokens)
    scale = checked_weight(op, pr_norm, pr_weight)
    (weight,) = widened(weight)
    if pr_norm == "paper":
        return scale * torch.linalg.vector_norm(weight)
    return scale / (2 * tokens) * weight.square().sum()


def checked_weight(op: str, pr_norm: PRNorm, pr_weight: float | None) -> float:
    """Lambda."""
    check_one_of(op, "pr_norm", pr_norm, get_args(PRNorm))
    if pr_weight is None:
        return _WEIGHTS[pr_norm]
    check_positive(op, "pr_weight", pr_weight)
    return pr_weight


class Projection(nn.Module):
    """A projection between a model and its output embedding S, for projection regularisation.

    ::

        logits = S (P h + p_b) + c
        loss   = cross entropy + penalty(tokens)

    The paper has it in its models without dropout, tied or not. In a model of one's own::

        projection = Projection(H)
        loss = tied.loss(projection(h), target)
        (loss + projection.penalty(target.numel())).backward()

    Args:
        hidden_size: H, the width of h and of the embedding.
        pr_norm, pr_weight: of the penalty, as in ``projection_penalty``.
        bias: whether there is p_b, which the paper's code has and its formula has not.
        init_range: P and p_b begin uniform in [-init_range, init_range], as all of the paper's small model;
            not as the identity.
        device, dtype: of the parameters.

    Shape:
        h ``(..., H)`` to ``(..., H)``. Parameters: ``weight`` (H, H), ``bias`` (H,).

    Raises:
        ValueError: an option or a size is not as above; h has another width.
        TypeError: a size is no integer.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017, and the code
    published with it.

    Example:
        >>> import torch
        >>> from fastkit.methods.tied_embedding import Projection
        >>> projection = Projection(64)
        >>> projection(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
        >>> projection.penalty(20).shape
        torch.Size([])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        *,
        pr_norm: PRNorm = "code",
        pr_weight: float | None = None,
        bias: bool = True,
        init_range: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("Projection", "hidden_size", hidden_size, 1)
        if check_number("Projection", "init_range", init_range) < 0:
            raise ValueError(f"Projection: init_range must not be negative, got {init_range}")
        self.pr_norm: PRNorm = pr_norm
        self.pr_weight: float = checked_weight("Projection", pr_norm, pr_weight)
        self.init_range: float = init_range
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.init_range, self.init_range)

    def forward(self, h: Tensor) -> Tensor:  # (..., H) -> (..., H)
        """``P h + p_b``."""
        size = self.weight.shape[-1]
        if h.dim() == 0 or h.shape[-1] != size:
            raise ValueError(f"Projection: h must have shape (..., {size}), got {tuple(h.shape)}")
        return linear(h, self.weight, self.bias)

    def penalty(self, tokens: float = 1) -> Tensor:  # ()
        """``projection_penalty`` of P. ``tokens``: what the sum of the losses was divided by."""
        return projection_penalty(self.weight, tokens, pr_norm=self.pr_norm, pr_weight=self.pr_weight)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.weight.shape[0]}, pr_norm={self.pr_norm!r}, pr_weight={self.pr_weight:.4g}{bias}"
