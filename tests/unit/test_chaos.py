"""What the soak calls a difference: a judge that misses one would call every run identical."""

from __future__ import annotations

import pytest
import torch

from raydistill.benchmark import chaos


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
