"""The environment of the processes that the tests of the benchmark start."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In child processes: on a busy machine threads wait for one another, and burn what they wait."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
