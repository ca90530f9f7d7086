"""Ray Train itself: workers that fail again and again after the same update end the stage, with reason and node."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raydistill.config.reading import load
from raydistill.errors import StageFailed
from raydistill.tracking.progress import write_progress
from raydistill.workers.ray_train import run_body, train

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
