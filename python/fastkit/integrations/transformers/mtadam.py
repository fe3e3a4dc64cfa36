"""MTAdamTrainer: a Trainer of a model that has several losses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils.generic import ModelOutput

from fastkit.integrations.transformers._arguments import checkpoints_reentrantly
from fastkit.optim import MTAdam

_OF_ARGS = {  # what of MTAdam's options the Trainer has a place for
    "lr": "args.learning_rate",
    "weight_decay": "args.weight_decay",
    "terms": "terms= to MTAdamTrainer",
    "params": "model= to MTAdamTrainer",
}


class MTAdamTrainer(Trainer):
    """A Trainer of a model that has several losses, which MTAdam balances: no weights, and no sum to tune.

    ::

        trainer = MTAdamTrainer(model=model, args=args, train_dataset=data, terms=["words", "sentence"])
        trainer.train()

    The losses of a batch are a dict by term: what ``compute_loss_func`` returns, if it is given; else the
    field of the model's output that ``losses`` names; else its field ``losses``, or its ``loss`` where that
    is a dict; else the terms are themselves fields of the output, as ``loss`` and ``mc_loss`` of
    ``GPT2DoubleHeadsModel``. Who would compute them otherwise overrides ``compute_losses``. A term whose loss
    is None has none in that batch. What else is in the dict is left alone.

    Args:
        *args: as of ``transformers.Trainer``.
        terms: the names of the losses, in MTAdam's order: the first is the anchor, unless ``mtadam`` has
            another.
        losses: the field of the model's output that has them, as ``loss_dict`` of object detection.
        mtadam: options of ``fastkit.optim.MTAdam``, as ``{"anchor": "sentence", "amsgrad": True}``. The
            learning rate and the weight decay are those of the TrainingArguments, with the Trainer's groups;
            the first two betas and eps too, and decay is decoupled as in the Trainer's AdamW, unless
            ``betas``, ``eps`` or ``decoupled_weight_decay`` is among the options.
        **kwargs: as of ``transformers.Trainer``. ``optimizers=(MTAdam(..., terms=...), None)`` is an
            optimizer of one's own; then ``terms`` may be left out, and ``mtadam`` must.

    Everything else is the Trainer's: accumulation (a norm is that of a term's accumulated gradient),
    schedules, bf16, fp16, ``torch_compile``, checkpoints, ``DistributedDataParallel``. ``max_grad_norm`` has
    no effect, for gradients do not go through ``p.grad``; chosen, it warns.

    The log has the sum of the terms, ``loss``, what each is of it, ``loss_<term>`` (a step without the term
    counts as zero), and in the place of ``grad_norm`` the norms that are balanced, ``grad_norm_<term>``: the
    root of the sum of the squares of MTAdam's running norms. Evaluation has ``eval_loss``, the sum, and
    ``eval_loss_<term>``, each over the examples that have it.

    Raises:
        TypeError: ``terms``, ``mtadam`` or ``optimizers`` is of another kind.
        ValueError: the terms are none, or not those of the optimizer; the arguments ask for what MTAdam has
            not: another ``optim``, DataParallel, DeepSpeed, FSDP, sharding by transformers or accelerate,
            reentrant checkpointing, label smoothing, ``enable_jit_checkpoint``, or streaming mode with
            accumulation. In training: the losses are no dict, or a term is not among them.
    """

    def __init__(
        self,
        *args: Any,
        terms: Sequence[str] | None = None,
        losses: str | None = None,
        mtadam: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_options(terms, mtadam)
        super().__init__(*args, **kwargs)
        given = self.optimizer
        if given is None and terms is None:
            raise ValueError("MTAdamTrainer: terms must name the losses, got None; pass terms=[...]")
        if given is not None:
            terms = _terms_of(given, terms, mtadam)
        self.terms: tuple[str, ...] = tuple(terms or ())
        self.losses = losses
        self.mtadam: dict[str, Any] = dict(mtadam or {})
        self._sums: Tensor | None = None  # of each term since the last log
        self._since = 0  # the step of that log
        # of each term that an evaluation has met: the loss times the examples, and how many they are
        self._evaluated: dict[str, tuple[Tensor, int]] | None = None
        self._check()

    # --- losses

    def compute_losses(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Mapping[str, Tensor | None], Any]:
        """The losses of a batch, and the model's output; to be overridden, as ``compute_loss`` of a Trainer.

        Args:
            model: the model, as it is wrapped.
            inputs: the batch.
            num_items_in_batch: how many labels the batches of a step have, if the Trainer counts them.

        Returns:
            A dict that has the terms, and perhaps more; and the output, for predictions.

        Raises:
            TypeError, ValueError: there is no such dict.
        """
        func = self.compute_loss_func
        counted = num_items_in_batch is not None and (self.model_accepts_loss_kwargs or func is not None)
        inputs = dict(inputs)
        labels = None if func is None else inputs.pop("labels", None)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs["num_items_in_batch"] = num_items_in_batch
        output = model(**inputs)
        if func is None:
            found = self._losses_in(output)
        else:
            found = func(output, labels, num_items_in_batch=num_items_in_batch)
        processes = self.accelerator.num_processes
        if counted and processes > 1 and self.args.average_tokens_across_devices:
            # They were divided by the labels of all processes, over which gradients are averaged.
            found = {term: None if x is None else x * processes for term, x in self._of_terms(found).items()}
        return found, output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of the losses, for evaluation: training has no use for it."""
        found, output = self.compute_losses(model, inputs, num_items_in_batch)
        losses = self._of_terms(found)
        if self._evaluated is not None:
            examples = find_batch_size(inputs) or 1
            for term, loss in losses.items():
                if loss is not None:
                    total, count = self._evaluated.get(term, (0, 0))
                    self._evaluated[term] = (total + loss.detach().float() * examples, count + examples)
        total = sum(loss for loss in losses.values() if loss is not None)
        if not isinstance(total, Tensor):
            total = torch.zeros((), device=self.args.device)
        return (total, output) if return_outputs else total

    def _losses_in(self, output: Any) -> Any:
        """The dict in a model's output."""
        if not isinstance(output, Mapping):
            raise TypeError(
                "MTAdamTrainer: the model's output must be a dict or a ModelOutput, got"
                f" {type(output).__name__}; return one that has the losses, or override compute_losses"
            )
        if self.losses is not None:
            if self.losses not in output:
                raise ValueError(
                    f"MTAdamTrainer: losses must be a field of the model's output, got {self.losses!r} beside"
                    f" {', '.join(output)}"
                )
            return output[self.losses]
        for field in ("losses", "loss"):
            if isinstance(output.get(field), Mapping):
                return output[field]
        return output

    def _of_terms(self, found: Any) -> dict[str, Tensor | None]:
        """The losses of all terms, in order."""
        if not isinstance(found, Mapping):
            raise TypeError(
                f"MTAdamTrainer: losses must be a dict by term, got {type(found).__name__}; return one from"
                " compute_loss_func or compute_losses, or name the field of the model's output that is one"
            )
        losses = {}
        for term in self.terms:
            # a field of a ModelOutput that is None is not among its keys
            if term not in found and not (isinstance(found, ModelOutput) and hasattr(found, term)):
                raise ValueError(
                    f"MTAdamTrainer: losses must have all terms, {', '.join(self.terms)}, got"
                    f" {', '.join(map(str, found)) or 'none'}; give None for one that has no loss in a batch"
                )
            loss = found[term] if term in found else getattr(found, term)
            if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(
                    f"MTAdamTrainer: the loss of term {term!r} must be a scalar tensor or None, got {got}"
                )
            losses[term] = loss
        return losses

    def _stacked(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Their values, 0 for None."""
        zero = torch.zeros((), device=self.args.device)
        values = [zero if loss is None else loss.detach().to(zero).reshape(()) for loss in losses.values()]
        return torch.stack(values)

    # --- training

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """MTAdam by the arguments, over the Trainer's groups; or what there is."""
        args = self.args
        if self.optimizer is None:
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2, 0.9),
                "eps": args.adam_epsilon,
                "decoupled_weight_decay": True,
                "terms": list(self.terms),
            }
            self.optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = (
                MTAdam,
                {**options, **self.mtadam},
            )
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self._mtadam().mode == "streaming" and args.gradient_accumulation_steps > 1:
            raise ValueError(
                "MTAdamTrainer: mode must be batched with gradient accumulation, got streaming, which takes a"
                " term once a step; pass mtadam={'mode': 'batched'}, or gradient_accumulation_steps=1"
            )
        self._mtadam().zero_grad()  # of a training that was stopped within a step
        self._sums = None
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Differentiate each term of a batch by itself; the Trainer's step follows.

        Args:
            model: the model, as it is wrapped.
            inputs: the batch.
            num_items_in_batch: how many labels the batches of a step have, if the Trainer counts them.

        Returns:
            The sum of the losses, for the log.

        Raises:
            TypeError, ValueError: as of ``compute_losses`` and ``MTAdam.backward_term``.
        """
        optimizer = self._mtadam()
        model.train()
        inputs = self._prepare_inputs(inputs)
        # MTAdam reduces over processes at its step. DistributedDataParallel, if it looks for parameters that
        # a batch does not use, would wait for the gradients of the others, which do not come to it.
        with self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                losses = self._of_terms(self.compute_losses(model, inputs, num_items_in_batch)[0])
            del inputs
            self._empty_cache()
            if not self._is_scaled(num_items_in_batch):
                parts = getattr(
                    self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
                )
                losses = {term: None if loss is None else loss / parts for term, loss in losses.items()}
            last = [term for term, loss in losses.items() if loss is not None][-1:]
            for term, loss in losses.items():
                optimizer.backward_term(
                    term, loss, scaler=self.accelerator.scaler, retain_graph=[term] != last
                )
        values = self._stacked(losses)
        if self._sums is None:
            self._sums, self._since = torch.zeros_like(values), self.state.global_step
        self._sums += (
            torch.where(values.isfinite(), values, 0) if self.args.logging_nan_inf_filter else values
        )
        return values.sum()

    def _mtadam(self) -> MTAdam:
        """The optimizer within what accelerate makes of it."""
        optimizer: Any = self.optimizer
        return optimizer if isinstance(optimizer, MTAdam) else optimizer.optimizer

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the losses of a step's batches are to be added up as they are, by the Trainer's rule."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def _empty_cache(self) -> None:
        steps = self.args.torch_empty_cache_steps
        if steps is not None and self.state.global_step % steps == 0:
            from accelerate.utils.memory import clear_device_cache

            clear_device_cache()

    # --- the log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of every Trainer; that of training has each term's loss and norm."""
        if "loss" in logs and self._sums is not None:
            logs.pop("grad_norm", None)  # of p.grad, where there is none
            sums: Any = self.accelerator.reduce(self._sums, reduction="mean")
            means = sums / max(self.state.global_step - self._since, 1)
            self._sums = None
            logs.update({f"loss_{t}": x for t, x in zip(self.terms, means.tolist(), strict=True)})
            logs.update({f"grad_norm_{term}": norm for term, norm in self._norms().items()})
        super().log(logs, start_time)

    def _norms(self) -> dict[str, float]:
        """Of each term, over all parameters."""
        optimizer = self._mtadam()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        device = self.args.device
        found = [
            torch.stack(list(norms.values())).to(device, torch.float32)
            for norms in map(optimizer.grad_norms, params)
            if norms
        ]
        if not found:
            return {}
        return dict(zip(self.terms, torch.stack(found).norm(dim=0).tolist(), strict=True))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As of every Trainer; losses are no predictions."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        fields = ["losses" if self.losses is None else self.losses, *self.terms]
        return super().prediction_step(model, inputs, prediction_loss_only, [*(ignore_keys or []), *fields])

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As of every Trainer; each term's loss is among the metrics."""
        evaluated = self._evaluated = {}
        try:
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluated = None
        rows = [list(evaluated.get(term, (0.0, 0))) for term in self.terms]
        sums: Any = self.accelerator.reduce(torch.tensor(rows, device=self.args.device), reduction="sum")
        for term, (total, examples) in zip(self.terms, sums.tolist(), strict=True):
            if examples:
                output.metrics[f"{metric_key_prefix}_loss_{term}"] = total / examples
        return output

    # --- what is refused

    def _check(self) -> None:
        """What the arguments of the Trainer ask for, and MTAdam has not."""
        args = self.args
        accelerator: Any = self.accelerator
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "MTAdamTrainer: optimizer_cls_and_kwargs must be None, got a class; pass MTAdam's options as"
                " mtadam={...}"
            )
        if type(self).compute_loss is not MTAdamTrainer.compute_loss:
            raise ValueError(
                "MTAdamTrainer: compute_loss must not be overridden, for training has no use for it; override"
                " compute_losses, which returns a dict of losses and the output"
            )
        optim = getattr(args.optim, "value", args.optim)
        if optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"MTAdamTrainer: args.optim must be left as it is, for the optimizer is MTAdam, got {optim!r}"
            )
        wrapped = {
            f"torch.nn.DataParallel over {args.n_gpu} devices": args.n_gpu > 1,
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled or bool(args.fsdp),
            "a parallelism_config": getattr(accelerator, "parallelism_config", None) is not None,
            "a distributed_config": getattr(self, "is_distributed_loading_by_transformers", False),
        }
        for what, there in wrapped.items():
            if there:
                raise ValueError(
                    "MTAdamTrainer: each process must have the whole model and its own gradients, got"
                    f" {what}; train on one device (CUDA_VISIBLE_DEVICES), or by torchrun, which makes it"
                    " DistributedDataParallel"
                )
        if checkpoints_reentrantly(args):
            raise ValueError(
                "MTAdamTrainer: use_reentrant must be False in checkpointing, got True, under which torch"
                " gives no gradients of single losses"
            )
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"MTAdamTrainer: label_smoothing_factor must be 0, got {args.label_smoothing_factor}, which"
                " makes one loss of a model's logits; smooth the labels in the loss that is to have it"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "MTAdamTrainer: enable_jit_checkpoint must be False, got True, which saves within a step, as"
                " MTAdam cannot; set save_steps"
            )
        if args.max_grad_norm not in (0, 1.0):  # 1.0 is what args have if nobody has said anything
            warnings.warn(
                f"MTAdamTrainer: max_grad_norm {args.max_grad_norm} has no effect: MTAdam's gradients do not"
                " go through p.grad, and have the norms that it gives them; set it to 0",
                stacklevel=3,
            )


def _check_options(terms: Any, mtadam: Any) -> None:
    if terms is not None:
        if isinstance(terms, str) or not isinstance(terms, Sequence):
            raise TypeError(f"MTAdamTrainer: terms must be a list of the losses' names, got {terms!r}")
        if not terms or not all(isinstance(t, str) and t for t in terms) or len(set(terms)) < len(terms):
            raise ValueError(f"MTAdamTrainer: terms must be one or more different names, got {list(terms)!r}")
    if mtadam is not None and not isinstance(mtadam, Mapping):
        raise TypeError(
            f"MTAdamTrainer: mtadam must be a dict of options, got {type(mtadam).__name__}; an optimizer is"
            " passed as optimizers=(optimizer, None)"
        )
    for name, place in _OF_ARGS.items():
        if name in (mtadam or {}):
            raise ValueError(f"MTAdamTrainer: mtadam must not have {name!r}; give it as {place}")


def _terms_of(optimizer: Any, terms: Sequence[str] | None, mtadam: Any) -> tuple[str, ...]:
    """Those of an optimizer that was given."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, MTAdam):
        raise TypeError(
            f"MTAdamTrainer: optimizers must have an MTAdam, got {type(optimizer).__name__}; leave them out,"
            " and pass terms= to have one made"
        )
    if mtadam is not None:
        raise ValueError("MTAdamTrainer: mtadam must be None beside optimizers=; give MTAdam its options")
    if optimizer.terms is None:
        raise ValueError("MTAdamTrainer: the MTAdam of optimizers= must know its terms; pass terms= to it")
    if terms is not None and tuple(terms) != optimizer.terms:
        raise ValueError(
            f"MTAdamTrainer: terms must be those of the optimizer, {', '.join(optimizer.terms)}, got"
            f" {', '.join(terms)}; leave them out"
        )
    return optimizer.terms
