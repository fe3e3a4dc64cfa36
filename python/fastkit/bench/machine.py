"""A name for this machine, under which results are kept."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path


def name() -> str:
    """The CPU's model and the number of cores, fit for a folder: ``amd-epyc-family-25-model-1-2-cores``.

    A hypervisor may hide the model's number; its family and model number are in the name for that.
    """
    facts = _cpu_facts()
    model = facts.get("model name") or platform.processor() or platform.machine()
    parts = [re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", model)]
    if "cpu family" in facts:
        parts.append(f"family {facts['cpu family']} model {facts['model']}")
    parts.append(f"{os.cpu_count()} cores")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first core."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    return facts
