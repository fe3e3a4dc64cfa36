"""What a token costs to generate after more and more of them: a Focus model beside a cached transformer.

    python benchmarks/focus_decoding.py --out FOLDER        a table, decoding.csv and decoding.png

Both have the same width, number of layers and vocabulary, and random weights. Before the steps that are
timed, a Focus model reads that many tokens; a transformer is simply given their keys and values, in a cache
with room for those that come: one that grows, as ``generate()`` has by default, is copied at every step. They
take turns, a bin of tokens at a time, so that what is due where a bin ends is in the time. Printed are
medians, relative to the Focus model after the fewest tokens, and the bytes that each keeps.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from fastkit.methods.focus import FocusCache, FocusConfig, FocusForCausalLM

VOCABULARY = 256
HEAD = 64


class Decoder(NamedTuple):
    model: PreTrainedModel
    cache: Cache
    kept: int  # bytes, before the first step

    def steps(self, tokens: Tensor) -> float:
        """Seconds for each of these tokens, one after the other."""
        begun = time.perf_counter()
        for token in tokens:
            self.model(token.view(1, 1), past_key_values=self.cache, use_cache=True)
        return (time.perf_counter() - begun) / len(tokens)


def focus(args: argparse.Namespace, tokens: int, _more: int) -> Decoder:
    config = FocusConfig(
        **sizes(args), qk_size=args.width // 2, attn_chunk=args.bin, bin_length=args.bin,
        kernel_length=args.kernel_length,
    )  # fmt: skip
    model = FocusForCausalLM(config).eval()
    read = torch.randint(VOCABULARY, (1, tokens))
    cache = model(read, use_cache=True, logits_to_keep=1).past_key_values
    assert isinstance(cache, FocusCache)
    kept = [cache.history, *(getattr(state, field.name) for state in cache.states for field in fields(state))]
    return Decoder(model, cache, sum(t.nbytes for t in kept if t is not None))


def transformer(args: argparse.Namespace, tokens: int, more: int) -> Decoder:
    heads = args.width // HEAD
    config = LlamaConfig(**sizes(args), num_attention_heads=heads, max_position_embeddings=2**20)
    model = LlamaForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=tokens + more)
    for layer in range(args.layers):
        cache.update(torch.randn(1, heads, tokens, HEAD), torch.randn(1, heads, tokens, HEAD), layer)
    return Decoder(model, cache, 2 * args.layers * tokens * args.width * 4)


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": args.width, "intermediate_size": 2 * args.width,
        "num_hidden_layers": args.layers,
    }  # fmt: skip


DECODERS: dict[str, Callable[[argparse.Namespace, int, int], Decoder]] = {
    "Focus": focus,
    "transformer": transformer,
}


class Cost(NamedTuple):
    decoder: str
    tokens: int
    seconds: float  # of a step
    kept: int


@torch.inference_mode()
def measure(args: argparse.Namespace, tokens: int) -> list[Cost]:
    turns = 1 + args.repeats  # the first warms up
    decoders = {name: make(args, tokens, turns * args.bin) for name, make in DECODERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        following = torch.randint(VOCABULARY, (args.bin,))
        for name, decoder in decoders.items():
            seconds[name].append(decoder.steps(following))
    return [
        Cost(name, tokens, statistics.median(seconds[name][1:]), decoder.kept)
        for name, decoder in decoders.items()
    ]


def draw(path: Path, costs: list[Cost], unit: float) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in DECODERS:
        own = [cost for cost in costs if cost.decoder == name]
        lengths = [cost.tokens for cost in own]
        left.plot(lengths, [cost.seconds / unit for cost in own], marker="o", label=name)
        right.plot(lengths, [cost.kept / 2**20 for cost in own], marker="o", label=name)
    left.set_ylabel(f"time of a token\n(Focus after {min(c.tokens for c in costs)}: 1)")
    right.set_ylabel("MiB kept")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("tokens before")
    left.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bin", type=int, default=128, help="tokens of a bin, and of a chunk")
    parser.add_argument("--kernel-length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(10, 17)])
    parser.add_argument("--repeats", type=int, default=5, help="bins of each, after one that is not timed")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    costs: list[Cost] = []
    for tokens in args.tokens:
        costs += measure(args, tokens)
        for cost in costs[-len(DECODERS) :]:
            ratio = cost.seconds / costs[0].seconds
            print(f"{tokens:7}  {cost.decoder:12}  {ratio:6.2f}  {cost.kept / 2**20:8.2f} MiB", flush=True)
    with open(args.out / "decoding.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Cost._fields)
        writer.writerows(costs)
    draw(args.out / "decoding.png", costs, costs[0].seconds)


if __name__ == "__main__":
    main()
