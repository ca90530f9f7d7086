"""The driver's side of Ray Train: controllers that are lost or cannot start, and room for workers."""

from __future__ import annotations

import threading

import pytest
import ray.exceptions
import torch

from raydistill.config.reading import load
from raydistill.errors import StageFailed
from raydistill.tracking.screen import screen
from raydistill.workers import ray_train
from raydistill.workers.checkpoint import save_state
from raydistill.workers.ray_train import fit, resume


class Trainer:
    """Of a controller that dies as told."""

    def __init__(self, deaths):
        self.deaths = deaths

    def fit(self):
        if self.deaths:
            raise self.deaths.pop()
        return "done"


def test_a_lost_controller_is_started_again_after_a_growing_pause(monkeypatch):
    pauses = []
    monkeypatch.setattr(ray_train.time, "sleep", pauses.append)
    trainer = Trainer([ray.exceptions.ActorUnavailableError("away", None) for _ in range(8)])
    adopted = []
    assert fit(lambda: trainer, "distill", -1, before=lambda: adopted.append(len(pauses))) == "done"
    assert adopted == list(range(9)), "before every start"
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    trainer = Trainer([ray.exceptions.RayActorError() for _ in range(3)])
    with pytest.raises(StageFailed, match="controller died 2 times"):
        fit(lambda: trainer, "distill", 1)


def test_a_controller_that_cannot_start_says_why_and_is_not_tried_again():
    text = "ray::TrainController.__init__()\nCheckpointManagerInitializationError: corrupted"
    cause = ray.exceptions.RayTaskError("__init__", text, ValueError("corrupted"))
    trainer = Trainer([ray.exceptions.ActorDiedError(cause)])
    with pytest.raises(StageFailed, match="cannot start: CheckpointManagerInitializationError: corrupted"):
        fit(lambda: trainer, "distill", -1)


def test_ray_train_runs_in_a_thread_where_it_leaves_ctrl_c_alone():
    where = []
    trainer = Trainer([])
    trainer.fit = lambda: where.append(threading.current_thread()) or "done"
    assert fit(lambda: trainer, "distill", 0) == "done"
    assert where != [threading.main_thread()]


def test_the_workers_room_is_counted_beside_that_of_teachers_that_are_not_placed_yet(monkeypatch):
    config = load(overrides=["distill.workers=3", "distill.min_workers=2", "teachers.shards=2", "teachers.replicas=2"])
    asked = []
    monkeypatch.setattr(ray_train.placement, "wait_for_room", lambda needs: asked.append(needs()))
    monkeypatch.setattr(ray_train.placement, "groups", lambda name: {"mine": ["CREATED", "PENDING"]}[name])
    ray_train.wait_for_room(config, "mine")
    ray_train.wait_for_room(config, encoders=False)
    found = [{need.what: need.count for need in needs} for needs in asked]
    assert found == [
        {"teacher ranks": 2, "train workers": 2, "text encoders": 2},
        {"teacher ranks": 0, "train workers": 2},
    ]

    def none(needs):
        raise StageFailed("train workers cannot be placed")

    monkeypatch.setattr(ray_train.placement, "wait_for_room", none)
    with pytest.raises(StageFailed, match="train workers cannot be placed"):
        ray_train.wait_for_room(config)


def checkpoint(folder, step):
    place = folder / f"checkpoint_2026-01-{step:02}"
    place.mkdir(parents=True)
    save_state(place, {"weight": torch.full((16,), float(step))}, {"step": step, "run": "mine"})
    return place


def test_where_a_stage_goes_on_is_said_before_its_workers_start(tmp_path, capsys, monkeypatch):
    """The newest checkpoint that is whole counts; a controller that is started again says it again."""
    monkeypatch.setattr(screen, "stages", ("bridge", "distill"))
    resume("distill", tmp_path / "none", ("mine",), 60)
    assert capsys.readouterr().out == ""
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 40)
    (checkpoint(tmp_path, 50) / "state.pt").unlink()
    resume("distill", tmp_path, ("mine",), 60)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 2/2 distill: resumes at update 40 of 60")
    resume("distill", tmp_path, ("mine",), 60)
    assert capsys.readouterr().out.count("resumes at update 40 of 60") == 1
