"""Sentences as tokens, tokenised once, in batches of a bounded number of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastkit.recipes._glue import Array, Part

POOL = 1024  # sentences among which those of a batch are of about one length


class Tokens(NamedTuple):
    """N sentences or pairs of them; what the model is given of each, without padding."""

    columns: dict[str, list[Array]]  # input_ids, and token_type_ids where the model wants them
    padding: dict[str, int]  # attention_mask too
    left: bool  # where padding goes
    lengths: Array  # (N,)
    y: Tensor  # (N,)


def tokenised(tokenizer: Any, part: Part, longest: int) -> Tokens:
    """Of each sentence or pair, at most ``longest`` tokens."""
    found = tokenizer(part.first, part.second, truncation=True, max_length=longest)
    ids = [np.array(row, dtype=np.int64) for row in found["input_ids"]]
    columns = {"input_ids": ids}
    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
    if "token_type_ids" in found:
        columns["token_type_ids"] = [np.array(row, dtype=np.int64) for row in found["token_type_ids"]]
        padding["token_type_ids"] = tokenizer.pad_token_type_id
    lengths = np.array([len(row) for row in ids])
    return Tokens(columns, padding, tokenizer.padding_side == "left", lengths, torch.from_numpy(part.y))


def batch(tokens: Tokens, chosen: Array, device: torch.device) -> dict[str, Tensor]:
    """The model's arguments for the sentences ``chosen``, padded to the longest of them."""
    lengths = tokens.lengths[chosen]
    shape = len(chosen), int(lengths.max())
    arrays = {name: np.full(shape, value, dtype=np.int64) for name, value in tokens.padding.items()}
    for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
        inside = slice(shape[1] - length, None) if tokens.left else slice(length)
        arrays["attention_mask"][row, inside] = 1
        for name, column in tokens.columns.items():
            arrays[name][row, inside] = column[i]
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def cut(order: Array, lengths: Array, limit: int) -> list[Array]:
    """``order``, by length, cut into batches of at most ``limit`` tokens, padding included."""
    order = order[np.argsort(lengths[order], kind="stable")]
    batches, begin = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - begin) * lengths[order[end]] > limit:
            batches.append(order[begin:end])
            begin = end
    return batches


def plan(lengths: Array, limit: int, steps: int, seed: int) -> list[Array]:
    """The batches of ``steps`` steps: of the seed alone, so that arms see the same ones.

    In each epoch the sentences are shuffled, sorted by length in pools of ``POOL``, cut into batches of at
    most ``limit`` tokens, and the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[Array] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator)
        epoch = [piece for pool in order.split(POOL) for piece in cut(pool.numpy(), lengths, limit)]
        shuffled = torch.randperm(len(epoch), generator=generator)
        batches += [epoch[i] for i in shuffled]
    return batches[:steps]


class HeldOut(NamedTuple):
    """A part to be judged by: padded batches on the device, made once."""

    batches: list[tuple[Array, dict[str, Tensor]]]
    y: Tensor  # (N,)


def held_out(tokens: Tokens, limit: int, device: torch.device) -> HeldOut:
    pieces = cut(np.arange(len(tokens.lengths)), tokens.lengths, limit)
    return HeldOut([(chosen, batch(tokens, chosen, device)) for chosen in pieces], tokens.y)


@torch.no_grad()
def predict(model: nn.Module, part: HeldOut) -> Tensor:  # (N, classes or 1), on the CPU
    """The logits, in the order of the part, in eval."""
    training = model.training
    model.eval()
    logits = torch.cat([model(**inputs).logits.float() for _, inputs in part.batches]).cpu()
    model.train(training)
    places = torch.from_numpy(np.concatenate([chosen for chosen, _ in part.batches]))
    return torch.empty_like(logits).index_copy_(0, places, logits)
