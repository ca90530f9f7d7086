"""Workers of a run that another job has taken over: they leave, and Ray Train does not start them again for ever."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from raydistill.config.reading import load
from raydistill.errors import RunLost, StageFailed
from raydistill.storage import lease
from raydistill.storage.lease import LEASE_FILE, Lease, holding
from raydistill.workers import bridge, ray_train
from raydistill.workers.bridge import MetricLog
from raydistill.workers.ray_train import FATAL_FILE, run_body, train

LOST = "was taken over by another job: leaving, and nothing more is written"


def held_by(folder, token):
    (folder / LEASE_FILE).write_text(json.dumps({"host": "h", "pid": 1, "started": "now", "token": token}))


@pytest.fixture
def mine(tmp_path):
    """The lease of a run's folder."""
    held_by(tmp_path, "mine")
    return Lease(tmp_path, "mine")


@pytest.fixture
def of_two():
    """This process is one of two workers; the other one does nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def lose(mine):
    held_by(mine.folder, "another")


def writes(mine):
    lose(mine)
    lease.check(mine.folder)


def fails(mine):
    """As where the other worker has left."""
    lose(mine)
    raise ValueError("connection closed by peer")


@pytest.mark.parametrize("body", [writes, fails])
def test_a_worker_that_finds_its_run_lost_says_so_once_and_ends_in_order(mine, body, capfd):
    run_body(mine.folder, "distill", lambda: body(mine), mine)
    assert capfd.readouterr().out == f"distill: {mine.folder} {LOST}\n"
    assert not (mine.folder / FATAL_FILE).exists()
    run_body(mine.folder, "distill", lambda: pytest.fail("it was started again"), mine)
    assert capfd.readouterr().out == f"distill: {mine.folder} {LOST}\n"


@pytest.mark.parametrize("body", [writes, fails])
def test_one_of_several_fails_so_that_none_waits_for_it_and_started_again_all_leave(mine, body, of_two, capfd):
    with pytest.raises(RunLost, match=LOST):
        run_body(mine.folder, "distill", lambda: body(mine), mine)
    assert capfd.readouterr().out == ""
    run_body(mine.folder, "distill", lambda: pytest.fail("it was started again"), mine)
    assert capfd.readouterr().out == f"distill: {mine.folder} {LOST}\n"


def test_a_failure_of_a_worker_that_has_its_run_stays_one(mine, capfd):
    def body():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run_body(mine.folder, "distill", body, mine)
    assert capfd.readouterr().out == "distill: a worker failed: ValueError: wrong\n"
    assert (mine.folder / FATAL_FILE).read_text() == "ValueError: wrong"


@pytest.mark.parametrize("failure", [None, StageFailed("distill: the workers failed 3 times")])
def test_a_driver_whose_workers_have_left_leaves_too(mine, monkeypatch, failure):
    """Frozen, it did not see that the run was taken over; the workers ended without a result, or failed."""

    def fit(*_):
        lose(mine)
        if failure:
            raise failure

    monkeypatch.setattr(ray_train, "wait_for_room", lambda *_: None)  # without a cluster there is none
    monkeypatch.setattr(ray_train, "fit", fit)
    with holding(mine), pytest.raises(RunLost, match=LOST):
        train(
            lambda _: None,
            {},
            load(),
            name="distill",
            folder=mine.folder / "distill",
            checkpoints="checkpoints",
            steps=2,
        )


def test_curves_and_pictures_of_a_lost_run_do_not_reach_the_others_mlflow_run(mine, monkeypatch):
    sent = []
    tracker = SimpleNamespace(
        metrics=lambda values, step: sent.append(step), image=lambda *_: sent.append("picture"), catch_up=lambda _: None
    )
    monkeypatch.setattr(bridge, "Tracker", lambda *_: tracker)
    with holding(mine):
        log = MetricLog(mine.folder, "uri", "run")
        log.metrics({"loss/bridge": 1.0}, 1)
        log.image(None, "reconstruction", 1)
        lose(mine)
        with pytest.raises(RunLost):
            log.metrics({"loss/bridge": 1.0}, 2)
        with pytest.raises(RunLost):
            log.image(None, "reconstruction", 2)
    assert sent == [1, "picture"]
    assert list(log.curves) == [1]
