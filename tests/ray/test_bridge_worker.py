"""Bridge training on Ray Train: the same Bridge from one worker, two workers, and an interrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from pair_sets import write_upscaled
from safetensors.torch import load_file

from raydistill.bridge.model import Bridge
from raydistill.bridge.trainer import build_trainer
from raydistill.config.reading import load
from raydistill.errors import InputError, StageFailed
from raydistill.spaces import load_space
from raydistill.workers.bridge import train_bridge

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    return write_upscaled(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def configure(sd_folder, flux_folder):
    def configure(*overrides: str):
        return load(
            None,
            [
                f"student.model={sd_folder}", f"teacher.model={flux_folder}", "bridge.batch_size=4", "bridge.embed_dim=16",
                "bridge.depths=[2]", "bridge.steps=4", "bridge.checkpoint_every=2", "distill.cpus_per_worker=0.5",
                "distill.max_failures=0", "bridge.lr_decay=none", *overrides,
            ],
        )  # fmt: skip

    return configure


def weights(folder):
    return load_file(folder / "projector.safetensors")


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory):
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("bridge", artifact_location=str(folder / "artifacts"))
    return f"sqlite:///{folder}/mlflow.db", client.create_run(experiment).info.run_id


@pytest.mark.full
def test_ray_gives_the_bridge_of_plain_torch_and_going_on_equals_never_stopping(
    ray_cluster, configure, pairs_folder, tmp_path, sd_folder, flux_folder, mlflow_run
):
    from mlflow import MlflowClient

    plain = build_trainer(configure(), pairs_folder)
    states = []
    for _ in range(4):
        plain.step(plain.objective.batch(plain.step_count))
        states.append({name: value.clone() for name, value in plain.bridge.projector.state_dict().items()})

    every = "bridge.checkpoint_every=1"
    short = train_bridge(configure("bridge.steps=2", every), tmp_path, pairs_folder)  # MLflow hears nothing of it yet
    assert largest_difference(weights(short.folder), states[1]) == 0
    state = latest(tmp_path / "bridge-checkpoints", "/state.pt")
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(damaged)  # the checkpoint before it counts
    (tmp_path / "bridge-checkpoints" / "checkpoint_manager_snapshot.json").write_text("")  # by a full disk, or a kill
    longer = train_bridge(configure(), tmp_path, pairs_folder, *mlflow_run)
    assert largest_difference(weights(longer.folder), states[3]) == 0
    assert longer.metrics["step"] == 4
    assert longer.metrics == plain.validation()[0] | {"step": 4}
    Bridge.load(longer.folder, load_space(sd_folder), load_space(flux_folder))

    again = train_bridge(configure(), tmp_path, pairs_folder)  # nothing left to do
    assert again == longer
    assert again.folder == tmp_path / "bridge"

    client = MlflowClient(mlflow_run[0])
    history = sorted(client.get_metric_history(mlflow_run[1], "eval/psnr"), key=lambda point: point.step)
    assert [point.step for point in history] == [1, 2, 4]
    assert history[-1].value == pytest.approx(longer.metrics["eval/psnr"])
    assert any("reconstruction" in file.path for file in client.list_artifacts(mlflow_run[1], "images"))


@pytest.mark.full
def test_two_workers_divide_the_batch_and_give_the_bridge_of_one(ray_cluster, configure, pairs_folder, tmp_path):
    one = build_trainer(configure("bridge.attention.weight=0"), pairs_folder)
    for _ in range(2):
        one.step(one.objective.batch(one.step_count))
    overrides = ("bridge.attention.weight=0", "bridge.steps=2", "distill.workers=2", "bridge.micro_batches=2")
    two = train_bridge(configure(*overrides), tmp_path, pairs_folder)
    # Adam divides by the size of tiny gradients, so rounding may show; a wrong mean would change every weight by lr.
    changed = [(weights(two.folder)[n] - v).abs().flatten() for n, v in one.bridge.projector.state_dict().items()]
    assert float(torch.cat(changed).median()) < 1e-6


@pytest.mark.full
def test_mistakes_are_told_before_any_worker_starts(
    ray_cluster, configure, pairs_folder, tmp_path, sd_folder, flux_folder
):
    with pytest.raises(InputError, match="no pairs-"):
        train_bridge(configure(), tmp_path / "run", tmp_path)
    swapped = (f"student.model={flux_folder}", f"teacher.model={sd_folder}")
    with pytest.raises(InputError, match=r"column z_T has shape"):
        train_bridge(configure(*swapped), tmp_path / "run", pairs_folder)
    assert not (tmp_path / "run").exists()
    with pytest.raises(StageFailed, match="not finite"):
        train_bridge(configure("bridge.lr=1e30", "bridge.attention.weight=0"), tmp_path / "diverged", pairs_folder)


# -- the job ------------------------------------------------------------------------------------------------


STEPS = 60  # long enough to be struck three times


def wait_until(done, process, log, what):
    deadline = time.monotonic() + 200
    while not (found := done()):
        assert process.poll() is None, f"the job ended before {what}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {what} after 200 s:\n{log.read_text()}"
        time.sleep(0.02)
    return found


def latest(folder, file=""):
    return max(folder.glob(f"checkpoint_2*{file}"), default=Path())


def process_of(actor):
    """Process of an actor of this cluster, which is this process's child."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(actor in word for word in process.cmdline()):
                return process
    return None


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_job_whose_driver_controller_and_worker_are_killed_gives_the_bridge_of_one_left_alone(
    ray_cluster, pairs_folder, sd_folder, flux_folder, tmp_path
):
    """kill -9 of the driver, the same command again, of Ray Train's controller, of a worker: the same weights, one MLflow
    run."""
    overrides = [
        f"storage={tmp_path}", "run.name=killed", f"bridge.pairs={pairs_folder}", f"student.model={sd_folder}",
        "student.unet=null", f"teacher.model={flux_folder}", "bridge.batch_size=4", "bridge.embed_dim=16",
        "bridge.depths=[2]", f"bridge.steps={STEPS}", "bridge.checkpoint_every=3", "distill.cpus_per_worker=0.5",
        "distill.max_failures=1",
    ]  # fmt: skip
    plain = build_trainer(load(None, [*overrides, "bridge.checkpoint=null"]), pairs_folder)
    for _ in range(STEPS):
        plain.step(plain.objective.batch(plain.step_count))

    checkpoints, log = tmp_path / "killed" / "bridge-checkpoints", tmp_path / "log"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for life in ("first", "second"):
        before = latest(checkpoints)
        with log.open("w") as stream:
            command = [sys.executable, str(ROOT / "jobs" / "train_bridge.py"), *overrides]
            process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment)
        try:
            wait_until(lambda before=before: latest(checkpoints) > before, process, log, "another checkpoint")
            wait_until((checkpoints / "checkpoint_manager_snapshot.json").is_file, process, log, "Ray Train's list")
            assert not (tmp_path / "killed" / "bridge").exists()
            if life == "first":
                process.kill()
                process.wait(30)
            else:
                for actor in ("ray::TrainController", "ray::RayTrainWorker"):
                    wait_until(lambda actor=actor: process_of(actor), process, log, actor).kill()
                    before = latest(checkpoints)
                    if actor == "ray::TrainController":
                        wait_until(lambda before=before: latest(checkpoints) > before, process, log, "one more")
                assert process.wait(300) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(30)

    assert largest_difference(weights(tmp_path / "killed" / "bridge"), plain.bridge.projector.state_dict()) == 0
    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((tmp_path / "killed" / "run.json").read_text())["mlflow"]["bridge"]
    assert store.get_run(run_id).info.status == "FINISHED"
    points = {point.step: point.value for point in store.get_metric_history(run_id, "eval/psnr")}
    assert points.keys() == set(range(3, STEPS + 1, 3))
    assert points[STEPS] == pytest.approx(plain.validation()[0]["eval/psnr"])
