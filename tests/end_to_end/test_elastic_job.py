"""A run that loses a node goes on with the workers that are left, and takes more when a node comes back."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from jobs_started import JOB_S, TEST_S

from raydistill.benchmark.world import World
from raydistill.distill.record import consumed_by_all, read_lines, step_file

pytestmark = pytest.mark.timeout(TEST_S)
STEPS, BATCH, FAKE_UPDATES = 40, 2, 1
SETTINGS = (
    f"distill.steps={STEPS}", f"distill.batch_size={BATCH}", "distill.workers=2", "distill.min_workers=1",
    "distill.resize_after_s=1", "distill.checkpoint_every=2", "distill.evaluate_every=1000",
    "distill.cpus_per_worker=1.2",  # one on each node
    f"fake_score.updates={FAKE_UPDATES}", "discriminator.real_count=16", "evaluation.count=8",
    "evaluation.periodic_count=8", "evaluation.grid=4", "evaluation.judge=null", "teacher.sampling_steps=2",
    "teachers.shards=1", "controls=[]",
)  # fmt: skip


def test_a_lost_node_costs_a_worker_and_no_prompt(tmp_path):
    folder = tmp_path / "elastic" / "distill"

    def worlds() -> list[int]:
        return [line["world"] for line in read_lines(step_file(folder, 0))]

    with World(tmp_path / "world") as world:
        world.add_node()
        log = tmp_path / "job.log"
        settings = (*SETTINGS, f"storage={tmp_path}", "run.name=elastic", f"tracking.uri={world.server.uri}")
        job = world.start_job("distill", settings, log)

        def until(reached, seconds: float = JOB_S) -> None:
            deadline = time.monotonic() + seconds
            while not reached():
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

        until(lambda: worlds().count(2) >= 3)
        world.kill_node()
        until(lambda: 1 in worlds())
        world.add_node()
        until(lambda: worlds()[-1] == 2)
        deadline = time.monotonic() + JOB_S
        while job.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert job.returncode == 0, log.read_text()
    assert worlds()[0] == worlds()[-1] == 2
    ids = np.sort(consumed_by_all(folder))
    assert ids.tolist() == list(range(STEPS * (1 + FAKE_UPDATES) * 2 * BATCH)), "each once, by however many workers"
    assert json.loads((folder / "result.json").read_text())["steps"] == STEPS
