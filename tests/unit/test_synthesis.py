"""Sets of teacher samples: both latents describe one picture, and no interruption changes a row."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.data.pairs import existing_shards, load_pairs
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import LocalTeacher, PairEncoder, SynthesisError, resized, synthesise
from raydistill.diffusion.noise import normal
from raydistill.spaces import load_space

PROMPTS = PromptSet(["a red circle", "a blue square", "a green triangle"], ids=[3, 4, 9])
SETTINGS = {"batch_size": 2, "shard_size": 4, "steps": 2, "guidance_scale": 2.0, "seed": 5}


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def local(spaces):
    return LocalTeacher(spaces[0], spaces[0].load_network())


@pytest.fixture(scope="module")
def whole(local, spaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert synthesise(local, *spaces, PROMPTS, folder, count=7, **SETTINGS) == 7
    return load_pairs(folder)


def pillow_resized(images, pixels: int) -> torch.Tensor:
    """Pillow's antialiased bilinear resizing, in float."""
    planes = [
        Image.fromarray(p).resize((pixels, pixels), Image.Resampling.BILINEAR) for p in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes])).unflatten(0, images.shape[:2])


def same(a, b) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("prompt_ids", "seeds", "z_T", "z_S"))
    return tensors and a.prompts == b.prompts and a.previews == b.previews


class StopsAfter:
    """A teacher that goes away after a number of answers."""

    def __init__(self, teacher, answers: int) -> None:
        self.teacher, self.answers = teacher, answers

    def generate(self, *arguments):
        if self.answers == 0:
            raise ConnectionError("gone")
        self.answers -= 1
        return self.teacher.generate(*arguments)


def test_rows_hold_the_sampled_picture_in_both_spaces(whole, spaces, local):
    teacher, student = spaces
    assert len(whole) == 7
    assert set(whole.seeds.tolist()) == {5}
    ids, texts = PROMPTS.at(5, np.arange(7))
    assert whole.prompt_ids.tolist() == ids.tolist()
    assert whole.prompts == texts

    text = teacher.load_text()
    noise = normal(5, range(7), teacher.latent_shape, "synthesis")
    latents = teacher.sample(
        local.network, noise, teacher.encode_prompts(text, texts), teacher.encode_prompts(text, [""]), 2, 2.0
    )
    with torch.no_grad():
        images = teacher.decode(teacher.load_vae(), latents)
        z_T = teacher.encode(teacher.load_vae(), images)
        z_S = student.encode(student.load_vae(), pillow_resized(images, 32))
    torch.testing.assert_close(whole.z_T.float(), z_T, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(whole.z_S.float(), z_S, rtol=2e-3, atol=2e-3)


def test_preview_is_the_picture(whole, spaces, local):
    preview = Image.open(io.BytesIO(whole.previews[0]))
    assert preview.format == "PNG"
    assert preview.size == (64, 64)
    teacher, text = spaces[0], spaces[0].load_text()
    noise = normal(5, range(2), teacher.latent_shape, "synthesis")
    prompts, empty = teacher.encode_prompts(text, whole.prompts[:2]), teacher.encode_prompts(text, [""])
    with torch.no_grad():
        image = teacher.decode(teacher.load_vae(), local.generate(noise, prompts, empty, 2, 2.0).result())[0]
    pixels = (image.permute(1, 2, 0) + 1) * 127.5
    assert (torch.from_numpy(np.array(preview)).float() - pixels).abs().max() <= 1


def test_interrupted_set_goes_on_to_the_same_rows(whole, spaces, local, tmp_path):
    settings = SETTINGS | {"shard_size": 2}
    with pytest.raises(ConnectionError):
        synthesise(StopsAfter(local, 3), *spaces, PROMPTS, tmp_path, count=7, **settings)
    assert existing_shards(tmp_path) == [0]
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **settings) == 5
    assert same(load_pairs(tmp_path), whole)


def test_shards_that_are_there_are_not_made_again(whole, spaces, local, tmp_path):
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=4, **SETTINGS) == 4
    written = (tmp_path / "pairs-00000.parquet").stat().st_mtime_ns
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 3
    assert (tmp_path / "pairs-00000.parquet").stat().st_mtime_ns == written
    assert same(load_pairs(tmp_path), whole)
    assert synthesise(StopsAfter(local, 0), *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 0


def test_larger_count_completes_a_short_last_shard(whole, spaces, local, tmp_path):
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=5, **SETTINGS) == 5
    assert existing_shards(tmp_path) == [0, 1]
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 3
    assert same(load_pairs(tmp_path), whole)


def test_held_out_prompts_are_refused_before_anything_is_written(spaces, local, tmp_path):
    with pytest.raises(SynthesisError, match="1 held-out prompts.*'a blue square'"):
        synthesise(local, *spaces, PROMPTS, tmp_path / "set", count=2, forbidden={"a blue square", "other"}, **SETTINGS)
    assert not (tmp_path / "set").exists()


def test_rows_of_other_settings_are_not_mixed(spaces, local, tmp_path):
    synthesise(local, *spaces, PROMPTS, tmp_path, count=1, **SETTINGS)
    with pytest.raises(SynthesisError, match="seed was 5, now 6"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS | {"seed": 6})
    with pytest.raises(SynthesisError, match="prompts was"):
        synthesise(local, *spaces, PromptSet(["else"]), tmp_path, count=7, **SETTINGS)


def test_pair_encoder_does_not_depend_on_the_batch_beyond_rounding(spaces):
    encoder = PairEncoder(*spaces)
    latents = normal(0, range(11), spaces[0].latent_shape, "latents")
    z_T, z_S, pngs = encoder(latents)
    assert z_T.shape == latents.shape
    assert z_S.shape == (11, *spaces[1].latent_shape)
    assert len(pngs) == 11
    torch.testing.assert_close(z_T[9:], encoder(latents[9:])[0], rtol=1e-4, atol=1e-4)


def test_resizing_averages_instead_of_skipping_pixels():
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    assert resized(stripes, 32).abs().max() < 0.2  # nearest or plain bilinear sampling would alias
    assert resized(stripes, 64) is stripes
