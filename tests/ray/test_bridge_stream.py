"""A Bridge that is trained on a stream of pictures: what Ray does is what plain torch does, whatever is killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from safetensors.torch import load_file

from raydistill.bridge.trainer import VALIDATION_PAIRS, build_trainer
from raydistill.config.reading import load
from raydistill.data.pair_stream import Encoding, StreamedPairs, decode, encode, read
from raydistill.data.picture_order import PictureOrder, Position
from raydistill.data.pictures import open_pictures
from raydistill.errors import StageFailed
from raydistill.spaces import load_space
from raydistill.workers.bridge import train_bridge

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]
SHARDS, ROWS, BAD = 4, 8, 11


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A WebDataset, one of whose pictures is none."""
    folder, random = tmp_path_factory.mktemp("tars"), np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(ROWS):
                number, data = shard * ROWS + row, io.BytesIO()
                Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data, "png")
                picture = b"none" if number == BAD else data.getvalue()
                for suffix, content in (("png", picture), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def settings(sd_folder, flux_folder, tars):
    return [
        f"student.model={sd_folder}", "student.unet=null", f"teacher.model={flux_folder}", "bridge.checkpoint=null",
        "bridge.source=stream", f"synthesis.images={tars}", "bridge.shuffle=6", "bridge.batch_size=4", "bridge.embed_dim=16",
        "bridge.depths=[2]", "bridge.lr_decay=none", "bridge.validation_share=0.2", "distill.cpus_per_worker=0.5",
        "distill.max_failures=1", "synthesis.cpus_per_encoder=0.1", "synthesis.batch_size=5",
    ]  # fmt: skip


def in_plain_torch(config, steps):
    """The same training in this process: (state of the projector, validation)."""
    teacher, student = load_space(config.teacher.model), load_space(config.student.model)
    pictures = open_pictures(config.synthesis.images)
    share, window = config.bridge.validation_share, config.bridge.shuffle
    order = PictureOrder(pictures=pictures, seed=config.run.seed, held_out=share, window=window)
    encoder = Encoding(teacher=teacher, student=student, seed=0, posterior="mean", dtype="float16").encoder("cpu")
    chunks = (
        encode(decode(chunk, teacher.resolution), encoder) for chunk in read(order, Position(), VALIDATION_PAIRS, 16)
    )
    pairs = StreamedPairs(chunks, seed=0, max_failed_rows=20)
    trainer = build_trainer(config, None)
    trainer.objective.kept = pairs.held_out()
    for step in range(steps):
        trainer.step(pairs.next(np.arange(4 * step, 4 * step + 4)))
    return trainer.bridge.projector.state_dict(), trainer.validation()[0]


def largest_difference(folder, state):
    saved = load_file(folder / "projector.safetensors")
    return max(float((saved[name] - value).abs().max()) for name, value in state.items())


def latest(folder):
    return max(folder.glob("checkpoint_2*"), default=Path())


STEPS = 24  # three epochs and a little


def test_a_killed_job_gives_the_bridge_of_plain_torch(ray_cluster, settings, tmp_path):
    """kill -9 of the driver between two checkpoints, then the same command: the same weights, and nothing is stored."""
    overrides = [
        *settings, f"storage={tmp_path}", "run.name=streamed", f"bridge.steps={STEPS}", "bridge.checkpoint_every=2",
        "evaluation.judge=null", "synthesis.licence=CC0",
    ]  # fmt: skip
    checkpoints, log = tmp_path / "streamed" / "bridge-checkpoints", tmp_path / "log"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for life in ("first", "second"):
        with log.open("w") as stream:
            command = [sys.executable, str(ROOT / "jobs" / "train_bridge.py"), *overrides]
            process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment)
        try:
            deadline = time.monotonic() + 300
            while life == "first" and latest(checkpoints) == Path():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            if life == "first":
                process.kill()
                process.wait(30)
                assert not (tmp_path / "streamed" / "bridge").exists()
            else:
                assert process.wait(300) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(30)
    weights, validation = in_plain_torch(load(overrides=overrides), STEPS)
    assert largest_difference(tmp_path / "streamed" / "bridge", weights) == 0
    assert not (tmp_path / "streamed" / "pairs").exists()
    told = json.loads((tmp_path / "streamed" / "bridge" / "bridge.json").read_text())["pictures"]
    assert [one["licence"] for one in told] == ["CC0"]
    assert "resumes at update" in log.read_text()

    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((tmp_path / "streamed" / "run.json").read_text())["mlflow"]["bridge"]
    points = {point.step: point.value for point in store.get_metric_history(run_id, "eval/psnr")}
    assert points[STEPS] == pytest.approx(validation["eval/psnr"])
    failed = [point.value for point in store.get_metric_history(run_id, "data/failed_pictures")]
    assert failed
    assert max(failed) == 1


def test_two_workers_go_on_each_at_its_own_place(ray_cluster, settings, tars, tmp_path):
    two = [*settings, "distill.workers=2", "bridge.attention.weight=0", "bridge.checkpoint_every=100"]
    pictures = open_pictures(str(tars))
    for name, lives in (("whole", (6,)), ("interrupted", (2, 6))):
        for steps in lives:
            config = load(overrides=[*two, f"bridge.steps={steps}"])
            done = train_bridge(config, tmp_path / name, pictures=pictures, held_out=("picture 3",))
            assert done.metrics["step"] == steps
    assert (
        largest_difference(
            tmp_path / "whole" / "bridge", load_file(tmp_path / "interrupted/bridge/projector.safetensors")
        )
        == 0
    )


def test_too_many_bad_pictures_end_the_stage_with_the_last_one_named(ray_cluster, settings, tars, tmp_path):
    config = load(overrides=[*settings, "synthesis.max_failed_rows=0", "bridge.attention.weight=0", "bridge.steps=20"])
    with pytest.raises(StageFailed, match=rf"more than synthesis\.max_failed_rows=0; the last one: 1\.tar, {BAD}"):
        train_bridge(config, tmp_path, pictures=open_pictures(str(tars)))
