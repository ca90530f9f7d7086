"""What an operator makes of meta tensors is worked out once, and is then what torch says it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raydistill.planning.meter import counted
from raydistill.spaces import meta
from raydistill.spaces.meta import WithoutNumbers


def sizes(*tensors):
    return [(t.size(), t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


def worked(x, weight, bias):
    """Tensors of an update in small: a transposed layout, a reduction, halves, a backward pass, a change in place."""
    last = x.permute(0, 2, 3, 1)
    normed = F.layer_norm(last, last.shape[-1:])
    product = F.linear(normed.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    loss = (product.square().mean((1, 2)) + 1).sum()
    gradients = torch.autograd.grad(loss, [x, weight, bias])
    changed = product.detach().add_(1).mul_(gradients[2])
    return last, normed, product, loss, *gradients, changed, *product.chunk(2, -1), torch.empty_like(last)


def operands():
    return [
        torch.empty(shape, device="meta", requires_grad=True)
        for shape in ((2, 8, 4, 4), (6, 8), (6,))
    ]  # fmt: skip


def test_they_are_those_of_torch(monkeypatch):
    plain = sizes(*worked(*operands()))
    monkeypatch.setattr(meta, "_shapes", {})
    with WithoutNumbers():
        first = sizes(*worked(*operands()))
        known = len(meta._shapes)
        again = sizes(*worked(*operands()))
    assert known > 20
    assert len(meta._shapes) == known, "nothing is worked out twice"
    assert plain == first == again


def test_a_result_is_a_tensor_of_its_own_unless_the_operator_says_otherwise():
    with WithoutNumbers():
        for _ in range(2):
            x = torch.empty(3, 4, device="meta")
            assert x.add_(1) is x
            assert torch.empty(3, 4, device="meta").t_().shape == (4, 3)
            made = x + 1
            assert made.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert x.view(4, 3).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add(1).dtype == torch.float32
            assert (x > 1).dtype == torch.bool


def test_a_plan_counts_the_same_bytes_however_often_it_is_made(monkeypatch):
    """A product of three dimensions is a view of one of two: what it is kept as must not be a tensor of its own."""
    monkeypatch.setattr(meta, "_shapes", {})
    peaks = []
    for _ in range(2):
        with counted() as meter:
            x, weight = torch.empty(2, 64, 128, device="meta"), torch.empty(512, 128, device="meta")
            peaks.append(meter.count(lambda x=x, weight=weight: F.linear(x, weight)).peak)
    assert peaks == [4 * (2 * 64 * 128 + 512 * 128 + 2 * 64 * 512)] * 2


def test_what_differs_in_a_number_alone_is_not_taken_for_the_same():
    with WithoutNumbers():
        x = torch.empty(4, 6, device="meta")
        ints = torch.empty(4, 6, dtype=torch.int64, device="meta")
        for _ in range(2):
            assert torch.sum(x, 0).shape == (6,)
            assert torch.sum(x, 1).shape == (4,)
            assert (ints + 1).dtype == torch.int64
            assert (ints + 1.0).dtype == torch.float32
            assert (x + 1).stride() == (6, 1)
            assert (torch.empty(6, 4, device="meta").t() + 1).stride() == (1, 4), "a layout of the same size"
            assert torch.cat([x, x], 0).shape == (8, 6)
            assert torch.cat([x, x, x], 0).shape == (12, 6)


def test_real_tensors_are_computed():
    with WithoutNumbers():
        for number in (1.0, 2.0):
            assert (torch.full((2,), number) + 1).tolist() == [number + 1] * 2
