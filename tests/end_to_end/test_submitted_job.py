"""The README's way to a cluster, on a machine that has never seen Ray: token, head, submitted job, its facts, a stop."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from jobs_started import ROOT, SMALL, TEST_S, running

pytestmark = [pytest.mark.full, pytest.mark.timeout(TEST_S)]
BIN = Path(sys.executable).parent


def free_ports(count):
    """Below those that Ray gives its workers."""
    found = []
    for port in range(7000, 9000):
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def snippet():
    """The README's lines up to the start of the head."""
    (block,) = re.findall(r"```\n((?:(?!```)[\s\S])*ray start --head\n)", (ROOT / "README.md").read_text())
    return block.splitlines()


@pytest.fixture
def short():
    """A folder whose name leaves room for those of Ray's sockets: Linux allows 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_submitted_job_shows_its_run_in_rays_list_and_a_stop_leaves_a_checkpoint(tmp_path, short):
    home, storage = tmp_path / "home", tmp_path / "runs"
    home.mkdir()
    gcs, dashboard = free_ports(2)
    address = f"http://127.0.0.1:{dashboard}"
    *before, start = snippet()
    start += f" --block --num-cpus=4 --port={gcs} --dashboard-port={dashboard} --temp-dir={short}"
    path = {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": ""}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | path
    del environment["RAY_AUTH_MODE"]

    alone = subprocess.run(
        ["bash", "-c", f"export RAY_AUTH_MODE=token; {start}"], env=environment, capture_output=True, text=True
    )
    assert "no authentication token was found" in alone.stderr, "then the snippet's first line is not needed"

    def ray_job(*arguments, check=True):
        mode = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": address}
        command = [str(BIN / "ray"), "job", *map(str, arguments)]
        done = subprocess.run(command, env=environment | mode, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    with running(
        tmp_path, ["bash", "-c", "\n".join(["unset RAY_AUTH_MODE", *before, f"exec {start}"])], **path
    ) as head:
        head.until(lambda: "Ray runtime started" in head.text() and "succeeded" not in ray_job("list", check=False))
        small = [one for one in SMALL if not one.startswith("distill.steps")]
        entry = [sys.executable, str(ROOT / "jobs" / "distill.py"), "run.name=mine", f"storage={storage}", *small]
        submit = ("submit", "--no-wait", "--submission-id", "one", "--", *entry, "distill.steps=1000")
        # a head that is new has no agent yet, and says "try again later"
        head.until(lambda: "submitted successfully" in ray_job(*submit, check=False), pause=2)
        head.until(lambda: any((storage / "mine" / "distill" / "checkpoints").glob("checkpoint_*/about.json")), pause=1)
        listed = ray_job("list")
        (facts,) = (ast.literal_eval(found) for found in re.findall(r"metadata=(\{'job_name'[^}]*\})", listed))
        assert facts["job_name"] == "mine"
        assert (facts["run"], facts["teacher"]) == (str(storage / "mine"), "shapes:flux")
        assert re.search(r"mlflow ui .*, then http://127.0.0.1:5000/#/experiments/\d+/runs\?", facts["mlflow"])
        ray_job("stop", "one")
        assert "a checkpoint was written" in ray_job("logs", "one")
        assert "job_name='mine'" in ray_job("list").replace("'job_name': 'mine'", "job_name='mine'"), "still there"
