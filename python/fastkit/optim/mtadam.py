"""MTAdam: Adam for several losses, balanced per loss and per layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from fastkit.ops.mtadam import NonFinite
from fastkit.ops.mtadam_checks import check_ranks
from fastkit.optim.mtadam_pending import Pending
from fastkit.optim.mtadam_processes import (
    Gradients,
    Group,
    Processes,
    any_sharded,
    as_sharded,
    by_backward,
    found_by_any,
)
from fastkit.optim.mtadam_state import (
    Buckets,
    by_index,
    check_loaded,
    is_scalar,
    loaded,
    new_entry,
    new_state,
)
from fastkit.optim.mtadam_terms import Losses, check_gradients, check_group, check_loss, named, names_of
from fastkit.optim.mtadam_update import Update, weights_of

OnNonFinite = Literal["skip_step", "skip_term", "propagate"]
_NONFINITE: dict[str, NonFinite] = {"skip_step": "skip", "skip_term": "skip_term", "propagate": "propagate"}


class MTAdam(torch.optim.Optimizer):
    """Adam for several losses ("terms"), whose gradients are balanced per loss and per layer.

    Each term is differentiated by itself. Of each parameter tensor the gradients of all terms are given the
    norm that the first one's has (running averages of norms), so that the weights of the losses do not
    matter; second moments are kept per term, and the largest one divides. The formula is that of
    ``fastkit.ops.mtadam_update_``. With one term it is ``torch.optim.Adam``; with L aligned terms a step is
    up to L times as long as Adam's, for the balanced gradients are added: compare with Adam at ``L lr``.

    ::

        optimizer = MTAdam(model.parameters(), lr=1e-3)
        optimizer.step({"class": loss, "sparsity": penalty})  # no backward(): the optimizer differentiates

    or term by term, which keeps the graph only as long as terms are to come::

        optimizer.backward_term("class", loss)
        optimizer.backward_term("sparsity", penalty)
        optimizer.step()

    A step costs L backward passes. Gradients do not go through ``p.grad``, which is left as it is: clipping
    it does not change a step, and ``zero_grad()`` forgets the terms that wait for ``step()``.

    Args:
        params: parameters or groups of them, as of every optimizer; dense, real, float32, float64, bfloat16
            or float16, on any devices. A group may have its own lr, betas, eps, weight_decay, amsgrad,
            decoupled_weight_decay, ranks, anchor, alive_eps and max_scale.
        lr: the learning rate, a number or a tensor of one; on a GPU a tensor there is read on the device.
        betas: decay rates of the first and second moments, and of the running norms.
        eps: added to the denominator.
        weight_decay: coupled by default: a part of every term's gradient, as in the authors' code, so that it
            acts L times.
        amsgrad: divide by the largest denominator so far.
        terms: how many losses there are, or their names; by default what the first step is given. A list's
            terms are named "0", "1" and so on. torch.distributed.checkpoint needs them here.
        ranks: weights of the balanced terms, a number for each; default: all 1.
        decoupled_weight_decay: as AdamW has it, once.
        anchor: the index or the name of the term whose norm the others are given; of a tensor where that is
            dead, the first term that is alive takes its place.
        alive_eps: a running norm above this is alive; a dead term is not scaled.
        max_scale: the largest factor by which a norm is raised; default: no limit.
        mode: ``"batched"`` holds the gradients of all terms until ``step()``: L times the parameters.
            ``"streaming"`` folds a term into the moments as soon as it is differentiated, and holds one set.
            It gives the same numbers, but cannot undo a term: ``on_nonfinite`` must not be ``"skip_step"``,
            terms must come in their order, once a step and unscaled, and the anchor must be the first.
        process_group: the processes whose gradients are averaged; by default all, if there are several. None:
            no others, or gradients that are averaged already.
        on_nonfinite: what a NaN or inf does. ``"skip_step"``: of a loss, nothing is updated; of the norm of a
            gradient, its tensor is left as it is. ``"skip_term"``: a gradient whose norm it is counts as
            zeros. ``"propagate"``: nothing is looked at, a term whose norm is NaN is not scaled.

    On several processes a step takes the mean of their gradients, term by term, unasked: autograd does not
    hand those of several losses to ``DistributedDataParallel``. All processes must step at the same time,
    with a term that one has not as None. Parameters that are DTensors, as those of FSDP2, are differentiated
    by ``loss.backward()``, and have the mean from there; their norms are those of the whole parameter.
    FSDP2 needs every loss on every process, and on the way from the model's output: ``0 * output.sum()`` in
    the place of None, and added to losses of inner activations; penalties of parameters are to be computed
    before the forward.

    A term that does not reach a parameter, as another task's head, is a gradient of zeros there; a parameter
    that no term reaches in a step, or that is frozen, is left as it is, with its state.

    State, per parameter: ``step``, ``exp_avg``, ``exp_avg_sq.<term>``, ``grad_norm.<term>`` and with amsgrad
    ``max_exp_avg_sq``, shaped like it or a number, in float32, for float64 parameters in float64; that is
    4 (L + 1) bytes an element. ``load_state_dict`` keeps these dtypes, and refuses other terms.

    Raises:
        ValueError: an option, a loss, or the terms of a step are not as above.
        TypeError: a parameter or a gradient is sparse, complex or of another dtype.
        RuntimeError: in a step: the processes have other parameters or terms than each other.

    Source: Malkiel, Wolf, "MTAdam: Automatic Balancing of Multiple Training Loss Terms", EMNLP 2021, and the
    behaviour of the authors' code; ``docs/ops/mtadam.md`` has what is our choice.

    Example:
        >>> import torch
        >>> from fastkit.optim import MTAdam
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = MTAdam([w], lr=0.1)
        >>> for _ in range(20):
        ...     _ = optimizer.step([w[0] ** 2, 1000 * w[1] ** 2])
        >>> bool(w.abs().max() < 0.4)
        True
    """

    _step_supports_amp_scaling = True  # GradScaler then passes found_inf, and waits for nothing

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        terms: int | Sequence[str] | None = None,
        ranks: Sequence[float] | None = None,
        decoupled_weight_decay: bool = False,
        anchor: int | str = 0,
        alive_eps: float = 1e-10,
        max_scale: float | None = None,
        mode: Literal["batched", "streaming"] = "batched",
        on_nonfinite: OnNonFinite = "skip_step",
        process_group: Group | Literal["default"] | None = "default",
    ) -> None:
        if mode not in ("batched", "streaming"):
            raise ValueError(f"MTAdam: mode must be batched or streaming, got {mode!r}")
        if on_nonfinite not in ("skip_step", "skip_term", "propagate"):
            raise ValueError(
                f"MTAdam: on_nonfinite must be skip_step, skip_term or propagate, got {on_nonfinite!r}"
            )
        if mode == "streaming" and on_nonfinite == "skip_step":
            raise ValueError(
                "MTAdam: on_nonfinite must be skip_term or propagate in streaming mode, which cannot undo the"
                " terms of a step; pass on_nonfinite='skip_term'"
            )
        self.mode = mode
        self.on_nonfinite = on_nonfinite
        self._processes = Processes(process_group)
        self._begin()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "terms": None if terms is None else names_of(terms),
            "ranks": ranks,
            "decoupled_weight_decay": decoupled_weight_decay,
            "anchor": anchor,
            "alive_eps": alive_eps,
            "max_scale": max_scale,
        }
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Nothing waits for ``step()``, and nothing is known of the state."""
        self._buckets = Buckets()
        self._pending = Pending()

    # --- what there is

    @property
    def terms(self) -> tuple[str, ...] | None:
        """The names of the terms, in order; None before they are known."""
        terms = self.param_groups[0]["terms"]
        return None if terms is None else tuple(terms)

    @property
    def process_group(self) -> Group | Literal["default"] | None:
        """The processes whose gradients are averaged, as given."""
        return self._processes.given

    def grad_norms(self, param: Tensor) -> dict[str, Tensor]:
        """The running norms of a parameter's gradients, by term: copies, on its device; {} before a step."""
        state = self.state.get(param)
        return {} if not state else {t: state[f"grad_norm.{t}"].clone() for t in self.terms or ()}

    def effective_weights(self, param: Tensor) -> dict[str, Tensor]:
        """The factors that gradients of these norms are multiplied with, by term, with the group's ranks."""
        norms = self.grad_norms(param)
        if not norms:
            return {}
        group = next(g for g in self.param_groups if any(param is p for p in g["params"]))
        weights = weights_of(group, torch.stack(list(norms.values())))
        return dict(zip(norms, weights.unbind(), strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as of every optimizer; the terms are those that there are."""
        self._refuse_within_a_step("add_param_group")
        self._processes.forget()
        if isinstance(param_group, dict):
            terms = param_group.get("terms")
            known = self.param_groups[0]["terms"] if self.param_groups else self.defaults["terms"]
            terms = known if terms is None else names_of(terms)
            param_group = {**param_group, "terms": None if terms is None else list(terms)}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["terms"] != self.param_groups[0]["terms"]:
                raise ValueError(
                    f"MTAdam: terms must be those of the other groups, {self.terms}, got {group['terms']}"
                )
            check_group(group, self.mode)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def add_term(self, name: str) -> None:
        """One more term, the last. Its norms begin with the first that are alive, its moments with zeros."""
        self._refuse_within_a_step("add_term")
        if self.terms is None:
            raise ValueError("MTAdam.add_term: the terms must be known; pass terms= to MTAdam")
        if not isinstance(name, str) or not name or name in self.terms:
            raise ValueError(
                f"MTAdam.add_term: name must be a new one beside {list(self.terms)}, got {name!r}"
            )
        terms = [*self.terms, name]
        for group in (*self.param_groups, self.defaults):
            group["ranks"] = None if group["ranks"] is None else [*group["ranks"], 1.0]
            group["terms"] = list(terms)
        for param in self._params():
            if state := self.state.get(param):
                for key in (f"exp_avg_sq.{name}", f"grad_norm.{name}"):
                    state[key] = new_entry(param, key)
        self._buckets = Buckets()
        self._processes.forget()

    def drop_term(self, name: str) -> None:
        """One term less: its state is forgotten. The anchor cannot go, unless it is just index 0."""
        self._refuse_within_a_step("drop_term")
        terms = list(self.terms or ())
        if name not in terms or len(terms) == 1:
            raise ValueError(f"MTAdam.drop_term: name must be one of several terms, {terms}, got {name!r}")
        index = terms.index(name)
        if any(group["anchor"] in (name, index or name) for group in self.param_groups):
            raise ValueError(f"MTAdam.drop_term: {name!r} is the anchor; set another in param_groups first")
        for group in (*self.param_groups, self.defaults):
            if group["ranks"] is not None:
                group["ranks"] = [rank for i, rank in enumerate(group["ranks"]) if i != index]
            group["terms"] = [term for term in terms if term != name]
            if isinstance(group["anchor"], int) and group["anchor"] > index:
                group["anchor"] -= 1
        for param in self._params():
            if state := self.state.get(param):
                del state[f"exp_avg_sq.{name}"], state[f"grad_norm.{name}"]
        self._buckets = Buckets()
        self._processes.forget()

    # --- a step

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        losses: Losses | Callable[[], Losses] | None = None,
        ranks: Sequence[float] | None = None,
        *,
        closure: Callable[[], Losses] | None = None,
    ) -> Losses | None:
        """Differentiate the losses, and update; or, without losses, update by the terms given before.

        Args:
            losses: a list of scalars, or a dict of them by term; None in the place of one is a term without a
                gradient in this step. A function is taken as ``closure``. Without losses: ``backward_term``
                has been called. (Without that too, where the terms are known, the state of parameters is made
                that have none, and nothing else happens: torch.distributed.checkpoint asks for that.)
            ranks: the weights of the terms in this step, instead of those of the groups.
            closure: a function without arguments that returns the losses, and does not call backward; or None
                where ``backward_term`` has been called.

        Returns:
            The losses, detached, as they were given; None without.
        """
        if losses is not None and closure is not None:
            raise ValueError("MTAdam.step: losses and closure give the same; pass one of them")
        if callable(losses):
            losses, closure = None, losses
        if closure is not None:
            with torch.enable_grad():
                losses = closure()
            if losses is None and not self._pending.times:  # pyright: ignore[reportUnnecessaryComparison]
                raise ValueError("MTAdam.step: the closure must return the losses, got None")
        if getattr(self, "found_inf", None) is None:  # which GradScaler.step sets for its call
            return self._step(losses, ranks)
        try:
            self._pending.check_scaler(losses, self.mode)
            return self._step(losses, ranks)
        except BaseException:
            for name in ("found_inf", "grad_scale"):  # GradScaler does that after a step alone
                delattr(self, name)
            raise

    def _step(self, losses: Losses | None, ranks: Sequence[float] | None) -> Losses | None:
        if losses is not None:
            return self._step_of_losses(losses, ranks)
        if not self._pending.times and (not self.state or self._processes.group is None):
            self._step_of_nothing()
            return None
        if ranks is not None:
            if self.mode == "streaming":
                raise ValueError(
                    "MTAdam.step: ranks come too late in streaming mode, whose terms are folded; pass them to"
                    " MTAdam"
                )
            check_ranks("MTAdam.step", ranks, len(self.terms or ()))
        self._finish(ranks)
        return None

    def _step_of_losses(self, losses: Losses, ranks: Sequence[float] | None) -> Losses:
        op = "MTAdam.step"
        self._refuse_within_a_step("step", "call step() without losses")
        of_term = named(op, losses, self.terms)
        if ranks is not None:
            check_ranks(op, ranks, len(of_term))
        present = {term: loss for term, loss in of_term.items() if loss is not None}
        if not present and self._processes.group is None:
            raise ValueError(f"{op}: one loss at least must not be None")
        for term, loss in present.items():
            check_loss(op, term, loss)
        with self._terms_of_step(list(of_term)):
            for term, loss in present.items():
                self._differentiate(op, term, loss, term != list(present)[-1], None, ranks)
            self._finish(ranks)
        detached = {term: None if loss is None else loss.detach() for term, loss in of_term.items()}
        return detached if isinstance(losses, Mapping) else list(detached.values())

    def _step_of_nothing(self) -> None:
        new = [
            (group, param)
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad and not self.state.get(param)
        ]
        if self.terms is None or not new:
            raise ValueError(
                "MTAdam.step: there is no loss; pass one for each term, or call backward_term first"
            )
        for group, param in new:
            self.state[param] = new_state(group, param)

    def backward_term(
        self, term: str | int, loss: Tensor | None, scaler: Any = None, *, retain_graph: bool | None = None
    ) -> None:
        """Differentiate one term's loss; ``step()`` then updates by all terms so far.

        In batched mode a term may be given several times before ``step()``: its gradients are added up, and
        the norm is that of the sum (gradient accumulation).

        Args:
            term: its name, or its index.
            loss: a scalar; None, or no call at all, is a term without a gradient in this step. On several
                processes, of which one has no term in the first step, that one calls with None.
            scaler: a ``torch.amp.GradScaler``; it scales the loss, not the caller. The sum of the scaled
                gradients is in ``p.grad`` until the step: ``scaler.step(optimizer)`` looks for inf there.
            retain_graph: whether the loss's graph is kept for another backward. Default: until all terms have
                been given equally often.
        """
        op = "MTAdam.backward_term"
        if self.terms is None:
            raise ValueError(f"{op}: the terms must be known; pass terms= to MTAdam")
        name = self._name(op, term)
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.mode == "streaming":
            self._pending.check_order(name, self.terms, scaler)
        if retain_graph is None:
            times = {t: self._pending.times.get(t, 0) + (t == name) for t in self.terms}
            retain_graph = len(set(times.values())) > 1
        if loss is None:
            if self._processes.group is not None:  # others may have one
                self._take_nothing(name, scaler)
            self._pending.count(name)
            return
        check_loss(op, name, loss)
        self._pending.check_scaled_alike(name, scaler)
        self._differentiate(op, name, loss, retain_graph, scaler, None)

    def step_from_grads(
        self,
        grads: Sequence[Sequence[Tensor | None]] | Mapping[str, Sequence[Tensor | None]],
        ranks: Sequence[float] | None = None,
    ) -> None:
        """A step by gradients that are at hand, as from ``torch.func``: ``grads[l][i]``, term l, parameter i.

        ``i`` counts all parameters, group after group; None where a term does not reach one. ``p.grad`` is
        not touched.
        """
        op = "MTAdam.step_from_grads"
        self._refuse_within_a_step("step_from_grads")
        if isinstance(grads, Tensor) or not isinstance(grads, (Mapping, Sequence)):
            raise TypeError(f"{op}: grads must be a list of lists of tensors, got {type(grads).__name__}")
        params = self._params()
        of_term = named(op, grads, self.terms)
        if ranks is not None:
            check_ranks(op, ranks, len(of_term))
        given: dict[str, Gradients] = {}
        for term, of_params in of_term.items():
            given[term] = [None] * len(params) if of_params is None else list(of_params)
        check_gradients(op, given, params)
        with self._terms_of_step(list(given)):
            for term, of_params in given.items():
                self._take(term, of_params, ranks)
            self.step(ranks=None if self.mode == "streaming" else ranks)  # as schedulers and hooks see it

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer; terms that wait for ``step()`` are forgotten too, unless they are folded."""
        super().zero_grad(set_to_none)
        if self.mode == "batched":
            self._forget()

    # --- terms and their gradients

    @contextmanager
    def _terms_of_step(self, names: list[str]) -> Generator[None]:
        """The terms, where they are not known yet; and nothing waits in the end, unless it is folded."""
        unknown = self.terms is None
        try:
            if unknown:
                for group in self.param_groups:
                    group["terms"] = list(names)
                    check_group(group, self.mode)
            yield
        except BaseException:
            if unknown and not self.state:
                for group in self.param_groups:
                    group["terms"] = None
            raise
        finally:
            if not any(self._pending.folded):
                self._forget()

    def _name(self, op: str, term: str | int) -> str:
        terms = self.terms or ()
        if isinstance(term, int) and 0 <= term < len(terms):
            return terms[term]
        if term not in terms:
            raise ValueError(
                f"{op}: term must be one of {', '.join(terms)}, or its index, got {term!r}; add_term makes a"
                " new one"
            )
        return str(term)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _refuse_within_a_step(self, method: str, cure: str = "call step() first") -> None:
        if self._pending.times:
            raise RuntimeError(
                f"MTAdam.{method}: terms {', '.join(self._pending.times)} have been given and wait for"
                f" step(); {cure}"
            )

    def _differentiate(
        self, op: str, term: str, loss: Tensor, retain_graph: bool, scaler: Any, ranks: Sequence[float] | None
    ) -> None:
        params = self._params()
        wanted = [i for i, param in enumerate(params) if param.requires_grad]
        if not wanted:
            raise ValueError(f"{op}: all parameters are frozen; let one at least require a gradient")
        scale = None if scaler is None else self._pending.scale_of(term, loss, scaler)
        scaled = loss if scale is None else loss * scale.to(loss.dtype)
        of = [params[i] for i in wanted]
        sharded = any_sharded(of)
        if sharded:
            found = by_backward(scaled, of, retain_graph)
        else:
            found = torch.autograd.grad(scaled, of, retain_graph=retain_graph, allow_unused=True)
        if all(grad is None for grad in found):
            raise ValueError(
                f"{op}: the loss of term {term!r} reaches none of the parameters; pass None for a term that"
                " has no gradient in this step"
                + (
                    "; under FSDP2 leave set_requires_gradient_sync(True), and compute penalties of"
                    " parameters before the forward"
                )
                * sharded
            )
        grads: Gradients = [None] * len(params)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        check_gradients(op, {term: grads}, params)
        if scale is not None:
            self._pending.show(term, scale, params, grads)
        if self.on_nonfinite == "skip_step":
            self._pending.note_loss(loss)
        self._take(term, grads, ranks)

    def _take(self, term: str, grads: Gradients, ranks: Sequence[float] | None) -> None:
        """Gradients of one term: kept until ``step()``, or folded."""
        if self.mode == "streaming":
            self._fold((self.terms or ()).index(term), grads, ranks)
        else:
            self._pending.add(term, grads)
        self._pending.count(term)

    def _take_nothing(self, term: str, scaler: Any) -> None:
        """In streaming mode now, as others fold now; and a scaler must find something to check."""
        params = self._params()
        nothing: Gradients = [None] * len(params)
        if self.mode == "streaming":
            self._fold((self.terms or ()).index(term), nothing, None)
        elif scaler is not None and self._pending.fits_scaler(term, scaler):
            zeros = torch.zeros_like(params[0])
            scale = self._pending.scale_of(term, zeros, scaler)
            self._pending.show(term, scale, params[:1], [zeros])
            self._pending.add(term, nothing)

    def _fold(self, term: int, grads: Gradients, ranks: Sequence[float] | None) -> None:
        """On several processes together, as zeros those terms before it that this one has not been given."""
        if self._processes.group is None:
            self._update().fold(term, grads, ranks)
            return
        nothing: Gradients = [None] * len(grads)
        for index in range(self._pending.ended, term + 1):
            own = grads if index == term else nothing
            if any(as_sharded(param) is None for param in self._params()):
                (own,), _, _ = self._mean([list(own)], [None], None)
            self._update().fold(index, own, ranks)
            self._pending.ended = index + 1

    def _mean(
        self, grads: list[Gradients], scales: list[Tensor | None], found_inf: Tensor | None
    ) -> tuple[list[Gradients], list[Tensor | None], Tensor]:
        op, params, terms = "MTAdam.step", self._params(), self.terms or ()
        return self._processes.mean(op, params, terms, grads, scales, found_inf)

    def _forget(self) -> None:
        if self._pending.shows:
            for param in self._params():
                param.grad = None
        self._pending = Pending()

    # --- the update

    def _finish(self, ranks: Sequence[float] | None) -> None:
        """Update by the terms that have been given, and forget them."""
        try:
            if self.mode == "streaming":
                if self._processes.group is not None and self._pending.ended < len(self.terms or ()):
                    self._fold(len(self.terms or ()) - 1, [None] * len(self._params()), ranks)
                self._update().apply()
            else:
                self._share()
                self._update().at_once(ranks)
        finally:
            self._forget()

    def _share(self) -> None:
        """Go on with the means over all processes."""
        pending, params, terms = self._pending, self._params(), list(self.terms or ())
        found_inf = pending.found_inf(getattr(self, "found_inf", None), params[0].device)
        if self._processes.group is None:
            if any_sharded(params):
                pending.found(found_by_any(found_inf, params))
            return
        means, scales, found_inf = self._mean(
            [pending.gradients.get(term) or [None] * len(params) for term in terms],
            [pending.scale(term) for term in terms],
            found_inf,
        )
        of_terms = dict(zip(terms, scales, strict=True))
        pending.take_over(dict(zip(terms, means, strict=True)), of_terms, found_inf)

    def _update(self) -> Update:
        found_inf = getattr(self, "found_inf", None)
        nonfinite = _NONFINITE[self.on_nonfinite]
        return Update(self.param_groups, self.state, self._buckets, self._pending, nonfinite, found_inf)

    # --- files

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_within_a_step("__getstate__")
        if self.process_group not in (None, "default"):
            raise RuntimeError(
                "MTAdam: an optimizer with a process_group of its own cannot be copied or pickled; make a new"
                " one, and load this one's state_dict"
            )
        own = {name: getattr(self, name) for name in ("mode", "on_nonfinite", "process_group")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)  # of a copy; load_state_dict hands over what is in files alone
        if "process_group" in own:
            self._processes = Processes(own.pop("process_group"))
        super().__setstate__(own)
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer: moments are the optimizer's own, numbers are clones."""
        self._refuse_within_a_step("state_dict")
        saved = super().state_dict()
        saved["state"] = {
            index: {key: entry.clone() if is_scalar(key) else entry for key, entry in state.items()}
            for index, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer, but state keeps its dtypes and is copied; other terms or shapes are refused.

        What the checkpoint says of the groups is taken over, as their lr and terms are.
        """
        self._refuse_within_a_step("load_state_dict")
        terms = None if self.terms is None else list(self.terms)
        saved: dict[str, Any] = {}  # what hooks of others have made of it

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            saved.update(state_dict)
            check_loaded(saved, self.param_groups, terms, self.mode)

        def copy(_: torch.optim.Optimizer) -> None:
            for group in self.param_groups:
                group["terms"] = group["terms"] or terms
            for index, param in by_index(saved["param_groups"], self.param_groups):
                if of_param := saved["state"].get(index):
                    self.state[param] = {key: loaded(param, key, entry) for key, entry in of_param.items()}

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(copy, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
