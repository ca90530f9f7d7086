"""What people do with a Stable Diffusion folder works on an exported one-step student, with diffusers' own classes.

LoRAs and ControlNets are made for the base model, as those that people have; references are our x_0 computed from the
same weights by hand. Tiny random networks.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from raydistill.data.encode import TextEncoder
from raydistill.diffusion.path import to_x0
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0

PROMPTS = ["a small red circle at the left on a white background", "two blue squares"]
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}
STARTS = (999, 625)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def space(sd_folder):
    """The base student's."""
    return load_space(sd_folder)


@pytest.fixture(scope="module")
def student(space):
    """A trained student: weights that are not the base model's."""
    unet = space.load_network()
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def exports(space, student, tmp_path_factory) -> dict[object, Path]:
    """Start timestep -> float32 export; ("half", start) -> float16 export."""
    root = tmp_path_factory.mktemp("ecosystem")
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    kinds = {s: (s, torch.float32) for s in STARTS} | {("half", s): (s, torch.float16) for s in STARTS}
    return {
        kind: export_student(space, student, start, root / f"{start}-{dtype}", card, dtype)
        for kind, (start, dtype) in kinds.items()
    }


@pytest.fixture(scope="module")
def noise(space):
    return torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def conditioning(space):
    return TextEncoder(space).encode(PROMPTS)


def latents(pipe, noise, **more) -> torch.Tensor:
    """What the pipeline reaches in its one step."""
    noise = noise.to(pipe.unet.dtype)
    return quiet(pipe)(PROMPTS, latents=noise, output_type="latent", **ONE_STEP, **more).images.float()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# -- LoRA -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(space, tmp_path_factory):
    """(folder of a LoRA trained on the base model's UNet, saved as diffusers' training scripts do; its tensors)."""
    unet = space.load_network()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:  # zero before training
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(unet).items()}
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict(), safe_serialization=True
    )
    return folder, state


@pytest.mark.parametrize("start", STARTS)
def test_a_lora_of_the_base_model_adapts_the_student(start, space, student, exports, lora, noise, conditioning):
    """The step is our x_0 of a UNet with W + (alpha / r) B A written into its layers; without the LoRA it is as before."""
    folder, state = lora
    pipe = StableDiffusionPipeline.from_pretrained(exports[start])
    before = latents(pipe, noise)
    pipe.load_lora_weights(folder)
    adapted = latents(pipe, noise)

    fused = copy.deepcopy(student)
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    assert len(layers) >= 4 * 2 * 3  # four projections in two attentions of each block at least
    for layer in layers:
        delta = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        fused.get_submodule(layer).weight.data += 8 / 4 * delta
    with torch.no_grad():
        assert close(adapted, one_step_x0(space, fused, noise, conditioning, start))
        assert close(before, one_step_x0(space, student, noise, conditioning, start))
    assert not close(adapted, before, 1e-2)
    assert close(latents(pipe, noise, cross_attention_kwargs={"scale": 0.0}), before)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert close(latents(pipe, noise), adapted)


# -- ControlNet -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlnet(space):
    """Made for the base model: `from_unet`, with its zero convolutions no longer zero, as after training."""
    net = ControlNetModel.from_unet(space.load_network(), conditioning_embedding_out_channels=(8, 16, 32))
    generator = torch.Generator().manual_seed(4)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    for parameter in net.controlnet_cond_embedding.parameters():
        parameter.data *= 3  # the picture counts
    return net.eval()


@pytest.mark.parametrize("start", STARTS)
def test_a_controlnet_of_the_base_model_steers_the_student(
    start, space, student, exports, controlnet, noise, conditioning
):
    """Its residuals enter the one evaluation; with the scale 0 the picture is the student's own."""
    plain = StableDiffusionPipeline.from_pretrained(exports[start])
    pipe = StableDiffusionControlNetPipeline.from_pipe(plain, controlnet=controlnet)
    image = torch.rand(2, 3, space.resolution, space.resolution, generator=torch.Generator().manual_seed(5))
    steered = latents(pipe, noise, image=image, controlnet_conditioning_scale=0.5)

    t_B = space.path.t_of_timestep(torch.full((2,), float(start), dtype=torch.float64))
    sigma = 1.0 if start == 999 else space.path.alpha_sigma(t_B)[1][0]
    x_t, embeds = noise * sigma, conditioning["prompt_embeds"]
    with torch.no_grad():
        down, middle = controlnet(x_t, start, embeds, image, 0.5, return_dict=False)
        prediction = student(
            x_t, start, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    assert close(steered, to_x0(space.path, space.prediction, x_t, prediction, t_B))
    own = latents(plain, noise)
    assert not close(steered, own, 1e-2)
    assert close(latents(pipe, noise, image=image, controlnet_conditioning_scale=0.0), own)
    other = latents(pipe, noise, image=1 - image, controlnet_conditioning_scale=0.5)
    assert not close(other, steered, 1e-2)


# -- saving and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loader", [DiffusionPipeline, AutoPipelineForText2Image])
def test_generic_loaders_save_and_load_the_same_student(
    loader, start, space, student, exports, noise, conditioning, tmp_path
):
    """Class, scheduler and weights survive a round trip, so that the one step stays our x_0."""
    with torch.no_grad():
        ours = one_step_x0(space, student, noise, conditioning, start)
    pipe = loader.from_pretrained(exports[start])
    assert type(pipe) is StableDiffusionPipeline
    assert close(latents(pipe, noise), ours)
    pipe.save_pretrained(tmp_path / "again", safe_serialization=True)
    again = loader.from_pretrained(tmp_path / "again", use_safetensors=True)
    assert torch.equal(latents(again, noise), latents(pipe, noise))
    assert quiet(again).scheduler.timesteps.tolist() == [start]


@pytest.mark.parametrize("start", STARTS)
def test_a_half_precision_export_runs_as_it_is_loaded(start, exports, noise):
    """Without a dtype every part is loaded in float32, with one every part in that; both draw nearly the same."""
    folder = exports["half", start]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    half = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    for loaded, dtype in ((pipe, torch.float32), (half, torch.float16)):
        assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {dtype}
    reference = latents(StableDiffusionPipeline.from_pretrained(exports[start]), noise)
    assert close(latents(pipe, noise), reference, 1e-2)
    assert close(latents(half, noise), reference, 5e-2)  # x_0 amplifies rounding 14.65 times at t = 999


@pytest.mark.parametrize("start", STARTS)
def test_fp16_variants_are_written_and_read(start, exports, noise, tmp_path):
    """`variant="fp16"` beside the float32 files, as the hub's repositories have both."""
    pipe = StableDiffusionPipeline.from_pretrained(exports[start])
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    pipe.to(torch.float16).save_pretrained(tmp_path, safe_serialization=True, variant="fp16")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        full, half = (load_file(tmp_path / part / f"{stem}{kind}.safetensors") for kind in ("", ".fp16"))
        assert half.keys() == full.keys()
        assert all(torch.equal(half[name], value.to(half[name].dtype)) for name, value in full.items())
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16, use_safetensors=True)
    assert loaded.unet.dtype == torch.float16
    reference = latents(StableDiffusionPipeline.from_pretrained(exports[start]), noise)
    assert close(latents(loaded, noise), reference, 5e-2)
