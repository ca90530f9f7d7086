"""Learning rates, moving averages and the GAN's weight: closed forms, and the same bits across a resume."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from test_updates import configuration, flat, make_distiller, rates, run

from raydistill.config.networks import DiscriminatorConfig, StudentConfig
from raydistill.config.reading import load
from raydistill.config.stages import DistillConfig
from raydistill.distillation.rates import decay, gan_weight, power_of, rate_share
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError


def shares(**changes):
    distill = DistillConfig(steps=10, **changes)
    return [rate_share(distill, n) for n in range(10)]


def test_learning_rates_fall_to_the_last_update_after_their_warm_up():
    assert shares() == [1.0] * 10
    assert shares(schedule="linear") == pytest.approx([1 - n / 10 for n in range(10)])
    assert shares(schedule="cosine") == pytest.approx([math.cos(math.pi * n / 20) ** 2 for n in range(10)])
    warm = shares(schedule="linear", warmup_steps=2)
    assert warm == pytest.approx([0.5, 1.0, *(1 - n / 8 for n in range(8))])
    assert shares(schedule="cosine", warmup_steps=10) == pytest.approx([(n + 1) / 10 for n in range(10)])
    gan = DiscriminatorConfig(weight=0.5, ramp_steps=4)
    assert [gan_weight(gan, n) for n in range(5)] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert gan_weight(DiscriminatorConfig(weight=0.5), 0) == 0.5


def weights_of(student, updates):
    """What each update's student counts in the average after so many, the start first."""
    weights = np.zeros(updates + 1)
    weights[0] = 1.0
    for n in range(updates):
        d = decay(student, n)
        weights *= d
        weights[n + 1] += 1 - d
    assert weights.sum() == pytest.approx(1)
    return weights


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_power_average_is_as_wide_as_it_says_at_any_length(sigma_rel):
    student = StudentConfig(ema="power", ema_sigma_rel=sigma_rel)
    gamma = power_of(sigma_rel)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(sigma_rel)
    for updates in (300, 3000):
        weights, i = weights_of(student, updates), np.arange(updates + 1)
        assert weights[0] == 0
        mean = (weights * i).sum()
        assert math.sqrt((weights * (i - mean) ** 2).sum()) / updates == pytest.approx(sigma_rel, rel=0.03)
        profile = i**gamma / (i**gamma).sum()
        assert np.abs(weights - profile).max() < 0.02 * profile.max() + 2 / updates**1.5


def test_a_half_life_forgets_half_in_so_many_updates():
    student = StudentConfig(ema="half_life", ema_half_life=20)
    weights = weights_of(student, 1000)
    assert weights[-20:].sum() == pytest.approx(0.5, abs=1e-3)
    assert weights_of(student, 100)[0] < 1e-6  # the start is forgotten early


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        ("power", lambda n: (n / (n + 1)) ** (power_of(0.2) + 1)),
        pytest.param("half_life", lambda n: 0.5**20, marks=pytest.mark.full),
    ],
)
def test_rates_and_averages_go_on_with_the_same_bits_across_a_resume(spaces, tables, ema, expected):
    config = configuration(
        fake_score__updates=1, distill__steps=4, distill__schedule="cosine", student__ema=ema, student__ema_sigma_rel=0.2,
        student__ema_half_life=0.05, discriminator__ramp_steps=3,
    )  # fmt: skip
    whole = make_distiller(config, spaces, tables)
    mean = flat(whole.networks.student).double()
    for n in range(3):
        run(config, spaces, tables, steps=1, distiller=whole)
        full = {"student": 1e-3, "fake": 1e-3, "discriminator": 1e-2}
        share = math.cos(math.pi * n / 8) ** 2
        assert rates(whole) == pytest.approx({name: share * rate for name, rate in full.items()})
        d = expected(n)
        mean = d * mean + (1 - d) * flat(whole.networks.student).double()
        torch.testing.assert_close(flat(whole.networks.ema).double(), mean, rtol=1e-5, atol=1e-6)
        if n == 1:
            state = copy.deepcopy(whole.state_dict())
    resumed = make_distiller(config, spaces, tables)
    for _ in range(2 * 2):
        next(resumed.batches.source)
    resumed.load_state_dict(state)
    run(config, spaces, tables, steps=1, distiller=resumed)
    for part in ("student", "ema", "discriminator"):
        assert torch.equal(flat(getattr(whole.networks, part)), flat(getattr(resumed.networks, part))), part


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_gans_pull_is_the_students_gradient_of_that_loss_alone(spaces, tables, parts):
    """Without VSD it is all of the gradient: ramped, weighted, in the units of vsd/gradient_norm."""
    found = []
    for weight in (0, 1):
        config = configuration(
            vsd__weight=weight, fake_score__updates=1, discriminator__ramp_steps=2, distill__micro_batches=parts
        )
        distiller, taken = make_distiller(config, spaces, tables), []
        plain = distiller.networks.bridged

        def x(*inputs, plain=plain, taken=taken):
            found = plain(*inputs)
            if found.requires_grad:
                found.register_hook(lambda g: taken.append(g * found.numel() * parts))
            return found

        distiller.networks.bridged = x
        if weight:
            run(config, spaces, tables, steps=1, distiller=distiller)
        else:
            distiller.student_update(list(distiller.make()), None)
        metrics = distiller.pop_metrics()
        found.append((metrics["gan/gradient_norm"], torch.cat(taken).square().mean().sqrt().item()))
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-4)
    assert found[0][0] > 0
    assert metrics["vsd/gradient_norm"] > 0
    assert found[1][0] != pytest.approx(found[1][1], rel=1e-2)  # VSD is in the whole gradient too


def test_a_run_whose_rates_fall_to_its_end_keeps_its_length(tmp_path):
    settings = [f"storage={tmp_path}", "run.name=a", "distill.steps=10"]
    config = load(overrides=[*settings, "distill.schedule=cosine"])
    create_run_folder(open_run_folder(config), config)
    with pytest.raises(InputError, match=r"distill\.steps: 10 -> 20"):
        open_run_folder(load(overrides=[*settings[:2], "distill.steps=20", "distill.schedule=cosine"]))
    with pytest.raises(InputError, match=r"distill\.schedule: 'cosine' -> 'constant'"):
        open_run_folder(load(overrides=settings))
