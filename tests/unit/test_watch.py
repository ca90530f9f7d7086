"""What is watched of the updates: latents of all workers together, and how the fake score keeps up."""

from __future__ import annotations

import pytest
import torch

from raydistill.distillation.collapse import CollapseAlarm
from raydistill.distillation.watch import RUNNING, FakeLag, Watch

Z = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LOSSES = [torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])]  # of two fake updates in four parts


def watched(parts, mean_micro_batches, average=lambda tensors: None):
    watch = Watch(CollapseAlarm(None, X))
    watch.lag.observe([2.0])
    watch.begin()
    for part in parts:
        watch.made(Z[2 * part : 2 * part + 2], X[2 * part : 2 * part + 2])
    for losses in LOSSES:
        watch.faked([losses[part] for part in parts])
    return watch.observe(*watch.of_update(mean_micro_batches, average))


def test_figures_of_parts_are_those_of_the_batch():
    whole = watched(range(4), 4)
    assert whole["student/latent_mean"] == pytest.approx(Z.mean().item(), rel=1e-5)
    assert whole["student/latent_std"] == pytest.approx(Z.std(correction=0).item(), rel=1e-5)
    assert whole["fake/lag"] == pytest.approx(3.0 / 2.0), "the first fake update's mean loss over what was before"
    assert "guard/latent_drift" in whole


def test_two_workers_of_unequal_parts_say_the_same():
    """Three parts and one; each divides by the mean, and the mean of both is taken."""
    sent = []
    for parts in ([0, 1, 2], [3]):
        watched(parts, 2, lambda tensors: sent.append([t.clone() for t in tensors]))
    means = iter([[(a + b) / 2 for a, b in zip(sent[call], sent[call + 2], strict=True)] for call in (0, 1)])

    def average(tensors):
        for tensor, mean in zip(tensors, next(means), strict=True):
            tensor.copy_(mean)

    assert watched([3], 2, average) == pytest.approx(watched(range(4), 4))


def test_a_fake_score_that_keeps_up_reads_1_and_one_that_is_left_behind_more():
    lag = FakeLag()
    assert [lag.observe([0.5, 0.5]) for _ in range(20)] == pytest.approx([1.0] * 20)
    behind = [lag.observe([0.5 * 1.02**n, 0.5 * 1.02**n]) for n in range(100)]
    assert behind[0] == pytest.approx(1.0)
    assert behind[-1] > 1.3
    learning = FakeLag()
    assert [learning.observe([1.0 * 0.98**n]) for n in range(50)][-1] < 0.8


def test_the_running_loss_is_a_mean_of_what_came_before_and_lasts_in_checkpoints():
    lag, losses = FakeLag(), [1.0, 4.0, 2.0, 3.0, 5.0]
    lag.observe(losses[:2])
    lag.observe(losses[2:4])
    again = FakeLag()
    again.load_state_dict(lag.state_dict())
    weights = [RUNNING ** (3 - place) for place in range(4)]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
    assert again.observe(losses[4:]) == lag.observe(losses[4:]) == pytest.approx(5.0 / mean)


def test_a_checkpoint_from_before_the_figure_begins_it_anew():
    watch = Watch(CollapseAlarm(None, X))
    watch.lag.observe([3.0])
    watch.load_state_dict({"average": 0.25})
    assert watch.alarm.average == 0.25
    assert watch.lag.observe([7.0]) == 1.0
