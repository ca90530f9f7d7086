"""The driver's progress lines: rate and time left follow the work that is really done."""

import re
import time

from raydistill.tracking.progress import ProgressWatcher, write_progress


def shown(capsys, file, steps, total=10):
    with ProgressWatcher(file, "stage"):
        for step in steps:
            write_progress(file, step=step, total=total, loss=0.5)
            time.sleep(0.7)
    return capsys.readouterr().out


def test_a_line_names_stage_step_and_values(tmp_path, capsys):
    assert "stage: step 3/10, loss=0.5" in shown(capsys, tmp_path / "progress.json", [3])


def test_an_earlier_attempts_file_is_not_taken_for_this_one(tmp_path, capsys):
    file = tmp_path / "progress.json"
    write_progress(file, step=9, total=10, loss=0.5)
    out = shown(capsys, file, [4, 10])
    assert "step 9/10" not in out
    assert "step 4/10" in out


def test_the_time_left_is_never_negative_after_a_restart(tmp_path, capsys):
    out = shown(capsys, tmp_path / "progress.json", [8, 2, 10])
    assert "step 10/10" in out
    assert all(int(left) >= 0 for left in re.findall(r"(-?\d+) s left", out))
    assert re.search(r"step 10/10, 0 s left", out)
