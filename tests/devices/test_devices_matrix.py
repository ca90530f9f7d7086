"""Every role of every family on a device that is not there, at tiny sizes."""

from __future__ import annotations

import pytest
from device_lane import check, needs_a_compiler, run_cells

pytestmark = [needs_a_compiler, pytest.mark.full, pytest.mark.timeout(1800)]

FAMILIES = ("sd3", "flux-dev", "flux2", "z-image", "chroma", "sana", "qwen-image", "sdxl", "kolors", "pixart")
UNETS = ("sdxl", "kolors")  # which cannot be truncated
ROLES = (
    "text", "score", "sample", "zero3", "vae", "evaluation", "update", "update_full", "update_truncated",
    "update_joint", "update_float32", "update_shared", "update_shard", "resume", "bridge", "bridge_resumed",
)  # fmt: skip
CELLS = [(f, r) for f in FAMILIES for r in ROLES if not (f in UNETS and r == "update_truncated")]
BESIDE_ALL = (
    "update_student_lora",
    "update_few_steps",
    "update_float16",
    "update_reward",
    "update_student_shard",
)  # the student is the same beside every teacher
CELLS += [("sd3", role) for role in BESIDE_ALL]
TRANSFORMERS = ("sd3+pixart-alpha", "sd3+sana")  # students that are no UNets
CELLS += [(pair, role) for pair in TRANSFORMERS for role in ("text", "update_full", "resume", "evaluation", "bridge")]


@pytest.fixture(scope="module")
def cells_of(tmp_path_factory):
    """`cells_of(family)` -> its cells; one process a family."""
    done = {}

    def run(family):
        if family not in done:
            wanted = [cell for cell in CELLS if cell[0] == family]
            done[family] = run_cells(tmp_path_factory.mktemp(family), wanted)
        return done[family]

    return run


@pytest.mark.parametrize("cell", CELLS, ids=":".join)
def test_a_role_of_a_family_runs_on_its_device(cells_of, cell):
    notes = check(cells_of(cell[0])[cell])
    if cell[1].startswith("update") and cell[1] not in ("update_shard", "update_student_shard"):
        assert [kernel for kernel in notes["kernels"] if kernel.startswith("WindowAttention: math")] == []
    if cell[1] == "update_float16":  # the scale makes nobody wait
        assert sum(notes["waits"].values()) == 6


def test_the_earlier_steps_of_a_student_wait_for_nothing(cells_of):
    """An update of one part of each batch that takes four steps waits as often as one of one step (`test_devices.py`)."""
    notes = check(cells_of("sd3")["sd3", "update_few_steps"])
    assert notes["waits"] == {
        "distillation/leaving_out.py:look": 2,
        "distillation/gradients.py:step": 3,
        "distillation/readings.py:read": 1,
    }
    assert sum(copies["blocking"] for copies in notes["uploads"].values()) == 0
    assert notes["uploads"]["distillation/rollout.py:seen"]["count"] > 0
