"""Spaces against diffusers' own pipelines: same noise, prompt and guidance give the same latents and pictures."""

import json

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline

from raydistill.data.vae import in_chunks
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.flux import pack, unpack

PROMPT = "a small red circle at the left on a white background"


def noise_for(space):
    return torch.randn(1, *space.latent_shape, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def ours(space, steps, guidance_scale):
    text = space.load_text()
    conditioning, empty = space.encode_prompts(text, [PROMPT]), space.encode_prompts(text, [""])
    latents = space.sample(space.load_network(), noise_for(space), conditioning, empty, steps, guidance_scale)
    return latents, space.decode(space.load_vae(), latents)


def test_flux_sampling_equals_the_pipeline(flux_folder):
    space = load_space(flux_folder)
    latents, image = ours(space, 4, 3.0)
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(
        prompt=PROMPT, negative_prompt="", true_cfg_scale=3.0, num_inference_steps=4, max_sequence_length=20,
        latents=pack(noise_for(space)), height=64, width=64,
    )  # fmt: skip
    theirs = unpack(pipe(**arguments, output_type="latent").images, 16, 16)
    torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-4)
    picture = pipe(**arguments, output_type="pt").images * 2 - 1
    torch.testing.assert_close(image, picture, rtol=0, atol=1e-3)


def test_stable_diffusion_sampling_equals_the_pipeline(sd_folder):
    space = load_space(sd_folder)
    latents, image = ours(space, 4, 2.0)
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(
        prompt=PROMPT, negative_prompt="", guidance_scale=2.0, num_inference_steps=4, latents=noise_for(space),
        height=32, width=32,
    )  # fmt: skip
    theirs = pipe(**arguments, output_type="latent").images
    torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-4)
    picture = pipe(**arguments, output_type="pt").images * 2 - 1
    torch.testing.assert_close(image, picture, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["flux_folder", "sd_folder"])
def test_normalisation_is_the_vae_configs_and_reversible(name, request):
    space = load_space(request.getfixturevalue(name))
    raw = torch.randn(2, *space.latent_shape)
    shift, scale = space.vae_config.get("shift_factor") or 0.0, space.vae_config["scaling_factor"]
    torch.testing.assert_close(space.normalise(raw), (raw - shift) * scale)
    torch.testing.assert_close(space.denormalise(space.normalise(raw)), raw)


def test_packing_is_fluxs_own():
    latents = torch.randn(2, 8, 16, 12)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 8, 16, 12))
    assert torch.equal(unpack(pack(latents), 16, 12), latents)


def test_wrong_folders_are_named(tmp_path, flux_folder):
    with pytest.raises(InputError, match="not a diffusers pipeline folder"):
        load_space(tmp_path)
    with pytest.raises(InputError, match="is a FluxPipeline, but a StableDiffusionPipeline"):
        load_space(flux_folder, "StableDiffusionPipeline")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MysteryPipeline"}))
    with pytest.raises(InputError, match="MysteryPipeline is not a known family"):
        load_space(tmp_path)


@pytest.mark.parametrize(("pixels", "most"), [(1024, 1), (512, 4), (64, 6)])
def test_a_vae_never_sees_more_than_a_megapixel_at_once(flux_folder, monkeypatch, pixels, most):
    """16 pictures of 1024 px would take it 52 GB."""
    space = load_space(flux_folder)
    monkeypatch.setattr(type(space), "resolution", pixels)  # as a real model's; the miniature's pictures are small
    vae, seen = space.load_vae(), []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    latents = torch.randn(6, *space.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        pictures = space.decode(vae, latents)
        assert max(seen) == most
        assert sum(seen) == len(pictures) == 6
        torch.testing.assert_close(pictures[5:], space.decode(vae, latents[5:]), rtol=0, atol=1e-5)
        seen.clear()
        z_teacher = in_chunks(space, lambda part: space.encode(vae, part), pictures)
    assert max(seen) == min(8, 2**20 // pixels**2)
    torch.testing.assert_close(z_teacher[:1], space.encode(vae, pictures[:1]), rtol=0, atol=1e-5)
