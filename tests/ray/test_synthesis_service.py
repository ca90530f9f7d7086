"""Sets of pairs on Ray: the service's rows are the local teacher's, whatever the order of completion, the actors lost
or the driver killed on the way; rows that fail are recorded; real images need no service."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from pair_sets import load_pairs
from PIL import Image
from safetensors.torch import load_file, save_file

from raydistill.config.networks import TeacherServiceConfig
from raydistill.config.stages import SynthesisConfig
from raydistill.data import ray_data, synthesis_stream
from raydistill.data.images import open_images
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.pairs import existing_shards, shard_file
from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.data.synthesis_stream import synthesise_on_ray
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError, StageFailed
from raydistill.spaces import load_space
from raydistill.teachers import placement, service
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import NonFiniteScores, TeacherError

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[2]
TEACHERS = TeacherServiceConfig(shards=2, slice=2, cpus_per_rank=0.1, start_timeout_s=400)
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square")]
COUNT, SHARDS = 22, 6
NUMBERS = {"batch_size": 2, "shard_size": 4, "seed": 5, "steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> PromptSet:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return read_prompts(file)


@pytest.fixture(scope="module")
def client(ray_cluster, flux_folder):
    service.start(str(flux_folder), TEACHERS, "teacher-pairs")
    yield TeacherClient("teacher-pairs", TEACHERS)
    service.stop("teacher-pairs")


def recipe(spaces, prompts, count=COUNT, **changes) -> Recipe:
    return Recipe(teacher=spaces[0], student=spaces[1], source=prompts, count=count, **NUMBERS | changes)


@pytest.fixture(scope="module")
def whole(client, spaces, prompts, tmp_path_factory):
    """Folder of an uninterrupted set, one request at a time."""
    folder = tmp_path_factory.mktemp("whole")
    arrived = []
    made = synthesise_on_ray(
        recipe(spaces, prompts),
        folder,
        SynthesisConfig(in_flight=1),
        client,
        lambda writer, _: arrived.append(writer.done),
    )
    assert made == COUNT
    assert arrived[-1] == COUNT
    assert len(arrived) >= COUNT // 2
    return folder


def shards(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob("pairs-*.parquet")}


@pytest.mark.full
def test_rows_are_those_of_the_local_teacher(whole, spaces, prompts, tmp_path):
    local = LocalTeacher(spaces[0], spaces[0].load_network())
    synthesise(recipe(spaces, prompts, 6), tmp_path, local)
    here, there = load_pairs(tmp_path), load_pairs(whole)
    assert here.prompts == there.prompts[:6]
    torch.testing.assert_close(there.z_teacher[:6].float(), here.z_teacher.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there.z_student[:6].float(), here.z_student.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_rows_arrive_with_their_request_where_a_block_has_many(whole, client, spaces, prompts, tmp_path, monkeypatch):
    """As in sets of millions: what is made is written and shown, rather than held back until a block is full."""
    monkeypatch.setattr(ray_data, "MAX_BLOCKS", 2)
    arrived = []
    synthesise_on_ray(
        recipe(spaces, prompts),
        tmp_path,
        SynthesisConfig(in_flight=1),
        client,
        lambda writer, _: arrived.append(writer.done),
    )
    assert len(arrived) >= COUNT // 2
    assert arrived[-1] == COUNT
    assert shards(tmp_path) == shards(whole)


@pytest.mark.full
def test_order_of_completion_and_a_killed_actor_change_no_byte(whole, client, spaces, prompts, tmp_path, monkeypatch):
    """Shuffled requests, two actors a stage, four requests at once, and one VAE actor killed in mid-set."""
    in_order = synthesis_stream._dataset

    def shuffled(requests):
        random.Random(1).shuffle(requests)
        return in_order(requests)

    monkeypatch.setattr(synthesis_stream, "_dataset", shuffled)
    finished, killed = [], []

    def watch(writer, written):
        finished.extend(written)
        if not killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "MapWorker" in (title := " ".join(process.cmdline())) and "Encoder" in title:
                        killed.append(process)
            killed[0].kill()

    synthesise_on_ray(recipe(spaces, prompts), tmp_path, SynthesisConfig(encoders=2, in_flight=2), client, watch)
    assert killed
    assert [file.name for file in finished] != sorted(file.name for file in finished)
    assert shards(tmp_path) == shards(whole)


@pytest.mark.full
def test_a_killed_task_that_reads_images_changes_no_byte(ray_cluster, spaces, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    pixels = random.Random(2)
    for number in range(6):
        Image.frombytes("RGB", (64, 64), pixels.randbytes(64 * 64 * 3)).save(tmp_path / "images" / f"{number}.png")
    told = recipe(spaces, open_images(tmp_path / "images"), count=6)
    synthesise_on_ray(told, tmp_path / "quiet", SynthesisConfig())
    read, killed = synthesis_stream._read_images, []

    def long_read(requests, stored):
        time.sleep(1)
        return read(requests, stored)

    def kill_one():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if not killed and "MapBatches(long_read)" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.05)

    monkeypatch.setattr(synthesis_stream, "_read_images", long_read)
    killer = threading.Thread(target=kill_one)
    killer.start()
    synthesise_on_ray(told, tmp_path / "struck", SynthesisConfig())
    killer.join()
    assert killed
    assert shards(tmp_path / "struck") == shards(tmp_path / "quiet") != {}


@pytest.mark.full
def test_samples_that_are_not_finite_can_be_told_from_the_others(client, spaces):
    """What the row-level record rests on: one bad row of a request leaves the other rows' answers as they are."""
    noise = torch.randn(3, *spaces[0].latent_shape, generator=torch.Generator().manual_seed(0))
    widths = {"prompt_embeds": (20, 64), "pooled_prompt_embeds": (64,)}
    conditioning = {name: torch.ones(3, *shape) for name, shape in widths.items()}
    good = client.generate(noise, conditioning, None, 2, 1.0).result()
    noise[1] = 3e38
    pending = client.generate(noise, conditioning, None, 2, 1.0)
    latents = pending.result(check_finite=False)
    assert torch.isfinite(latents).flatten(1).all(1).tolist() == [True, False, True]
    assert torch.equal(latents[[0, 2]], good[[0, 2]])
    with pytest.raises(NonFiniteScores, match="1 of 3 samples: sample 1"):
        pending.result()


@pytest.mark.full
def test_a_failing_row_is_recorded(whole, client, spaces, prompts, flux_folder, tmp_path):
    """The text encoder of this copy does not survive the word "green"; the service's network is the same."""
    from transformers import CLIPTokenizer

    shutil.copytree(flux_folder, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    (token,) = CLIPTokenizer.from_pretrained(flux_folder / "tokenizer")("green", add_special_tokens=False).input_ids
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    weights[name][token] = float("nan")
    save_file(weights, file, {"format": "pt"})
    told = recipe((load_space(tmp_path / "model"), spaces[1]), prompts)
    complete = load_pairs(whole)
    green = [row for row in range(COUNT) if "green" in complete.prompts[row]]
    synthesise_on_ray(told, tmp_path / "set", SynthesisConfig(max_failed_rows=len(green)), client)
    failures = [json.loads(line) for line in (tmp_path / "set" / "failures.jsonl").read_text().splitlines()]
    assert [failure["row"] for failure in failures] == green
    assert {failure["reason"] for failure in failures} == {"the text encoders' output is not finite"}
    pairs, left = load_pairs(tmp_path / "set"), [row for row in range(COUNT) if row not in green]
    assert torch.equal(pairs.z_teacher, complete.z_teacher[left])
    assert pairs.prompts == [complete.prompts[row] for row in left]


@pytest.mark.full
def test_real_images_become_pairs_without_a_service(ray_cluster, spaces, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(9):
        pixels = uniform(index, [0], "picture", shape=(50 + index, 70, 3))[0]
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / f"{index}.png")
        if index % 2:
            (folder / f"{index}.txt").write_text(f"caption {index}")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:900])
    images = open_images(folder)
    told = recipe(spaces, images, count=9, posterior="sample")
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    assert synthesise_on_ray(told, tmp_path / "set", SynthesisConfig(max_failed_rows=1, node_labels=here)) == 9
    pairs = load_pairs(tmp_path / "set")
    assert pairs.prompts == ["", "caption 1", "", "caption 3", "", "", "caption 7", ""]
    (failure,) = map(json.loads, (tmp_path / "set" / "failures.jsonl").read_text().splitlines())
    assert failure["row"] == 5
    assert failure["reason"].startswith("5.png: OSError: image file is truncated")
    synthesise(dataclasses.replace(told, batch_size=3), tmp_path / "here", max_failed_rows=1)
    assert shards(tmp_path / "set") == shards(tmp_path / "here")


@pytest.mark.full
def test_a_teacher_that_stays_away_ends_the_set(ray_cluster, spaces, prompts, tmp_path):
    away = TeacherClient("no-such-service", TEACHERS.model_copy(update={"retry_for_s": 0.5}))
    with pytest.raises(TeacherError, match="there is no teacher service no-such-service on this cluster"):
        synthesise_on_ray(recipe(spaces, prompts, count=1), tmp_path, SynthesisConfig(), away)


@pytest.mark.full
def test_an_incomplete_model_folder_is_named(ray_cluster, spaces, flux_folder, tmp_path):
    shutil.copytree(flux_folder, tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    told = recipe((load_space(tmp_path / "model"), spaces[1]), open_images(tmp_path / "images"), count=1)
    with pytest.raises(InputError, match="model/vae: no diffusion_pytorch_model.safetensors"):
        synthesise_on_ray(told, tmp_path / "set", SynthesisConfig())


def test_actors_that_cannot_be_placed_are_named(ray_cluster, spaces, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "ROOM_PATIENCE_S", 0.0)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    told = recipe(spaces, open_images(tmp_path), count=1)
    with pytest.raises(
        StageFailed, match=r"asked for 3 of 0.2 CPU \+ 1 GPU each, room for 0; free on .* CPU and 0 GPU"
    ):
        synthesise_on_ray(told, tmp_path / "set", SynthesisConfig(encoders=3, gpus_per_encoder=1))
    with pytest.raises(StageFailed, match=r"on the 0 node\(s\) labelled role=none: nothing.*change the labels"):
        synthesise_on_ray(told, tmp_path / "set", SynthesisConfig(node_labels={"role": "none"}))


# -- the job ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(ray_cluster, flux_folder, sd_folder, prompts, tmp_path_factory):
    """(command line and environment of jobs/synthesize.py on this cluster, its storage)."""
    storage = tmp_path_factory.mktemp("storage")
    overrides = {
        "storage": storage,
        "run.name": "killed",
        "run.seed": NUMBERS["seed"],
        "student.model": sd_folder,
        "student.unet": "null",
        "teacher.model": flux_folder,
        "teacher.guidance_scale": NUMBERS["guidance_scale"],
        "teacher.sampling_steps": NUMBERS["steps"],
        "teachers.slice": TEACHERS.slice,
        "teachers.cpus_per_rank": TEACHERS.cpus_per_rank,
        "synthesis.count": COUNT,
        "synthesis.batch_size": NUMBERS["batch_size"],
        "synthesis.shard_size": NUMBERS["shard_size"],
        "prompts.path": prompts.report.source,
    }
    line = [sys.executable, str(ROOT / "jobs" / "synthesize.py"), *(f"{k}={v}" for k, v in overrides.items())]
    address = ray.get_runtime_context().gcs_address
    return {"args": line, "cwd": ROOT, "env": os.environ | {"RAY_ADDRESS": address}}, storage


def finish(job, log: Path) -> str:
    """Run the job to its end; what it printed."""
    with log.open("w") as stream:
        process = subprocess.Popen(**job, stdout=stream, stderr=stream)
        try:
            code = process.wait(400)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"no end after 400 s:\n{log.read_text()}")
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_driver_killed_in_mid_set_goes_on_to_the_same_bytes(whole, command, tmp_path):
    """kill -9, then the same command: identical shards, the same MLflow run, and a third start has nothing to do."""
    job, storage = command
    folder = storage / "killed" / "pairs"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(**job, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not existing_shards(folder):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    before = shards(folder)
    assert 0 < len(before) < SHARDS
    assert not (folder / "summary.json").exists()
    run_id = json.loads((storage / "killed" / "run.json").read_text())["mlflow"]["synthesis"]
    written = {name: (folder / name).stat().st_mtime_ns for name in before}

    finish(job, tmp_path / "resumed")
    assert shards(folder) == shards(whole)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == written
    rows = [row for index in range(SHARDS) for row in pq.read_table(shard_file(folder, index))["row"].to_pylist()]
    assert rows == list(range(COUNT))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rows"], summary["failed_rows"]) == (COUNT, 0)

    import mlflow

    store = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == summary["mlflow_run_id"]
    assert {"throughput/pictures_per_s", "synthesis/failed_rows"} <= run.data.metrics.keys()
    steps = [metric.step for metric in store.get_metric_history(run_id, "synthesis/failed_rows")]
    assert steps == sorted(set(steps))
    assert steps[-1] == COUNT
    assert any("pictures" in file.path for file in store.list_artifacts(run_id, "images"))

    assert "run killed is finished" in finish(job, tmp_path / "again")
