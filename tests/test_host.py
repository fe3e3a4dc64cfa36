"""The inner kernels of every instruction set that this CPU has, on NumPy arrays."""

import numpy as np
import pytest

from fastkit import reference

torch = pytest.importorskip("torch")
host = pytest.importorskip(
    "fastkit._host", reason="fastkit._host is built in editable installs where Python.h exists"
)

TOLERANCE = {np.float32: 2e-4, np.float64: 1e-12}


def aligned(shape, dtype):
    """Zeros that begin on a cache line, as PyTorch allocates them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def problem(dtype, layout, batch=2, channels=40, time=256, chunk=64, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, channels, time) if layout == "time" else (batch, time, channels)

    def signal(fill):
        array = aligned(shape, dtype)
        if fill:
            array[:] = rng.standard_normal(shape)
        return array if layout == "time" else array.transpose(0, 2, 1)

    chunks = -(-time // chunk)
    radius, angle = rng.uniform(0, 0.9, (2, batch, channels, chunks)) * [[[[1]]], [[[3.4]]]]
    a = np.stack([-2 * radius * np.cos(angle), radius**2], -1).astype(dtype)
    b = rng.standard_normal((batch, channels, chunks, 3)).astype(dtype)
    return signal, a, b


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", host.isas())
def test_every_isa_agrees_with_the_float64_reference(isa, dtype, layout, stream):
    signal, a, b = problem(dtype, layout)
    x, gy, y, gx = signal(True), signal(True), signal(False), signal(False)
    ga, gb = np.zeros_like(a), np.zeros_like(b)
    host.iir_scan_forward(isa, x, y, a, b, chunk=64, carry=True, stream=stream)
    host.iir_scan_backward(isa, gy, x, y, gx, ga, gb, a, b, chunk=64, carry=True, stream=stream)

    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, a, b)]
    want = reference.iir_scan(*leaves, chunk=64)
    want.backward(torch.tensor(gy, dtype=torch.float64))
    for got, oracle in zip((y, gx, ga, gb), (want, *(v.grad for v in leaves)), strict=True):
        oracle = oracle.detach().numpy()
        assert np.abs(got - oracle).max() <= TOLERANCE[dtype] * np.abs(oracle).max()


@pytest.mark.parametrize("isa", host.isas())
def test_streamed_and_plain_stores_write_the_same_bits(isa):
    signal, a, b = problem(np.float32, "time")
    x, plain, streamed = signal(True), signal(False), signal(False)
    host.iir_scan_forward(isa, x, plain, a, b, chunk=64, carry=True, stream=False)
    host.iir_scan_forward(isa, x, streamed, a, b, chunk=64, carry=True, stream=True)
    assert np.array_equal(plain, streamed)


def test_unknown_isa_is_refused():
    signal, a, b = problem(np.float32, "time")
    with pytest.raises(ValueError, match=r"isa must be one of isas\(\), got mmx"):
        host.iir_scan_forward("mmx", signal(True), signal(False), a, b, chunk=64, carry=True, stream=False)
