"""Ready pairs at their published sizes on a device that is not there: nothing is computed, everything has its shape.

Three pairs run. An update of another takes one to several minutes of a core, and runs where it is asked for:
`RAYDISTILL_TEST_PAIRS=all pytest -m full tests/devices/test_devices_real_sizes.py`, or `RAYDISTILL_TEST_PAIRS=kolors_sd15,…`.
"""

from __future__ import annotations

import os

import pytest
from device_lane import check, needs_a_compiler, run_cells
from device_real_sizes import GIB, Pair

from raydistill.config.reading import CONFIGS
from raydistill.planning.counting import count_trainer

pytestmark = [needs_a_compiler, pytest.mark.full, pytest.mark.timeout(1800)]

H100_GIB = 79.6
PAIRS = ("sd35_medium_sd15", "flux1_dev_sd15", "sdxl_sd15")
ROLES = ("update", "score", "vae")
OTHERS = sorted(
    file.stem
    for student in ("sd15", "sd21_base", "sdxl")
    for file in CONFIGS.glob(f"*_{student}.yaml")
    if not file.stem.startswith("shapes") and file.stem not in PAIRS
)
ASKED = os.environ.get("RAYDISTILL_TEST_PAIRS", "").split(",")
CELLS = [(pair, role) for pair in PAIRS for role in ROLES]
CELLS += [(pair, "update") for pair in OTHERS if pair in ASKED or ASKED == ["all"]]


@pytest.fixture(scope="module")
def cells_of(tmp_path_factory):
    """`cells_of(pair)` -> its cells; one process a pair."""
    done = {}

    def run(pair):
        if pair not in done:
            wanted = [cell for cell in CELLS if cell[0] == pair]
            done[pair] = run_cells(tmp_path_factory.mktemp(pair), wanted, "device_real_sizes.py")
        return done[pair]

    return run


@pytest.mark.parametrize("cell", CELLS, ids=":".join)
def test_a_role_of_a_ready_pair_runs_on_its_device_at_its_real_size(cells_of, cell):
    told = cells_of(cell[0])[cell]
    notes = check(told)
    assert told["peak_gib"] > 0.5
    if cell[1] == "update":
        assert [kernel for kernel in notes["kernels"] if ": math" in kernel] == []
        pair = Pair(cell[0])
        planned = count_trainer(pair.config, pair.student, pair.teacher).peak / GIB
        assert told["peak_gib"] == pytest.approx(planned, rel=0.02)
        assert planned < 0.9 * H100_GIB
