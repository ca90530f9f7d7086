"""Changed pictures: which rows they are, that a row's picture depends on nothing but itself, and what changes in it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raydistill.config.reading import load
from raydistill.data.prompts import PromptSet
from raydistill.data.vae import PairEncoder
from raydistill.driver.stages import recipe_of
from raydistill.pictures.augment import MOTTLE, REGIONS, augmented, blended, recoloured, view
from raydistill.shapes.captions import single_scenes
from raydistill.shapes.render import render
from raydistill.spaces import load_space

ROWS = np.arange(100, 140)


@pytest.fixture(scope="module")
def pictures():
    return render(single_scenes()[:: 720 // len(ROWS)][: len(ROWS)], 64, seed=0)


def changed_rows(pictures, result):
    return {row for row, before, after in zip(ROWS.tolist(), pictures, result, strict=True) if not before.equal(after)}


def test_a_share_of_zero_gives_the_pictures_back(pictures):
    assert augmented(pictures, 3, ROWS, 0.0) is pictures


def test_the_share_says_how_many_and_a_larger_one_changes_the_same_rows_alike(pictures):
    some, more, all_ = (augmented(pictures, 3, ROWS, share) for share in (0.3, 0.6, 1.0))
    rows = [changed_rows(pictures, result) for result in (some, more, all_)]
    assert rows[0] < rows[1] < rows[2] == set(ROWS.tolist())
    assert 0.15 < len(rows[0]) / len(ROWS) < 0.45
    places = [row - ROWS[0] for row in rows[0]]
    assert torch.equal(some[places], all_[places])


def test_a_rows_bits_depend_on_seed_and_row_and_on_no_other_picture(pictures):
    torch.manual_seed(1)
    whole = augmented(pictures, 3, ROWS, 0.7)
    torch.manual_seed(2)  # nothing may come from the global state
    assert torch.equal(whole, augmented(pictures, 3, ROWS, 0.7))
    for place in (0, 17, 39):
        assert torch.equal(augmented(pictures[place : place + 1], 3, [int(ROWS[place])], 0.7)[0], whole[place])
    assert torch.equal(augmented(pictures.flip(0), 3, ROWS[::-1], 0.7), whole.flip(0))
    assert not torch.equal(whole, augmented(pictures, 4, ROWS, 0.7))
    assert not torch.equal(whole, augmented(pictures, 3, ROWS + 1, 0.7))


@pytest.mark.parametrize("pixels", [32, 40, 64])
def test_changed_pictures_are_pictures_beside_the_given_ones(pictures, pixels):
    given = torch.nn.functional.interpolate(pictures, size=pixels)
    before = given.clone()
    result = augmented(given, 3, ROWS, 1.0)
    assert torch.equal(given, before)
    assert result.shape == given.shape
    assert result.dtype == torch.float32
    assert -1 <= result.min() < result.max() <= 1
    change = (result - given).abs().flatten(1).mean(1)
    assert change.min() > 0.01
    assert change.median() > 0.1
    assert result.flatten(1).std(1).min() > 0.02, "and none is flat"


def test_a_blend_shows_either_picture_or_both(pictures):
    here, there = pictures[:2], pictures[2:4]
    flat = torch.zeros(2, 1, REGIONS, REGIONS)
    bias = torch.tensor([-40.0, 40.0])[:, None, None, None]
    one, other = blended(here, there, flat, bias)
    torch.testing.assert_close(one, here[0])
    torch.testing.assert_close(other, there[1])
    half = blended(here, there, flat, torch.zeros(2, 1, 1, 1))
    torch.testing.assert_close(half, (here + there) / 2)


def test_colours_are_mixed_by_the_matrix_and_the_mottle_has_its_strength(pictures):
    some, none = pictures[:2], torch.zeros(2, 1, 1, 1)
    mottle = torch.ones(2, 3, MOTTLE, MOTTLE)
    torch.testing.assert_close(recoloured(some, torch.zeros(2, 3, 3), mottle, none), some)
    swap = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]) - torch.eye(3)
    torch.testing.assert_close(recoloured(some, swap.expand(2, 3, 3), mottle, none), some[:, [1, 0, 2]])
    brighter = recoloured(some, torch.zeros(2, 3, 3), mottle, none + 1)
    torch.testing.assert_close(brighter, (some + 0.15).clamp(max=1))


def test_a_square_has_eight_views():
    picture = torch.arange(12.0).reshape(3, 2, 2)
    views = [view(picture, number) for number in range(8)]
    assert torch.equal(views[0], picture)
    assert len({tuple(each.flatten().tolist()) for each in views}) == 8
    assert all(each.sort(-1).values.sum() == picture.sum() for each in views)


def test_wrong_shares_and_rows_are_refused(pictures):
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            augmented(pictures, 0, ROWS, share)
    with pytest.raises(ValueError, match="40 pictures need as many rows, not 3"):
        augmented(pictures, 0, [1, 2, 3], 0.5)


# -- in a set of pairs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


def test_a_jobs_pairs_are_changed_as_configured(spaces):
    inputs = SimpleNamespace(
        teacher=spaces[0], student=spaces[1], prompts=PromptSet(["a red circle"], ids=[3]), images=None, drawer=None
    )
    for overrides, share in (([], 0.0), (["synthesis.augment_share=0.25"], 0.25)):
        told = recipe_of(load(overrides=overrides), inputs)
        assert told.settings()["augment_share"] == told.encoder("cpu").augment_share == share


def test_a_picture_is_changed_for_a_row(spaces):
    with pytest.raises(ValueError, match="rows must be given"):
        PairEncoder(*spaces, augment_share=0.1).encode(torch.zeros(1, 3, 64, 64))
