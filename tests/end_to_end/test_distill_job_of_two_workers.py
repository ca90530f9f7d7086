"""jobs/distill.py with all that a run can do at once, on two workers."""

import json

import mlflow
import numpy as np
import pytest
import torch
from jobs_started import TEST_S, history, mlflow_runs, started

from raydistill.workers.step_log import consumed_by_all

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of two workers that makes its own pairs and Bridge, trains that along, and ends with both controls.

    Batches come in two parts under bfloat16 autocast. Every stage is stopped as collapsing: at its first update, or the
    control without teacher samples, which is compared with its own start, at its second.
    """
    storage = tmp_path_factory.mktemp("both")
    settings = (
        "teachers.shards=1", "distill.workers=2", "distill.cpus_per_worker=0.3", "controls=[no_vsd,shared_space]",
        "bridge.checkpoint=null", "bridge.steps=2", "bridge.batch_size=8", "bridge.trainable=true",
        "synthesis.count=64", "discriminator.real_data=null",
        "distill.micro_batches=2", "distill.in_flight=1", "distill.mixed_precision=true", "fake_score.shard=true",
        "distill.steps=3", "distill.drift_limit=1e-6", "distill.stop_on_collapse=true",
    )  # fmt: skip
    with started(storage, storage, "run.name=both", *settings) as job:
        code, seen = job.wait(watch=["ray::RayTrainWorker"])
        assert code == 0, job.text()
        assert job.left() == []
        return storage, job.text(), seen["ray::RayTrainWorker"]


def test_two_workers_train_the_student_and_both_controls(both):
    storage, text, workers = both
    assert len(workers) == 4 * 2  # the Bridge's, and three distillations'
    assert text.count("control:") == 2
    summary = json.loads((storage / "both" / "summary.json").read_text())
    assert summary["controls"].keys() == {"no_vsd", "shared_space"}
    for table in summary["controls"].values():
        assert {"mean", "size", "color", "shape", "position", "background"} <= table.keys()
        assert all(0 <= value <= 1 for value in table.values())
    parent, children = mlflow_runs(storage, "both")
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert children.keys() == {"synthesis", "bridge", "distill", "no_vsd", "shared_space"}
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    losses = {stage: {key for key in run.data.metrics if key.startswith("loss/")} for stage, run in children.items()}
    assert losses == {
        "synthesis": set(),
        "bridge": {"loss/bridge", "loss/latent_l1", "loss/attention"},
        "distill": {"loss/vsd", "loss/fake", "loss/gan", "loss/discriminator"},
        "no_vsd": {"loss/fake", "loss/gan", "loss/discriminator"},
        "shared_space": {"loss/vsd", "loss/fake"},
    }
    assert children["shared_space"].data.params["teacher.model"] == "shapes:sd15"
    for name, steps in {"distill": {1}, "no_vsd": {1}, "shared_space": {1, 2}}.items():
        assert set(history(storage, children[name], "loss/fake")) == steps
        assert set(history(storage, children[name], "guard/latent_drift")) == steps
        last = max(steps)
        assert children[name].data.tags["collapse_alarm"].startswith(f"step {last}: the latents' drift from ")
        assert summary["stopped"][name] == children[name].data.tags["collapse_alarm"]
        assert f"stopped   {name} after {last} of 3 updates" in text
        shown = {file.path for file in client.list_artifacts(children[name].info.run_id, "pictures")}
        assert ("pictures/scores.png" in shown) == (name != "no_vsd"), (
            "the workers share the fake score that draws them"
        )
    assert (summary["steps"], summary["best_step"]) == (1, 1)
    # one update of two batches, each of four samples from each worker
    assert np.sort(consumed_by_all(storage / "both" / "distill")).tolist() == list(range(2 * 2 * 4))


def test_a_run_without_a_bridge_makes_pairs_trains_its_own_and_trains_it_along(both):
    from raydistill.bridge.model import Bridge
    from raydistill.data.pairs import PairSet
    from raydistill.shapes import WEIGHTS
    from raydistill.spaces import load_space

    folder = both[0] / "both"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"synthesis", "bridge", "distill"} <= summary["stages"].keys()
    pairs = PairSet(folder / "pairs")
    assert len(pairs) == 64
    assert not set(pairs.prompts()) & set((WEIGHTS / "heldout.txt").read_text().splitlines())
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    own, along = (Bridge.load(place, student, teacher) for place in (folder / "bridge", folder / "distill" / "bridge"))
    rows = pairs.rows(range(8))
    with torch.no_grad():
        before, after = own(rows.z_student.float()), along(rows.z_student.float())
    assert before.shape == rows.z_teacher.shape
    assert 0 < (before - after).abs().max() < 0.1  # a small update later
    _, children = mlflow_runs(both[0], "both")
    losses = {
        key: history(both[0], children["bridge"], key)[2] for key in ("loss/bridge", "loss/latent_l1", "loss/attention")
    }
    assert losses["loss/attention"] > 0
    assert losses["loss/bridge"] == pytest.approx(losses["loss/latent_l1"] + losses["loss/attention"], rel=1e-5)
    assert set(history(both[0], children["distill"], "bridge/latent_l1")) == {1}
