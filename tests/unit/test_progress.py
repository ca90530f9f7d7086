"""The driver's screen: stages, rates and the time left follow the work that is really done."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from raydistill.evaluation.summary import table
from raydistill.tracking import progress
from raydistill.tracking.progress import ProgressWatcher, write_progress
from raydistill.tracking.screen import WINDOW, Pace, Screen, duration
from raydistill.workers.stage import Standing


def shown(capsys, file, steps, total=10):
    with ProgressWatcher(file, "stage"):
        for step in steps:
            write_progress(file, step=step, total=total, loss=0.5)
            time.sleep(0.7)
    return capsys.readouterr().out


def test_a_line_of_a_log_names_time_stage_step_and_values(tmp_path, capsys):
    assert re.match(r"^\d\d:\d\d:\d\d stage: step 3/10, loss 0.5\n", shown(capsys, tmp_path / "progress.json", [3]))


def test_the_last_step_of_a_stage_is_seen_however_soon_it_ends(tmp_path, capsys):
    with ProgressWatcher(tmp_path / "progress.json", "synthesis", "row"):
        write_progress(tmp_path / "progress.json", step=32, total=32, failed=0)
    assert "synthesis: row 32/32, failed 0" in capsys.readouterr().out


def test_an_earlier_attempts_file_is_not_taken_for_this_one(tmp_path, capsys):
    file = tmp_path / "progress.json"
    write_progress(file, step=9, total=10, loss=0.5)
    out = shown(capsys, file, [4, 10])
    assert "step 9/10" not in out
    assert "step 4/10" in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (3599.6, "1 h")],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_the_pace_is_that_of_the_last_steps_and_starts_anew_after_a_restart():
    pace = Pace()
    assert pace.left(100) is None
    for step in range(11):
        pace.see(step, 50.0 * step)  # slow at first
    for step in range(11, 11 + 2 * WINDOW):
        pace.see(step, 500.0 + 2 * (step - 10))
    assert pace.left(100) == pytest.approx(2 * (100 - 70))
    pace.see(40, 1000.0)  # a worker was lost: back to its checkpoint
    assert pace.left(100) is None
    pace.see(42, 1010.0)
    assert pace.left(100) == pytest.approx(5 * 58)


def test_the_time_left_counts_the_stages_that_follow_where_they_are_alike():
    screen = Screen()
    screen.plan(["bridge", "distill", "no_vsd", "shared_space"])
    alike = ("no_vsd", "shared_space")
    assert screen.time_left("distill", 20.0, 120.0, alike) == "4 min 20 s left"  # 20 s, and twice 120 s
    assert screen.time_left("shared_space", 20.0, 120.0, alike) == "20 s left"
    assert screen.time_left("bridge", 20.0) == "20 s left of this stage"
    assert screen.time_left("distill", None, 120.0, alike) == ""
    assert screen.time_left("unplanned", 20.0, 120.0, alike) == "20 s left of this stage"


def test_after_a_resume_the_stages_that_follow_take_as_long_as_a_whole_one(tmp_path, monkeypatch):
    """The last 20 of 100 updates of 2 s are left, then an evaluation of 7 s; the control has two, and all updates."""
    screen = Screen()
    screen.plan(["distill", "no_vsd"])
    monkeypatch.setattr(progress, "screen", screen)
    watcher, pace, said = ProgressWatcher(tmp_path / "progress.json", "distill", alike=("no_vsd",)), Pace(), []

    class Shown:
        def update(self, step, total, details, left):
            said.append(left)

    clock = iter((1000.0, 1002.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for step in (79, 80):
        write_progress(watcher.file, step=step, total=100, tail_s=7.0)
        watcher._look(Shown(), pace)
    assert said == ["", duration(20 * 2 + 7 + 100 * 2 + 2 * 7) + " left"]


def test_the_time_that_an_evaluation_takes_outlives_a_loss():
    kept = Standing(step=3, final_s=7.5).about("id")
    assert Standing.of(kept).final_s == 7.5
    old = Standing(step=3).about("id")
    assert "final_s" not in old
    assert Standing.of(old).final_s == 0.0


def test_rows_that_come_by_the_batch_have_a_steady_time_left():
    """Every fourth look sees 128 rows, the others 16: a row takes 0.5 s in the long run."""
    pace, step, now, left = Pace(), 0, 0.0, []
    for look in range(200):
        step += 128 if look % 4 == 0 else 16
        now += 22.0
        pace.see(step, now)
        left.append(pace.left(step + 1000))
    assert all(value == pytest.approx(500.0, rel=0.1) for value in left[WINDOW:])


def test_a_log_that_holds_no_unicode_gets_its_lines(monkeypatch):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", log)
    Screen().say("run mine: flux → sd15\udcff")
    Screen().show(table({"before": {"mean": 0.5}, "after": {"all": 0.25}}), width=80)  # a dash for what is not known
    log.flush()
    first, *rows = log.buffer.getvalue().decode().splitlines()
    assert first.endswith(" run mine: flux ? sd15?")
    assert [row.split() for row in rows] == [["mean", "all"], ["before", "0.500", "?"], ["after", "?", "0.250"]]


def test_two_threads_that_say_something_at_once_write_two_lines(monkeypatch):
    class Slow(io.StringIO):
        """Another thread writes between any two pieces."""

        def write(self, text):
            super().write(text)
            time.sleep(0.001)

    monkeypatch.setattr(sys, "stdout", Slow())
    board = Screen()
    speakers = [threading.Thread(target=lambda: [board.say("said by a thread") for _ in range(20)]) for _ in range(2)]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    assert {line[9:] for line in sys.stdout.getvalue().splitlines()} == {"said by a thread"}


def test_stages_have_numbers_and_end_with_their_time(capsys):
    screen = Screen()
    screen.plan(["distill", "no_vsd"])
    with screen.stage("distill"):
        pass
    with pytest.raises(RuntimeError), screen.stage("no_vsd"):
        raise RuntimeError
    lines = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["1/2 distill", "1/2 distill: done in 0 s", "2/2 no_vsd", "2/2 no_vsd: failed after 0 s"]


def test_work_that_is_no_stage_has_a_bar_with_its_time_left(capsys):
    with Screen().count("evaluate", 3, "picture") as done:
        done(1)
        time.sleep(0.05)
        done(2)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["evaluate: picture 1/3", "evaluate: picture 3/3, 0 s left"]


PROGRAM = """
from raydistill.tracking.screen import screen
with screen.bar("distill") as bar:
    bar.update(1, 4, "vsd 0.5 " + "and much more " * 20)
    screen.say("a line of a worker")
    bar.update(2, 4, "vsd 0.4")
print("the end")
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_lines_above_one_bar_that_is_never_wider(columns):
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    out = b""
    try:
        while part := os.read(leader, 65536):
            out += part
    except OSError:  # the other side is closed
        pass
    os.close(leader)
    assert process.wait(30) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert "a line of a worker" in lines
    assert lines[-1] == "the end"
    bars = [line for line in lines if line.startswith("distill")]
    assert any("1/4" in bar and "vsd 0.5" in bar for bar in bars)
    assert all(len(line) <= columns for line in lines)
