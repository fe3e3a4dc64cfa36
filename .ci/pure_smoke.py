"""An installed pure-Python package, outside of a checkout: one notice, the reference, Triton where it is."""

import importlib.util
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"  # no GPU is needed

import torch

from fastkit import ops

x, a = torch.randn(2, 3, 50), torch.tensor([-1.6, 0.81]).view(1, 1, 1, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = ops.iir_scan(x, a)
    assert torch.equal(ops.iir_scan(x, a, impl="reference"), y)
notices = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
assert len(notices) == 1 and "this is a pure-Python build, without the library" in notices[0], notices
print(notices[0])

if importlib.util.find_spec("triton") is None:
    print(f"Triton's kernels: not run: there is no triton for {sys.platform}")
else:
    rows = torch.randn(100, 5)
    found, expected = (ops.moments(rows, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(tuple(found), tuple(expected))
    print("Triton's kernels: run, in its interpreter")
