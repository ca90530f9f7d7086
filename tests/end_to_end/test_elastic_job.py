"""Runs of several workers on one cluster: nodes come and go, another run shares the teachers, SIGTERM asks to leave."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
from jobs_started import JOB_S, TEST_S

from raydistill.benchmark.world import World
from raydistill.workers.step_log import consumed_by_all, read_lines, step_file

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]
BATCH, FAKE_UPDATES = 2, 1
SETTINGS = (
    "distill.steps=100000",  # more than there is time for: SIGTERM ends it
    f"distill.batch_size={BATCH}", "distill.workers=2", "distill.min_workers=1",
    "distill.resize_after_s=1", "distill.checkpoint_every=2", "distill.evaluate_every=100000",
    "distill.cpus_per_worker=1.2",  # one on each node
    f"fake_score.updates={FAKE_UPDATES}", "discriminator.real_count=16", "evaluation.count=8",
    "evaluation.periodic_count=8", "evaluation.grid=4", "evaluation.judge=null", "teacher.sampling_steps=2",
    "teachers.shards=1", "controls=[]",
)  # fmt: skip


def test_a_lost_node_costs_a_worker_and_no_prompt_and_runs_share_teachers(tmp_path):
    folder = tmp_path / "elastic" / "distill"

    def lines() -> list[dict]:
        return read_lines(step_file(folder, 0))

    def worlds() -> list[int]:
        return [line["world"] for line in lines()]

    with World(tmp_path / "world") as world:
        world.add_node()
        log, other_log = tmp_path / "job.log", tmp_path / "other.log"
        stored = (f"storage={tmp_path}", f"tracking.uri={world.server.uri}")
        settings = (*SETTINGS, *stored, "run.name=elastic")
        job = world.start_job("distill", settings, log)

        def until(reached, seconds: float = JOB_S) -> None:
            deadline = time.monotonic() + seconds
            while not reached():
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

        until(lambda: worlds().count(2) >= 3)
        other = world.start_job(
            "distill",
            (*SETTINGS, *stored, "run.name=other", "teachers.service=teacher-elastic", "distill.steps=2",
             "distill.workers=1", "distill.cpus_per_worker=0.1"),
            other_log,
        )  # fmt: skip
        world.kill_node()
        until(lambda: 1 in worlds())
        world.add_node()
        until(lambda: worlds()[-1] == 2)

        assert other.wait(timeout=JOB_S) == 0, other_log.read_text()
        done = lines()[-1]["step"]
        until(lambda: lines()[-1]["step"] > done + 1)  # whose teachers the other run has left alone

        world.server.signal(signal.SIGSTOP)  # MLflow takes connections and says nothing
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=JOB_S) == 75, log.read_text()
        world.server.signal(signal.SIGCONT)
        assert f"a checkpoint was written after update {lines()[-1]['step']}" in log.read_text()
        assert world.titled("ray::TeacherRank") == []
        reached = lines()[-1]["step"]
        assert json.loads((tmp_path / "elastic" / "distill" / "progress.json").read_text())["step"] == reached

        job = world.start_job("distill", (*settings, f"distill.steps={reached + 2}"), log)
        assert job.wait(timeout=JOB_S) == 0, log.read_text()
    assert worlds()[0] == worlds()[-1] == 2
    assert [line["step"] for line in lines()[-2:]] == [reached + 1, reached + 2], "no update is done again"
    ids = np.sort(consumed_by_all(folder))
    assert ids.tolist() == list(range((reached + 2) * (1 + FAKE_UPDATES) * 2 * BATCH)), "each once, by however many"
    assert json.loads((folder / "result.json").read_text())["steps"] == reached + 2
    assert json.loads((tmp_path / "other" / "distill" / "result.json").read_text())["steps"] == 2
