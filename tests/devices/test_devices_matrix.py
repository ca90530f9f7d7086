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
CELLS += [("sd3", "update_student_lora"), ("sd3", "update_float16")]  # the student is the same beside every teacher


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
    if cell[1].startswith("update") and cell[1] != "update_shard":
        assert [kernel for kernel in notes["kernels"] if kernel.startswith("WindowAttention: math")] == []
    if cell[1] == "update_float16":  # the scale makes nobody wait
        assert sum(notes["waits"].values()) == 6
