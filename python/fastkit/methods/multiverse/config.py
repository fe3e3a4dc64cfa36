"""What a model with many heads is made of."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, BertConfig, PreTrainedConfig

from fastkit.reference.multihead_loss import Problem

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
HEAD_OPTIONS = (
    "num_heads", "ortho", "ortho_weight", "huber_width", "center_classes", "head_reduction", "inference",
    "init", "allow_overcomplete", "label_smoothing",
)  # fmt: skip
PROBLEMS: dict[str | None, Problem] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


class MultiverseConfig(PreTrainedConfig):
    """The classifier whose last layer is replaced, and the heads that take its place; saved with the model.

    Args:
        base: the configuration of a model for sequence classification, or a dict of one; default: BERT's.
            It is copied. Labels and ``problem_type`` are its own where neither ``num_labels`` nor
            ``id2label`` is given; else the copy gets those that are.
        num_heads, ortho, ortho_weight, huber_width, center_classes, head_reduction, inference, init,
            allow_overcomplete, label_smoothing: of ``fastkit.nn.MultiverseHead``.
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"`` or ``"regression"``,
            as everywhere in transformers. Default: regression for one label, else a single label.

    Raises:
        ValueError: ``problem_type`` is another; once a model is made: an option is not as ``MultiverseHead``
            wants it.
    """

    model_type = "fastkit_multiverse"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["head_losses", "correct", "count", "penalty"]

    base: dict[str, Any] | PreTrainedConfig | None = None
    problem_type: ProblemType | None = None
    num_heads: int = 128
    ortho: str | None = "abs"
    ortho_weight: float = 0.005
    huber_width: float = 1e-2
    center_classes: bool = False
    head_reduction: str = "mean"
    inference: str = "mean_logits"
    init: str = "normal"
    allow_overcomplete: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base is None:
            self.base = BertConfig()
        elif isinstance(self.base, dict):
            self.base = AutoConfig.for_model(**self.base)
        else:
            self.base = copy.deepcopy(self.base)
        if self.id2label is None and kwargs.get("num_labels") is None:
            problem = self.problem_type or self.base.problem_type
            give_labels(self.base, self)
            self.problem_type = problem
        super().__post_init__(**kwargs)
        if self.problem_type is None:
            self.problem_type = "regression" if self.num_labels == 1 else "single_label_classification"
        if self.problem_type not in PROBLEMS:
            raise ValueError(
                f"MultiverseConfig: problem_type must be one of {', '.join(map(str, PROBLEMS))}, got"
                f" {self.problem_type!r}"
            )
        give_labels(self, self.base)


def give_labels(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """What the labels are called, and what problem they are of."""
    target.id2label, target.label2id = copy.copy(source.id2label), copy.copy(source.label2id)
    target.problem_type = source.problem_type
