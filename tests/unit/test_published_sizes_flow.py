"""The flow families at their published sizes: real configuration files on the meta device, no weights.

raydistill/model_configs/*.json hold the configuration files of the public models, by their path in the model's folder.
"""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
import torch
from lanes import full_but

from raydistill.config.networks import FakeScoreConfig
from raydistill.distillation.fake_score import FakeScore
from raydistill.spaces import load_space
from raydistill.spaces.published import write_folder

# Billions of transformer parameters and millions of VAE parameters, as published with the weights. The names round
# more: FLUX.1 is "12B", Qwen-Image "20B", Sana 1.5's larger one "4.8B", [klein] "4B", Z-Image "6B". SD 3.5 Medium is "2.5B" with its table of positions (0.23 B),
# which is stored but not trained.
PUBLISHED = {
    "sd3.5-medium": (2.24, 83.8),
    "sd3.5-large": (8.06, 83.8),
    "flux1-dev": (11.9, 83.8),
    "flux2-klein-base-4b": (3.88, 84.0),
    "z-image": (6.15, 83.8),
    "chroma1-hd": (8.9, 83.8),
    "sana1.5-1.6b": (1.6, 312.3),
    "sana1.5-4.8b": (4.72, 312.3),
    "qwen-image": (20.43, 126.9),
}
SANA = ("sana1.5-1.6b", "sana1.5-4.8b")  # of a coarser grid
SHORTER = full_but(PUBLISHED, *(name for name in PUBLISHED if name != "sana1.5-4.8b"))
CHANNELS = dict.fromkeys(PUBLISHED, 16) | dict.fromkeys(("flux2-klein-base-4b", *SANA), 32)
SHIFT = {
    "sd3.5-medium": 3.0,
    "sd3.5-large": 3.0,
    "flux1-dev": math.exp(1.15),  # the end of its range: 4,096 tokens
    "flux2-klein-base-4b": 3.0,
    "z-image": 6.0,
    "chroma1-hd": 3.0,
    "sana1.5-1.6b": 3.0,
    "sana1.5-4.8b": 3.0,
    "qwen-image": math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)),
}


def space_of(name: str, folder: Path):
    """The Space of a folder with these configuration files."""
    return load_space(write_folder(name, folder))


def on_meta(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SHORTER)
def test_parameters_are_the_published_ones(name, tmp_path):
    space = space_of(name, tmp_path)
    billions, millions = PUBLISHED[name]
    transformer = on_meta(space.part_config("transformer"))
    assert numel(transformer) == pytest.approx(billions * 1e9, rel=0.02)
    assert numel(on_meta(space.vae_config)) == pytest.approx(millions * 1e6, rel=0.02)
    if name == "sd3.5-medium":
        stored = sum(tensor.numel() for tensor in transformer.state_dict().values())
        assert stored == pytest.approx(2.5e9, rel=0.02)


def test_sana_of_512_px_has_the_published_parameters_and_its_decoder_doubles_five_times(tmp_path):
    space = space_of("sana-0.6b-512", tmp_path)
    assert (space.latent_shape, space.resolution) == ((32, 16, 16), 512)
    assert numel(on_meta(space.part_config("transformer"))) == pytest.approx(0.59e9, rel=0.01)
    assert len(space.decoder_widths) - 1 == 5
    decoder = on_meta(space.vae_config)
    x = torch.empty(1, 32, 16, 16, device="meta")
    for step in space.decoder_prefix(decoder, 3):
        x = step(x)
    assert x.shape == (1, space.decoder_widths[3], 128, 128)


@pytest.mark.parametrize("name", SHORTER)
def test_the_space_of_a_public_model(name, tmp_path):
    space = space_of(name, tmp_path)
    side = 32 if name in SANA else 128
    assert space.latent_shape == (CHANNELS[name], side, side)
    assert space.resolution == 1024
    assert name in SANA or space.image_tokens == 4096
    assert space.default_shift == pytest.approx(SHIFT[name], rel=1e-6)
    assert len(space.start_sampling(28).timesteps) == 28
    if name == "flux1-dev":
        assert space.embeds_guidance


@pytest.mark.parametrize("name", full_but(PUBLISHED, "sd3.5-medium", "flux1-dev"))
def test_a_forward_of_the_public_shapes_fits_together(name, tmp_path):
    """Text widths are those of T5-XXL, both CLIPs of SD 3 and Qwen3-4B (three layers for FLUX.2)."""
    space = space_of(name, tmp_path)
    network = on_meta(space.part_config("transformer"))
    length, width, pooled = {
        "flux1-dev": (512, 4096, 768),
        "flux2-klein-base-4b": (512, 3 * 2560, None),
        "z-image": (512, 2560, None),
        "chroma1-hd": (512, 4096, None),
        "sana1.5-1.6b": (300, 2304, None),
        "sana1.5-4.8b": (300, 2304, None),
        "qwen-image": (512, 3584, None),
    }.get(name, (77 + 256, 4096, 768 + 1280))
    conditioning = {"prompt_embeds": torch.empty(1, length, width, device="meta")}
    if pooled is not None:
        conditioning["pooled_prompt_embeds"] = torch.empty(1, pooled, device="meta")
    if name == "z-image":
        conditioning["prompt_tokens"] = torch.tensor([100])
    if name == "chroma1-hd" or name in SANA or name == "qwen-image":
        mask = "prompt_embeds_mask" if name == "qwen-image" else "prompt_attention_mask"
        conditioning[mask] = torch.empty(1, length, dtype=torch.int64, device="meta")
    x_t = torch.empty(1, *space.latent_shape, device="meta")
    t_B = torch.empty(1, device="meta")
    fake = FakeScore(space, network, FakeScoreConfig(), [0.5])
    prediction, (features,) = fake(x_t, t_B, conditioning)
    assert prediction.shape == x_t.shape
    assert features.shape[2:] == ((32, 32) if name in SANA else (64, 64))
