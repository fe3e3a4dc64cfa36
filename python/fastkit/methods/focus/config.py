"""What a Focus model is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class FocusConfig(PreTrainedConfig):
    """Sizes and choices of a ``FocusModel``, saved with it.

    Args:
        vocab_size: of the embeddings; 256: bytes.
        hidden_size: width of the model.
        intermediate_size: of the feed-forward layers.
        num_hidden_layers: blocks of a ``FocusLayer`` and a feed-forward layer.
        qk_size, num_attention_heads, attn_chunk, bin_length, pool, num_filters, first, coefficients, causal,
            position, filtering: of ``fastkit.nn.FocusLayer``; ``param`` is its ``parameterization``,
            ``filter_hidden`` its ``hidden``.
        kernel_length: taps of the global convolution, None for none; ``conv_glu`` as of ``GlobalConv``.
        share_global_conv: whether there is one convolution, of the embeddings, which all layers pool; else
            each layer has its own, of its input.
        hidden_act: of the feed-forward layers.
        hidden_dropout: of embeddings, and of what each block adds.
        classifier_pooling: what ``FocusForSequenceClassification`` classifies: the ``"mean"`` over a row's
            tokens, or the ``"last"`` one.

    Raises:
        ValueError: an option is not as ``FocusLayer`` wants it.

    The default is the paper's count of parameters for enwik8: block matrices of 20,971,520 elements, with the
    kernel 22,020,096. ``qk_size``, ``kernel_length`` and ``intermediate_size`` are our choice, which fits it.
    """

    model_type = "fastkit_focus"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_heads": "num_attention_heads"}

    vocab_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 8
    qk_size: int = 256
    num_attention_heads: int = 1
    attn_chunk: int = 128
    bin_length: int = 128
    pool: int = 8
    filter_hidden: int = 32
    num_filters: int = 1
    param: str = "sigmoid"
    first: str = "identity"
    coefficients: str = "adaptive"
    kernel_length: int | None = 2048
    share_global_conv: bool = True
    conv_glu: bool = False
    causal: bool = True
    position: str = "relative_bias"
    filtering: str = "recurrence"
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    classifier_pooling: str = "mean"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.classifier_pooling not in ("mean", "last"):
            raise ValueError(
                f"FocusConfig: classifier_pooling must be mean or last, got {self.classifier_pooling!r}"
            )
        super().__post_init__(**kwargs)
