"""A worker's update, a Bridge's step and a teacher's score on a device that is not there: what a GPU would have to wait for.

Counted on tensors without numbers, at tiny sizes; not measured on a GPU (tests/README.md, "Devices").
"""

from __future__ import annotations

import pytest
from device_lane import check, needs_a_compiler, run_cells

pytestmark = needs_a_compiler

PARTS, FAKE_UPDATES, SAMPLES = 2, 1, 4  # of `device_roles.update`
CELLS = (("sd3", "rules"), ("sd3", "score"), ("sd3", "bridge"), ("flux2", "update"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return run_cells(tmp_path_factory.mktemp("cells"), CELLS)


def test_the_pretended_device_has_the_rules_of_cuda(cells):
    """Operands of two devices are refused; waits and copies are counted as torch's CUDA build makes them."""
    check(cells["sd3", "rules"])


@pytest.mark.parametrize("cell", CELLS[1:])
def test_a_role_keeps_its_tensors_together_and_attends_without_storing_attention_maps(cells, cell):
    notes = check(cells[cell])
    assert notes["kernels"]
    assert [kernel for kernel in notes["kernels"] if ": math" in kernel] == []


def test_an_update_waits_for_its_device_once_a_phase(cells):
    """Each part that goes to the teachers, each optimizer's step, and the metrics: not once a tensor."""
    assert check(cells["flux2", "update"])["waits"] == {
        "distillation/leaving_out.py:look": PARTS,
        "distillation/gradients.py:step": 2 * FAKE_UPDATES + 1,  # fake score and discriminator, then the student
        "distillation/readings.py:read": 1,
    }


def test_an_updates_copies_wait_for_nobody_and_a_batchs_conditioning_goes_once(cells):
    notes = check(cells["flux2", "update"])
    for copies in (*notes["uploads"].values(), *notes["downloads"].values()):
        assert copies["blocking"] == 0
    assert notes["uploads"]["distillation/batches.py:next"] == {
        "count": (1 + FAKE_UPDATES) * len(cells["flux2", "update"]["conditioning"]),
        "nbytes": (1 + FAKE_UPDATES) * SAMPLES * sum(cells["flux2", "update"]["conditioning"].values()),
        "blocking": 0,
    }
    noise = notes["uploads"]["distillation/batches.py:normal"]
    assert noise["count"] == PARTS * (2 + 3 * FAKE_UPDATES + 1)  # latents twice, score, fake and real noise, GAN
    assert sum(copies["count"] for copies in notes["downloads"].values()) <= 3 * PARTS + 2 * FAKE_UPDATES + 5


def test_a_bridges_step_waits_for_its_device_once(cells):
    notes = check(cells["sd3", "bridge"])
    assert notes["waits"] == {"bridge/trainer.py:_finite": 1}
    assert sum(copies["blocking"] for copies in notes["uploads"].values()) == 0
