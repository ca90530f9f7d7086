"""Counter-based draws: a function of seed, purpose, step and sample id, and of the right distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from raydistill.diffusion.noise import normal, uniform


def test_draw_does_not_depend_on_its_batch():
    together = normal(3, [5, 0, 9, 2], (4, 6, 6), "latents")
    for row, sample_id in enumerate([5, 0, 9, 2]):
        assert torch.equal(together[row], normal(3, [sample_id], (4, 6, 6), "latents")[0])
    assert torch.equal(uniform(3, [5, 0, 9], "t")[2:], uniform(3, [9], "t"))


def test_list_array_and_tensor_ids_are_the_same_ids():
    ids = [7, 2**40, 1]
    expected = normal(0, ids, (3,), "latents")
    assert torch.equal(expected, normal(0, np.array(ids), (3,), "latents"))
    assert torch.equal(expected, normal(0, torch.tensor(ids), (3,), "latents"))


def test_seed_purpose_step_and_id_all_change_the_draw():
    draws = [
        normal(seed, [sample_id], (8,), purpose, step)
        for seed, sample_id, purpose, step in itertools.product((0, 1), (0, 1, 2**33), ("latents", "noise"), (0, 1, 11))
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_numbers_of_seed_step_and_purpose_cannot_be_mistaken_for_each_other():
    assert not torch.equal(normal(1, [0], (4,), "x", 11), normal(11, [0], (4,), "x", 1))
    assert not torch.equal(normal(1, [0], (4,), "1/x", 1), normal(1, [0], (4,), "x", 1))


def test_bits_stay_what_they_were():
    """A finished run can only be continued when these do not change."""
    key = np.array([9313712925483664574, 8975809163500638593], dtype=np.uint64)
    reference = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 12, 0]))
    assert normal(0, [12], (5,), "latents").tolist() == [reference.standard_normal(5, dtype=np.float32).tolist()]


def test_normal_moments_and_independence_of_neighbours():
    x = normal(1, range(400), (500,), "latents").double()
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    assert abs((x[:-1] * x[1:]).mean()) < 0.01


def test_uniform_is_uniform_in_the_half_open_unit_interval():
    u = uniform(1, range(20000), "t").sort().values.double()
    assert u.shape == (20000,)
    assert u[0] >= 0
    assert u[-1] < 1
    assert (u - torch.linspace(0, 1, 20000).double()).abs().max() < 1.63 / 20000**0.5  # Kolmogorov-Smirnov at 1 %
    assert uniform(1, [0, 1], "t", shape=(3, 2)).shape == (2, 3, 2)


def test_empty_batch_gives_an_empty_tensor():
    assert normal(0, [], (4, 2), "latents").shape == (0, 4, 2)


@pytest.mark.parametrize(("ids", "said"), [([-1], "negative"), ([[1, 2]], "one-dimensional")])
def test_wrong_ids_are_refused(ids, said):
    with pytest.raises(ValueError, match=said):
        normal(0, ids, (2,), "latents")
