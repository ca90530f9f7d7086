"""The Slurm script against stand-ins of Slurm's commands and Ray's: what it starts where, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import pytest

from raydistill.config.reading import CONFIGS

SCRIPT = CONFIGS / "clusters" / "slurm.sbatch"
STANDINS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nlocalhost\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    # As Ray shows its nodes: each as a type of its own, those without work as idle. The second has joined at the fourth look.
    "ray": """echo "ray $*" >> "$LOG"
        if [ "$1" = start ]; then [ -z "$ENDS" ] || case "$*" in *--head*) ;; *) exit 1 ;; esac; exec /bin/sleep 60; fi
        if [ "$1" = status ]; then
          printf 'Node status\\n---\\nActive:\\n 1 node_a\\nIdle:\\n'
          if [ "$(grep -c 'ray status' "$LOG")" -ge 4 ]; then printf ' 1 node_b\\n'; else printf ' (no idle nodes)\\n'; fi
          printf 'Pending:\\n 7 node_c\\nRecent failures:\\n (no failures)\\n\\nResources\\nTotal Usage:\\n 3.0/96.0 CPU\\n'
        fi""",
    "sleep": "exec /bin/sleep 0.05",
    "python3": """trap 'echo checkpoint >> "$LOG"; exit 75' TERM
        echo "driver $RAY_ADDRESS $RAY_AUTH_MODE $*" >> "$LOG"
        [ -z "$CODE" ] || exit "$CODE"
        while :; do sleep 0.05; done""",
}


class Allocation:
    """A batch script under way."""

    def __init__(self, folder, code, ends):
        binaries, self.log = folder / "venv" / "bin", folder / "log"
        binaries.mkdir(parents=True)
        for name, body in STANDINS.items():
            (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (binaries / name).chmod(0o755)
        (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
        variables = {
            "SLURM_JOB_ID": "4217", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "96", "SLURM_GPUS_ON_NODE": "8",
            "VENV": str(folder / "venv"), "LOG": str(self.log), "STORAGE": "/scratch/runs", "CODE": code, "ENDS": ends,
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), "distill.steps=60"], env=os.environ | variables, start_new_session=True
        )

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def begun(self, what, count=1):
        """The lines of `count` commands, once there are so many."""
        deadline = time.monotonic() + 60
        while len(found := [line for line in self.lines() if line.startswith(what)]) < count:
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.02)
        return found


@pytest.fixture
def allocation(tmp_path):
    started = []

    def start(code="", ends=""):
        started.append(Allocation(tmp_path, code, ends))
        return started[0]

    yield start
    for job in started:
        with contextlib.suppress(ProcessLookupError):  # as Slurm ends what a job leaves
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def test_token_head_workers_and_job_come_in_this_order_and_a_signal_puts_the_job_back_into_the_queue(allocation):
    job = allocation()
    starts = job.begun("ray start", 2)
    (driver,) = job.begun("driver ")
    assert job.lines()[: job.lines().index(driver)].count("ray status") == 4  # all nodes have joined
    assert driver.startswith("driver 127.0.0.1:24217 token jobs/distill.py --config configs/sdxl_sd15.yaml ")
    assert " storage=/scratch/runs " in driver
    assert driver.endswith(" distill.steps=60")
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == 75
    assert job.lines()[-2:] == ["checkpoint", "scontrol requeue 4217"]
    assert job.lines()[0] == "ray get-auth-token --generate"
    node = "ray start --block --num-cpus=96 --num-gpus=8 --labels=role=all"
    head = f"{node} --head --node-ip-address=127.0.0.1 --port=24217 --temp-dir=/tmp/ray-4217"
    assert sorted(starts) == sorted([head, f"{node} --address=127.0.0.1:24217"])


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_a_run_that_ended_or_failed_is_not_tried_again(allocation, code):
    job = allocation(code)
    assert job.process.wait(60) == int(code)
    assert not any("requeue" in line for line in job.lines())


def test_a_node_on_which_ray_ends_ends_the_job(allocation):
    job = allocation(ends="yes")
    assert job.process.wait(60) == 1
    assert not any(line.startswith("driver") for line in job.lines())
