"""Students of Stable Diffusion 2.1's layout: 2.1-base (epsilon) and 2.1 (v-prediction), starting at t = 999 and 625.

Tiny random networks of the real classes; references are diffusers' pipeline and closed forms in float64.
"""

from __future__ import annotations

import math

import pytest
import tiny_diffusion_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline

from raydistill.data.encode import TextEncoder
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0

PROMPTS = ["a small red circle at the left on a white background", "two blue squares"]
CASES = [(prediction, start) for prediction in ("epsilon", "v_prediction") for start in (999, 625)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prediction type -> pipeline folder."""
    root = tmp_path_factory.mktemp("sd21")
    return {prediction: tiny.save_sd21(root / prediction, prediction) for prediction in ("epsilon", "v_prediction")}


def noise_for(space):
    return torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(5))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_spaces_read_both_models_as_they_are(folders):
    base, v = (load_space(folders[prediction]) for prediction in ("epsilon", "v_prediction"))
    assert (base.latent_shape, base.resolution, base.prediction) == ((4, 8, 8), 32, "epsilon")
    assert (v.latent_shape, v.resolution, v.prediction) == ((4, 12, 12), 48, "v_prediction")
    assert base.scaling == v.scaling == (0.0, 0.18215)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_equals_the_pipeline(prediction, folders):
    """PNDM for 2.1-base, DDIM for 2.1, as published; with guidance."""
    space = load_space(folders[prediction])
    encoded, empty = TextEncoder(space).encode(PROMPTS), TextEncoder(space).encode_unconditional()
    with torch.no_grad():
        ours = space.sample(space.load_network(), noise_for(space), encoded, empty, 4, 3.0)
        picture = space.decode(space.load_vae(), ours)
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folders[prediction]))
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise_for(space)}
    theirs = pipe(PROMPTS, output_type="latent", **arguments).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    torch.testing.assert_close(picture, pipe(PROMPTS, output_type="pt", **arguments).images * 2 - 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("prediction", "start"), CASES)
def test_one_step_x0_equals_a_float64_computation(prediction, start, folders):
    """alpha_bar = prod(1 - beta) of the scaled-linear schedule; eps: (x - sigma eps) / alpha; v: alpha x - sigma v."""
    space = load_space(folders[prediction])
    noise, encoded = noise_for(space), TextEncoder(space).encode(PROMPTS)
    with torch.no_grad():
        ours = one_step_x0(space, space.load_network(), noise, encoded, start)

        roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(start + 1)]
        alpha_bar = math.prod(1 - root**2 for root in roots)
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_t = noise.double() * (1.0 if start == 999 else sigma)
        unet = space.load_network().double()
        output = unet(x_t, start, encoder_hidden_states=encoded["prompt_embeds"].double(), return_dict=False)[0]
        wanted = (x_t - sigma * output) / alpha if prediction == "epsilon" else alpha * x_t - sigma * output
    assert output.std() > 0.1
    assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(("prediction", "start"), CASES)
def test_the_exported_pipelines_step_is_our_x0(prediction, start, folders, tmp_path):
    """The latents that plain diffusers reaches with one step and no guidance."""
    space = load_space(folders[prediction])
    unet, noise, encoded = space.load_network(), noise_for(space), TextEncoder(space).encode(PROMPTS)
    with torch.no_grad():
        ours = one_step_x0(space, unet, noise, encoded, start)
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="stable-diffusion-2-1", steps=1)
    folder = export_student(space, unet, start, tmp_path / "export", card, torch.float32)
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    theirs = pipe(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent").images
    assert pipe.scheduler.timesteps.tolist() == [start]
    assert pipe.scheduler.config.prediction_type == prediction
    assert (ours - theirs).abs().max() <= 2e-5 * ours.abs().max()
