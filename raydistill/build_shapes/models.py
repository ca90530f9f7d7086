"""The miniature diffusion models: denoising pre-training on renders, written as ordinary pipeline folders."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import diffusers
import torch
from torch import nn
from tqdm import tqdm

from raydistill.build_shapes.frame import Build, cached, fit, scenes_for
from raydistill.build_shapes.parts import text_part, vae_part
from raydistill.config.stages import LatentDtype
from raydistill.data.encode import PromptTable
from raydistill.diffusion.path import add_noise, expand, target
from raydistill.shapes import miniatures
from raydistill.shapes.captions import corrupt
from raydistill.shapes.render import render
from raydistill.spaces import load_space
from raydistill.spaces.base import Space

CORRUPTION = 0.55  # share of attributes redrawn in the captions of weak students
CAPTION_DROPOUT = 0.1  # share of empty captions, for classifier-free guidance


# -- which there are -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """How a miniature model is put together and trained."""

    network: Callable[[], nn.Module]
    assemble: Callable[[Build, nn.Module], diffusers.DiffusionPipeline]
    vae: str
    seed: int
    steps: int
    lr: float
    corruption: float = 0.0  # of the captions of the last third of the steps; students only
    start_timestep: int | None = None  # of the one-step start; students only
    samples: LatentDtype = "float16"  # numbers of the shipped samples; teachers only


def _flux(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    clip_tokenizer, clip = text_part(build, "clip")
    t5_tokenizer, t5 = text_part(build, "t5")
    vae = vae_part(build, "flux_vae")
    return diffusers.FluxPipeline(
        miniatures.flow_scheduler(), vae, clip, clip_tokenizer, t5, t5_tokenizer, network
    )  # fmt: skip


def _sd3(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    tokenizer, clip = text_part(build, "clip")
    tokenizer_2, clip_2 = text_part(build, "clip_projected")
    tokenizer_3, t5 = text_part(build, "t5_wide")
    return diffusers.StableDiffusion3Pipeline(
        network, miniatures.flow_scheduler(), vae_part(build, "flux_vae"),
        miniatures.with_identity_projection(clip), tokenizer, clip_2, tokenizer_2, t5, tokenizer_3,
    )  # fmt: skip


def _sdxl(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    tokenizer, clip = text_part(build, "clip")
    tokenizer_2, clip_2 = text_part(build, "clip_projected")
    return diffusers.StableDiffusionXLPipeline(
        vae_part(build, "sdxl_vae"), clip, clip_2, tokenizer, tokenizer_2, network, miniatures.sdxl_scheduler(),
        add_watermarker=False,
    )  # fmt: skip


def _sana(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    tokenizer, gemma = text_part(build, "gemma")
    return diffusers.SanaPipeline(tokenizer, gemma, vae_part(build, "sana_vae"), network, miniatures.sana_scheduler())


def _stable_diffusion(build: Build, network: nn.Module, tokenizer, encoder) -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae_part(build, "sd_vae"), encoder, tokenizer, network, miniatures.student_scheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sd15(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    return _stable_diffusion(build, network, *text_part(build, "clip"))


def _sd21(build: Build, network: nn.Module) -> diffusers.DiffusionPipeline:
    tokenizer, encoder = text_part(build, "clip_projected")
    return _stable_diffusion(build, network, tokenizer, miniatures.without_projection(encoder))


TEACHERS = {
    "flux": Model(network=miniatures.flux_transformer, assemble=_flux, vae="flux_vae", seed=2, steps=6000, lr=1.5e-3),
    "sd3": Model(network=miniatures.sd3_transformer, assemble=_sd3, vae="flux_vae", seed=4, steps=5000, lr=1.5e-3),
    "sdxl": Model(network=miniatures.sdxl_unet, assemble=_sdxl, vae="sdxl_vae", seed=5, steps=6000, lr=1.0e-3),
    "sana": Model(
        network=miniatures.sana_transformer, assemble=_sana, vae="sana_vae", seed=7, steps=3500, lr=2e-3,
        samples="bfloat16",
    ),
}  # fmt: skip
STUDENTS = {
    "sd15": Model(
        network=miniatures.student_unet, assemble=_sd15, vae="sd_vae", seed=3, steps=5400, lr=1e-3,
        corruption=CORRUPTION, start_timestep=999,
    ),
    "sd21": Model(
        network=miniatures.sd21_unet, assemble=_sd21, vae="sd_vae", seed=6, steps=5400, lr=1e-3,
        corruption=CORRUPTION, start_timestep=625,
    ),
}  # fmt: skip
MODELS = TEACHERS | STUDENTS


def build_model(build: Build, name: str) -> None:
    """Teachers learn clean captions. Students draw well, but not what was asked."""
    model = MODELS[name]
    torch.manual_seed(build.seed + model.seed)
    network = model.network()
    folder = build.weights / name
    for part in folder.glob("*"):
        if part.is_symlink():  # to another model's part, which must not be written over
            part.unlink()
    # random weights first, so that the folder can be read as a Space
    model.assemble(build, copy.deepcopy(network)).to(torch.float16).save_pretrained(folder)
    trained = train_diffusion(build, name, load_space(folder), network)
    model.assemble(build, trained).to(torch.float16).save_pretrained(folder)


# -- training --------------------------------------------------------------------------------------------


def render_latents(
    build: Build, space: Space, vae_name: str, corruption: float
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Latents of `build.renders` training renders [N, C, H, W], their captions, and those captions corrupted."""
    count = max(64, round(build.renders * min(1.0, build.scale)))
    chunks = [scenes_for(10**7 + i, 64, build.seed) for i in range(-(-count // 64))]

    @torch.no_grad()
    def make() -> dict[str, torch.Tensor]:
        vae = space.load_vae()
        bar = tqdm(enumerate(chunks), total=len(chunks), desc="encode renders", disable=None, mininterval=5)
        latents = [space.encode(vae, render(scenes, space.resolution, 10**7 + i)) for i, scenes in bar]
        return {"latents": torch.cat(latents)}

    latents = cached(build.work / f"latents_{vae_name}.safetensors", make)["latents"]
    rng = random.Random(f"corrupt/{build.seed}")
    scenes = [scene for chunk in chunks for scene in chunk]
    return latents, [s.caption for s in scenes], [corrupt(s, corruption, rng).caption for s in scenes]


def caption_table(space: Space, captions: Iterable[str]) -> PromptTable:
    """Conditioning of each distinct caption, the unconditional one at row 0."""
    table = PromptTable(space, ["", *captions], batch_size=256)
    for name, value in space.unconditional(table([""])).items():
        table.columns[name][:1] = value
    return table


def without_padding(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Conditioning cut after the longest caption: Sana's has 300 tokens, and its network does not read the padding."""
    mask = columns.get("prompt_attention_mask")
    if mask is None:
        return columns
    longest = int(mask.sum(1).max())
    return {name: value[:, :longest] for name, value in columns.items()}


def train_diffusion(build: Build, name: str, space: Space, network: nn.Module) -> nn.Module:
    """Denoising pre-training on renders, in the network's native prediction.

    With corruption the captions of the last third of the steps are corrupted: the network has learned to read, and
    learns not to rely on it.
    """
    model, batch = MODELS[name], 32
    latents, *captions = render_latents(build, space, model.vae, model.corruption)
    table = caption_table(space, captions[0] + captions[1])
    clean, corrupted = map(table.rows, captions)
    columns = without_padding(table.columns)
    corrupt_from = build.steps(round(model.steps * 2 / 3))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        row = torch.where(drop, 0, (corrupted if step >= corrupt_from else clean)[pick])
        noise = torch.randn(latents[pick].shape, generator=generator)
        t_B = torch.rand(batch, generator=generator)
        if space.prediction == "velocity":
            t_B = torch.sigmoid(torch.randn(batch, generator=generator) + 0.4)
        x_t = add_noise(space.path, latents[pick], noise, t_B)
        prediction = space.predict(network, x_t, t_B, {k: v[row] for k, v in columns.items()})
        error = prediction - target(space.path, space.prediction, latents[pick], noise, t_B)
        if space.prediction == "epsilon":
            # as the error of v: otherwise noisy times, where the caption decides the picture, hardly count
            error = error / expand(space.path.alpha_sigma(t_B)[0], error)
        return error.square().mean()

    return fit(build, name, network, loss, build.steps(model.steps), model.lr)
