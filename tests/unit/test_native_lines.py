"""Lines that Ray's C++ side writes in the driver's own process: narration is dropped, all else is passed on."""

from __future__ import annotations

import os
import subprocess
import sys

from raydistill.driver.native_lines import STDERR, native_lines
from raydistill.driver.worker_lines import _shown

# As Ray 2.60 wrote them on the driver's descriptor, when it created an actor of a data stream.
NARRATION = (
    b"[2026-11-28 07:08:01,832 E 30875 30875] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches(x))' and "
    b"ID: '89df' has constructor arguments in the object store and max_restarts > 0. If the arguments in the object store "
    b"go out of scope or are lost, the actor restart will fail.\n"
)
FATAL = b"[2026-11-28 07:08:01,832 C 30875 30875] core_worker.cc:9: Check failed: a != b\n"

PROCESS = """
import faulthandler, logging, os, sys
from raydistill.driver.native_lines import native_lines
from raydistill.driver.worker_lines import _shown
logging.basicConfig()  # its handler keeps the object of before
before = sys.stderr
with native_lines(_shown):
    os.write(2, b"[2026-11-28 07:08:01,832 E 3 3] core_worker.cc:2465: Actor with class name: x\\n")
    print("of Python", file=sys.stderr)
    logging.warning("of a logger")
    os.system("echo of a child 1>&2")
    os.write(2, b"its end is miss")
    faulthandler.enable()  # as Ray does
assert sys.stderr is before
os.write(2, b"\\nafter\\n")
raise SystemExit("the end")
"""


def test_narration_is_dropped_and_everything_else_is_passed_on(capfd):
    with native_lines(_shown):
        os.write(STDERR, NARRATION + b"free(): invalid pointer\n\n" + FATAL + NARRATION[:40])
        os.write(STDERR, NARRATION[40:] + b"no end")
    os.write(STDERR, b", and on\n")
    assert capfd.readouterr().err == "free(): invalid pointer\n\nCheck failed: a != b\nno end, and on\n"


def test_python_s_own_standard_error_is_as_it_was():
    ended = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert set(lines) == {
        "of Python", "WARNING:root:of a logger", "of a child", "its end is miss", "after", "the end"
    }, ended.stderr  # fmt: skip
    assert lines[-2:] == ["after", "the end"]


def test_a_closed_standard_error_is_left_alone():
    code = "import os; os.close(2); from raydistill.driver.native_lines import *\nwith native_lines(str): print('in')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "in\n")
