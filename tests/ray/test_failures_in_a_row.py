"""Ray Train itself: workers that fail again and again after the same update end the stage, with reason and node."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch

from raydistill.config.reading import load
from raydistill.errors import StageFailed
from raydistill.tracking.progress import write_progress
from raydistill.workers.ray_train import Worker, run_body, train

pytestmark = pytest.mark.timeout(600)


@pytest.mark.full
def test_an_error_that_stays_ends_a_stage_that_may_fail_any_number_of_times(ray_cluster, tmp_path):
    """Its workers get one update further once, and then never again."""

    def body(settings):
        folder = Path(settings["folder"])

        def work():
            with (folder / "begins").open("a") as log:
                log.write("x")
            begins = len((folder / "begins").read_text())
            write_progress(folder / "progress.json", step=min(begins, 2), total=9)
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

        run_body(folder, "test", work)

    overrides = [
        "distill.cpus_per_worker=0.5",
        "distill.max_failures=-1",
        "distill.max_failures_without_progress=2",
    ]
    with pytest.raises(StageFailed) as failed:
        train(
            body,
            {"folder": str(tmp_path)},
            load(overrides=overrides),
            name="test",
            folder=tmp_path,
            checkpoints="checkpoints",
            steps=9,
            encoders=False,
        )
    text = str(failed.value)
    assert text.startswith(
        "test: 2 failures in a row and no update after 2 (distill.max_failures_without_progress=2); the last one on node "
        f"{socket.gethostname()} ("
    )
    assert text.endswith("): RuntimeError: CUDA error: no kernel image is available for execution on the device")
    assert (tmp_path / "begins").read_text() == "xxx", "after 1, after 2, and once more after 2"


@pytest.mark.full
def test_a_worker_that_hangs_is_named_with_its_node_when_the_others_have_waited_long_enough(ray_cluster, tmp_path):
    """Both meet twice; then the second one does not come, and lives on."""

    def body(settings):
        folder = Path(settings["folder"])

        def work():
            worker = Worker.current(load(overrides=settings["overrides"]))
            mine = torch.full((3,), float(worker.rank))
            worker.average([mine])
            assert worker.from_rank_0(worker.rank) == 0
            assert mine.tolist() == [0.5] * 3
            if worker.rank == 1:
                time.sleep(60)
            worker.average([mine])

        run_body(folder, "test", work)

    overrides = [
        "distill.workers=2", "distill.cpus_per_worker=0.5", "distill.max_failures=0", "distill.collective_timeout_s=10",
        "distill.network_interface=lo",
    ]  # fmt: skip
    started = time.monotonic()
    with pytest.raises(StageFailed) as failed:
        train(
            body,
            {"folder": str(tmp_path), "overrides": overrides},
            load(overrides=overrides),
            name="test",
            folder=tmp_path,
            checkpoints="checkpoints",
            steps=9,
            encoders=False,
        )
    assert f"worker 0 waits for rank 1 on node {socket.gethostname()}, which has not come" in str(failed.value)
    assert time.monotonic() - started < 60
