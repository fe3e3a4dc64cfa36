"""What is compiled of the Triton kernels of iir_scan without a GPU."""

from __future__ import annotations

from typing import Any

from fastkit.testing.aot import Variant, variant
from fastkit.triton import iir_scan as kernels


def _variant(
    name: str,
    kernel: Any,
    warps: int,
    *,
    signal: str = "fp32",
    arithmetic: str = "fp32",
    ones: tuple[str, ...] = (),
    **options: Any,
) -> Variant:
    """``ones`` are integers that are 1 in the call, and so constants of the kernel."""
    types: dict[str, str] = dict.fromkeys(("x", "y", "gx"), f"*{signal}")
    types |= dict.fromkeys(("a", "b", "l", "maps", "states", "ga", "gb"), f"*{arithmetic}")
    constexprs = {**dict.fromkeys(ones, 1), **options}
    warps = 2 * warps if arithmetic == "fp64" else warps
    return variant(name, kernel, warps, types, constexprs, lambda a: a not in ("chunks", "segments"))


_TIME = {"CHANNEL_LANES": False, "LANES": 1, "BLOCK": 1024, "ones": ("x_time", "y_time", "a_tap", "b_tap")}
_CHANNELS = {
    "CHANNEL_LANES": True, "LANES": 32, "BLOCK": 32, "ones": ("x_channel", "y_channel", "a_tap", "b_tap")
}  # fmt: skip
_ONE_SAMPLE = {
    "CHANNEL_LANES": False, "LANES": 1, "BLOCK": 16,
    "ones": (
        "batch", "channels", "time", "chunk", "length", "segments", "x_time", "y_time", "a_tap", "b_tap",
    ),
}  # fmt: skip
_HALF_CHANNELS = _CHANNELS | {"LANES": 64, "BLOCK": 16}
_CHUNKS = {"CHANNEL_LANES": False, "LANES": 8, "BLOCK": 128, "ones": ("x_time", "y_time", "a_tap", "b_tap")}


def _walk(name: str, layout: dict[str, Any], **options: Any) -> Variant:
    flags: dict[str, Any] = dict.fromkeys(("HAS_B", "HAS_STATES", "REVERSE", "VARYING", "RESTART"), False)
    return _variant(name, kernels.iir_scan_walk, 4, **{**layout, **flags, **options})


def _reduce(name: str, layout: dict[str, Any], **options: Any) -> Variant:
    ones = tuple(one for one in layout["ones"] if not one.startswith("y_"))
    flags: dict[str, Any] = dict.fromkeys(("HAS_B", "REVERSE", "VARYING"), False)
    return _variant(name, kernels.iir_scan_reduce, 4, **{**layout, "ones": ones, **flags, **options})


def _gradients(name: str, layout: dict[str, Any], **options: Any) -> Variant:
    axis = "channel" if layout["CHANNEL_LANES"] else "time"
    ones = tuple(f"{signal}_{axis}" for signal in ("l", "x", "y", "gx"))
    if layout is _ONE_SAMPLE:
        ones += ("batch", "channels", "time", "chunk", "length", "chunks", "pieces")
    flags: dict[str, Any] = {"HAS_B": True, "CARRY": True, "NEEDS_X": True, "NEEDS_COEFFICIENTS": True}
    layout = {**layout, "ones": (*ones, "b_tap")}
    return _variant(name, kernels.iir_scan_gradients, 4, **{**layout, **flags, **options})


AOT_VARIANTS = [
    _walk("forward, fixed, time", _TIME),
    _walk("forward, fixed, b, time", _TIME, HAS_B=True),
    _walk("forward, chunks, b, time", _TIME, HAS_B=True, VARYING=True),
    _walk("forward, chunks, b, split, time, float16", _TIME, HAS_B=True, VARYING=True, HAS_STATES=True,
          signal="fp16"),
    _walk("forward, apart, b, time", _CHUNKS, HAS_B=True, RESTART=True),
    _walk("forward, chunks, b, channels", _CHANNELS, HAS_B=True, VARYING=True),
    _walk("forward, apart, b, channels, bfloat16", _HALF_CHANNELS, HAS_B=True, RESTART=True, signal="bf16"),
    _walk("forward, chunks, b, time, float64", _TIME, HAS_B=True, VARYING=True, signal="fp64",
          arithmetic="fp64"),
    _walk("forward, b, one sample", _ONE_SAMPLE, HAS_B=True),
    _walk("backward, one sample", _ONE_SAMPLE, REVERSE=True),
    _walk("backward, chunks, time", _TIME, REVERSE=True, VARYING=True),
    _walk("backward, chunks, split, channels", _CHANNELS, REVERSE=True, VARYING=True, HAS_STATES=True),
    _reduce("reduce forward, chunks, b, time", _TIME, HAS_B=True, VARYING=True),
    _reduce("reduce backward, chunks, channels", _CHANNELS, REVERSE=True, VARYING=True),
    _variant("link", kernels.iir_scan_link, 2, BLOCK=512),
    _gradients("gradients, one sample", _ONE_SAMPLE),
    _gradients("gradients, time", _TIME),
    _gradients("gradients, apart, channels, bfloat16", _HALF_CHANNELS, CARRY=False, signal="bf16"),
    _gradients("gradients, apart, time", _CHUNKS, CARRY=False),
    _walk("backward, chunks, split, channels, float64", _CHANNELS | {"LANES": 16, "BLOCK": 64}, REVERSE=True,
          VARYING=True, HAS_STATES=True, signal="fp64", arithmetic="fp64"),
    _gradients("gradients, time, float64", _TIME, signal="fp64", arithmetic="fp64"),
]  # fmt: skip
