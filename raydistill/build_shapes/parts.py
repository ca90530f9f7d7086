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
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    GemmaTokenizer,
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
    instruction: Callable[[], str] = str  # what its pipeline puts in front of a prompt


@dataclass(frozen=True, kw_only=True)
class Vae(Part):
    folder: str = "vae"
    vae: Callable[[], nn.Module]
    vae_class: type[nn.Module] = AutoencoderKL
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
    "gemma": Text(
        seed=4, owner="sana", folder="text_encoder", tokenizer=miniatures.gemma_tokenizer,
        tokenizer_class=GemmaTokenizer, encoder=miniatures.gemma_text_encoder, encoder_class=Gemma2Model,
        width=miniatures.GEMMA_WIDTH, instruction=miniatures.sana_instruction,
    ),
}  # fmt: skip
VAES = {
    "flux_vae": Vae(seed=0, owner="flux", vae=miniatures.teacher_vae, shift=True, steps=2000),
    "sdxl_vae": Vae(seed=6, owner="sdxl", vae=miniatures.sdxl_vae, steps=3000),
    "sd_vae": Vae(seed=1, owner="sd15", vae=miniatures.student_vae, pixels=32, steps=4500),
    "sana_vae": Vae(seed=7, owner="sana", vae=miniatures.sana_vae, vae_class=AutoencoderDC, steps=5000),
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


def vae_part(build: Build, name: str) -> nn.Module:
    return VAES[name].vae_class.from_pretrained(part_folder(build, name))


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
    """Text encoder with a linear read-out of all attributes of both objects: how the encoders learn to read.

    Where a pipeline puts an instruction in front of every prompt, its `lead` [1, L] of tokens is read once for all rows:
    a causal encoder reads it without what follows.
    """

    def __init__(self, encoder: nn.Module, width: int, lead: torch.Tensor | None = None) -> None:
        super().__init__()
        self.encoder, self.lead = encoder, lead
        self.head = nn.Linear(width, 2 * (len(SIZES) + len(COLORS) + len(SHAPES) + len(POSITIONS)) + 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.lead is not None:
            before = self.encoder(self.lead, use_cache=True).past_key_values
            before.batch_repeat_interleave(len(tokens))
            output = self.encoder(tokens, past_key_values=before, use_cache=True).last_hidden_state
            read = (tokens != self.encoder.config.pad_token_id).unsqueeze(2)
            return self.head((output * read).sum(1) / read.sum(1))
        output = self.encoder(tokens)
        if isinstance(self.encoder, CLIPTextModel):
            return self.head(output.pooler_output)
        if isinstance(self.encoder, CLIPTextModelWithProjection):
            return self.head(output.text_embeds)
        return self.head(output.last_hidden_state.mean(1))


def attribute_vector(scene: Scene) -> torch.Tensor:
    """Multi-hot target of `_AttributeReader`: each object's attributes by its slot, then background, then count."""
    values = []
    for slot in range(2):
        item = scene.objects[slot] if slot < len(scene.objects) else None
        for name, choices in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("position", POSITIONS)):
            values += [float(item is not None and getattr(item, name) == choice) for choice in choices]
    return torch.tensor(values + [float(scene.background == b) for b in BACKGROUNDS] + [float(len(scene.objects) == 2)])


def _build_text(build: Build, name: str) -> None:
    """Pretrain a text encoder to read captions (real ones arrive pretrained, too)."""
    text = TEXTS[name]
    tokenizer = text.tokenizer()
    encoder = text.encoder(tokenizer)
    instruction = text.instruction()
    # the instruction's last token is a space, which becomes part of the caption's first word
    lead = torch.tensor([tokenizer.encode(instruction)[:-1]]) if instruction else None

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"text/{build.seed}/{step}")
        scenes = [sample_scene(rng, two_objects=0.5) for _ in range(64)]
        captions = [s.caption if lead is None else f" {s.caption}" for s in scenes]
        tokens = tokenizer(
            captions, padding="max_length", max_length=20, truncation=True, return_tensors="pt", **behind
        )
        wanted = torch.stack([attribute_vector(s) for s in scenes])
        return F.binary_cross_entropy_with_logits(reader(tokens.input_ids), wanted)

    behind = {} if lead is None else {"add_special_tokens": False, "padding_side": "right"}
    reader = _AttributeReader(encoder, text.width, lead)
    trained = fit(build, f"text_{name}", reader, loss, build.steps(text.steps), 2e-3).encoder
    folder = build.work / "parts" / name
    tokenizer.save_pretrained(folder / "tokenizer")
    trained.half().save_pretrained(folder / "model")


# -- VAEs ------------------------------------------------------------------------------------------------


def _coded(vae: nn.Module, images: torch.Tensor, generator: torch.Generator | None = None) -> tuple[Any, Any]:
    """Latents of pictures [B, 3, S, S], and their Kullback-Leibler divergence a number.

    Args:
        generator: of the posterior's sample while a VAE learns; None for its mode. A DC-AE has no posterior: its latents
            are disturbed by a tenth of their deviation, so that near latents mean like pictures.
    """
    coded = vae.encode(images)
    if not isinstance(vae, AutoencoderDC):
        posterior = coded.latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents, posterior.kl().mean() / posterior.mean[0].numel()
    latents = coded.latent
    if generator is not None:
        latents = latents + 0.1 * latents.std() * torch.randn(latents.shape, generator=generator)
    return latents, 0.0


def _build_vae(build: Build, name: str) -> None:
    part = VAES[name]
    vae = part.vae()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images = render(scenes_for(step, 8, build.seed), part.pixels, step)
        latents, kl = _coded(vae, images, generator)
        reconstruction = vae.decode(latents).sample
        edges = sum(
            (torch.diff(reconstruction, dim=d) - torch.diff(images, dim=d)).abs().mean() for d in (2, 3)
        )  # sharp contours, where the shape is told
        fidelity = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return fidelity + 0.5 * edges + 1e-4 * kl

    trained = fit(build, name, vae, loss, build.steps(part.steps), 2e-3, ema_decay=0.995)
    with torch.no_grad():
        images = render(scenes_for(10**6, 512, build.seed), part.pixels, 10**6)
        latents = torch.cat([_coded(trained, some)[0] for some in images.split(64)])
    offset = latents.mean().item() if part.shift else 0.0
    scale = {"scaling_factor": 1 / (latents - offset).std().item()}
    trained.register_to_config(**scale if part.vae_class is AutoencoderDC else scale | {"shift_factor": offset or None})
    trained.half().save_pretrained(build.work / "parts" / name / "model")
