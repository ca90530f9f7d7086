"""Ray Train itself: a checkpoint that a lost worker had written and not reported is adopted by its successor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray.train
import torch

from raydistill.config.reading import load
from raydistill.storage.atomic import scratch
from raydistill.workers.adoption import mark
from raydistill.workers.checkpoint import save_state
from raydistill.workers.ray_train import Worker, newest_state, train

pytestmark = pytest.mark.timeout(600)
RUNS = ("mine",)


@pytest.mark.full  # the short lane has tests/unit/test_adoption.py
def test_a_checkpoint_that_was_written_and_not_reported_is_adopted_at_once(ray_cluster, tmp_path):
    def body(settings):
        """Dies between writing and reporting the second checkpoint, beside one that is not whole."""
        folder = Path(settings["folder"])
        worker = Worker.current(load(overrides=settings["overrides"]))
        found = newest_state("test", worker, folder / "checkpoints", RUNS)
        with (folder / "begins").open("a") as log:
            log.write(f"{found.about['step'] if found else 0}\n")
        if found is not None:
            return
        with scratch(folder) as local:
            save_state(local, {"weight": torch.ones(3)}, {"step": 1} | mark(RUNS))
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(local))
        unreported = folder / "checkpoints" / "checkpoint_2999-01-01"
        unreported.mkdir()
        save_state(unreported, {"weight": torch.ones(3)}, {"step": 2} | mark(RUNS))
        (folder / "checkpoints" / "checkpoint_2999-01-02").mkdir()
        raise RuntimeError("lost")

    overrides = ["distill.cpus_per_worker=0.5", "distill.max_failures=1"]
    settings = {"folder": str(tmp_path), "overrides": overrides, "runs": RUNS}
    result = train(
        body,
        settings,
        load(overrides=overrides),
        name="test",
        folder=tmp_path,
        checkpoints="checkpoints",
        steps=4,
        encoders=False,
    )
    assert (tmp_path / "begins").read_text().split() == ["0", "2"]
    assert Path(result.checkpoint.path).name == "checkpoint_2999-01-01"
    listed = json.loads((tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    names = [entry["checkpoint_dir_name"] for entry in listed["checkpoint_results"]]
    assert len(names) == 2
    assert sorted(place.name for place in (tmp_path / "checkpoints").glob("checkpoint_*/")) == sorted(names)
