"""The parts that the miniature models are put together from: judge, text encoders, VAEs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that models share. Once its training folder is gone, it is read from the shipped model `owner`."""

    seed: int
    owner: str
    folder: str  # in its owner
    steps: int


@dataclass(frozen=True, kw_only=True)
class Text(Part):
    """A text encoder, and its tokenizer."""

    tokenizer: Callable[[], Any] = miniatures.clip_tokenizer
    tokenizer_class: type = CLIPTokenizer
    encoder: Callable[[Any], PreTrainedModel]
    encoder_class: type[PreTrainedModel]
    width: int = miniatures.TEXT_WIDTH
    steps: int = 1500


@dataclass(frozen=True, kw_only=True)
class Vae(Part):
    folder: str = "vae"
    vae: Callable[[], nn.Module]
    pixels: int = 64
    shift: bool = False  # whether its latents are centred


WIDE = 2 * miniatures.TEXT_WIDTH  # SD 3's T5 is as wide as both of its CLIPs together
T5 = {"tokenizer": miniatures.t5_tokenizer, "tokenizer_class": T5Tokenizer, "encoder_class": T5EncoderModel}
TEXTS = {
    "clip": Text(
        seed=0, owner="flux", folder="text_encoder", encoder=miniatures.clip_text_encoder, encoder_class=CLIPTextModel
    ),
    "clip_projected": Text(  # the second CLIP of SDXL and SD 3, and SD 2.1's
        seed=2, owner="sdxl", folder="text_encoder_2", encoder=partial(miniatures.clip_text_encoder, projected=True),
        encoder_class=CLIPTextModelWithProjection,
    ),
    "t5": Text(seed=1, owner="flux", folder="text_encoder_2", encoder=miniatures.t5_text_encoder, **T5),
    "t5_wide": Text(
        seed=3, owner="sd3", folder="text_encoder_3", encoder=partial(miniatures.t5_text_encoder, width=WIDE),
        width=WIDE, **T5,
    ),
}  # fmt: skip
VAES = {
    "flux_vae": Vae(seed=0, owner="flux", vae=miniatures.teacher_vae, shift=True, steps=2000),
    "sdxl_vae": Vae(seed=6, owner="sdxl", vae=miniatures.sdxl_vae, steps=3000),
    "sd_vae": Vae(seed=1, owner="sd15", vae=miniatures.student_vae, pixels=32, steps=4500),
}
PARTS = TEXTS | VAES


def part_folder(build: Build, name: str, what: str = "model") -> Path:
    """Folder of a part (`model`) or of its `tokenizer`: in the training folder, or else in the shipped model."""
    trained, part = build.work / "parts" / name, PARTS[name]
    if trained.is_dir():
        return trained / what
    return build.weights / part.owner / (part.folder if what == "model" else part.folder.replace("text_encoder", what))


def is_built(build: Build, name: str) -> bool:
    return (part_folder(build, name) / "config.json").is_file()


def build_part(build: Build, name: str) -> None:
    torch.manual_seed(build.seed + PARTS[name].seed)
    (_build_text if name in TEXTS else _build_vae)(build, name)


def text_part(build: Build, name: str) -> tuple[Any, PreTrainedModel]:
    """(tokenizer, text encoder)."""
    text = TEXTS[name]
    tokenizer = text.tokenizer_class.from_pretrained(part_folder(build, name, "tokenizer"))
    return tokenizer, text.encoder_class.from_pretrained(part_folder(build, name))


def vae_part(build: Build, name: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(part_folder(build, name))


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


def _build_text(build: Build, name: str) -> None:
    """Pretrain a text encoder to read captions (real ones arrive pretrained, too)."""
    text = TEXTS[name]
    tokenizer = text.tokenizer()
    encoder = text.encoder(tokenizer)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"text/{build.seed}/{step}")
        scenes = [sample_scene(rng, two_objects=0.5) for _ in range(64)]
        tokens = tokenizer(
            [s.caption for s in scenes], padding="max_length", max_length=20, truncation=True, return_tensors="pt"
        )
        wanted = torch.stack([attribute_vector(s) for s in scenes])
        return F.binary_cross_entropy_with_logits(reader(tokens.input_ids), wanted)

    reader = _AttributeReader(encoder, text.width)
    trained = fit(build, f"text_{name}", reader, loss, build.steps(text.steps), 2e-3).encoder
    folder = build.work / "parts" / name
    tokenizer.save_pretrained(folder / "tokenizer")
    trained.half().save_pretrained(folder / "model")


# -- VAEs ------------------------------------------------------------------------------------------------


def _build_vae(build: Build, name: str) -> None:
    part = VAES[name]
    vae = part.vae()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images = render(scenes_for(step, 8, build.seed), part.pixels, step)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        edges = sum(
            (torch.diff(reconstruction, dim=d) - torch.diff(images, dim=d)).abs().mean() for d in (2, 3)
        )  # sharp contours, where the shape is told
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        fidelity = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return fidelity + 0.5 * edges + 1e-4 * kl

    trained = fit(build, name, vae, loss, build.steps(part.steps), 2e-3, ema_decay=0.995)
    with torch.no_grad():
        images = render(scenes_for(10**6, 512, build.seed), part.pixels, 10**6)
        latents = torch.cat([trained.encode(part).latent_dist.mode() for part in images.split(64)])
    offset = latents.mean().item() if part.shift else 0.0
    trained.register_to_config(scaling_factor=1 / (latents - offset).std().item(), shift_factor=offset or None)
    trained.half().save_pretrained(build.work / "parts" / name / "model")
