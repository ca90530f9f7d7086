"""Teacher samples and the Bridges, one per pair of VAEs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from raydistill.bridge.trainer import build_trainer
from raydistill.build_shapes.frame import Build
from raydistill.build_shapes.models import TEACHERS
from raydistill.build_shapes.starts import training_prompts
from raydistill.config.reading import CONFIGS, load, validate
from raydistill.config.stages import LatentDtype
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.pairs import Pairs, PairSet, existing_shards, write_pairs
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.data.vae import PairEncoder, resized
from raydistill.pictures.augment import MOTTLE, REGIONS, TURN, blended, recoloured
from raydistill.shapes.captions import single_scenes
from raydistill.spaces import load_space
from raydistill.storage.atomic import replacing

SAMPLE_STEPS = 12
SAMPLE_GUIDANCE = 3.0  # of the teacher's samples
SHIPPED_SAMPLES = 192


def _synthesise(
    build: Build, teacher_name: str, folder: Path, count: int, seed: int, dtype: LatentDtype = "float16"
) -> Path:
    teacher, student = load_space(build.weights / teacher_name), load_space(build.weights / "sd15")
    recipe = Recipe(
        teacher=teacher,
        student=student,
        source=training_prompts(build),
        count=count,
        batch_size=64,
        shard_size=256,
        seed=seed,
        steps=SAMPLE_STEPS,
        guidance_scale=SAMPLE_GUIDANCE,
        dtype=dtype,
    )
    held_out = {scene.caption for scene in single_scenes(held_out=True)}
    synthesise(recipe, folder, LocalTeacher(teacher, teacher.load_network()), forbidden=held_out)
    return folder


def build_samples(build: Build, name: str) -> None:
    """A small teacher-sampled set that is shipped, without previews: the discriminator's real data."""
    folder, kind = build.work / f"samples_{name}", TEACHERS[name].samples
    pairs = PairSet(_synthesise(build, name, folder, SHIPPED_SAMPLES, build.seed, kind))
    rows = pairs.rows(range(SHIPPED_SAMPLES))
    write_pairs(
        build.weights / "samples" / name, 0, prompts=rows.prompts, prompt_ids=rows.prompt_ids, seeds=rows.seeds, z_teacher=rows.z_teacher, z_student=rows.z_student,
        vaes={role: next(iter(found)) for role, found in pairs.vaes.items()},
    )  # fmt: skip


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures between and beside the given ones [B, 3, S, S]: two of them blended in soft regions, colours mixed.

    A student under training draws such pictures, and a Bridge that has never seen them would change their colours, so
    that the teacher judges other pictures than the student's.
    """
    count = len(images)

    def noise(channels: int, cells: int) -> torch.Tensor:
        return torch.randn(count, channels, cells, cells, generator=generator)

    other = images[torch.randperm(count, generator=generator)]
    images = blended(images, other, noise(1, REGIONS), noise(1, 1))
    turn = TURN * torch.randn(count, 3, 3, generator=generator) * torch.rand(count, 1, 1, generator=generator)
    return recoloured(images, turn, noise(3, MOTTLE), torch.rand(count, 1, 1, 1, generator=generator))


@torch.no_grad()
def varied_pairs(
    encoder: PairEncoder, vaes: tuple[nn.Module, nn.Module], rows: Pairs, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, list[bytes]]:
    """Pairs for a Bridge from N teacher samples: the first N // 4 as they are; N * 9 // 16 - N // 4 varied pictures; then
    what the student's VAE draws from latents that no encoder gave, as a student under training makes them.

    Args:
        vaes: the teacher's and the student's, on the CPU.

    Returns:
        z_teacher, z_student and previews, N of each.
    """
    (teacher, student), (teacher_vae, student_vae), count = (encoder.teacher, encoder.student), vaes, len(rows)
    images = torch.cat([teacher.decode(teacher_vae, chunk.float()) for chunk in rows.z_teacher.split(32)])
    plain, pictures, beside = images.tensor_split([count // 4, count * 9 // 16])
    z_teacher, z_student, pngs = encoder.encode(torch.cat([plain, vary(pictures, generator)]))
    latents = rows.z_student[-len(beside) :].float()
    other = latents[torch.randperm(len(latents), generator=generator)]
    share, strength = torch.rand(2, len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    latents = torch.lerp(latents, other, share**3) + 0.6 * strength * noise
    drawn = torch.cat([student.decode(student_vae, chunk) for chunk in latents.split(32)])
    z_beside, _, beside_pngs = encoder.encode(resized(drawn, teacher.resolution))
    return torch.cat([z_teacher, z_beside]), torch.cat([z_student, latents]), pngs + beside_pngs


def build_varied_pairs(build: Build, name: str, folder: Path, count: int) -> None:
    """The shipped Bridge's pairs, see `varied_pairs`."""
    teacher, student = load_space(build.weights / name), load_space(build.weights / "sd15")
    sampled = max(64, round(1024 * min(1.0, build.scale)))
    samples = PairSet(_synthesise(build, name, build.work / f"pairs_{name}", sampled, build.seed + 1))
    encoder, vaes = PairEncoder(teacher, student), (teacher.load_vae(), student.load_vae())
    shard = 512
    for index in tqdm(range(-(-count // shard)), desc="varied pairs", disable=None):
        if index in existing_shards(folder):
            continue
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + index)
        rows = samples.rows(torch.randint(len(samples), (shard,), generator=generator).tolist())
        z_teacher, z_student, pngs = varied_pairs(encoder, vaes, rows, generator)
        write_pairs(
            folder,
            index,
            prompts=rows.prompts,
            prompt_ids=rows.ids,
            seeds=[build.seed] * shard,
            z_teacher=z_teacher,
            z_student=z_student,
            previews=pngs,
        )


def build_bridge(build: Build, name: str) -> None:
    """The shipped Bridge: its pair's in configs/, on teacher samples and varied ones, by the same trainer as a job."""
    pairs = build.work / f"varied_{name}"
    build_varied_pairs(build, name, pairs, max(512, round(8192 * min(1.0, build.scale))))
    config = load(CONFIGS / f"shapes_{name}_sd15.yaml").model_dump()
    config["student"]["model"], config["teacher"]["model"] = str(build.weights / "sd15"), str(build.weights / name)
    config["bridge"]["steps"] = build.steps(config["bridge"]["steps"])
    settings = validate(config)
    trainer = build_trainer(settings, pairs)
    state = build.work / f"bridge_{name}" / "state.pt"
    if state.is_file():
        trainer.load_state_dict(torch.load(state, weights_only=True))
    first, last = trainer.step_count, settings.bridge.steps
    for step in tqdm(range(first, last), desc=f"bridge_{name}", initial=first, total=last, disable=None):
        losses = trainer.step(trainer.objective.batch(step))
        if step % 100 == 0:
            tqdm.write(f"bridge {step}: {losses}")
            with replacing(state, alone=True) as fresh:
                torch.save(trainer.state_dict(), fresh)
    metrics, picture = trainer.validation()
    tqdm.write(f"bridge: {metrics}")
    picture.save(build.work / f"bridge_{name}.png")
    trainer.bridge.save(build.weights / "bridge" / f"sd15-{name}", metrics, torch.float16)
