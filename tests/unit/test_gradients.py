"""Steps on gradients of several workers: whose part was not finite is told apart, and nothing is stepped on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from raydistill.distillation.finite import Finite
from raydistill.distillation.gradients import OTHERS, Gradients
from raydistill.errors import NonFiniteError


def spoilt_by_another(tensors):
    """The mean with a worker whose gradients are not finite."""
    for tensor in tensors:
        tensor.fill_(float("nan"))


@pytest.fixture
def build():
    """`build(average)` -> gradients of two networks, and all of their parameters."""

    def start(average):
        networks = {name: nn.Linear(3, 2) for name in ("fake", "discriminator")}
        optimizers = {name: AdamW(network.parameters(), lr=1.0) for name, network in networks.items()}
        parameters = [p for network in networks.values() for p in network.parameters()]
        return Gradients(optimizers, 2, Finite(), average), networks, parameters

    return start


def test_another_workers_gradient_is_told_from_this_ones(build):
    gradients, networks, parameters = build(spoilt_by_another)
    before = [p.clone() for p in parameters]
    gradients.accumulate(networks["fake"](torch.ones(4, 3)).sum(), "fake")
    with pytest.raises(NonFiniteError, match=f"^{OTHERS} fake gradient") as caught:
        gradients.step(fake=1.0)
    assert caught.value.elsewhere
    assert all(map(torch.equal, before, parameters))
    gradients, networks, _ = build(spoilt_by_another)
    gradients.accumulate(networks["fake"](torch.full((4, 3), float("inf"))).sum(), "fake")
    with pytest.raises(NonFiniteError, match="^the fake loss") as caught:
        gradients.step(fake=1.0)
    assert not caught.value.elsewhere


def test_what_came_first_is_named_although_it_is_looked_at_later(build):
    gradients, networks, _ = build(lambda tensors: None)
    gradients.finite.note(torch.tensor([1.0, float("nan")]), "the student's x0")
    gradients.accumulate(networks["fake"](torch.full((4, 3), float("nan"))).sum(), "fake")
    with pytest.raises(NonFiniteError, match=r"^the student's x0: not finite in samples \[1\] of 2"):
        gradients.step(fake=1.0)


def test_two_networks_are_stepped_after_one_look_with_the_norms_of_each(build, monkeypatch):
    gradients, networks, parameters = build(lambda tensors: None)
    looks, look = [], gradients.finite.look
    monkeypatch.setattr(gradients.finite, "look", lambda *values: looks.append(1) or look(*values))
    before = [p.clone() for p in parameters]
    for name in networks:
        gradients.accumulate(networks[name](torch.ones(1, 3)).sum(), name)
    norms = gradients.step(fake=10.0, discriminator=10.0)
    assert looks == [1]
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(dict.fromkeys(networks, 2**0.5))
    assert not any(map(torch.equal, before, parameters))
