"""The state of MTAdam: what it is of one parameter, how kernels take that of many, what may be loaded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from fastkit.optim.mtadam_processes import any_sharded, as_sharded, layout_of, local
from fastkit.optim.mtadam_terms import check_group

State = dict[str, Tensor]


def keys_of(terms: Sequence[str], amsgrad: bool) -> list[str]:
    """Of one parameter's state."""
    keys = ["step", "exp_avg", *(f"exp_avg_sq.{term}" for term in terms)]
    keys += [f"grad_norm.{term}" for term in terms]
    return [*keys, "max_exp_avg_sq"] if amsgrad else keys


def is_scalar(key: str) -> bool:
    return key == "step" or key.startswith("grad_norm.")


def new_entry(param: Tensor, key: str) -> Tensor:
    """Zeros: a number or, in the parameter's strides, a moment of each element."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    if is_scalar(key):
        return torch.zeros((), dtype=dtype, device=param.device)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def new_state(group: dict[str, Any], param: Tensor) -> State:
    return {key: new_entry(param, key) for key in keys_of(group["terms"], group["amsgrad"])}


class Bucket:
    """The parameters of one group, device, dtype and layout that have state, as kernels take them.

    Numbers of one parameter each are packed into two tensors, of which the entries of their states are views.
    """

    def __init__(
        self, group: dict[str, Any], indices: list[int], params: list[Tensor], states: list[State]
    ) -> None:
        terms, amsgrad = group["terms"], group["amsgrad"]
        self.indices = indices  # among all parameters of the optimizer
        self.params = params
        device = params[0].device
        self.steps: Tensor = torch.stack([state["step"].to(device) for state in states])
        norms = [[state[f"grad_norm.{term}"].to(device) for term in terms] for state in states]
        self.grad_norms: Tensor = torch.stack([torch.stack(of_param) for of_param in norms])
        for state, step, of_param in zip(states, self.steps.unbind(), self.grad_norms.unbind(), strict=True):
            state["step"] = step
            for term, norm in zip(terms, of_param.unbind(), strict=True):
                state[f"grad_norm.{term}"] = norm
        self.exp_avgs: list[Tensor] = [local(state["exp_avg"]) for state in states]
        self.exp_avg_sqs: list[Tensor] = [
            local(state[f"exp_avg_sq.{term}"]) for term in terms for state in states
        ]
        self.max_exp_avg_sqs: list[Tensor] = (
            [local(state["max_exp_avg_sq"]) for state in states] if amsgrad else []
        )
        self._entries = _entries(states)
        self._numbers = [entry for state in states for key, entry in state.items() if is_scalar(key)]
        self._addresses = list(map(Tensor.data_ptr, self._numbers))
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def is_of(
        self, group: dict[str, Any], indices: list[int], params: list[Tensor], states: list[State]
    ) -> bool:
        """Whether these are its parameters and their state: either may be replaced from outside."""
        entries = _entries(states)
        return (
            indices == self.indices
            and group["amsgrad"] == bool(self.max_exp_avg_sqs)
            and len(entries) == len(self._entries)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, entries, self._entries))
            and list(map(Tensor.data_ptr, self._numbers)) == self._addresses  # or their .data
        )

    def index_of(self, rows: list[int]) -> Tensor:
        """On the device, to which it is copied once."""
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, device=self.steps.device)
        return self._indices[key]


def _entries(states: Iterable[State]) -> list[Tensor]:
    return list(chain.from_iterable(map(dict.values, states)))


class Part:
    """Some parameters of a bucket."""

    def __init__(self, bucket: Bucket, rows: list[int]) -> None:
        n = len(bucket.params)
        self.params: list[Tensor] = [bucket.params[row] for row in rows]
        self.exp_avgs: list[Tensor] = [bucket.exp_avgs[row] for row in rows]
        self.exp_avg_sqs: list[Tensor] = [
            bucket.exp_avg_sqs[begin + row] for begin in range(0, len(bucket.exp_avg_sqs), n) for row in rows
        ]
        self.max_exp_avg_sqs: list[Tensor] = (
            [bucket.max_exp_avg_sqs[row] for row in rows] if bucket.max_exp_avg_sqs else []
        )
        index = bucket.index_of(rows)
        self.grad_norms: Tensor = bucket.grad_norms.index_select(0, index)
        self.steps: Tensor = bucket.steps.index_select(0, index)


@contextmanager
def rows_of(bucket: Bucket, rows: list[int] | None) -> Generator[Bucket | Part]:
    """The bucket, or its rows; numbers that are written go back to it."""
    if rows is None or len(rows) == len(bucket.params):
        yield bucket
        return
    part = Part(bucket, rows)
    yield part
    index = bucket.index_of(rows)
    bucket.grad_norms.index_copy_(0, index, part.grad_norms)
    bucket.steps.index_copy_(0, index, part.steps)


class Buckets:
    """Those of each group, packed anew where their parameters or states are others than the last time."""

    def __init__(self) -> None:
        self._of_group: dict[int, list[Bucket]] = {}

    def prepared(
        self,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, State],
        reached: Callable[[int], bool],
    ) -> Iterator[tuple[dict[str, Any], Bucket]]:
        """The parameters that have state, or are reached now and get it."""
        begin = 0
        for number, group in enumerate(groups):
            params = group["params"]
            own = _with_states(group, states, begin, reached)
            members = [
                (indices, [params[i - begin] for i in indices], [own[i - begin] for i in indices])
                for indices in _kinds(params, own, begin)
            ]
            buckets = self._of_group.get(number, [])
            if len(buckets) != len(members) or not all(
                bucket.is_of(group, *member) for bucket, member in zip(buckets, members, strict=True)
            ):
                buckets = [Bucket(group, *member) for member in members]
                self._of_group[number] = buckets
            for bucket in buckets:
                yield group, bucket
            begin += len(params)


def _with_states(
    group: dict[str, Any],
    states: MutableMapping[Tensor, State],
    begin: int,
    reached: Callable[[int], bool],
) -> list[State]:
    """Of each parameter of a group; empty of what is not reached yet."""
    params = group["params"]
    own = [state or {} for state in map(states.get, params)]
    if not all(own):
        for i, param in enumerate(params):
            if not own[i] and reached(begin + i):
                states[param] = own[i] = new_state(group, param)
    if group["amsgrad"]:
        for param, state in zip(params, own, strict=True):
            if state and "max_exp_avg_sq" not in state:  # turned on in training
                state["max_exp_avg_sq"] = new_entry(param, "max_exp_avg_sq")
    return own


_KIND = operator.attrgetter("device", "dtype")


def _kinds(params: Sequence[Tensor], own: Sequence[State], begin: int) -> Iterable[list[int]]:
    """The parameters that have state, by device, dtype and layout."""
    layouts = map(layout_of, params) if any_sharded(params) else repeat(None, len(params))
    kinds: dict[Any, list[int]] = {}
    for i, (kind, layout, state) in enumerate(zip(map(_KIND, params), layouts, own, strict=True), begin):
        if state:
            kinds.setdefault((kind, layout), []).append(i)
    return kinds.values()


def by_index(
    groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]]
) -> list[tuple[int, Tensor]]:
    """The parameters of an optimizer, each with its index in a saved state."""
    return [
        pair
        for group, own in zip(groups, own_groups, strict=True)
        for pair in zip(group["params"], own["params"], strict=True)
    ]


def check_loaded(
    state_dict: Mapping[str, Any],
    own_groups: Sequence[Mapping[str, Any]],
    terms: Sequence[str] | None,
    mode: str,
) -> None:
    """Refuse, before anything has changed, a saved state that is not of these parameters or terms."""
    op = "MTAdam.load_state_dict"
    state, groups = state_dict["state"], state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(own["params"]) for own in own_groups]:
        return  # which torch refuses
    for group, own in zip(groups, own_groups, strict=True):
        if lacking := sorted(own.keys() - group.keys() - {"param_names"}):
            raise ValueError(
                f"{op}: param_groups have no {', '.join(lacking)}; the state must be that of an MTAdam"
            )
        saved = group["terms"]
        if terms is not None and saved is not None and list(saved) != list(terms):
            raise ValueError(
                f"{op}: the terms must be those of this optimizer, {list(terms)}, got {list(saved)};"
                " add_term or drop_term makes them alike"
            )
        for index, param in zip(group["params"], own["params"], strict=True):
            of_param = state.get(index)
            if not of_param:
                continue
            for key in keys_of(saved or (), group["amsgrad"]):
                entry = of_param.get(key)
                want = () if is_scalar(key) else tuple(param.shape)
                if not isinstance(entry, Tensor) or tuple(entry.shape) != want:
                    got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
                    raise ValueError(f"{op}: {key!r} of parameter {index} must have shape {want}, got {got}")
                if not is_scalar(key) and (as_sharded(entry) is None) != (as_sharded(param) is None):
                    raise ValueError(
                        f"{op}: {key!r} of parameter {index} must be a DTensor where the parameter is, and"
                        " nowhere else; load by set_optimizer_state_dict of"
                        " torch.distributed.checkpoint.state_dict"
                    )
    for group, own in zip(groups, own_groups, strict=True):
        check_group({**group, "params": own["params"]}, mode)


def loaded(param: Tensor, key: str, entry: Tensor) -> Tensor:
    """A copy of a saved entry, in the dtype of state (torch would cast it to the parameter's)."""
    return new_entry(param, key).copy_(entry)
