"""A process that is killed while it saves an adapter leaves the old one or the new one."""

import contextlib
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from prilora_folders import CONFIG, OURS, STATE, TENSORS, Net, peft, trained

from fastkit.methods.prilora import load_prilora

# PEFT asks a model of transformers for a property that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Stops the program before its n-th change of the disk."""
    left = [math.inf]

    def counted(function):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return run

    for method in ("replace", "rename", "unlink", "rmdir", "mkdir", "write_bytes"):
        monkeypatch.setattr(Path, method, counted(getattr(Path, method)))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))

    def set_to(changes):
        left[0] = changes

    return set_to


@pytest.mark.parametrize(
    ("options", "uniform"),
    [({}, False), ({"alpha": 5.0}, False), ({}, True)],
    ids=["same", "scale", "uniform"],
)
def test_a_killed_process_leaves_the_old_adapter_or_the_new_one(tmp_path, killed_at, options, uniform):
    x = torch.randn(5, 8)

    def net():
        torch.manual_seed(0)
        return Net()

    def made(**options):
        return trained(model=net(), target_modules=["fc"], modules_to_save=["head"], **options)

    @torch.no_grad()
    def those(model):
        y = model(x)
        return {i for i, prilora in enumerate(handles) if torch.allclose(y, prilora.model(x), 1e-6, 1e-6)}

    handles = old, _ = made(), made(seed=1, **options)
    seen, refused, done = set(), 0, False
    for changes in itertools.count():
        folder = tmp_path / str(changes)
        old.save_pretrained(folder)
        killed_at(changes)
        with contextlib.suppress(Killed):
            handles[1].save_pretrained(folder, uniform=uniform)
            done = True
        killed_at(math.inf)
        found = those(load_prilora(net(), folder).model)
        assert len(found) == 1, changes
        seen |= found
        try:
            assert len(those(peft.PeftModel.from_pretrained(net(), folder))) == 1, changes
        except ValueError as error:  # of PEFT, for a moment
            assert "Can't find" in str(error)
            refused += 1
        old.save_pretrained(folder)  # whatever is left, the next one is whole
        assert those(load_prilora(net(), folder).model) == {0}
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS, OURS, STATE]
        if done:
            break
    assert seen == {0, 1} and (refused > 0) == bool(options or uniform)
