"""The options that recipes have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastkit._command import Refusal, positive


def add_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """The options that all recipes have; ``out`` is the folder taken without ``--out``."""
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="a folder as docs/data.md has it; default: data of its own"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(out), help="default: %(default)s")
    parser.add_argument(
        "--seeds", type=_seed, nargs="+", metavar="N", help="each arm is trained once from each"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--quick", action="store_true", help="a short run that shows that it works, no more")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, of recipes that run on a GPU too; ``device_of`` gives what it names."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device must be cpu where torch sees no GPU, got cuda; leave it out")
    return torch.device(args.device)


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """``--threads``; what is small loses more by waiting for others than it gains: 1 is its default."""
    parser.add_argument(
        "--threads",
        type=positive,
        default=default,
        metavar="N",
        help=f"of the CPU; default: {default or 'those of torch'}",
    )


def seeds_of(args: argparse.Namespace, default: Sequence[int]) -> list[int]:
    """Those that are asked for, each once; by default these, and with ``--quick`` the first of them."""
    return list(dict.fromkeys(args.seeds or (default[:1] if args.quick else default)))


def check_folder(data: Path, give: str, option: str = "--data") -> None:
    """Refuses an ``option`` that is no folder; ``give`` is what to give instead."""
    if not data.is_dir():
        found = "a file" if data.exists() else "nothing there"
        raise Refusal(f"{option} must be a folder, got {found}: {data}; give {give}")


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"a seed must be at least 0 and below 2^63, got {seed}")
    return seed
