"""A pretrained encoder under a head that classifies, by name or folder; a small random one without."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkit._command import Refusal
from fastkit.recipes._experiment import replace_folder, seeded, sha256


class Encoder(NamedTuple):
    source: str  # a folder or a name
    tokenizer: Any

    def classifier(self, classes: Sequence[str]) -> nn.Module:
        """The encoder in float32 under a new head, drawn from torch's generator; no classes: a regression."""
        from transformers import AutoModelForSequenceClassification

        names = {"id2label": dict(enumerate(classes)), "label2id": {n: i for i, n in enumerate(classes)}}
        with quiet(), _refused(self.source, "the weights of a model in safetensors that can classify"):
            model = AutoModelForSequenceClassification.from_pretrained(
                self.source,
                num_labels=len(classes) or 1,
                problem_type="single_label_classification" if classes else "regression",
                pad_token_id=self.tokenizer.pad_token_id,
                dtype=torch.float32,
                use_safetensors=True,
                **(names if classes else {}),
            )
        return model

    @property
    def longest(self) -> int:
        """Tokens that the model takes at once, as far as it says."""
        from transformers import AutoConfig

        with quiet(), _refused(self.source, "a model with a config.json"):
            config = AutoConfig.from_pretrained(self.source)
        said = getattr(config, "max_position_embeddings", None)
        # Tokenizers that know no limit give 10^30.
        return min(self.tokenizer.model_max_length, said or self.tokenizer.model_max_length)


def encoder(source: str) -> Encoder:
    """The model ``source``, a folder or a name on the Hub.

    Raises:
        Refusal: it cannot be read.
    """
    from transformers import AutoTokenizer

    with quiet(), _refused(source, "a model with a tokenizer, as a folder or a name"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise Refusal(f"--model must have a token to pad with, got {source} without")
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(source, tokenizer)


def facts(source: str) -> dict[str, str]:
    """What ``--resume`` compares: the name, and a hash of the weights where it is a folder."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if not files:
        return {"name": source}
    return {"name": source, "sha256": sha256(chunk for path in files for chunk in _chunks(path))}


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            yield chunk


def write_random(folder: Path, texts: Sequence[str]) -> None:
    """A BERT of 4 layers, width 128, from seed 0, and 4000 pieces of words of ``texts``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    # The trainer numbers letters in an order that is another in each process: here they are numbered before.
    letters = sorted({letter for text in texts for letter in normalizer.normalize_str(text)} - {" "})
    known = [*special, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer.train_from_iterator(
        texts,
        WordPieceTrainer(vocab_size=max(4000, len(known)), special_tokens=known, show_progress=False),
    )
    pieces = tokenizer.get_vocab()
    tokenizer = Tokenizer(WordPiece(pieces, unk_token="[UNK]"))  # in which letters are no special tokens
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        **{f"{name[1:-1].lower()}_token": name for name in special},
    )
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
    )

    def write(temporary: Path) -> None:
        with seeded(0):
            model = BertModel(config)
        model.save_pretrained(temporary)
        wrapped.save_pretrained(temporary)

    with quiet():
        replace_folder(folder, write)


@contextmanager
def quiet() -> Generator[None]:
    """Without transformers' bars, its notes that a head is new, and what it deprecates for peft."""
    from transformers.utils import logging as hf

    verbosity, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf.set_verbosity(verbosity)
        if bars:
            hf.enable_progress_bar()


@contextmanager
def _refused(source: str, wanted: str) -> Generator[None]:
    try:
        yield
    except Exception as error:  # of a dozen kinds, from transformers, safetensors, tokenizers and the Hub
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"--model must be {wanted}, got {source} ({reason})") from error
