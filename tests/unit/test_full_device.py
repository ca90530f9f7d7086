"""A worker whose device is full: it goes on in more parts, once."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from test_distill_worker import fixture_stage, fixture_store, fixture_work_here, kept, tracked  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.errors import OutOfMemory, StageFailed
from raydistill.workers import distill, ray_train
from raydistill.workers.checkpoint import load_state
from raydistill.workers.distill import launch
from raydistill.workers.stage import Stage


class Full(TorchDispatchMode):
    """A device that has no room for the backward pass of more than so many samples: its allocator says so, as CUDA's does."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and len(args[0]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launch_here(monkeypatch, work_here):
    """`launch` of one worker in this process; returns how many parts each attempt had, which grows."""
    attempts = []

    def train(body, settings, config, *, folder, **_):
        attempts.append(config.distill.micro_batches)
        ray_train.forget_fatal_error(folder)
        with contextlib.suppress(OutOfMemory):  # Ray Train starts it again, and it leaves at once
            ray_train.run_body(folder, "distill", lambda: work_here(settings))
        if (reason := ray_train.fatal_error(folder)) is not None:
            raise StageFailed(f"distill: {reason}")

    monkeypatch.setattr(distill, "train", train)
    return lambda settings: (launch(Stage(**settings)), attempts)[1]


@pytest.mark.full
def test_a_full_device_is_tried_once_more_with_more_parts_and_the_run_says_so(stage, launch_here, tmp_path, capsys):
    few = ("distill.steps=1", "distill.evaluate_every=9", "evaluation.consistency_count=0")
    settings = stage("distill.micro_batches=1", *few)
    with Full(2):
        assert launch_here(settings) == [1, 2]
    assert "goes on with distill.micro_batches=2, the same update up to rounding" in capsys.readouterr().out
    told = tracked(settings).tags["out_of_memory"]
    assert told.startswith(
        "goes on with distill.micro_batches=2. trainer: out of device memory at the fake score's update; set "
        "distill.micro_batches=2 or"
    )
    state = load_state(kept(tmp_path)[-1])[0]
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "result.json").unlink()
    (tmp_path / "more_parts.json").unlink()
    with Full(2):  # it needed no more than two parts
        assert launch_here(stage("distill.micro_batches=2", *few))[2:] == [2]
    other = load_state(kept(tmp_path)[-1])[0]
    assert all(torch.equal(value, other["student"][name]) for name, value in state["student"].items())


@pytest.mark.full
def test_a_device_that_is_full_again_or_not_in_an_update_ends_the_stage(stage, launch_here, tmp_path, monkeypatch):
    settings = stage("distill.micro_batches=1", "distill.steps=1", "evaluation.consistency_count=0")
    with Full(1), pytest.raises(StageFailed, match=r"at the fake score's update; set distill\.micro_batches=4 or"):
        launch_here(settings)
    assert json.loads((tmp_path / "more_parts.json").read_text())["micro_batches"] == 2
    with Full(1), pytest.raises(StageFailed, match=r"set distill\.micro_batches=4 or"):  # begins with two, and ends
        launch_here(settings)
    (tmp_path / "more_parts.json").unlink()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(distill.Observer, "before", full)
    with pytest.raises(StageFailed, match="trainer: out of device memory"):
        launch_here(settings)
    assert not (tmp_path / "more_parts.json").exists()
