"""The loss of a causal language model of transformers, without its logits in memory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastkit import ops
from fastkit.methods.tied_embedding.probe import compared
from fastkit.ops._checks import FLOATING

Model = TypeVar("Model", bound=nn.Module)

_MARK = "_fastkit_fused_loss"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of configurations: what logits are multiplied or divided by.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
# And the softcap of logits: of Gemma 2 and others, RecurrentGemma, xLSTM.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# What the loss takes, and not the model below it.
_OF_THE_LOSS = (
    "labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict",
)  # fmt: skip


def patch_causal_lm(model: Model) -> Model:
    """Compute the loss of a causal language model of transformers without its logits; returns the model.

    Its forward with ``labels`` then is that of the model below the head, and
    ``fastkit.ops.linear_cross_entropy`` on the head's weight, bias and softcap
    (``config.final_logit_softcapping``, ``logits_soft_cap`` or ``output_logit_soft_cap``). ``labels``,
    ``shift_labels``, ``ignore_index`` and ``num_items_in_batch``, as the Trainer gives it, are taken as
    transformers takes them. In the output ``logits`` are None and all else is as it was. Without ``labels``,
    or with ``logits_to_keep``, it is the model's own forward, so that generation is as before.

    Whether the head is tied is of no matter. The signature of forward stays, copies of the model are patched,
    each computing with its own weights, and what is saved is not concerned. ``unpatch_causal_lm`` takes it
    back.

    Args:
        model: a causal language model of transformers, in memory, with a plain ``nn.Linear`` as its head. For
            one of PEFT give ``peft_model.get_base_model()``.

    Raises:
        ValueError: the model computes another loss: logits that are scaled, as in Cohere and Granite, the
            loss of a mixture's router, labels that are not shifted, or are masked by ``attention_mask``, a
            loss of the user's. The model is asked for the logits and losses of four tokens, in eval, which
            are compared, and its hooks are called; what it adds elsewhere, as in training alone, is not
            found.
        TypeError: the model is not one of transformers, or its head is not plain: wrapped by an adapter,
            quantised, sharded, with hooks. That is looked at in each call, too.
        RuntimeError: it is patched already, its forward was replaced, or it is on the meta device.
        ImportError: transformers is not installed.

    Numerics: logits are not rounded to the model's dtype, as they are where they are stored; in half
    precision the loss and its gradients are more exact than the model's own. Else as of the op.
    """
    op = "patch_causal_lm"
    losses = _losses(op)
    _check_model(op, model)
    any_model: Any = model
    if _is_patched(model):
        raise RuntimeError(f"{op}: the model is patched already; call unpatch_causal_lm(model) first")
    forward = type(model).forward
    if getattr(vars(model).get("forward", model.forward), "__func__", None) is not forward:
        raise RuntimeError(
            f"{op}: forward of the model must be that of {type(model).__name__}, got one that was put in its"
            " place (by accelerate or another patch?); patch the model before"
        )
    parameters = inspect.signature(forward).parameters
    if "labels" not in parameters:
        raise ValueError(f"{op}: forward of {type(model).__name__} must take labels, got one that does not")
    _check_loss(op, any_model, losses)
    head = _head(op, any_model)
    if head.weight.device.type == "meta":
        raise RuntimeError(f"{op}: the model must be in memory, got it on the meta device; load it first")
    counts = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    try:
        fused, found = compared(
            any_model,
            forward,
            lambda output: _fused(forward, losses, output),
            lambda h: _logits(any_model, head, h),
            counts=counts,
            masks="attention_mask" in parameters,
        )
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{op}: {type(model).__name__} must be a causal language model that takes input_ids, got"
            f" {type(error).__name__}: {error}"
        ) from error
    if found is not None:
        raise ValueError(
            f"{op}: {type(model).__name__} must compute the cross entropy of its head's logits for the next"
            f" token, got a {found.what} of {found.found:g} where that gives {found.expected:g}; its forward"
            " does more, and is left as it is"
        )
    model.forward = MethodType(fused, model)  # pyright: ignore[reportAttributeAccessIssue]
    any_model._replicate_for_data_parallel = MethodType(_replica, model)
    return model


def unpatch_causal_lm(model: Model) -> Model:
    """Give a model its own forward back; returns the model. RuntimeError, where it is not patched."""
    if not _is_patched(model):
        replaced = "forward" in vars(model)
        why = ", or its forward was replaced since; undo that first" if replaced else ""
        raise RuntimeError(f"unpatch_causal_lm: the model is not patched{why}")
    del model.forward
    vars(model).pop("_replicate_for_data_parallel", None)
    return model


def _replica(model: Any) -> Any:
    """Of ``nn.DataParallel``: its attributes are the model's, also a forward that computes with the model."""
    made = type(model)._replicate_for_data_parallel(model)
    if _is_patched(made):
        made.forward = MethodType(made.forward.__func__, made)
    return made


_replica.__name__ = "_replicate_for_data_parallel"  # by which pickle finds it, in a model that is unpatched


def _is_patched(model: nn.Module) -> bool:
    return getattr(getattr(vars(model).get("forward"), "__func__", None), _MARK, False)


def _fused(forward: Callable[..., Any], losses: Any, output: type) -> Callable[..., Any]:
    """A forward that holds no model: a copy of a model would compute with the weights of the first."""
    names = [
        name
        for name, each in inspect.signature(forward).parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.POSITIONAL_ONLY)
    ][1:]
    kept = tuple(each.name for each in dataclasses.fields(output) if each.name not in ("loss", "logits"))

    @functools.wraps(forward)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("labels") is None or _keeps_logits(given) or len(args) > len(names):
            return forward(self, *args, **kwargs)
        _check_loss("forward", self, losses, given.get("output_router_logits"))
        return _with_loss(self, given, output, kept)

    setattr(fused, _MARK, True)
    # No __wrapped__: accelerate, which takes its own wrappers off, would go on to the model's forward.
    del fused.__wrapped__
    fused.__signature__ = inspect.signature(forward)  # pyright: ignore[reportAttributeAccessIssue]
    return fused


def _keeps_logits(given: dict[str, Any]) -> bool:
    kept = given.get("logits_to_keep", 0)
    return isinstance(kept, Tensor) or bool(kept)


def _with_loss(model: Any, given: dict[str, Any], output: type, kept: tuple[str, ...]) -> Any:
    of_loss = {name: given.pop(name) for name in _OF_THE_LOSS if name in given}
    below = model.base_model(**given, return_dict=True)
    loss = _loss(model, below.last_hidden_state, **of_loss)
    made = output(loss=loss, logits=None, **{name: getattr(below, name, None) for name in kept})
    as_dict = of_loss.get("return_dict")
    as_dict = model.config.return_dict if as_dict is None else as_dict
    return made if as_dict else made.to_tuple()


def _loss(
    model: Any,
    hidden: Tensor,  # (B, T, H)
    *,
    labels: Tensor,  # (B, T)
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **_of_output: Any,
) -> Tensor:
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"forward: labels must be a token for each of {tuple(hidden.shape[:-1])}, got"
            f" {tuple(shift_labels.shape)}"
        )
    head = _head("forward", model)
    loss = ops.linear_cross_entropy(
        hidden,
        head.weight,
        shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
        linear_bias=head.bias,
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        softcap=_softcap(model),
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _softcap(model: Any) -> float | None:
    config = model.config.get_text_config()
    return next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)


def _logits(model: Any, head: nn.Linear, hidden: Tensor) -> Tensor:
    z, cap = head(hidden), _softcap(model)
    return z if cap is None else cap * torch.tanh(z / cap)


def _losses(op: str) -> Any:
    """The module of transformers that has them."""
    try:
        from transformers.loss import loss_utils
    except ImportError as error:
        raise ImportError(f"{op}: needs transformers; pip install 'fastkit[hf]'") from error
    return loss_utils


def _check_model(op: str, model: Any) -> None:
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise TypeError(
            f"{op}: model must be one of transformers, got {type(model).__name__}; give"
            " model.get_base_model()"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{op}: model must be one of transformers, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{op}: {type(model).__name__} must be a causal language model, got an encoder and a decoder"
        )
    if model.base_model is model:
        raise ValueError(f"{op}: {type(model).__name__} must have a model below its head, got none")


def _check_loss(op: str, model: Any, losses: Any, router: bool | None = None) -> None:
    """That its loss is what is computed here, as far as the model says so."""
    name, config = type(model).__name__, model.config.get_text_config()
    # As the property loss_function, which logs a warning where there is no loss_type.
    of_type = losses.LOSS_MAPPING.get(getattr(model, "loss_type", None), losses.ForCausalLMLoss)
    loss = getattr(model, "_loss_function", of_type)
    if loss is not losses.ForCausalLMLoss:
        raise ValueError(
            f"{op}: {name} must have the loss ForCausalLMLoss, got {getattr(loss, '__name__', loss)}; call"
            " unpatch_causal_lm(model) to use it"
        )
    for scale in _SCALES:
        value = getattr(config, scale, None)
        if isinstance(value, (int, float)) and value != 1:
            raise ValueError(
                f"{op}: {name} must have the logits of its head, got them scaled by config.{scale}={value};"
                " leave it as it is"
            )
    if getattr(config, "output_router_logits", False) if router is None else router:
        raise ValueError(
            f"{op}: {name} must have no loss of its router, got output_router_logits=True, with which that is"
            " added; set it to False, or leave the model as it is"
        )


def _head(op: str, model: Any) -> nn.Linear:
    """The output embedding: that it is its weight and bias, and nothing around it."""
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if "DTensor" in (type(weight).__name__, type(getattr(weight, "data", None)).__name__):
        raise TypeError(
            f"{op}: the weight of the head is a DTensor; leave the head in the group of the whole model,"
            " whose forward gathers it, or pass weight.full_tensor() to fastkit.ops.linear_cross_entropy"
        )
    cure = "merge or unload the adapter, dequantise it, or call unpatch_causal_lm(model)"
    # In a call it may be none: FSDP with use_orig_params and torch.func.functional_call give tensors.
    kinds = (nn.Parameter, Tensor) if op == "forward" else (nn.Parameter,)
    plain = type(head) is nn.Linear and type(weight) in kinds and weight.dtype in FLOATING
    if not plain:
        of = f" with a weight of {weight.dtype}" if type(head) is nn.Linear and weight is not None else ""
        raise TypeError(f"{op}: the head must be a plain nn.Linear, got {torch.typename(head)}{of}; {cure}")
    if "forward" in vars(head) or any(getattr(head, hooks) for hooks in _HOOKS):
        raise TypeError(
            f"{op}: the head must have no hooks, for it is not called, got some; remove them, or call"
            " unpatch_causal_lm(model)"
        )
    return head
