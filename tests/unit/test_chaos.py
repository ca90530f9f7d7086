"""What the soak calls a difference: a judge that misses one would call every run identical."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch

from raydistill.benchmark import chaos, soak
from raydistill.config.reading import load


def line(step: int, first: int, repeated: float = 0.0) -> dict:
    return {"step": step, "samples": [[[first, first + 3]]], "values": {"teachers/repeated": repeated}}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["student"]["weight"].__setitem__(0, 1.0 + 2**-23),
        lambda state: state["optimizers"]["state"][0].__setitem__("step", torch.tensor(4.0)),
        lambda state: state["optimizers"]["groups"].append({}),
        lambda state: state["student"].__setitem__("bias", torch.zeros(1)),
        lambda state: state.__setitem__("updates", 4),
        lambda state: state["student"].__setitem__("weight", torch.ones(3, dtype=torch.float64)),
    ],
)
def test_one_bit_anywhere_is_a_difference(change):
    def state() -> dict:
        optimizers = {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1, "betas": (0.0, 0.9)}]}
        return {"updates": 3, "student": {"weight": torch.ones(3)}, "optimizers": optimizers}

    other = state()
    assert chaos._differing(state(), other) == []
    change(other)
    assert len(chaos._differing(state(), other)) == 1


def test_a_step_that_took_other_samples_the_second_time_is_counted():
    assert chaos._changed_on_repeat([line(1, 0), line(2, 4), line(2, 4), line(3, 8)]) == 0
    assert chaos._changed_on_repeat([line(1, 0), line(2, 4), line(2, 8), line(3, 12)]) == 1


def test_repeated_requests_are_summed_over_workers_whose_counters_start_anew():
    assert chaos._repeated([line(1, 0, 0), line(2, 4, 2), line(2, 4, 0), line(3, 8, 1), line(4, 12, 1)]) == 3
    assert chaos._repeated([]) == 0


def test_recovery_tells_faults_that_came_alone_from_others():
    alone = chaos.Strike(fault="node", at=10.0, step=3, recovered=18.0)
    together = chaos.Strike(fault="node", at=50.0, step=9, recovered=90.0, alone=False)
    row = chaos._recovery([alone, together])["node"]
    assert row == {"kills": 2, "alone_median_s": 8.0, "median_s": 24.0, "longest_s": 40.0}


# -- faults -----------------------------------------------------------------------------------------------


@pytest.fixture
def process():
    """A process that runs until it is killed."""
    started = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield psutil.Process(started.pid)
    started.kill()
    started.wait()


def soak_of(*processes: psutil.Process, faults=soak.FAULTS) -> soak.Soak:
    world = SimpleNamespace(titled=lambda title: list(processes), raylet=lambda: processes[0])
    return soak.Soak(
        world=world, folder=None, start_driver=None, kills=200, until=float("inf"), faults=list(faults),
        choice=random.Random(0),
    )  # fmt: skip


def status(process: psutil.Process, wanted: str) -> str:
    """What the system says of the process, which a signal reaches after a moment."""
    deadline = time.monotonic() + 10
    while process.status() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.status()


@pytest.mark.parametrize("fault", [fault for fault in soak.FAULTS if fault.startswith(soak.FREEZE)])
def test_a_freeze_stops_a_process_ends_none_and_is_over_with_the_next_update_after_it(process, fault):
    driver = SimpleNamespace(pid=process.pid, poll=lambda: None)
    run = soak_of(process)
    run._strike(fault, driver, lines=7)
    (strike,), (repair,) = run.strikes, run.repairs
    assert status(process, psutil.STATUS_STOPPED) == psutil.STATUS_STOPPED
    run._follow(strike, driver, lines=9)  # the rest of the run goes on meanwhile
    assert strike.back is None
    run._mend(repair.at - 0.1)
    assert run.repairs == [repair]
    run._mend(repair.at)
    assert status(process, psutil.STATUS_RUNNING) == psutil.STATUS_RUNNING
    run._follow(strike, driver, lines=9)
    run._follow(strike, driver, lines=9)
    assert strike.recovered is None
    run._follow(strike, driver, lines=10)
    assert strike.recovered is not None


def test_what_was_frozen_may_be_killed_before_it_is_thawed(process):
    run = soak_of(process)
    run._strike("freeze teacher rank", None, lines=1)
    run._strike("teacher rank", None, lines=1)
    assert process.wait(10) is not None
    run._mend(float("inf"))
    assert [strike.fault for strike in run.strikes] == ["freeze teacher rank", "teacher rank"]
    assert run.repairs == []


def test_a_run_that_ends_leaves_nothing_frozen(process, monkeypatch):
    run = soak_of(process)
    run._strike("freeze train worker", None, lines=1)
    assert status(process, psutil.STATUS_STOPPED) == psutil.STATUS_STOPPED
    monkeypatch.setattr(run, "_run", lambda: None)
    run.run()
    assert status(process, psutil.STATUS_RUNNING) == psutil.STATUS_RUNNING


def test_two_hundred_faults_are_of_every_kind_and_a_quarter_freezes(process):
    run, deck = soak_of(process), []
    drawn = Counter()
    for _ in range(200):
        fault = run._draw(deck)
        drawn[fault] += 1
        run.strikes.append(soak.Strike(fault=fault, at=0.0, step=0))
    assert drawn.keys() == soak.FAULTS.keys()
    assert min(drawn.values()) >= 5
    assert sum(drawn[fault] for fault in drawn if fault.startswith(soak.FREEZE)) >= 50


def test_the_run_has_two_workers_and_two_replicas_and_steps_for_two_hundred_faults(tmp_path):
    world = SimpleNamespace(server=SimpleNamespace(uri="http://127.0.0.1:1"))
    config = load(overrides=chaos._overrides(world, tmp_path, "quiet", 1600))
    assert (config.distill.workers, config.teachers.replicas, config.distill.steps) == (2, 2, 1600)


# -- both workers' logs -----------------------------------------------------------------------------------


def test_a_difference_in_any_workers_log_is_found(tmp_path, monkeypatch):
    for part in ("_differing", "_last_state", "_missing_in_mlflow"):
        monkeypatch.setattr(chaos, part, lambda *_: [])

    def write(name: str, rank: int, lines: list[dict]) -> None:
        file = tmp_path / name / "distill" / f"steps-{rank}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def of(rank: int, **changed: float) -> list[dict]:
        values = {"teachers/repeated": 0.0, "loss/vsd": 1.0} | changed
        own = [[[4 * step + 2 * rank, 4 * step + 2 * rank + 1]] for step in range(3)]
        return [{"step": step + 1, "world": 2, "samples": [own[step]], "values": values} for step in range(3)]

    for name in ("quiet", "chaos"):
        for rank in range(2):
            write(name, rank, of(rank))
    same = chaos._compare(None, tmp_path)
    assert (same["metrics_differing"], same["prompts_consumed"], same["requests"]) == ([], 12, 6)
    assert same["prompts_doubled"] == same["prompts_skipped"] == same["requests_lost"] == 0
    write("chaos", 1, of(1, **{"loss/vsd": 1.5}))
    assert chaos._compare(None, tmp_path)["metrics_differing"] == ["loss/vsd"]
    write("chaos", 1, of(1)[:2])
    cut = chaos._compare(None, tmp_path)
    assert (cut["requests_lost"], cut["prompts_skipped"]) == (1, 2)
