"""Benchmarks that run from an installed package: a protocol, cases for it, and the demo."""
