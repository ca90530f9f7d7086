"""What a replica says of its own work, against a clock that the test turns."""

from __future__ import annotations

import pytest

from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.teachers.utilisation import RECENT_ANSWERS, WINDOW_S, LoadLog, Meter, Utilisation


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_busy_fraction_is_work_over_the_life_and_later_over_the_last_minute():
    clock = Clock()
    meter = Meter(clock)
    assert meter.busy_fraction() == 0
    clock.now += 10
    with meter.work():
        clock.now += 5
        assert meter.busy_fraction() == pytest.approx(5 / 15)  # work under way counts
    clock.now += 5
    assert meter.busy_fraction() == pytest.approx(5 / 20)
    clock.now += WINDOW_S - 7  # the last two seconds of that work are still in the window
    assert meter.busy_fraction() == pytest.approx(2 / WINDOW_S)
    clock.now += WINDOW_S
    assert meter.busy_fraction() == 0

    def fails():
        with meter.work():
            clock.now += WINDOW_S / 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()  # failed work is over, too
    clock.now += WINDOW_S / 2
    assert meter.busy_fraction() == pytest.approx(0.5)


def test_an_answer_tells_its_latency_and_who_waits_behind_it():
    clock = Clock()
    meter = Meter(clock)
    arrived = clock()
    clock.now += 3
    assert meter.load(arrived, 2) == Utilisation(3, 0.0, 2)


def test_the_client_gathers_recent_answers():
    log = LoadLog()
    assert log.metrics() == {}
    for latency in range(1, 101):
        log.add(Utilisation(float(latency), 0.25, 7))
    assert log.metrics() == {
        "teachers/latency_p50": 50.0, "teachers/latency_p95": 95.0,
        "teachers/busy_fraction": 0.25, "teachers/queue": 7.0,
    }  # fmt: skip
    for _ in range(RECENT_ANSWERS):
        log.add(Utilisation(1.0, 0.5, 0))
    assert log.metrics()["teachers/latency_p95"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.min_replicas=1"], "min_replicas needs max_replicas"),
        (["teachers.replicas=4", "teachers.max_replicas=3"], r"replicas \(4\) <= max_replicas \(3\) does not hold"),
        (["teachers.min_replicas=3", "teachers.max_replicas=4"], r"min_replicas \(3\) <= replicas \(1\)"),
    ],
)
def test_bounds_that_contradict_each_other_are_named(overrides, message):
    with pytest.raises(InputError, match=message):
        load(None, overrides)
