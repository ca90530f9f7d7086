"""The parts that the miniature models are put together from: judge, text encoders, VAEs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5EncoderModel,
    T5Tokenizer,
)

from raydistill.build_shapes.frame import Build, fit, scenes_for
from raydistill.shapes import miniatures
from raydistill.shapes.captions import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene, sample_scene
from raydistill.shapes.judge import Judge
from raydistill.shapes.render import render

# Where a part is found in the shipped models once its training folder is gone: (model, its folder, its tokenizer's).
OWNERS = {
    "clip": ("flux", "text_encoder", "tokenizer"),
    "clip_projected": ("sdxl", "text_encoder_2", "tokenizer_2"),
    "t5": ("flux", "text_encoder_2", "tokenizer_2"),
    "t5_wide": ("sd3", "text_encoder_3", "tokenizer_3"),
    "flux_vae": ("flux", "vae", None),
    "sdxl_vae": ("sdxl", "vae", None),
    "sd_vae": ("sd15", "vae", None),
}


def part_folders(build: Build, name: str) -> tuple[Path, Path | None]:
    """Folders of a part and of its tokenizer, in the training folder or else in the shipped model that has it."""
    trained = build.work / "parts" / name
    if trained.is_dir():
        return trained / "model", trained / "tokenizer"
    model, folder, tokenizer = OWNERS[name]
    return build.weights / model / folder, build.weights / model / tokenizer if tokenizer else None


def is_built(build: Build, name: str) -> bool:
    return (part_folders(build, name)[0] / "config.json").is_file()


def text_part(build: Build, name: str) -> tuple[Any, PreTrainedModel]:
    """(tokenizer, text encoder)."""
    model_class, tokenizer_class = {
        "clip": (CLIPTextModel, CLIPTokenizer),
        "clip_projected": (CLIPTextModelWithProjection, CLIPTokenizer),
        "t5": (T5EncoderModel, T5Tokenizer),
        "t5_wide": (T5EncoderModel, T5Tokenizer),
    }[name]
    folder, tokenizer = part_folders(build, name)
    return tokenizer_class.from_pretrained(tokenizer), model_class.from_pretrained(folder)


def vae_part(build: Build, name: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(part_folders(build, name)[0])


# -- judge ---------------------------------------------------------------------------------------------


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur (down to half size and back) and noise, so that the judge also reads imperfect pictures."""
    blur = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    mix = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.15
    return torch.lerp(images, blur, mix) + noise * torch.rand(len(images), 1, 1, 1, generator=generator)


def build_judge(build: Build) -> None:
    torch.manual_seed(build.seed)
    judge = Judge()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"judge/{build.seed}/{step}")
        scenes = [sample_scene(rng) for _ in range(64)]
        return judge.loss(degrade(render(scenes, (64, 32)[step % 2], step), generator), scenes)

    fit(build, "judge", judge, loss, build.steps(2500), 2e-3).save(build.weights / "judge")


# -- text encoders --------------------------------------------------------------------------------------


class _AttributeReader(nn.Module):
    """Text encoder with a linear read-out of all attributes of both objects: how the encoders learn to read."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2 * (len(SIZES) + len(COLORS) + len(SHAPES) + len(POSITIONS)) + 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.encoder(tokens)
        if isinstance(self.encoder, CLIPTextModel):
            return self.head(output.pooler_output)
        if isinstance(self.encoder, CLIPTextModelWithProjection):
            return self.head(output.text_embeds)
        return self.head(output.last_hidden_state.mean(1))


def attribute_vector(scene: Scene) -> torch.Tensor:
    """Multi-hot target of `_AttributeReader`: each object's attributes by its slot, then background, then count."""
    parts = []
    for slot in range(2):
        item = scene.objects[slot] if slot < len(scene.objects) else None
        for name, choices in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("position", POSITIONS)):
            parts += [float(item is not None and getattr(item, name) == choice) for choice in choices]
    return torch.tensor(parts + [float(scene.background == b) for b in BACKGROUNDS] + [float(len(scene.objects) == 2)])


def _build_text(build: Build, name: str, tokenizer: Any, encoder: PreTrainedModel, width: int, steps: int) -> None:
    """Pretrain a text encoder to read captions (real ones arrive pretrained, too)."""

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"text/{build.seed}/{step}")
        scenes = [sample_scene(rng, two_objects=0.5) for _ in range(64)]
        tokens = tokenizer(
            [s.caption for s in scenes], padding="max_length", max_length=20, truncation=True, return_tensors="pt"
        )
        wanted = torch.stack([attribute_vector(s) for s in scenes])
        return F.binary_cross_entropy_with_logits(reader(tokens.input_ids), wanted)

    reader = _AttributeReader(encoder, width)
    trained = fit(build, f"text_{name}", reader, loss, build.steps(steps), 2e-3).encoder
    folder = build.work / "parts" / name
    tokenizer.save_pretrained(folder / "tokenizer")
    trained.half().save_pretrained(folder / "model")


def build_clip(build: Build) -> None:
    torch.manual_seed(build.seed)
    tokenizer = miniatures.clip_tokenizer()
    _build_text(build, "clip", tokenizer, miniatures.clip_text_encoder(tokenizer), miniatures.TEXT_WIDTH, 1500)


def build_t5(build: Build) -> None:
    torch.manual_seed(build.seed + 1)
    tokenizer = miniatures.t5_tokenizer()
    _build_text(build, "t5", tokenizer, miniatures.t5_text_encoder(tokenizer), miniatures.TEXT_WIDTH, 1500)


def build_clip_projected(build: Build) -> None:
    """The second CLIP of SDXL and SD 3, and SD 2.1's."""
    torch.manual_seed(build.seed + 2)
    tokenizer = miniatures.clip_tokenizer()
    encoder = miniatures.clip_text_encoder(tokenizer, projected=True)
    _build_text(build, "clip_projected", tokenizer, encoder, miniatures.TEXT_WIDTH, 1500)


def build_t5_wide(build: Build) -> None:
    """SD 3's T5, as wide as both of its CLIPs together."""
    torch.manual_seed(build.seed + 3)
    tokenizer, width = miniatures.t5_tokenizer(), 2 * miniatures.TEXT_WIDTH
    _build_text(build, "t5_wide", tokenizer, miniatures.t5_text_encoder(tokenizer, width), width, 1500)


# -- VAEs ------------------------------------------------------------------------------------------------


def _build_vae(build: Build, name: str, vae: nn.Module, pixels: int, shift: bool, steps: int) -> None:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images = render(scenes_for(step, 8, build.seed), pixels, step)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        edges = sum(
            (torch.diff(reconstruction, dim=d) - torch.diff(images, dim=d)).abs().mean() for d in (2, 3)
        )  # sharp contours, where the shape is told
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        fidelity = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return fidelity + 0.5 * edges + 1e-4 * kl

    trained = fit(build, name, vae, loss, build.steps(steps), 2e-3, ema_decay=0.995)
    with torch.no_grad():
        images = render(scenes_for(10**6, 512, build.seed), pixels, 10**6)
        latents = torch.cat([trained.encode(part).latent_dist.mode() for part in images.split(64)])
    offset = latents.mean().item() if shift else 0.0
    trained.register_to_config(scaling_factor=1 / (latents - offset).std().item(), shift_factor=offset or None)
    trained.half().save_pretrained(build.work / "parts" / name / "model")


def build_flux_vae(build: Build) -> None:
    torch.manual_seed(build.seed)
    _build_vae(build, "flux_vae", miniatures.teacher_vae(), 64, shift=True, steps=2000)


def build_sd_vae(build: Build) -> None:
    torch.manual_seed(build.seed + 1)
    _build_vae(build, "sd_vae", miniatures.student_vae(), 32, shift=False, steps=4500)


def build_sdxl_vae(build: Build) -> None:
    torch.manual_seed(build.seed + 6)
    _build_vae(build, "sdxl_vae", miniatures.sdxl_vae(), 64, shift=False, steps=3000)
