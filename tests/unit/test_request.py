"""What travels to a teacher: refused unless finite, cut and converted without changing a bit, never the shared memory itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from raydistill.teachers.request import all_finite, rows_from_wire, to_wire


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_anywhere_is_found(dtype, bad):
    value = torch.randn(3, 1001, dtype=torch.float32).to(dtype)
    assert all_finite(value)
    for place in (0, 1500, 3002):
        spoiled = value.clone()
        spoiled.view(-1)[place] = bad
        assert not all_finite(spoiled)
    assert all_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.empty(2, 0, dtype=dtype))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4], [4, 4, 4], [2, 3, 4, 4], [0]])
def test_rows_are_those_of_the_tensor_in_memory_of_their_own(kind, rows):
    """As Ray hands them out: read-only. In order and filled up with repeats, in their own dtype and in another."""
    tensor = torch.randn(5, 3, 7).mul(100).to(kind)
    wire = to_wire(tensor.clone())
    (wire[1] if isinstance(wire, tuple) else wire).flags.writeable = False
    for dtype in (None, torch.bfloat16, torch.float32):
        expected = tensor[rows] if dtype is None or not kind.is_floating_point else tensor[rows].to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = rows_from_wire(wire, np.array(rows), dtype)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        found.zero_()  # a network may work in place
        assert torch.equal(rows_from_wire(wire, np.array(rows), dtype), expected)
