"""SIGTERM and Ctrl-C: a distillation is asked to end, everything else is left at once."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from raydistill.workers import stop_signal
from raydistill.workers.stop_signal import (
    STOP_FILE,
    Stopped,
    acknowledge_stop,
    draining,
    stop_on_signals,
    stop_requested,
)


def terminate(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def test_a_stage_that_keeps_what_it_has_is_left_at_once():
    before, reached = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stop_on_signals():
            try:
                terminate()
                reached.append("after")
            except Exception:  # noqa: BLE001 (that is the point: no handler of failures gets it)
                reached.append("swallowed")

    with pytest.raises(Stopped):
        run()
    assert reached == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_distillation_is_asked_and_goes_on_to_its_end(tmp_path, number):
    before, seen = signal.getsignal(number), []

    def run() -> None:
        with stop_on_signals(), draining(tmp_path):
            seen.append(stop_requested(tmp_path))
            terminate(number)
            seen.append(stop_requested(tmp_path))
            acknowledge_stop(tmp_path, 7)
            seen.append(stop_requested(tmp_path))

    with pytest.raises(Stopped, match=f"by {number.name}; a checkpoint was written after update 7"):
        run()
    assert seen == [False, True, True]
    assert signal.getsignal(number) is before
    assert not (tmp_path / STOP_FILE).exists()  # or the resumed run would stop again


def test_a_second_signal_leaves_at_once(tmp_path):
    reached = []

    def run() -> None:
        with stop_on_signals(), draining(tmp_path):
            terminate()
            reached.append("first")
            terminate()
            reached.append("second")

    with pytest.raises(Stopped):
        run()
    assert reached == ["first"]


@pytest.mark.parametrize(
    ("step", "said"), [(7, "a checkpoint was written after update 7"), (None, "no checkpoint came within 0.2 s")]
)
def test_a_driver_that_cannot_wait_longer_says_whether_there_is_a_checkpoint(tmp_path, monkeypatch, step, said):
    monkeypatch.setattr(stop_signal, "LEAVE_WITHIN_S", 0.2)

    def run() -> None:
        with stop_on_signals(), draining(tmp_path):
            terminate()
            if step:
                acknowledge_stop(tmp_path, step)
            time.sleep(5)

    with pytest.raises(Stopped, match=said):
        run()


def test_a_request_after_the_last_update_says_so(tmp_path):
    def run() -> None:
        with stop_on_signals(), draining(tmp_path):
            terminate()

    with pytest.raises(Stopped, match="the distillation had ended"):
        run()


def test_a_stale_request_does_not_stop_the_next_run(tmp_path):
    (tmp_path / STOP_FILE).touch()
    with stop_on_signals(), draining(tmp_path):
        assert not stop_requested(tmp_path)


def test_another_thread_leaves_the_process_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
