"""The Gaussian path against closed forms in float64 and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from raydistill.diffusion.guidance import classifier_free, is_guided
from raydistill.diffusion.path import DiscretePath, FlowPath, add_noise, target, to_x0
from raydistill.diffusion.timesteps import sample_t, shift
from raydistill.errors import InputError

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draws(seed=0, shape=(6, 4, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return x_0, noise, torch.rand(shape[0], generator=generator) * 0.9 + 0.05


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (FlowPath(), "velocity"),
        (DiscretePath.from_scheduler_config(SD15), "epsilon"),
        (DiscretePath.from_scheduler_config(SD15), "v_prediction"),
    ],
)
def test_a_perfect_prediction_gives_back_x0(path, kind):
    x_0, noise, t_B = draws()
    x_t = add_noise(path, x_0, noise, t_B)
    recovered = to_x0(path, kind, x_t, target(path, kind, x_0, noise, t_B), t_B)
    torch.testing.assert_close(recovered, x_0, rtol=0, atol=2e-4)


def test_sd15_last_step_amplifies_epsilon_as_documented():
    path = DiscretePath.from_scheduler_config(SD15)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha, sigma = path.alpha_sigma(torch.ones(1))
    exact = (1 - betas).cumprod(0)[-1].sqrt()
    assert alpha.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (sigma / alpha).item() == pytest.approx(14.61, abs=0.05)
    x_t, eps = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert to_x0(path, "epsilon", x_t, eps, torch.ones(1)).item() == pytest.approx(-(sigma / alpha).item())


def test_noising_agrees_with_the_ddpm_scheduler():
    x_0, noise, _ = draws()
    steps = torch.tensor([0, 1, 10, 500, 998, 999])
    path = DiscretePath.from_scheduler_config(SD15)
    ours = add_noise(path, x_0, noise, path.t_of_timestep(steps))
    torch.testing.assert_close(ours, DDPMScheduler(**SD15).add_noise(x_0, noise, steps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_agrees_with_the_ddim_scheduler(kind):
    scheduler = DDIMScheduler(**SD15, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    path = DiscretePath.from_scheduler_config(SD15)
    x_t, prediction, _ = draws()
    for step in (1, 250, 900):
        theirs = scheduler.step(prediction, step, x_t).pred_original_sample
        ours = to_x0(path, kind, x_t, prediction, path.t_of_timestep(torch.full((6,), step)))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_flow_x0_agrees_with_the_euler_scheduler_stepping_to_zero():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.7])
    x_t, velocity, _ = draws()
    theirs = scheduler.step(velocity, scheduler.timesteps[0], x_t, return_dict=False)[0]
    torch.testing.assert_close(to_x0(FlowPath(), "velocity", x_t, velocity, torch.full((6,), 0.7)), theirs)


def test_timesteps_survive_the_round_trip():
    path = DiscretePath.from_scheduler_config(SD15)
    steps = torch.arange(1000)
    assert torch.equal(path.timestep(path.t_of_timestep(steps)), steps)


@given(u=st.floats(0, 1), factor=st.floats(0.1, 10), low=st.floats(0, 0.4), high=st.floats(0.6, 1))
def test_sampled_times_stay_in_their_range(u, factor, low, high):
    t = sample_t(torch.tensor([u]), low, high, factor).item()
    assert low - 1e-6 <= t <= high + 1e-6


def test_shift_is_sd3s_formula_and_keeps_the_ends():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unshifted = torch.arange(1, 1001).flip(0) / 1000
    torch.testing.assert_close(shift(unshifted, 3.0), scheduler.sigmas, rtol=1e-5, atol=1e-6)
    assert shift(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]


def test_guidance_of_one_is_conditional_and_zero_unconditional():
    c, u, _ = draws()
    torch.testing.assert_close(classifier_free(c, u, 1.0), c)
    torch.testing.assert_close(classifier_free(c, u, 0.0), u)
    torch.testing.assert_close(classifier_free(c, u, 3.0), 3 * c - 2 * u)


def test_a_scale_of_zero_to_one_is_no_guidance_as_in_diffusers():
    assert [is_guided(scale) for scale in (0, 0.5, 1, 1.001, 7.5, 100)] == [False, False, False, True, True, True]
    for scale in (-1, -1e-9, 100.5, math.inf, -math.inf, math.nan):
        with pytest.raises(InputError, match=f"guidance scale {scale:g}: must lie between 0 and 100"):
            is_guided(scale)


def test_unknown_prediction_type_is_named():
    x_0, noise, t_B = draws()
    with pytest.raises(ValueError, match="sample"):
        to_x0(FlowPath(), "sample", x_0, noise, t_B)
