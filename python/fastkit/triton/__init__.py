"""Kernels in Triton, a module for each op; the ops import them when they first run."""
