"""Maximal Multiverse Learning: many classifier heads on one encoder, of which weak ones are dropped."""

from fastkit.methods.multiverse.elimination import HeadEliminator

__all__ = ["HeadEliminator"]
