"""A driver that is frozen for too long loses its run to a job on another machine, and so do its workers."""

import json
import signal
import sys

import pytest
from jobs_started import ROOT, SMALL, TEST_S, running, started

from raydistill.storage.lease import LEASE_FILE, owner_of
from raydistill.workers.step_log import consumed, read_lines, step_file

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]

# jobs/distill.py as it starts on another machine, which waits for less than 30 s
ELSEWHERE = (
    "import runpy, socket, sys\n"
    "socket.gethostname = lambda: 'elsewhere'\n"
    "from raydistill.driver import run_lock\n"
    "run_lock.WATCHED_FOR_S = 8.0\n"
    "script = sys.argv.pop(1)\n"
    "sys.exit(runpy.run_path(script)['main']())\n"
)


def test_a_frozen_driver_and_its_workers_leave_the_run_to_another_machine(tmp_path):
    """SIGSTOP to the driver alone, while its workers go on; SIGCONT when the other job is at work."""
    folder, steps = tmp_path / "frozen", 40
    settings = ("run.name=frozen", f"distill.steps={steps}", "distill.evaluate_every=20", "distill.checkpoint_every=5")
    second = [sys.executable, "-c", ELSEWHERE, str(ROOT / "jobs" / "distill.py"), f"storage={tmp_path}"]
    (tmp_path / "second").mkdir()
    with started(tmp_path, tmp_path, *settings) as first:
        first.until(lambda: any((folder / "distill" / "checkpoints").glob("checkpoint_*/state.pt")), pause=0.2)
        first.process.send_signal(signal.SIGSTOP)
        with running(tmp_path / "second", [*second, *SMALL, *settings]) as other:
            other.until(lambda: owner_of(folder)["host"] == "elsewhere", pause=0.2)
            done = len(read_lines(step_file(folder / "distill", 0)))
            assert done < steps, "the first job's workers had not ended before it was taken over"
            other.until(lambda: len(other.processes("ray::RayTrainWorker")) > 0, pause=0.2)
            first.process.send_signal(signal.SIGCONT)
            code, _ = first.wait()
            assert code == 75, first.text()
            assert "was taken over by another job: leaving" in first.text()
            ours = [line for line in first.text().splitlines() if "pid=" not in line]  # Ray has tracebacks of its own
            assert not [line for line in ours if line.startswith("Traceback")], first.text()
            assert first.left() == []
            code, _ = other.wait()
            assert code == 0, other.text()
            assert other.left() == []
    lines = read_lines(step_file(folder / "distill", 0))
    assert consumed(lines).tolist() == list(range(steps * 2 * 4))  # steps, batches, samples
    again = [line["step"] for line in lines[done:]]
    assert again == list(range(again[0], steps + 1)), "one writer from then on"
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps
    assert (folder / LEASE_FILE).read_bytes() == b""
