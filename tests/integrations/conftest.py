"""Trainers that are quiet, and each the first of its process."""

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch, one_thread):
    """No logging to elsewhere, no progress bars; and accelerate as if it were new."""
    import accelerate
    import transformers

    monkeypatch.setenv("WANDB_DISABLED", "true")
    transformers.utils.logging.set_verbosity_error()
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
        state._reset_state()
