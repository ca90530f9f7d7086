"""Convolutions with their channels last in memory: the numbers of the usual layout, up to rounding."""

from __future__ import annotations

import pytest
import torch
from student_updates import distiller, stepped

from raydistill.config.networks import TeacherServiceConfig
from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.teachers import speed
from raydistill.teachers.plain import Whole


def are_last(tensors) -> bool:
    """Whether all tensors of a convolution larger than 1 x 1 are so."""
    wide = [value for value in tensors if value.ndim == 4 and value.shape[2:] != (1, 1) and value.shape[1] > 1]
    assert wide
    return all(value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous() for value in wide)


def test_a_teacher_that_is_a_unet_scores_alike(sd_folder, flux_folder):
    space, cpu = load_space(sd_folder), torch.device("cpu")
    usual, last = (TeacherServiceConfig(backend="plain", channels_last=on) for on in (False, True))
    networks = [Whole(space, config, cpu).network for config in (usual, last)]
    assert [are_last(network.parameters()) for network in networks] == [False, True]
    text = {name: torch.randn(2, *shape) for name, (shape, _) in space.conditioning_layout.items()}
    x_t, t_B = torch.randn(2, *space.latent_shape), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        one, two = (space.predict_x0(network, x_t, t_B, text) for network in networks)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert speed.check(last, space) == []
    assert "no UNet; it stays as it is" in speed.check(last, load_space(flux_folder))[0]


def test_a_student_that_is_a_unet_learns_alike(sd_folder, flux_folder):
    space, teacher = load_space(sd_folder), load_space(flux_folder)
    workers = [
        stepped(distiller(space, teacher, "student.lr=1e-3", f"distill.channels_last={on}"), teacher, 1)
        for on in (False, True)
    ]
    usual, last = (worker.networks for worker in workers)
    assert are_last(last.student.parameters())
    assert are_last(last.ema.parameters())
    moments = [of["exp_avg"] for of in workers[1].gradients.optimizers["student"].state.values()]
    assert are_last(moments)
    for one, two in zip(usual.student.parameters(), last.student.parameters(), strict=True):
        assert (one - two).norm() <= 1e-3 * (one.norm() + 1e-3)
    kept = workers[1].state_dict()
    again = distiller(space, teacher, "distill.channels_last=true")
    again.load_state_dict(kept)
    assert are_last(again.networks.student.parameters())
    assert are_last(of["exp_avg"] for of in again.gradients.optimizers["student"].state.values())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("distill.channels_last=true", "student.shard=true", "distill.workers=2"), "distill.channels_last"),
        (("distill.channels_last=true", "fake_score.shard=true", "distill.workers=2"), "distill.channels_last"),
    ],
)
def test_what_has_no_such_layout_is_refused(settings, key):
    with pytest.raises(InputError, match=key):
        load(overrides=list(settings))
