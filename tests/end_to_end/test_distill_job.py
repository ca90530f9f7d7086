"""jobs/distill.py as a user starts it: a two-step configuration of the embedded world."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from raydistill.lease import RunTaken, held

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


def job_of(storage, *overrides, timeout=400):
    return subprocess.run(command(storage, *overrides), capture_output=True, text=True, timeout=timeout, cwd=ROOT)


class Job:
    """A job of its own, whose processes can be told from all others: they inherit a mark, and Ray's session has its pid."""

    MARK = "RAYDISTILL_TEST_JOB"

    def __init__(self, folder, storage, *overrides):
        self.mark, self.log = uuid.uuid4().hex, folder / "job.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(storage, *overrides), stdout=log, stderr=log, cwd=ROOT, env=os.environ | {self.MARK: self.mark}
            )
        self.started = time.monotonic()

    def processes(self, title=""):
        """Every live process of this job, whoever its parent is by now; or only those that Ray calls `title`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if title not in line or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if title and title in " ".join(process.parent().cmdline()):
                    continue  # forked from it, and not yet something else
                session = "session_" in line and f"_{self.process.pid}/" in line
                if session or process.environ().get(self.MARK) == self.mark:
                    found.append(process)
        return found

    def text(self):
        return self.log.read_text()

    def until(self, reached, timeout=300, pause=0.02):
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(pause)

    def wait(self, timeout=400, watch=()):
        """(exit code, {title: pids seen}) of the job, which is looked at twice a second."""
        seen, deadline = {title: set() for title in watch}, time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            for title, pids in seen.items():
                pids |= {process.pid for process in self.processes(title)}
            time.sleep(0.5)
        return self.process.returncode, seen

    def left(self, patience=20):
        """What is still alive although the job has ended; nothing is killed here."""
        deadline = time.monotonic() + patience
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [(process.pid, process.name()) for process in processes]


@contextlib.contextmanager
def started(folder, storage, *overrides):
    job = Job(folder, storage, *overrides)
    try:
        yield job
    finally:  # of a test that failed; after a good one there is nothing to kill
        for process in job.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        job.process.kill()
        job.process.wait()


def mlflow_runs(storage, name):
    """(parent, {stage: child}) of a run in the store of `storage`."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    ids = json.loads((storage / name / "run.json").read_text())["mlflow"]
    parent = client.get_run(ids["pipeline"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, {child.data.tags["stage"]: child for child in children}


def history(storage, run, key):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, key)}


def exported(folder):
    return load_file(next((folder / "export" / "unet").glob("*.safetensors")))


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, overlap on."""
    storage = tmp_path_factory.mktemp("storage")
    result = job_of(storage, "run.name=whole")
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
    logged = child.data.metrics
    assert {"loss/vsd", "loss/fake", "loss/gan", "eval/mean", "time/wait_teacher"} <= logged.keys()
    assert 0 < logged["teachers/latency_p50"] <= logged["teachers/latency_p95"]
    assert 0 < logged["teachers/busy_fraction"] <= 1
    assert [m.step for m in client.get_metric_history(child.info.run_id, "loss/vsd")] == [1, 2]


def test_a_finished_run_says_so_and_changes_nothing(finished):
    storage, _ = finished
    before = (storage / "whole" / "summary.json").read_bytes()
    result = job_of(storage, "run.name=whole", timeout=60)
    assert result.returncode == 0
    assert "is finished" in result.stdout
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
    finished, tmp_path
):
    """First life, the sequential loop: a teacher rank is killed, after the checkpoint everything. Second life: the rest."""
    from raydistill.distill.record import read_lines, step_file

    storage, _ = finished
    folder, settings = tmp_path / "killed", ("run.name=killed", "distill.overlap=false")
    with started(tmp_path, tmp_path, *settings) as job:
        job.until((folder / "distill" / "before.json").is_file)  # the first step comes next
        ranks = {process.pid for process in job.processes("ray::TeacherRank")}
        assert len(ranks) == 2
        with pytest.raises(RunTaken, match=f"process {job.process.pid} "), held(folder):
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
    refused = job_of(tmp_path, *settings, "student.lr=0.5", timeout=60)
    assert refused.returncode == 2
    assert "student.lr" in refused.stderr
    result = job_of(tmp_path, *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((folder / "summary.json").read_text())["mlflow_run_id"] == run_id
    lines = {name: read_lines(step_file(place / "distill", 0)) for name, place in
             (("whole", storage / "whole"), ("killed", folder))}  # fmt: skip
    waits = {name: [line["values"]["time/wait_teacher"] for line in some] for name, some in lines.items()}
    assert waits["killed"][0] > 2 + max(waits["whole"]), waits
    assert same_weights(exported(storage / "whole"), exported(folder))


@pytest.fixture
def mlflow_server(tmp_path):
    """A tracking server that the test may kill and start again."""
    from raydistill.benchmark.world import MlflowServer

    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


def test_faults_of_every_part_and_ctrl_c_change_no_number(finished, tmp_path, mlflow_server):
    """First life: a text encoder and a Serve replica are killed, the disk is full, Ctrl-C. Second: the train worker is
    killed, and MLflow is away for a while. Each kill is a SIGKILL of a real process."""
    from raydistill.distill.record import consumed, read_lines, step_file
    from raydistill.runs import client_of

    folder = tmp_path / "struck" / "distill"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "state.tmp").symlink_to("/dev/full")  # the first state of the best student finds no room
    with started(tmp_path, tmp_path, "run.name=struck", f"tracking.uri={mlflow_server.uri}") as job:
        job.until(lambda: job.processes("ray::MapWorker"), pause=0.1)
        job.processes("ray::MapWorker")[0].kill()
        job.until((folder / "before.json").is_file)  # the first step comes next
        (replica,) = job.processes("ray::ServeReplica")
        replica.kill()
        job.process.send_signal(signal.SIGINT)  # Ctrl-C; the elastic run leaves by SIGTERM
        code, _ = job.wait()
        assert code == 75, job.text()
        assert "asked to leave by SIGINT; a checkpoint was written" in job.text()
        assert "can be continued with run.name=struck" in job.text()
        assert "a worker failed: OSError: " in job.text()
        assert "is the disk full?" in job.text()
        assert job.left() == []
    steps = [line["step"] for line in read_lines(step_file(folder, 0))]
    assert steps[-1] == 1, "by a successor of the worker that found the disk full before its first step"
    client = client_of(mlflow_server.uri)
    ids = json.loads((tmp_path / "struck" / "run.json").read_text())["mlflow"]
    assert {client.get_run(ids[stage]).info.status for stage in ("pipeline", "distill")} == {"KILLED"}

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
    values = {entry.step: entry.value for entry in client.get_metric_history(ids["distill"], "loss/vsd")}
    assert values == history(finished[0], mlflow_runs(finished[0], "whole")[1]["distill"], "loss/vsd")


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
        code, seen = job.wait(600, watch=["ray::RayTrainWorker"])
        assert code == 0, job.text()
        assert job.left() == []
        return storage, job.text(), seen["ray::RayTrainWorker"]


def test_two_workers_train_the_student_and_both_controls(finished, both):
    storage, text, workers = both
    assert len(workers) == 4 * 2  # the Bridge's, and three distillations'
    assert text.count("control:") == 2
    summary = json.loads((storage / "both" / "summary.json").read_text())
    assert summary["controls"].keys() == {"no_vsd", "shared_space"}
    for table in summary["controls"].values():
        assert {"mean", "size", "color", "shape", "position", "background"} <= table.keys()
        assert all(0 <= value <= 1 for value in table.values())
    parent, children = mlflow_runs(storage, "both")
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
    assert (summary["steps"], summary["best_step"]) == (1, 1)
    # eight samples an update instead of four
    assert not same_weights(exported(finished[0] / "whole"), exported(storage / "both"))


def test_a_run_without_a_bridge_makes_pairs_trains_its_own_and_trains_it_along(both):
    from raydistill.bridge.model import Bridge
    from raydistill.data.pairs import read_pairs
    from raydistill.shapes import WEIGHTS
    from raydistill.spaces import load_space

    folder = both[0] / "both"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"synthesis", "bridge", "distill"} <= summary["stages"].keys()
    pairs = read_pairs(folder / "pairs")
    assert len(pairs) == 64
    assert not set(pairs.prompts()) & set((WEIGHTS / "heldout.txt").read_text().splitlines())
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    own, along = (Bridge.load(place, student, teacher) for place in (folder / "bridge", folder / "distill" / "bridge"))
    rows = pairs.rows(range(8))
    with torch.no_grad():
        before, after = own(rows.z_S.float()), along(rows.z_S.float())
    assert before.shape == rows.z_T.shape
    assert 0 < (before - after).abs().max() < 0.1  # a small update later
    _, children = mlflow_runs(both[0], "both")
    losses = {
        key: history(both[0], children["bridge"], key)[2] for key in ("loss/bridge", "loss/latent_l1", "loss/attention")
    }
    assert losses["loss/attention"] > 0
    assert losses["loss/bridge"] == pytest.approx(losses["loss/latent_l1"] + losses["loss/attention"], rel=1e-5)
    assert set(history(both[0], children["distill"], "bridge/latent_l1")) == {1}


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
    with started(tmp_path, tmp_path / "storage", *[o.format(**names) for o in overrides]) as job:
        code, _ = job.wait(120)
        assert code == 2, job.text()
        assert message in job.text()
        assert "Traceback" not in job.text()
        assert not (tmp_path / "storage").exists()
        assert not list(Path(tempfile.gettempdir(), "ray").glob(f"session_*_{job.process.pid}"))  # Ray never started
        assert job.left() == []
