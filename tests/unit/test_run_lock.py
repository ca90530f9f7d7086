"""Two drivers cannot have one run: the second is told who has it, and a crashed one is no obstacle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from raydistill.driver import run_lock
from raydistill.driver.run_lock import RunLocked, lock_run
from raydistill.errors import RunLost
from raydistill.storage import lease
from raydistill.storage.atomic import move_folder, remove_folder, replace_text, replacing, writing
from raydistill.storage.lease import LEASE_FILE, Lease, holding
from raydistill.storage.place import remote
from raydistill.workers.step_log import open_log
from raydistill.workers.stop_signal import STOP_FILE, draining, stop_on_signals

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


@pytest.mark.full
def test_a_holder_on_another_machine_is_watched(holder, monkeypatch, capfd):
    """That machine's lock is not seen, as on storage without locks, and it has another name."""
    _, folder = holder
    monkeypatch.setattr(run_lock.fcntl, "flock", fail)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "another")
    monkeypatch.setattr(run_lock, "READ_BACK_S", 0.1)
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 20.0)
    with pytest.raises(RunLocked, match="is under way"), lock_run(folder):
        pytest.fail("it beats every five seconds")
    assert "watching for 20 s" in capfd.readouterr().out
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 1.0)  # shorter than a beat: as if it were gone
    with lock_run(folder):
        assert json.loads((folder / LEASE_FILE).read_text())["host"] == "another"


def fail(*_):
    raise OSError(95, "Operation not supported")


DAMAGED = [b"[1]", b"7", b"null", b'{"host": 1}', b'{"host": "x", "pi', b"\xff\xfe\x00", b"[" * 100_000, b'"x"']


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:12]))
def test_a_damaged_owner_file_is_named_and_watched_and_then_the_run_is_taken(tmp_path, monkeypatch, capfd, content):
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 0.1)
    (tmp_path / LEASE_FILE).write_bytes(content)
    with lock_run(tmp_path):
        assert lease.owner_of(tmp_path)["pid"] == os.getpid()
    (line,) = capfd.readouterr().out.splitlines()
    assert f"{tmp_path / LEASE_FILE}, which is damaged" in line


def take_over(folder):
    """As a job on another machine does."""
    other = {"host": "elsewhere", "pid": 1, "started": "now", "token": "another"}
    (folder / LEASE_FILE).write_bytes(json.dumps(other).encode())


def leave_in_order(folder):
    """As the other job does at its end."""
    if isinstance(folder, remote("s3://a/b").__class__):
        (folder / LEASE_FILE).unlink()
    else:
        (folder / LEASE_FILE).write_bytes(b"")


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path
    return remote(f"{request.getfixturevalue('bucket')}/{request.node.name.partition('[')[0]}/{time.time_ns()}")


@pytest.mark.parametrize("taken", [take_over, leave_in_order])
def test_who_has_lost_a_run_writes_nothing_to_it(place, tmp_path, taken):
    mine = Lease(place, "mine")
    (place / LEASE_FILE).write_bytes(json.dumps({"host": "h", "pid": 2, "started": "", "token": "mine"}).encode())
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")

    def staged():
        with replacing(place / "distill" / "replaced") as fresh:
            fresh.write_text("x")

    def written():
        with writing(place / "best.json") as fresh:
            fresh.write_text("x")

    writes = [
        lambda: replace_text(place / "run.json", "{}"),
        staged,
        written,
        lambda: move_folder(tmp_path / "source", place / "moved"),
        lambda: remove_folder(place / "kept"),
    ]
    with holding(mine):
        (place / "kept").mkdir(exist_ok=True)
        (place / "kept" / "file").write_text("x")
        log = open_log(place, 0)
        log.add(1, 1, [[0]], {})
        log.keep()
        taken(place)
        for write in writes:
            with pytest.raises(RunLost, match="was taken over by another job: leaving"):
                write()
        with pytest.raises(RunLost):
            next_line(log)
        assert sorted(one.name for one in place.iterdir()) == sorted({"kept", "steps-0.jsonl", *here(place, tmp_path)})
        replace_text(tmp_path.parent / f"{tmp_path.name}.elsewhere", "")  # what is not the run's is not guarded
    replace_text(place / "run.json", "{}")  # by whoever has it


def next_line(log):
    log.add(2, 1, [[1]], {})
    log.keep()


def here(place, tmp_path):
    """What else lies there: the owner's file, and what the test made."""
    names = {LEASE_FILE} if (place / LEASE_FILE).exists() else set()
    return names | ({"source"} if place == tmp_path else set())


def test_a_frozen_driver_that_lost_its_run_leaves_without_asking_for_a_checkpoint(place, monkeypatch, capfd):
    """It wakes up in a distillation, which another job goes on with: no request to stop, no note of its own."""
    monkeypatch.setattr(run_lock, "BEAT_EVERY_S", 0.05)
    monkeypatch.setattr(run_lock, "READ_BACK_S", 0.0)
    (place / "distill").mkdir(exist_ok=True)

    def run():
        with lock_run(place), stop_on_signals(), draining(place / "distill"):
            take_over(place)
            threading_wait()

    with pytest.raises(RunLost, match="was taken over by another job: leaving"):
        run()
    assert lease.owner_of(place)["host"] == "elsewhere"
    assert not (place / "distill" / STOP_FILE).exists()
    assert "was taken over by another job: leaving" in capfd.readouterr().out


def threading_wait():
    """Until a signal comes, or the test has failed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_signal_that_wakes_a_driver_that_lost_its_run_asks_for_nothing(tmp_path, monkeypatch):
    (tmp_path / "distill").mkdir()

    def run():
        with lock_run(tmp_path), stop_on_signals(), draining(tmp_path / "distill"):
            take_over(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)
            threading_wait()

    with pytest.raises(RunLost):
        run()
    assert not (tmp_path / "distill" / STOP_FILE).exists()
    assert lease.owner_of(tmp_path)["host"] == "elsewhere"


@pytest.mark.full
def test_a_stopped_process_loses_its_run_to_another_machine_and_ends_when_it_goes_on(holder, monkeypatch):
    """Really stopped, by SIGSTOP; its lock is not seen by the other machine."""
    process, folder = holder
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "another")
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 1.0)
    monkeypatch.setattr(run_lock, "READ_BACK_S", 0.0)
    process.send_signal(signal.SIGSTOP)
    with lock_run(folder):
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == -signal.SIGTERM
        assert f"{folder} was taken over by another job: leaving" in process.stdout.read()
        assert lease.owner_of(folder)["host"] == "another"
