"""jobs/distill.py as a user starts it: a two-step configuration of the embedded world."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from jobs_started import SMALL, TEST_S, exported, history, job_of, mlflow_runs, modes, same_weights, started
from safetensors.torch import load_file, save_file

from raydistill.driver.run_lock import RunLocked, lock_run

pytestmark = pytest.mark.timeout(TEST_S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, overlap on."""
    storage = tmp_path_factory.mktemp("storage")
    code, text = job_of(storage, "run.name=whole")
    assert code == 0, text
    return storage, text


def test_a_run_leaves_summary_pictures_export_and_an_mlflow_run(finished):
    storage, text = finished
    folder = storage / "whole"
    summary = json.loads((folder / "summary.json").read_text())
    for who in ("student_before", "student_after", "teacher"):
        assert {"mean", "size", "color", "shape", "position", "background"} <= summary[who].keys()
        assert all(0 <= value <= 1 for value in summary[who].values())
    assert summary["steps"] == 2
    assert {"distill", "teacher evaluation"} <= summary["stages"].keys()
    assert (folder / "grids" / "before_after.png").stat().st_size > 1000
    assert (folder / "config.yaml").is_file()
    assert "mlflow ui --backend-store-uri" in text
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["student.lr"]
    assert client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'") == []
    logged = run.data.metrics  # of the distillation too: the run that one opens has the curves
    assert {
        "0-overview/loss",
        "0-overview/score",
        "loss/vsd",
        "loss/fake",
        "loss/gan",
        "student/latent_std",
        "fake/lag",
        "data/real_epoch",
        "eval/mean",
        "time/wait_teacher",
    } <= logged.keys()
    assert 0 < logged["teachers/latency_p50"] <= logged["teachers/latency_p95"]
    assert 0 < logged["teachers/busy_fraction"] <= 1
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/vsd")] == [1, 2]


def test_mlflow_shows_what_people_compare(finished):
    import mlflow

    storage, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(json.loads((storage / "whole" / "summary.json").read_text())["mlflow_run_id"])
    assert len(run.data.params) < 30
    assert run.data.params["distill.steps"] == "2"
    tags = run.data.tags
    assert (tags["teacher"], tags["recipe"], tags["steps"]) == ("shapes:flux", "shapes", "2")
    note = tags["mlflow.note.content"]
    assert f"get-artifact?path=before_after.png&run_uuid={run.info.run_id}" in note
    assert "| student after |" in note
    assert "distill.steps=2" in note
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"before_after.png", "config.yaml", "pictures"} <= files
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {"pictures/samples.png", "pictures/periodic.png", "pictures/scores.png"}
    inputs = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert inputs["training"].digest != inputs["evaluation"].digest
    assert json.loads(inputs["training"].profile)["num_rows"] > json.loads(inputs["evaluation"].profile)["num_rows"] > 0


def test_a_log_has_not_one_line_that_is_not_ours(finished):
    """Lines carry the time; only the table does not."""
    _, text = finished
    lines = text.splitlines()
    table = [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)]
    heads = ("whole: held-out prompts", "mean", "student before", "student after", "teacher")
    assert [line.split("  ")[0].strip() or line.split()[0] for line in table] == list(heads), text
    said = [line[9:] for line in lines if line not in table]
    assert said[0] == "run whole: shapes:flux → shapes:sd15"
    assert any(line.startswith("distill: done in ") or line.startswith("1/1 distill: done in ") for line in said)
    assert any(re.match(r"1/1 distill: step \d/2, ", line) for line in said), text


def test_others_may_read_all_that_a_run_leaves(finished):
    storage, _ = finished
    umask = os.umask(0)
    os.umask(umask)
    assert modes(storage) == [{0o666 & ~umask}, {0o777 & ~umask}]


def test_a_finished_run_says_so_and_changes_nothing(finished, run_script):
    storage, _ = finished
    before = (storage / "whole" / "summary.json").read_bytes()
    code, output, _ = run_script("distill", f"storage={storage}", *SMALL, "run.name=whole")
    assert code == 0
    assert "is finished" in output
    assert (storage / "whole" / "summary.json").read_bytes() == before


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
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "image = pipe('a small red circle at the left on a white background', num_inference_steps=1,\n"
        "             guidance_scale=0, generator=torch.Generator().manual_seed(0)).images[0]\n"
        "assert image.size == (32, 32)\n"
        "image.save(sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", script, str(storage / "whole" / "export"), str(tmp_path / "image.png")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_job_that_loses_a_rank_and_then_everything_goes_on_under_its_mlflow_run_with_the_same_bits(
    finished, tmp_path, run_script
):
    """First life, the sequential loop: a teacher rank is killed, after the checkpoint everything. Second life: the rest."""
    from raydistill.workers.step_log import read_lines, step_file

    storage, _ = finished
    folder, settings = tmp_path / "killed", ("run.name=killed", "distill.overlap=false")
    with started(tmp_path, tmp_path, *settings) as job:
        job.until((folder / "distill" / "before.json").is_file)
        job.until(lambda: " teacher evaluation\n" in job.text())  # the teachers are ready: the first step comes next
        ranks = {process.pid for process in job.processes("ray::TeacherRank")}
        assert len(ranks) == 2
        with pytest.raises(RunLocked, match=f"process {job.process.pid} "), lock_run(folder):
            pytest.fail("the job lives")
        os.kill(max(ranks), signal.SIGKILL)
        seen = set(ranks)

        def checkpoint_written() -> bool:
            seen.update(process.pid for process in job.processes("ray::TeacherRank"))
            return any((folder / "distill" / "checkpoints").glob("checkpoint_*/state.pt"))

        job.until(checkpoint_written, pause=0.2)
        for process in job.processes():
            process.kill()
        assert job.process.wait() == -signal.SIGKILL
        assert job.left() == []
    assert len(seen - ranks) == 2, "the whole group is replaced, once"
    run_id = json.loads((folder / "run.json").read_text())["mlflow"]["pipeline"]
    refused, _, error = run_script("distill", f"storage={tmp_path}", *SMALL, *settings, "student.lr=0.5")
    assert refused == 2
    assert "student.lr" in error
    code, text = job_of(tmp_path, *settings)
    assert code == 0, text
    assert json.loads((folder / "summary.json").read_text())["mlflow_run_id"] == run_id
    lines = {name: read_lines(step_file(place / "distill", 0)) for name, place in
             (("whole", storage / "whole"), ("killed", folder))}  # fmt: skip
    waits = {name: [line["values"]["time/wait_teacher"] for line in some] for name, some in lines.items()}
    assert waits["killed"][0] > 2 + max(waits["whole"]), waits
    assert same_weights(exported(storage / "whole"), exported(folder))


@pytest.mark.full
def test_a_run_in_a_bucket_goes_on_after_a_kill_with_the_bits_of_one_in_a_folder(
    finished, bucket, tmp_path, monkeypatch
):
    """Prompts, Bridge and teacher samples come from the bucket, and everything is killed after the first checkpoint."""
    from raydistill.shapes import WEIGHTS
    from raydistill.storage.atomic import reading
    from raydistill.storage.place import remote
    from raydistill.workers.step_log import consumed, read_lines, step_file

    monkeypatch.setenv("RAYDISTILL_CACHE", str(tmp_path / "cache"))
    inputs, runs = remote(f"{bucket}/inputs"), remote(f"{bucket}/runs")
    named = {
        "prompts.path": "prompts.txt",
        "bridge.checkpoint": "bridge/sd15-flux",
        "discriminator.real_data": "samples/flux",
    }
    for name in named.values():
        (inputs / name).upload(WEIGHTS / name)
    settings = (
        "run.name=far", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        *(f"{key}={inputs}/{name}" for key, name in named.items()),
    )  # fmt: skip
    stage = runs / "far" / "distill"
    with started(tmp_path, runs, *settings) as job:
        job.until(lambda: any(name.endswith("state.pt") for name, *_ in (stage / "checkpoints").entries()), pause=0.2)
        for process in job.processes():
            process.kill()
        assert job.process.wait() == -signal.SIGKILL
        assert job.left() == []
    done = [line["step"] for line in read_lines(step_file(stage, 0))]
    assert done[:1] == [1], "what a checkpoint counts as done is in the log"
    with started(tmp_path, runs, *settings) as job:
        code, _ = job.wait()
        assert code == 0, job.text()
        assert job.left() == []
    assert consumed(read_lines(step_file(stage, 0))).tolist() == list(range(2 * 2 * 4))  # steps, batches, samples
    with reading(runs / "far" / "export") as export:
        assert same_weights(exported(finished[0] / "whole"), exported(export.parent))
    whole = json.loads((finished[0] / "whole" / "summary.json").read_text())
    far = json.loads((runs / "far" / "summary.json").read_text())
    tables = ("student_before", "student_after", "teacher", "steps", "best_step")
    assert {name: far[name] for name in tables} == {name: whole[name] for name in tables}
    assert not (stage / "export").exists()


@pytest.fixture
def mlflow_server(tmp_path):
    """A tracking server that the test may kill and start again."""
    from raydistill.benchmark.world import MlflowServer

    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.full
def test_faults_of_every_part_and_ctrl_c_change_no_number(finished, tmp_path, mlflow_server):
    """First life: a text encoder is killed, the disk is full, a Serve replica is killed, Ctrl-C. Second: the train worker is
    killed, and MLflow is away for a while. Each kill is a SIGKILL of a real process."""
    from raydistill.tracking.store import client_of
    from raydistill.workers.step_log import consumed, read_lines, step_file

    folder = tmp_path / "struck" / "distill"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / ".new.state.pt").symlink_to("/dev/full")  # the first state of the best student finds no room
    with started(tmp_path, tmp_path, "run.name=struck", f"tracking.uri={mlflow_server.uri}") as job:
        job.until(lambda: job.processes("ray::MapWorker"), pause=0.1)
        job.processes("ray::MapWorker")[0].kill()
        job.until(lambda: "a worker failed: OSError: " in job.text(), pause=0.1)
        job.until((folder / "best" / "state.pt").is_file)  # by its successor
        job.until(lambda: " teacher evaluation\n" in job.text())  # the first step comes next
        (replica,) = job.processes("ray::ServeReplica")
        ranks = {process.pid for process in job.processes("ray::TeacherRank")}
        replica.kill()
        job.until(lambda: {process.pid for process in job.processes("ray::TeacherRank")} - ranks, pause=0.2)
        job.process.send_signal(signal.SIGINT)  # Ctrl-C; the elastic run leaves by SIGTERM
        code, _ = job.wait()
        assert code == 75, job.text()
        assert "asked to leave by SIGINT; a checkpoint was written" in job.text()
        assert "can be continued with run.name=struck" in job.text()
        assert "is the disk full?" in job.text()
        assert job.left() == []
    steps = [line["step"] for line in read_lines(step_file(folder, 0))]
    assert steps[-1] == 1, "by a successor of the worker that found the disk full before its first step"
    client = client_of(mlflow_server.uri)
    ids = json.loads((tmp_path / "struck" / "run.json").read_text())["mlflow"]
    assert client.get_run(ids["pipeline"]).info.status == "KILLED"

    with started(tmp_path, tmp_path, "run.name=struck", f"tracking.uri={mlflow_server.uri}") as job:
        job.until(lambda: job.processes("ray::MapWorker"), pause=0.1)
        mlflow_server.kill()
        (worker,) = job.processes("ray::RayTrainWorker")
        worker.kill()
        job.until(lambda: job.processes("ray::RayTrainWorker") and not worker.is_running(), pause=0.1)
        mlflow_server.start()
        code, _ = job.wait()
        assert code == 0, job.text()
        assert job.left() == []
    assert same_weights(exported(finished[0] / "whole"), exported(tmp_path / "struck"))
    assert consumed(read_lines(step_file(folder, 0))).tolist() == list(range(2 * 2 * 4))  # steps, batches, samples
    values = {entry.step: entry.value for entry in client.get_metric_history(ids["pipeline"], "loss/vsd")}
    assert values == history(finished[0], mlflow_runs(finished[0], "whole")[1]["distill"], "loss/vsd")


@pytest.fixture(scope="module")
def broken_teacher(tmp_path_factory):
    """The shipped teacher with one tensor of NaN."""
    from raydistill.shapes import WEIGHTS

    folder = tmp_path_factory.mktemp("teacher") / "flux"
    shutil.copytree(WEIGHTS / "flux", folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.weight"].fill_(float("nan"))
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.full
def test_a_teacher_of_nan_is_named_by_the_worker_and_not_tried_again(finished, broken_teacher, tmp_path):
    storage, _ = finished
    (tmp_path / "nan").mkdir()
    for name in ("teacher.json", "teacher.safetensors"):  # its evaluation is done, so it is found out by a worker
        shutil.copy(storage / "whole" / name, tmp_path / "nan" / name)
    with started(
        tmp_path,
        tmp_path,
        "run.name=nan",
        f"teacher.model={broken_teacher}",
        "distill.max_failures=3",
        "teachers.shards=1",
    ) as job:
        code, seen = job.wait(watch=["ray::RayTrainWorker"])
        assert code == 1, job.text()
        assert job.left() == []
        (message,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert "NonFiniteError: the fake score, which starts as the teacher's copy: not finite" in message
    assert 1 <= len(seen["ray::RayTrainWorker"]) <= 2  # the second only reads why the first one ended
    parent, children = mlflow_runs(tmp_path, "nan")
    assert parent.info.status == "FAILED"
    assert {stage: run.info.status for stage, run in children.items()} == {"distill": "FAILED"}
    assert not (tmp_path / "nan" / "summary.json").exists()


def test_wrong_input_is_named_before_anything_starts(tmp_path):
    """As the command line sees it; every kind of mistake is in tests/unit/test_job.py."""
    with started(tmp_path, tmp_path / "storage", "prompts.path=no/such.txt") as job:
        code, _ = job.wait()
        assert code == 2, job.text()
        assert "prompts.path: no/such.txt does not exist" in job.text()
        assert "Traceback" not in job.text()
        assert not (tmp_path / "storage").exists()
        assert not list(Path(tempfile.gettempdir(), "ray").glob(f"session_*_{job.process.pid}"))  # Ray never started
        assert job.left() == []
