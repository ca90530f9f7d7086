"""Two drivers cannot have one run: the second is told who has it, and a crashed one is no obstacle."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raydistill.driver import run_lock
from raydistill.driver.run_lock import LEASE_FILE, RunLocked, lock_run

HOLD = "import sys, pathlib\nfrom raydistill.driver.run_lock import lock_run\nwith lock_run(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


@pytest.fixture
def holder(tmp_path):
    """A living process that holds the run `mine`."""
    folder = tmp_path / "storage" / "mine"
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process, folder
    process.kill()
    process.communicate()


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_second_job_of_a_run_ends_with_two_names_the_first_and_touches_nothing(holder, run_script):
    process, folder = holder
    (folder / "run.json").write_text('{"seconds": {}}')
    before = contents(folder)
    code, _, error = run_script("distill", f"storage={folder.parent}", "run.name=mine")
    assert code == 2
    assert f"run.name=mine is under way: process {process.pid} on " in error
    after = contents(folder)
    assert {path: data for path, (data, _) in after.items()} == {path: data for path, (data, _) in before.items()}
    assert after[folder / "run.json"] == before[folder / "run.json"]


def test_a_killed_holder_and_one_that_left_are_no_obstacle(holder, capfd):
    process, folder = holder
    process.kill()
    process.wait()
    for _ in range(2):
        with lock_run(folder):
            assert json.loads((folder / LEASE_FILE).read_text())["pid"] == os.getpid()
            with pytest.raises(RunLocked, match=f"process {os.getpid()} "), lock_run(folder):
                pytest.fail("it is held")
    assert (folder / LEASE_FILE).read_text() == ""
    assert "watching" not in capfd.readouterr().out


def test_a_holder_on_another_machine_is_watched(holder, monkeypatch, capfd):
    """That machine's lock is not seen, as on storage without locks, and it has another name."""
    _, folder = holder
    monkeypatch.setattr(run_lock.fcntl, "flock", fail)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "another")
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 20.0)
    with pytest.raises(RunLocked, match="is under way"), lock_run(folder):
        pytest.fail("it beats every five seconds")
    assert "watching for 20 s" in capfd.readouterr().out
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 1.0)  # shorter than a beat: as if it were gone
    with lock_run(folder):
        assert json.loads((folder / LEASE_FILE).read_text())["host"] == "another"


def fail(*_):
    raise OSError(95, "Operation not supported")
