"""Losses against independent float64 arithmetic."""

import pytest
import torch

from raydistill.distillation.finite import Finite
from raydistill.distillation.losses import (
    fake_logits_loss,
    generator_loss,
    real_logits_loss,
    vsd_gradient,
    vsd_loss,
)
from raydistill.errors import NonFiniteError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3)]


def test_vsd_gradient_and_loss_equal_a_float64_computation():
    x, real, fake = tensors()
    gradient = vsd_gradient(x, real, fake)
    for b in range(3):
        x_b, real_b, fake_b = (v[b].double().flatten().tolist() for v in (x, real, fake))
        scale = sum(abs(p - q) for p, q in zip(x_b, real_b, strict=True)) / len(x_b) + 1e-6
        expected = torch.tensor([(f - r) / scale for f, r in zip(fake_b, real_b, strict=True)])
        torch.testing.assert_close(gradient[b].flatten(), expected.float(), rtol=1e-5, atol=1e-6)
    leaf = x.clone().requires_grad_(True)
    loss = vsd_loss(leaf, gradient)
    assert loss.item() == pytest.approx(0.5 * gradient.double().square().mean().item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(leaf.grad, gradient / x.numel(), rtol=1e-4, atol=1e-7)


def test_gan_losses_equal_their_closed_forms():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    log = torch.log1p
    assert generator_loss(fake).item() == pytest.approx(log(torch.exp(-fake)).mean().item(), rel=1e-5)
    assert real_logits_loss(real).item() == pytest.approx(log(torch.exp(-real)).mean().item(), rel=1e-5)
    assert fake_logits_loss(fake).item() == pytest.approx(log(torch.exp(fake)).mean().item(), rel=1e-5)


def test_a_look_names_the_first_value_that_was_not_finite_and_its_samples():
    values, finite = tensors(), Finite()
    values[1][2, 0, 0, 0] = float("nan")
    values[2][0, 1, 3, 3] = float("inf")
    for value, name in zip(values, ("x", "the teacher's score", "the fake score"), strict=True):
        assert finite.note(value, name) is value
    with pytest.raises(NonFiniteError, match=r"^the teacher's score: not finite in samples \[2\] of 3$") as caught:
        finite.look()
    assert caught.value.count == 1
    finite.look()  # what was looked at is forgotten
    finite.note(torch.tensor(float("-inf")), "the loss")
    with pytest.raises(NonFiniteError, match=r"^the loss: not finite in samples \[0\] of 1$"):
        finite.look()


def test_a_look_gives_what_is_wanted_in_main_memory():
    x, real, _ = tensors()
    finite = Finite()
    assert finite.look() == []
    finite.note(x, "x")
    copies = finite.look(x, real)
    assert all(map(torch.equal, copies, (x, real)))
    finite.note(x.requires_grad_(True) * 1, "x")  # with a graph
    assert torch.equal(finite.look(x.detach())[0], x)


def test_vsd_gradient_is_not_finite_where_a_score_is_not():
    x, real, fake = tensors()
    fake[2, 0, 0, 0] = float("nan")
    finite = vsd_gradient(x, real, fake).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, True, False]
