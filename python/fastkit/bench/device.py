"""What a benchmark asks of the device that a case runs on: the time of a call, its memory, a copy."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import torch

from fastkit.bench.case import Call


class Measured(NamedTuple):
    """One call."""

    seconds: float
    extra_bytes: int  # its peak memory above what is there before it
    result: Any


class Device(Protocol):
    def warm_up(self, call: Call) -> None:
        """What only the first call of a process does, which no other is like."""
        ...

    def seconds(self, call: Call) -> float:
        """Of one call; what frees its result is not the call's work."""
        ...

    def measured(self, call: Call) -> Measured: ...

    def copy(self, floor_bytes: int, copy_bytes: int) -> tuple[Call, int]:
        """What gives the copy rate of a case, and the bytes that it reads and writes."""
        ...

    def clone(self, floor_bytes: int) -> Call:
        """Reads and writes the floor's bytes, in memory that it asks for."""
        ...

    def touch(self, extra_bytes: int) -> None:
        """Warm memory up: a contestant that is called once has no call for that."""
        ...

    def works(self) -> bool:
        """False when a failed call has left nothing that could run another."""
        ...


class Cpu:
    def warm_up(self, call: Call) -> None:
        pass  # a first call is as slow as some fresh pages make it

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        del result
        return stop - start

    def measured(self, call: Call) -> Measured:
        gc.collect()
        before = _start_of_peak()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        return Measured(seconds, max(0, _peak() - before), result)

    def copy(self, floor_bytes: int, copy_bytes: int) -> tuple[Call, int]:
        return _large_copy(copy_bytes), 2 * copy_bytes

    def clone(self, floor_bytes: int) -> Call:
        return torch.ones(floor_bytes // 8).clone

    def touch(self, extra_bytes: int) -> None:
        torch.ones(extra_bytes // 4)

    def works(self) -> bool:
        return True


class Gpu:
    """Times by events on the stream, from a cold L2.

    The copy is of the floor's bytes and as cold, so a small case, part of which stays in the L2 when it is
    written, is held against a copy of which as much stays.

    The time is the device's, from the end of the flush of the L2 to that of the call's last kernel. The host
    launches the call during the flush, six reads of 256 MiB or more (some 400 us at 4 TB/s): its work counts
    only as far as the device waits for it after that. A call that the host takes longer to launch than the
    device to do is slower for users than it is here, by up to the time of a flush.
    """

    def warm_up(self, call: Call) -> None:
        call()  # loads kernels, and compiles those of Triton
        torch.cuda.synchronize()

    def seconds(self, call: Call) -> float:
        for _ in range(6):
            self._flushed.sum()  # reads: what is in the L2 then need not be written back during the call
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3

    def measured(self, call: Call) -> Measured:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()  # not events: the first call may compile, and load kernels
        result = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Measured(seconds, torch.cuda.max_memory_allocated() - before, result)

    def copy(self, floor_bytes: int, copy_bytes: int) -> tuple[Call, int]:
        source, target = (torch.ones(floor_bytes // 8, device="cuda") for _ in range(2))
        return lambda: target.copy_(source), 8 * len(source)

    def clone(self, floor_bytes: int) -> Call:
        return torch.ones(floor_bytes // 8, device="cuda").clone

    def touch(self, extra_bytes: int) -> None:
        pass

    def works(self) -> bool:
        """An illegal access in a kernel ends the context: each later call of the process would fail."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @cached_property
    def _flushed(self) -> torch.Tensor:
        size = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size
        return torch.ones(max(size, 256 << 20) // 4, device="cuda")


@cache  # one for all cases: the first touch of its arrays takes longer than many rounds
def _large_copy(copy_bytes: int) -> Call:
    source, target = torch.ones(copy_bytes // 4), torch.ones(copy_bytes // 4)
    return lambda: target.copy_(source)


def _start_of_peak() -> int:
    """Resets the peak of the resident memory where the system can; returns what it is now, in bytes."""
    if not sys.platform.startswith("linux"):
        return _peak()
    with suppress(AttributeError):  # musl has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)  # else a call would reuse what others have freed
    with suppress(OSError), open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")
    return _peak()


def _peak() -> int:
    """The peak of the resident memory, in bytes."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Gpu()}
