"""The driver's side of Ray Train: a list of checkpoints that was damaged, and controllers that are lost or cannot start."""

from __future__ import annotations

import threading

import pytest
import ray.exceptions
import torch
from ray.train import CheckpointConfig, RunConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from raydistill.config.reading import load
from raydistill.errors import StageFailed
from raydistill.workers import ray_train
from raydistill.workers.checkpoint import save_state
from raydistill.workers.ray_train import fit, mend_list

LIST = "checkpoint_manager_snapshot.json"


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of a stage, the last one cut."""
    folder = tmp_path / "checkpoints"
    for number in range(3):
        (folder / f"checkpoint_2026-01-0{number + 1}").mkdir(parents=True)
        save_state(folder / f"checkpoint_2026-01-0{number + 1}", {"weight": torch.ones(9)}, {"step": number})
    state = folder / "checkpoint_2026-01-03" / "state.pt"
    state.write_bytes(state.read_bytes()[:-40])
    return folder


def run_of(folder):
    return RunConfig(storage_path=str(folder.parent), name=folder.name)


def as_ray_reads_it(folder):
    return CheckpointManager(CheckpointConfig(num_to_keep=2), StorageContext(str(folder.parent), folder.name))


@pytest.mark.parametrize("content", ["", '{"ray_version": "2.60.0", "checkpoint_re', '{"a": 1}', "\udcff"])
def test_a_damaged_list_is_written_anew_from_the_whole_checkpoints(folder, content, capfd):
    (folder / LIST).write_text(content, errors="surrogateescape")
    with pytest.raises(Exception):  # noqa: B017 (whatever Ray Train raises: that is why)
        as_ray_reads_it(folder)
    mend_list("distill", run_of(folder))
    said = capfd.readouterr().out
    assert "checkpoint_2026-01-03: damaged or incomplete" in said
    assert f"{folder / LIST}, was damaged: 2 found there; going on from checkpoint_2026-01-02" in said
    found = as_ray_reads_it(folder)
    assert found.latest_checkpoint_result.checkpoint.path == str(folder / "checkpoint_2026-01-02")
    assert len(found.best_checkpoint_results) == 2
    mended = (folder / LIST).read_bytes()
    mend_list("distill", run_of(folder))
    assert (folder / LIST).read_bytes() == mended
    assert capfd.readouterr().out == ""


def test_a_list_without_any_whole_checkpoint_goes_and_one_that_names_a_lost_one_is_mended(folder, capfd):
    (folder / LIST).write_text("")
    mend_list("distill", run_of(folder))
    (folder / "checkpoint_2026-01-02").rename(folder.parent / "lost")
    mend_list("distill", run_of(folder))
    assert as_ray_reads_it(folder).latest_checkpoint_result.checkpoint.path == str(folder / "checkpoint_2026-01-01")
    (folder / "checkpoint_2026-01-01").rename(folder.parent / "lost-too")
    mend_list("distill", run_of(folder))
    assert not (folder / LIST).exists()
    assert "was damaged: none found there" in capfd.readouterr().out
    mend_list("distill", run_of(folder.parent / "nowhere" / folder.name))
    assert not (folder.parent / "nowhere").exists()


class Trainer:
    """Of a controller that dies as told."""

    def __init__(self, folder, deaths):
        self.run_config, self.deaths = run_of(folder / "checkpoints"), deaths

    def fit(self):
        if self.deaths:
            raise self.deaths.pop()
        return "done"


def test_a_lost_controller_is_started_again_after_a_growing_pause(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(ray_train.time, "sleep", pauses.append)
    trainer = Trainer(tmp_path, [ray.exceptions.ActorUnavailableError("away", None) for _ in range(8)])
    assert fit(lambda: trainer, "distill", -1) == "done"
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    trainer = Trainer(tmp_path, [ray.exceptions.RayActorError() for _ in range(3)])
    with pytest.raises(StageFailed, match="controller died 2 times"):
        fit(lambda: trainer, "distill", 1)


def test_a_controller_that_cannot_start_says_why_and_is_not_tried_again(tmp_path):
    text = "ray::TrainController.__init__()\nCheckpointManagerInitializationError: corrupted"
    cause = ray.exceptions.RayTaskError("__init__", text, ValueError("corrupted"))
    trainer = Trainer(tmp_path, [ray.exceptions.ActorDiedError(cause)])
    with pytest.raises(StageFailed, match="cannot start: CheckpointManagerInitializationError: corrupted"):
        fit(lambda: trainer, "distill", -1)


def test_ray_train_runs_in_a_thread_where_it_leaves_ctrl_c_alone(tmp_path):
    where = []
    trainer = Trainer(tmp_path, [])
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
