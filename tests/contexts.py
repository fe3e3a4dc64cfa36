"""Contexts that tests of several ops enter."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def waits_are_errors():
    """Whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all which waits is seen
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_default_device():
    """Out of ``with torch.device``, under which torch 2.11 has no vmap of an autograd.Function."""
    return torch._C.DisableTorchFunction()
