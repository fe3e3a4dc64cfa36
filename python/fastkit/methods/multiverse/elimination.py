"""Which of many parallel classifier heads are dropped during training, and when."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fastkit.methods._options import check_integer, check_number, check_one_of

Score = Literal["loss", "accuracy", "dev"]
Policy = Literal["margin", "fraction", "none"]
Group = Any  # torch.distributed.ProcessGroup, where PyTorch has it

FORMAT = 1
_OP = "HeadEliminator"
_SLACK = 1e-3  # of the margin: where the best head has hardly an error left, noise would be beyond any share
_OPTIONS = (
    "num_heads", "total_steps", "score", "beta", "policy", "margin", "fraction", "interval", "start", "stop",
    "min_heads",
)  # fmt: skip


class HeadEliminator:
    """Drops heads whose error stays behind that of the best one, for good; numbers in, heads out.

    ::

        e_h = beta e_h + (1 - beta) x_h,    w = beta w + (1 - beta),    s_h = e_h / w     at first e_h = w = 0
        x_h = sum of losses / rows, or 1 - sum of correct / rows        over micro-batches and processes

    Once per step of the optimizer, w being 1 - beta^n after n of them. At step t there is a check where
    ``start <= t <= stop`` and ``t % interval == 0``. Of the K active heads, the worst first, and of equal
    ones that of the higher index first, it drops

    - ``"margin"``: those with ``s_h > (1 + margin) min(s) + 1e-3``, at most ``ceil(fraction K)``;
    - ``"fraction"``: ``floor(fraction K)``, which is 0 where K is small;

    and never so many that fewer than ``min_heads`` are left. What is not finite counts as +inf. ::

        eliminator = HeadEliminator(128, total_steps=1000)
        for batch in batches:
            found = ...                                     # loss (H,), correct (H,), count
            eliminator.add(found.loss, found.correct, found.count)       # for each micro-batch
            ...
            optimizer.step()
            dropped = eliminator.step()

    Args:
        num_heads: H, how many heads there are at first.
        total_steps: steps of the optimizer in the whole run, from which defaults follow.
        score: x_h is the training ``"loss"``, or the share of wrong rows (``"accuracy"``); or s_h is 1 minus
            what ``add_dev_scores`` was given last (``"dev"``), without an average.
        beta: the weight of the past, in [0, 1). None: 0.99, or 0.9 where ``total_steps`` is below 1000.
        policy: ``"margin"``, ``"fraction"``, or ``"none"``: no check ever.
        margin: by which share an error may be above the least.
        fraction: in (0, 1], the share of active heads at a check: that is dropped, or at most. The product is
            rounded as a double.
        interval: steps between checks. None: ``total_steps / 50`` rounded down, but at least 10.
        start, stop: the first and the last step at which there may be a check. None: 10 % and 90 % of
            ``total_steps``. With the defaults, a run of few steps has no check.
        min_heads: how many are left in any case.
        process_group: the processes whose rows are added up, so that all drop the same heads; by default all,
            if there are several. None: this one alone.

    Attributes:
        num_heads, total_steps, score, beta, policy, margin, fraction, interval, start, stop, min_heads: the
            options, None replaced.

    Raises:
        ValueError, TypeError: an option is not as above, or ``interval``, ``start`` and ``stop`` as given
            leave no check.

    Numerics: sums are float64 on the device of what is added, averages and decisions Python's floats: on any
    machine the same losses drop the same heads. A step copies 2H + 1 numbers from the device to the host, and
    waits for them; ``add`` waits for nothing. With several processes there is one collective a step.

    Source: Malkiel, Wolf, *Maximal Multiverse Learning for Promoting Cross-Task Generalization of Fine-Tuned
    Language Models*, EACL 2021. That weaker heads are dropped adaptively in training is theirs. The scores,
    the rules and all defaults here are our choice.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        total_steps: int,
        score: Score = "loss",
        beta: float | None = None,
        policy: Policy = "margin",
        margin: float = 0.10,
        fraction: float = 0.10,
        interval: int | None = None,
        start: int | None = None,
        stop: int | None = None,
        min_heads: int = 1,
        process_group: Group | Literal["default"] | None = "default",
    ) -> None:
        check_integer(_OP, "num_heads", num_heads, 1)
        check_integer(_OP, "total_steps", total_steps, 1)
        check_one_of(_OP, "score", score, get_args(Score))
        check_one_of(_OP, "policy", policy, get_args(Policy))
        if beta is None:
            beta = 0.9 if total_steps < 1000 else 0.99
        if not 0 <= check_number(_OP, "beta", beta) < 1:
            raise ValueError(f"{_OP}: beta must be in [0, 1), got {beta}")
        if not 0 <= check_number(_OP, "margin", margin) <= sys.float_info.max:
            raise ValueError(f"{_OP}: margin must be finite and not negative, got {margin}")
        if not 0 < check_number(_OP, "fraction", fraction) <= 1:
            raise ValueError(f"{_OP}: fraction must be in (0, 1], got {fraction}")
        check_integer(_OP, "min_heads", min_heads, 1)
        if min_heads > num_heads:
            raise ValueError(f"{_OP}: min_heads must be at most num_heads, {num_heads}, got {min_heads}")
        is_given = any(value is not None for value in (interval, start, stop))
        interval = max(10, total_steps // 50) if interval is None else interval
        start = -(-total_steps // 10) if start is None else start
        stop = 9 * total_steps // 10 if stop is None else stop
        for name, value, least in (("interval", interval, 1), ("start", start, 0), ("stop", stop, 0)):
            check_integer(_OP, name, value, least)
        if is_given and policy != "none" and stop // interval * interval < max(start, 1):
            raise ValueError(
                f"{_OP}: stop must leave a check, got stop={stop} with start={start} and"
                f" interval={interval}; raise it, or pass policy='none'"
            )
        is_known = process_group is None or (isinstance(process_group, str) and process_group == "default")
        if not is_known and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                f"{_OP}: process_group must be a torch.distributed.ProcessGroup, 'default' or None, got"
                f" {type(process_group).__name__}"
            )
        self.num_heads: int = num_heads
        self.total_steps: int = total_steps
        self.score: Score = score
        self.beta: float = float(beta)
        self.policy: Policy = policy
        self.margin: float = float(margin)
        self.fraction: float = float(fraction)
        self.interval: int = interval
        self.start: int = start
        self.stop: int = stop
        self.min_heads: int = min_heads
        self._process_group = process_group
        self._steps = 0
        self._active = [True] * num_heads
        self._average = [0.0] * num_heads  # e; with score="dev" the errors themselves
        self._weight = 0.0  # w; 0 where no head has a score yet
        self._has_new_scores = False  # of dev, since the last check
        self._pending: Tensor | None = None  # sums of losses, of correct, and rows: (2H + 1,)
        self._is_compared = False

    @property
    def active(self) -> Tensor:
        """(H,) bool on the CPU, a copy: which heads are left."""
        return torch.tensor(self._active)

    @property
    def num_active(self) -> int:
        """How many heads are left."""
        return sum(self._active)

    @property
    def steps(self) -> int:
        """How often ``step`` was called: t above."""
        return self._steps

    @torch.no_grad()
    def add(self, loss: Tensor, correct: Tensor, count: int | Tensor) -> None:
        """What a micro-batch has found; those of one step are weighted by their rows. Nothing is waited for.

        Args:
            loss: (H,) floating point, the mean over the rows that count; of dropped heads it has no effect.
            correct: (H,), how many rows each head had right; used by ``score="accuracy"`` alone.
            count: how many rows count, an integer or a 0-d tensor; with 0 the rest has no effect.

        Raises:
            ValueError, TypeError: another shape or dtype, or a negative count; of a tensor ``step`` says so.
        """
        self._check_vector("add: loss", loss)
        self._check_vector("add: correct", correct)
        if not loss.is_floating_point():
            raise TypeError(f"{_OP}: add: loss must be floating point, got {loss.dtype}")
        if isinstance(count, Tensor):
            if count.ndim != 0:
                raise ValueError(f"{_OP}: add: count must be a 0-d tensor, got shape {tuple(count.shape)}")
            if count.is_complex():
                raise TypeError(f"{_OP}: add: count must be real, got {count.dtype}")
            rows = count.to(loss.device, torch.float64).reshape(1)
        else:
            check_integer(f"{_OP}: add", "count", count, 0)
            rows = torch.full((1,), count, dtype=torch.float64, device=loss.device)  # a kernel, not a copy
        values = torch.cat([loss.double() * rows, correct.to(loss.device, torch.float64)])
        values = torch.where(rows > 0, values, 0.0)  # a mean over no rows may be NaN
        found = torch.cat([values, torch.where(rows >= 0, rows, math.nan)])
        self._pending = found if self._pending is None else self._pending.to(found.device) + found

    def add_dev_scores(self, scores: Tensor) -> None:
        """With ``score="dev"``, what the heads reach on a development set; a check uses the last given.

        Args:
            scores: (H,), higher is better and 1 the best: accuracy, F1, a correlation; the same on all
                processes. Of dropped heads they have no effect.

        Raises:
            ValueError, TypeError: another shape, a score above 1, or another ``score`` of the eliminator.
        """
        if self.score != "dev":
            raise ValueError(
                f"{_OP}: add_dev_scores: score must be 'dev', got {self.score!r}; pass score='dev' to {_OP}"
            )
        self._check_vector("add_dev_scores: scores", scores)
        values: list[float] = scores.detach().double().tolist()
        if any(on and 1 < value < math.inf for value, on in zip(values, self._active, strict=True)):
            raise ValueError(
                f"{_OP}: add_dev_scores: scores must be at most 1, got {values}; divide percentages by 100"
            )
        heads = zip(self._active, self._average, values, strict=True)
        self._average, self._weight = [1 - value if on else e for on, e, value in heads], 1.0
        self._has_new_scores = True

    def scores(self) -> Tensor:
        """(H,) float64 on the CPU: s, the less the better; +inf of dropped heads, and before any was seen."""
        return torch.tensor(self._errors(self._average, self._weight), dtype=torch.float64)

    @torch.no_grad()
    def step(self) -> list[int]:
        """Once after each step of the optimizer; under torch.distributed on all processes.

        A step to which no row was added leaves the average as it is, and has no check: by what was judged
        once nothing is dropped twice. What is refused changes nothing, and may be called again.

        Returns:
            The heads that are dropped now, the worst first.

        Raises:
            RuntimeError: no active head has a finite score at a check; a check of ``score="dev"`` without new
                scores; processes differ in their active heads, options, steps or dev scores.
            ValueError: a count that was added is negative; ``policy="margin"`` with a score below 0, of which
                there are no shares.
        """
        *sums, rows = self._sums()
        if not 0 <= rows < math.inf:
            raise ValueError(
                f"{_OP}: step: count must be finite and not negative, got another in add(); pass the number"
                " of rows that count"
            )
        steps, average, weight, has_new = self._steps + 1, self._average, self._weight, self._has_new_scores
        if self.score != "dev":
            has_new = rows > 0
            if has_new:
                average, weight = self._averaged(sums, rows)
        is_check = self.policy != "none" and self.start <= steps <= self.stop and steps % self.interval == 0
        if is_check and self.score == "dev" and not has_new:
            raise RuntimeError(
                f"{_OP}: step: dev scores must be new at each check, got none before that of step {steps};"
                " call add_dev_scores() first, or pass interval=, the steps from one evaluation to the next"
            )
        dropped = self._weakest(self._errors(average, weight), steps) if is_check and has_new else []
        self._steps, self._average, self._weight, self._pending = steps, average, weight, None
        self._has_new_scores = self.score == "dev" and has_new and not is_check
        for head in dropped:
            self._active[head] = False
        return dropped

    def state_dict(self) -> dict[str, Any]:
        """All that the elimination goes on from, as numbers and tensors on the CPU.

        Under torch.distributed it is the same on all processes, but for ``pending``, what was added since the
        last step: each has its own. So save right after a step, or one state for each process.
        """
        pending = torch.zeros(2 * self.num_heads + 1, dtype=torch.float64)
        return {
            "format": FORMAT,
            **self._options(),
            "steps": self._steps,
            "active": self.active,
            "average": torch.tensor(self._average, dtype=torch.float64),
            "weight": self._weight,
            "has_new_scores": self._has_new_scores,
            "pending": pending if self._pending is None else pending.copy_(self._pending),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, to the same heads; what is refused changes nothing.

        Raises:
            ValueError, TypeError: it is of another format or other options, or not what ``state_dict`` gives.
        """
        op = f"{_OP}: load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(f"{op}: state must be what state_dict() gave, got {type(state).__name__}")
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{op}: format must be {FORMAT}, got {state.get('format')}; is it of another version?"
            )
        for name in (*_OPTIONS, "steps", "active", "average", "weight", "has_new_scores", "pending"):
            if name not in state:
                raise ValueError(f"{op}: state must have {name}, got none; pass what state_dict() gave")
        for name, value in self._options().items():
            if state[name] != value:
                raise ValueError(
                    f"{op}: {name} must be {value!r}, got {state[name]!r}; make the {_OP} with the options of"
                    " the state"
                )
        heads = self.num_heads
        for name, dtype, length in (
            ("active", torch.bool, heads),
            ("average", torch.float64, heads),
            ("pending", torch.float64, 2 * heads + 1),
        ):
            found = state[name]
            if not isinstance(found, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor, got {type(found).__name__}")
            if found.dtype != dtype or found.shape != (length,):
                raise ValueError(
                    f"{op}: {name} must be {dtype} of shape ({length},), got {found.dtype} of shape"
                    f" {tuple(found.shape)}; pass what state_dict() gave"
                )
        check_integer(op, "steps", state["steps"], 0)
        if not 0 <= check_number(op, "weight", state["weight"]) <= 1 + 1e-9:  # rounding may lead beyond 1
            raise ValueError(f"{op}: weight must be in [0, 1], got {state['weight']}")
        check_one_of(op, "has_new_scores", state["has_new_scores"], (False, True))
        active: list[bool] = state["active"].tolist()
        if sum(active) < self.min_heads:
            raise ValueError(
                f"{op}: active must have min_heads, {self.min_heads}, or more, got {sum(active)}"
            )
        self._active, self._average = active, state["average"].tolist()
        self._steps, self._weight = state["steps"], float(state["weight"])
        self._has_new_scores = bool(state["has_new_scores"])
        self._pending = state["pending"].detach().clone() if bool(state["pending"].any()) else None

    def _check_vector(self, name: str, tensor: object) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != (self.num_heads,):
            raise ValueError(
                f"{_OP}: {name} must have shape ({self.num_heads},), got {tuple(tensor.shape)}; pass one"
                " number for each head"
            )
        if tensor.is_complex():
            raise TypeError(f"{_OP}: {name} must be real, got {tensor.dtype}")

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _averaged(self, sums: list[float], rows: float) -> tuple[list[float], float]:
        """e and w, with what a step has found."""
        if self.score == "loss":
            found = [x / rows for x in sums[: self.num_heads]]
        else:
            found = [1 - x / rows for x in sums[self.num_heads :]]
        past, share = self.beta, 1 - self.beta
        heads = zip(self._active, self._average, found, strict=True)
        average = [past * e + share * x if on else e for on, e, x in heads]
        return average, past * self._weight + share  # 1 - beta^n; a power may differ from machine to machine

    def _errors(self, average: list[float], weight: float) -> list[float]:
        """s of each head."""
        if weight == 0:
            return [math.inf] * self.num_heads
        errors = [e / weight if on else math.inf for on, e in zip(self._active, average, strict=True)]
        return [error if math.isfinite(error) else math.inf for error in errors]

    def _weakest(self, errors: list[float], step: int) -> list[int]:
        """The heads that a check drops, the worst first."""
        heads = [head for head, on in enumerate(self._active) if on]
        best = min(errors[head] for head in heads)
        if best == math.inf:
            raise RuntimeError(
                f"{_OP}: step: scores must be finite in some active head, got none of {len(heads)} at step"
                f" {step}; look for NaN in the inputs, or lower the learning rate"
            )
        worst_first = sorted(heads, key=lambda head: (errors[head], head), reverse=True)
        if self.policy == "fraction":
            most = math.floor(self.fraction * len(heads))
        elif best < 0:
            raise ValueError(
                f"{_OP}: step: scores must not be negative with policy='margin', got {best} of head"
                f" {errors.index(best)} at step {step}; pass policy='fraction'"
            )
        else:
            most = math.ceil(self.fraction * len(heads))
            worst_first = [head for head in worst_first if errors[head] > (1 + self.margin) * best + _SLACK]
        return worst_first[: min(most, len(heads) - self.min_heads)]

    def _sums(self) -> list[float]:
        """Sums of losses, of correct, and rows, of all processes, which are found to be alike."""
        length = 2 * self.num_heads + 1
        own = torch.zeros(length, dtype=torch.float64) if self._pending is None else self._pending
        if self._process_group is None or not dist.is_available() or not dist.is_initialized():
            return own.tolist()
        group = dist.group.WORLD if isinstance(self._process_group, str) else self._process_group
        processes = dist.get_world_size(group)
        if processes <= 1:
            return own.tolist()
        # The host is where the sums are needed, so there they are added up if the group can.
        kinds = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
        device = torch.device("cpu" if "cpu" in kinds else kinds[0])
        if not self._is_compared:  # once: sums of other lengths cannot be added up
            lengths = torch.tensor([length, -length], device=device)
            dist.all_reduce(lengths, op=dist.ReduceOp.MAX, group=group)
            self._check_alike(lengths.tolist() == [length, -length])
            self._is_compared = True
        facts = (self._options(), self._steps, self._active, self._has_new_scores)
        known = repr((*facts, self._average if self.score == "dev" else None))
        # Sums alone can show that all have the same: by Cauchy and Schwarz, n sum(p^2) = sum(p)^2 only then.
        parts = struct.unpack(">4H", hashlib.sha256(known.encode()).digest()[:8])
        check = torch.tensor([*parts, *(part * part for part in parts)], dtype=torch.float64)
        both = torch.cat([own.to(device), check.to(device)])
        dist.all_reduce(both, group=group)
        sums: list[float] = both.tolist()
        totals, squares = map(int, sums[length : length + 4]), map(int, sums[length + 4 :])
        self._check_alike(
            all(processes * square == total**2 for total, square in zip(totals, squares, strict=True))
        )
        return sums[:length]

    def _check_alike(self, is_alike: bool) -> None:
        if not is_alike:
            raise RuntimeError(
                f"{_OP}: step: all processes must have the same active heads, options, steps and dev scores,"
                f" got others than here, with {self.num_active} of {self.num_heads} heads after step"
                f" {self._steps}; load the same state on all, or pass process_group=, the group of those that"
                " train one model"
            )
