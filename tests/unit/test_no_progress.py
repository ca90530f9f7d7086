"""Which failures of workers count as standing still, and what is written when there are too many of them."""

from __future__ import annotations

import json

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raydistill.errors import RunLost
from raydistill.storage.lease import LEASE_FILE, Lease
from raydistill.workers.no_progress import FATAL_FILE, NoProgress


@pytest.fixture
def watch(tmp_path):
    return NoProgress("distill", str(tmp_path), "progress.json", 3)


@pytest.fixture
def fail(watch, tmp_path):
    """`fail(step, error)` -> what was written."""

    def once(step: int | None, error: Exception | None = None) -> str | None:
        if step is not None:
            (tmp_path / "progress.json").write_text(json.dumps({"step": step}))
        watch.after_exception(None, {0: error or RuntimeError("ECC")})
        file = tmp_path / FATAL_FILE
        return file.read_text() if file.exists() else None

    return once


def test_failures_count_until_an_update_is_done_that_was_not_done_before(fail):
    assert [fail(step) for step in (5, 3, 6, 6)] == [None] * 4
    assert fail(1) == (
        "3 failures in a row and no update after 6 (distill.max_failures_without_progress=3); the last one on node "
        "unknown: RuntimeError: ECC"
    )


def test_before_the_first_update_they_count_as_well(fail):
    assert [fail(None), fail(None)] == [None, None]
    assert fail(None).startswith("3 failures in a row and no update after 0 ")


def test_workers_that_are_lost_with_their_nodes_do_not_count_and_those_that_died_alone_do(fail):
    def dead(why: str) -> Exception:
        about = ActorDiedErrorContext(error_message=why, actor_id=bytes(16), name="a worker")
        return WorkerHealthCheckFailedError("lost", ActorDiedError(about))

    lost, died = dead("The actor died because its node has died. Node Id: 1"), dead("The process got SIGABRT")
    assert [fail(1, lost) for _ in range(5)] == [None] * 5
    assert [fail(1, died), fail(1, died)] == [None, None]
    assert "SIGABRT" in fail(1, died)


def test_any_number_is_any_number(watch, fail):
    watch.limit = -1
    assert [fail(1) for _ in range(9)] == [None] * 9


def test_nothing_is_written_to_a_run_that_another_job_has(watch, fail, tmp_path, capsys):
    watch.lease = Lease(tmp_path, "mine")
    (tmp_path / LEASE_FILE).write_text(json.dumps({"host": "h", "pid": 1, "started": "now", "token": "another"}))
    assert [fail(1) for _ in range(3)] == [None] * 3
    assert "not written down" in capsys.readouterr().out
    with pytest.raises(RunLost):
        watch.lease.check()
