"""What many heads cost of a training step: those of a BERT of base size, with random weights.

    python benchmarks/multiverse_step.py

The whole is a step of MultiverseForSequenceClassification: the encoder, the heads' losses and penalty, the
gradients of both, AdamW, and the look at the heads. The part is all of these but the encoder: the same heads,
on a vector that is given, with an optimizer and a HeadEliminator of their own. They take turns; printed are
the median of the steps' ratios, and the smallest and largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification

from fastkit.methods.multiverse import HeadEliminator, MultiverseForSequenceClassification
from fastkit.nn import MultiverseHead


def whole(args: argparse.Namespace) -> Callable[[], object]:
    """A step of the model."""
    config = BertConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_attention_heads=args.width // 64,
        num_hidden_layers=args.layers, num_labels=args.classes,
    )  # fmt: skip
    model = MultiverseForSequenceClassification.from_base(
        BertForSequenceClassification(config), num_heads=args.heads
    )
    optimizer, eliminator = _trainers(args, model)
    tokens = torch.randint(config.vocab_size, (args.rows, args.length))
    labels = torch.randint(args.classes, (args.rows,))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        sums = model.take_sums()
        assert sums is not None
        eliminator.add(*sums)
        model.head.eliminate(eliminator.step(), optimizer)

    return step


def part(args: argparse.Namespace) -> Callable[[], object]:
    """A step of the heads alone."""
    head = MultiverseHead(args.width, args.classes, args.heads)
    optimizer, eliminator = _trainers(args, head)
    x = torch.randn(args.rows, args.width, requires_grad=True)
    labels = torch.randint(args.classes, (args.rows,))

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        found = head.loss(x, labels)
        found.loss.backward()
        optimizer.step()
        eliminator.add(found.head_losses * found.count, found.correct, found.count)
        head.eliminate(eliminator.step(), optimizer)

    return step


def _trainers(args: argparse.Namespace, model: torch.nn.Module) -> tuple[torch.optim.AdamW, HeadEliminator]:
    return torch.optim.AdamW(model.parameters()), HeadEliminator(args.heads, total_steps=10_000)


def _seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each, after one that is not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps = [whole(args), part(args)]
    ratios: list[float] = []
    for i in range(args.repeats + 1):
        of_whole, of_part = map(_seconds, steps)
        if i > 0:
            ratios.append(of_part / of_whole)
    print(
        f"{args.heads} heads of {args.classes} classes, {args.rows} rows of {args.length} tokens,"
        f" {args.threads} threads: {statistics.median(ratios):.2%} of a step"
        f" ({min(ratios):.2%} to {max(ratios):.2%})"
    )


if __name__ == "__main__":
    main()
