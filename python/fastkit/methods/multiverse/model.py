"""Any model for sequence classification, with many orthogonal heads in the place of its last layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from fastkit.methods.multiverse.config import HEAD_OPTIONS, PROBLEMS, MultiverseConfig, give_labels
from fastkit.nn import MultiverseHead

_OP = "MultiverseForSequenceClassification"


@dataclass
class MultiverseOutput(SequenceClassifierOutput):
    """``logits`` (B, C) of the heads together; with ``labels`` also what ``MultiverseHead.loss`` gives."""

    head_losses: Tensor | None = None  # (H,)
    correct: Tensor | None = None  # (H,)
    count: Tensor | None = None  # ()
    penalty: Tensor | None = None  # ()


class MultiversePreTrainedModel(PreTrainedModel):
    config: MultiverseConfig
    config_class: type[PreTrainedConfig] | None = MultiverseConfig
    base_model_prefix: str = "model"
    # What the classifier lacks of these it refuses itself: it is a model of its own.
    supports_gradient_checkpointing: bool = True
    _supports_sdpa: bool = True
    _supports_flash_attn: bool = True
    _supports_flex_attn: bool = True
    _supports_attention_backend: bool = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MultiverseHead):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class MultiverseForSequenceClassification(MultiversePreTrainedModel):
    """A classifier of transformers whose last linear layer is a ``fastkit.nn.MultiverseHead``.

    ::

        model = MultiverseForSequenceClassification.from_base("bert-base-uncased", num_labels=3)
        Trainer(model=model, ..., callbacks=[EliminationCallback()]).train()
        fold_heads(model).save_pretrained("classifier")  # an ordinary one, of the same logits

    ``forward`` takes what the classifier takes, and gives its output with the logits of the heads together:
    metrics, pipelines and ``Trainer`` see an ordinary classifier. With ``labels`` the loss is that of
    ``MultiverseHead.loss``, a mean over rows. While it trains, what each head lost and had right is added up
    until ``take_sums`` takes it, as ``EliminationCallback`` of ``fastkit.integrations.transformers`` does
    after each step of the optimizer.

    Args:
        config: a ``MultiverseConfig``. Weights of a checkpoint come by ``from_base``.

    Under LoRA name the heads among what is trained and saved whole:
    ``LoraConfig(..., modules_to_save=["head"])``.

    Raises:
        ValueError: the classifier's last layer is not linear, or is not one on a sentence's vector; an option
            of the heads is not as ``MultiverseHead`` wants it.

    Source: Malkiel, Wolf, "Maximal Multiverse Learning for Promoting Cross-Task Generalization of Fine-Tuned
    Language Models", EACL 2021. That the input of the heads is that of the classifier's own last layer, with
    one dropout for all of them, is our choice.
    """

    # The loss is a mean of each batch, whatever else forward takes: Trainer divides it by accumulation steps.
    accepts_loss_kwargs: bool = False

    def __init__(self, config: MultiverseConfig) -> None:
        assert isinstance(config.base, PreTrainedConfig) and config.num_labels is not None
        give_labels(config, config.base)  # it may have got others since it was made
        own, base = _any(config), _any(config.base)
        if own._attn_implementation is not None:  # as from_pretrained(attn_implementation=...) asks
            base._attn_implementation = own._attn_implementation
        super().__init__(config)
        self.num_labels: int = config.num_labels
        self._take(AutoModelForSequenceClassification.from_config(config.base))
        self.post_init()

    def _take(self, classifier: Any) -> None:
        """The classifier without its last layer, whose logits then are what that was given; and the heads."""
        name, last = last_layer(classifier)
        classifier.set_submodule(name, nn.Identity())
        self.model: Any = classifier
        self.supports_gradient_checkpointing: bool = classifier.supports_gradient_checkpointing
        config = self.config
        give_labels(config, classifier.config)
        config.base = classifier.config  # one and the same, so that what changes there is saved
        _any(config)._attn_implementation = classifier.config._attn_implementation
        options: dict[str, Any] = {name: getattr(config, name) for name in HEAD_OPTIONS}
        self.head: MultiverseHead = MultiverseHead(
            last.in_features,
            last.out_features,
            problem=PROBLEMS[config.problem_type],
            device=last.weight.device,
            dtype=last.weight.dtype,
            **options,
        )
        self._sums: Tensor | None = None

    @classmethod
    def from_base(cls, name: str | PathLike[str] | PreTrainedModel, **options: Any) -> Self:
        """New heads on a checkpoint: an encoder's, or a classifier's but its last layer.

        Args:
            name: a folder or a name on the Hub, as of ``AutoModelForSequenceClassification.from_pretrained``;
                or such a model, which is taken over.
            options: those of ``MultiverseConfig`` that are of the heads; the others, ``num_labels`` and
                ``problem_type`` among them, go to ``from_pretrained``. A classifier of another number of
                labels needs ``ignore_mismatched_sizes=True``.
        """
        of_heads = {key: options.pop(key) for key in HEAD_OPTIONS if key in options}
        if isinstance(name, PreTrainedModel):
            classifier: Any = name
            if options:
                raise TypeError(f"{_OP}: a model that is there takes no {', '.join(options)}; set its config")
        else:
            classifier = AutoModelForSequenceClassification.from_pretrained(name, **options)
        last_layer(classifier)  # refuses what has none
        labels = {key: getattr(classifier.config, key) for key in ("id2label", "label2id", "problem_type")}
        config = MultiverseConfig(base=classifier.config, **labels, **of_heads)
        with torch.device("meta"):
            model = cls(config)
        model._take(classifier)
        return model.train(classifier.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As of every model of transformers.

        Raises:
            ValueError: the checkpoint has no active head.
        """
        found = super().from_pretrained(*args, **options)
        head = (found[0] if isinstance(found, tuple) else found).head
        if not head.active.is_meta and not bool(head.active.any()):
            raise ValueError(
                f"{_OP}: from_pretrained: active must have a head that takes part, got a checkpoint without"
                " one"
            )
        return found

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultiverseOutput:
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        found = self.model(**given, **kwargs, return_dict=True)
        x = found.logits
        logits = self.head(x)
        others = {name: found.get(name) for name in ("hidden_states", "attentions")}
        if labels is None:
            return MultiverseOutput(logits=logits, **others)
        losses = self.head.loss(x, labels)
        if self.training:
            self._add(losses.head_losses.detach(), losses.correct, losses.count)
        return MultiverseOutput(
            loss=losses.loss, logits=logits, head_losses=losses.head_losses.detach(),
            correct=losses.correct, count=losses.count, penalty=losses.penalty.detach(), **others,
        )  # fmt: skip

    def _add(self, losses: Tensor, correct: Tensor, count: Tensor) -> None:
        new = torch.cat([losses.double() * count, correct.double(), count.double().view(1)])
        self._sums = new if self._sums is None else self._sums + new

    def take_sums(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Since it was last called, over forwards with labels in training: mean losses, what is right, count.

        None, if there was none.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return None
        losses, correct, count = sums.split([len(sums) // 2, len(sums) // 2, 1])
        return losses / count.clamp_min(1), correct.long(), count[0].long()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        """That of the classifier, whose configuration has the size."""
        return self.model.resize_token_embeddings(*args, **options)


def _any(config: PreTrainedConfig) -> Any:
    """Transformers has no public name for the kind of attention."""
    return config


def last_layer(classifier: Any) -> tuple[str, nn.Linear]:
    """The name of the classifier's last linear layer, which gives the labels' logits, and the layer."""
    labels = classifier.config.num_labels
    # Layers of the encoder may be as wide, and be registered after those of the classifier.
    encoder = f"{classifier.base_model_prefix}."
    found: list[tuple[str, Any]] = [
        (name, module)
        for name, module in classifier.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels and not name.startswith(encoder)
    ]
    if not found or found[-1][1].bias is None:
        raise ValueError(
            f"{_OP}: {type(classifier).__name__} must end in a linear layer with a bias and {labels} outputs,"
            f" got {'one without a bias' if found else 'none'}"
        )
    return found[-1]


@torch.no_grad()
def fold_heads(model: nn.Module) -> PreTrainedModel:
    """The classifier whose last layer is the mean of the active heads: an ordinary one, of the same logits.

    Args:
        model: a ``MultiverseForSequenceClassification`` with ``inference="mean_logits"``, or one under PEFT
            after ``merge_and_unload()``. It is left as it is.

    Raises:
        TypeError: it is another model, or one that PEFT still has adapters in.
        ValueError: its logits are not the heads' mean, which no single layer gives.
    """
    if not isinstance(model, MultiverseForSequenceClassification):
        raise TypeError(
            f"fold_heads: model must be a {_OP}, got {type(model).__name__}; of a PEFT model pass"
            " model.merge_and_unload()"
        )
    if not isinstance(model.head, MultiverseHead):
        raise TypeError(
            f"fold_heads: model must be a {_OP} without adapters, got one under PEFT; pass"
            " model.merge_and_unload()"
        )
    if model.head.inference != "mean_logits":
        raise ValueError(
            f'fold_heads: inference must be "mean_logits", got {model.head.inference!r}: no single layer'
            " gives what those heads say together; set model.head.inference"
        )
    assert isinstance(model.config.base, PreTrainedConfig)
    with torch.device("meta"):
        name, _ = last_layer(AutoModelForSequenceClassification.from_config(model.config.base))
    classifier = copy.deepcopy(model.model)
    give_labels(model.config, classifier.config)
    classifier.set_submodule(name, model.head.fold())
    return classifier


AutoConfig.register(MultiverseConfig.model_type, MultiverseConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    MultiverseConfig, MultiverseForSequenceClassification, exist_ok=True
)
