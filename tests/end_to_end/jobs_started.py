"""Jobs as a user starts them, for the tests of this folder: watched, and shown with their log when they take too long."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
JOB_S = 900  # a job's own deadline: several times what one takes on two cores, so that it is met by a hang alone
TEST_S = 5 * JOB_S  # pytest's, of a test with its fixtures: above the deadlines of all their jobs
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


def command(job, *arguments):
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, arguments)]


class Job:
    """A job of its own, whose processes can be told from all others: they inherit a mark, and Ray's session has its pid."""

    MARK = "RAYDISTILL_TEST_JOB"

    def __init__(self, folder, command, **variables):
        """`variables`: of its environment."""
        self.mark, self.log = uuid.uuid4().hex, folder / "job.log"
        ours = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=ours | variables | {self.MARK: self.mark}
            )

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

    def until(self, reached, timeout=JOB_S, pause=0.02):
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(pause)

    def wait(self, timeout=JOB_S, watch=()):
        """(exit code, {title: pids seen}) of the job, which is looked at twice a second."""
        seen, deadline = {title: set() for title in watch}, time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            for title, pids in seen.items():
                pids |= {process.pid for process in self.processes(title)}
            time.sleep(0.5)
        return self.process.returncode, seen

    def left(self, patience=90):
        """What is still alive although the job has ended; nothing is killed here.

        A worker of Ray that is about to end when its cluster goes may look for it for a minute (Ray's
        gcs_rpc_server_reconnect_timeout_s) before it does.
        """
        deadline = time.monotonic() + patience
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [(process.pid, process.name()) for process in processes]


@contextlib.contextmanager
def running(folder, command, **variables):
    """A Job, whose log is in `folder`; `variables` of its environment."""
    job = Job(folder, command, **variables)
    try:
        yield job
    finally:  # of a test that failed; after a good one there is nothing to kill
        for process in job.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        job.process.kill()
        job.process.wait()


def started(folder, storage, *overrides):
    """A small distillation."""
    return running(folder, command("distill", f"storage={storage}", *SMALL, *overrides))


def whole(folder, command):
    """(exit code, what it printed) of a job that is left alone."""
    with running(folder, command) as job:
        code, _ = job.wait()
        return code, job.text()


def job_of(storage, *overrides):
    """As `whole`, of a small distillation."""
    return whole(storage, command("distill", f"storage={storage}", *SMALL, *overrides))


def mlflow_runs(storage, name):
    """(parent, {stage: run}) of a run in the store of `storage`; the distillation is the parent itself."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    ids = json.loads((storage / name / "run.json").read_text())["mlflow"]
    parent = client.get_run(ids["pipeline"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, {"distill": parent} | {child.data.tags["stage"]: child for child in children}


def history(storage, run, key):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, key)}


def modes(folder):
    """Modes of all files, and of all folders, below a folder."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return [{path.stat().st_mode & 0o777 for path in paths if path.is_dir() == kind} for kind in (False, True)]


def exported(folder):
    return load_file(next((folder / "export" / "unet").glob("*.safetensors")))


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
