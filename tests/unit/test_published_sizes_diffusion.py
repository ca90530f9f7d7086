"""SDXL, Kolors and PixArt-Sigma at their published sizes: real configuration files on the meta device, no weights.

raydistill/model_configs/*.json hold the configuration files of the public models, by their path in the model's folder.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from lanes import full_but

from raydistill.config.networks import FakeScoreConfig
from raydistill.distillation.fake_score import FakeScore
from raydistill.spaces import load_space
from raydistill.spaces.published import write_folder

PUBLISHED = {"sdxl-base": 2.567e9, "kolors": 2.58e9, "pixart-sigma-1024": 0.61e9}  # parameters of the network
VAE_PARAMETERS = 83.65e6
RELATIVES = {
    "bk-sdm-base": 0.58e9,
    "bk-sdm-small": 0.49e9,
    "bk-sdm-tiny": 0.33e9,
}  # of the UNet: BK-SDM's MODEL_CARD.md
# of SDXL's UNet with blocks left out (arXiv 2401.02677), and of PixArt's transformer; latents, text tokens, VAE's scale
STUDENTS = {
    "ssd-1b": (1.33e9, 128, 77, 0.13025),
    "segmind-vega": (0.745e9, 128, 77, 0.13025),
    "pixart-sigma-512": (0.61e9, 64, 300, 0.13025),
    "pixart-alpha-512": (0.61e9, 64, 120, 0.18215),
}
VEGA = {"down_blocks": 247e6, "mid_block": 31e6, "up_blocks": 460e6}  # as its authors count them (blog.segmind.com)
# tokens and widths: both CLIPs of SDXL (768 + 1,280; pooled 1,280), ChatGLM3-6B, T5-XXL
TEXT = {"sdxl-base": (77, 2048, 1280), "kolors": (256, 4096, 4096), "pixart-sigma-1024": (300, 4096, None)}


def space_of(name: str, folder: Path):
    """The Space of a folder with these configuration files."""
    return load_space(write_folder(name, folder))


def on_meta(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name, tmp_path):
    space = space_of(name, tmp_path)
    assert numel(on_meta(space.network_config)) == pytest.approx(PUBLISHED[name], rel=0.02)
    assert numel(on_meta(space.vae_config)) == pytest.approx(VAE_PARAMETERS, rel=0.02)


@pytest.mark.parametrize("name", RELATIVES)
def test_small_relatives_of_sd15_have_the_published_parameters(name, tmp_path):
    space = space_of(name, tmp_path)
    assert space.latent_shape == (4, 64, 64)
    unet = on_meta(space.network_config)
    assert numel(unet) == pytest.approx(RELATIVES[name], rel=0.025)
    assert sum(map(numel, space.large_blocks(unet))) > 0.98 * numel(unet)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_have_the_published_parameters_and_text_lengths(name, tmp_path):
    space, (parameters, side, tokens, scale) = space_of(name, tmp_path), STUDENTS[name]
    assert (space.latent_shape, space.scaling, space.prediction) == ((4, side, side), (0.0, scale), "epsilon")
    assert set(space.text_lengths.values()) == {tokens}
    network = on_meta(space.network_config)
    assert numel(network) == pytest.approx(parameters, rel=0.005)
    if name == "segmind-vega":
        counted = {part: numel(getattr(network, part)) for part in VEGA}
        assert counted == pytest.approx(VEGA, rel=0.005)
    if name.startswith("pixart"):
        assert not space.takes_sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_space_of_a_public_model(name, tmp_path):
    space = space_of(name, tmp_path)
    assert space.latent_shape == (4, 128, 128)
    assert space.resolution == 1024
    assert space.scaling == (0.0, 0.13025)
    assert space.prediction == "epsilon"
    assert space.path.num_train_timesteps == (1100 if name == "kolors" else 1000)
    assert len(space.start_sampling(20).timesteps) == 20
    if name == "pixart-sigma-1024":
        assert not space.takes_sizes
    else:
        assert space.time_ids.tolist() == [[1024, 1024, 0, 0, 1024, 1024]]


@pytest.mark.parametrize("name", full_but(PUBLISHED, "sdxl-base"))
def test_a_forward_of_the_public_shapes_fits_together(name, tmp_path):
    space = space_of(name, tmp_path)
    length, width, pooled = TEXT[name]
    conditioning = {"prompt_embeds": torch.empty(1, length, width, device="meta")}
    if pooled is None:
        conditioning["prompt_attention_mask"] = torch.ones(1, length, device="meta")
    else:
        conditioning |= {"pooled_prompt_embeds": torch.empty(1, pooled, device="meta")}
        conditioning |= {"time_ids": space.time_ids.to("meta")}
    x_t, t_B = torch.empty(1, *space.latent_shape, device="meta"), torch.empty(1, device="meta")
    fake = FakeScore(space, on_meta(space.network_config), FakeScoreConfig(), [0.5])
    prediction, (features,) = fake(x_t, t_B, conditioning)
    assert prediction.shape == x_t.shape
    assert features.shape[2:] == ((64, 64) if name == "pixart-sigma-1024" else (32, 32))
