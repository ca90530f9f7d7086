"""jobs/distill.py as a user starts it: a two-step configuration of the embedded world."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "distill.steps=2",
    "distill.batch_size=4",
    "distill.checkpoint_every=1",
    "distill.evaluate_every=1",
    "fake_score.updates=1",
    "evaluation.count=8",
    "evaluation.periodic_count=8",
    "evaluation.grid=8",
    "teacher.sampling_steps=2",
    "controls=[]",
]


def command(storage, *overrides):
    return [sys.executable, str(ROOT / "jobs" / "distill.py"), f"storage={storage}", *SMALL, *overrides]


def job(storage, *overrides, timeout=400):
    return subprocess.run(command(storage, *overrides), capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def exported(folder):
    return load_file(next((folder / "export" / "unet").glob("*.safetensors")))


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, overlap on."""
    storage = tmp_path_factory.mktemp("storage")
    result = job(storage, "run.name=whole")
    assert result.returncode == 0, result.stdout + result.stderr
    return storage, result


def test_a_run_leaves_summary_pictures_export_and_an_mlflow_run(finished):
    storage, result = finished
    folder = storage / "whole"
    summary = json.loads((folder / "summary.json").read_text())
    for who in ("student_before", "student_after", "teacher"):
        assert {"mean", "size", "color", "shape", "position", "background"} <= summary[who].keys()
        assert all(0 <= value <= 1 for value in summary[who].values())
    assert summary["steps"] == 2
    assert {"distill", "teacher evaluation"} <= summary["stages"].keys()
    assert (folder / "grids" / "before_after.png").stat().st_size > 1000
    assert (folder / "config.yaml").is_file()
    assert "mlflow ui --backend-store-uri" in result.stdout
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["student.lr"]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    (child,) = children
    assert {"loss/vsd", "loss/fake", "loss/gan", "eval/mean", "time/wait_teacher"} <= child.data.metrics.keys()
    assert [m.step for m in client.get_metric_history(child.info.run_id, "loss/vsd")] == [1, 2]


def test_a_finished_run_says_so_and_changes_nothing(finished):
    storage, _ = finished
    before = (storage / "whole" / "summary.json").read_bytes()
    result = job(storage, "run.name=whole", timeout=60)
    assert result.returncode == 0
    assert "is finished" in result.stdout
    assert (storage / "whole" / "summary.json").read_bytes() == before


def test_the_sequential_loop_exports_the_same_bits(finished, tmp_path):
    storage, _ = finished
    result = job(tmp_path, "run.name=sequential", "distill.overlap=false")
    assert result.returncode == 0, result.stdout + result.stderr
    assert same_weights(exported(storage / "whole"), exported(tmp_path / "sequential"))


def test_the_export_draws_in_a_process_without_raydistill(finished, tmp_path):
    storage, _ = finished
    script = (
        "import importlib.abc, sys\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'raydistill': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)\n"
        "image = pipe('a small red circle at the left on a white background', num_inference_steps=1,\n"
        "             guidance_scale=0, generator=torch.Generator().manual_seed(0)).images[0]\n"
        "assert image.size == (32, 32)\n"
        "image.save(sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", script, str(storage / "whole" / "export"), str(tmp_path / "image.png")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def ray_processes():
    return {
        p.pid for p in psutil.process_iter(["cmdline"]) if any("raylet" in part for part in p.info["cmdline"] or [])
    }


def test_a_killed_job_goes_on_under_the_same_mlflow_run_with_the_same_numbers(finished, tmp_path):
    storage, _ = finished
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command(tmp_path, "run.name=killed"), stdout=log, stderr=log, cwd=ROOT, start_new_session=True
    )
    checkpoints = tmp_path / "killed" / "distill" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint_*/state.pt")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=20)
    run_id = json.loads((tmp_path / "killed" / "run.json").read_text())["mlflow"]["pipeline"]
    refused = job(tmp_path, "run.name=killed", "student.lr=0.5", timeout=60)
    assert refused.returncode == 2
    assert "student.lr" in refused.stderr
    result = job(tmp_path, "run.name=killed")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["mlflow_run_id"] == run_id
    assert same_weights(exported(storage / "whole"), exported(tmp_path / "killed"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.path=no/such.txt"], "prompts.path: no/such.txt does not exist"),
        (["prompts.path={empty}"], "empty"),
        (["prompts.path={blank}", "prompts.on_bad_row=fail"], "2"),
        (["student.model=shapes:flux"], "is a FluxPipeline, but a StableDiffusionPipeline is needed"),
        (["bridge.checkpoint={other}"], "another teacher VAE"),
        (["prompts.path=shapes:heldout.txt"], "held-out prompts must occur in no training set"),
        (["teachers.shard=3"], "did you mean teachers.shards"),
        (["run.name=../escape"], "run.name"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(overrides, message, tmp_path):
    from raydistill.shapes import WEIGHTS

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("a small red circle at the left on a white background\n\n")
    other = tmp_path / "other"
    other.mkdir()
    description = json.loads((WEIGHTS / "bridge" / "sd15-flux" / "bridge.json").read_text())
    description["teacher"]["vae_sha256"] = "0" * 64
    (other / "bridge.json").write_text(json.dumps(description))
    names = {"empty": tmp_path / "empty.txt", "blank": tmp_path / "blank.txt", "other": other}
    before = ray_processes()
    result = job(tmp_path / "storage", *[o.format(**names) for o in overrides], timeout=60)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "storage").exists()
    assert ray_processes() <= before
