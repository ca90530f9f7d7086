"""Whether amounts of resources find room on nodes."""

from __future__ import annotations

import pytest

from raydistill.teachers.placement import place


@pytest.mark.parametrize(
    ("wanted", "nodes", "fits"),
    [
        ([{"CPU": 4}] * 2, [{"CPU": 4.0}, {"CPU": 4.0}], True),
        ([{"CPU": 4}] * 2, [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 3.0}], False),  # enough in all, but on no node
        ([{"CPU": 1, "GPU": 0.5}] * 3, [{"CPU": 8.0, "GPU": 1.0}], False),
        ([{"CPU": 1, "GPU": 0.5}] * 2 + [{"CPU": 1}], [{"CPU": 3.0, "GPU": 1.0}], True),
        ([{"CPU": 1, "GPU": 0.5}] * 2 + [{"CPU": 1}], [{"CPU": 2.0, "GPU": 1.0}], False),  # a reader beside them
        ([{"CPU": 0.2, "GPU": 0}], [{"CPU": 0.2}], True),
        ([{"CPU": 0.1}] * 3, [{"CPU": 0.3}], True),  # whatever the rounding
        ([{"CPU": 1}], [], False),
    ],
)
def test_each_amount_needs_one_node_that_has_it_all(wanted, nodes, fits):
    assert place(wanted, nodes) is fits
