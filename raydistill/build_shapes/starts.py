"""Prompt files, and the one-step starts of the weak students: regression on their own samples, then shared-space DMD."""

from __future__ import annotations

import copy
import random

import torch
import torch.nn.functional as F
from tqdm import tqdm

from raydistill.bridge.model import Bridge
from raydistill.build_shapes.frame import Build, cached, fit
from raydistill.build_shapes.models import STUDENTS, caption_table
from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.diffusion.noise import normal
from raydistill.distillation.local import LocalScores, local_batches
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.shapes.captions import evaluation_captions, sample_scene, single_scenes
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0

START_GUIDANCE = 1.0  # of the weak student when it distils itself into its one-step start


def build_prompts(build: Build) -> None:
    """Prompt files: every training one-object caption and half as many two-object ones; the held-out captions."""
    singles = [scene.caption for scene in single_scenes(held_out=False)]
    rng, pairs = random.Random(build.seed), {}
    while len(pairs) < len(singles) // 2:
        pairs[sample_scene(rng, held_out=False, two_objects=1.0).caption] = None
    build.weights.mkdir(parents=True, exist_ok=True)
    (build.weights / "prompts.txt").write_text("\n".join([*singles, *pairs]) + "\n")
    held_out = dict.fromkeys(evaluation_captions(len(single_scenes(held_out=True))))
    (build.weights / "heldout.txt").write_text("\n".join(held_out) + "\n")


def training_prompts(build: Build) -> PromptSet:
    return read_prompts(build.weights / "prompts.txt", "prompt", "fail", 200)


def start_config(build: Build, name: str) -> Config:
    """Shared-space DMD of the weak student from itself."""
    model = str(build.weights / name)
    return validate(
        {
            "student": {"model": model, "unet": None, "start_timestep": STUDENTS[name].start_timestep, "lr": 5e-5},
            "teacher": {"model": model, "guidance_scale": START_GUIDANCE},
            "bridge": {"projector": "identity", "checkpoint": None},
            "fake_score": {"kind": "full", "lr": 1e-4, "updates": 4},
            "discriminator": {"weight": 0},
            "evaluation": {"judge": str(build.weights / "judge")},
        }
    )


def build_start(build: Build, name: str) -> None:
    """One-step start of the weak student: first its own sampler's pictures by regression, then shared-space DMD."""
    space = load_space(build.weights / name)
    prompts = training_prompts(build)
    table = caption_table(space, prompts.prompts)
    unet = space.load_network()
    count = max(64, round(4096 * min(1.0, build.scale)))
    captions = prompts.at(build.seed, range(count))[1]

    @torch.no_grad()
    def make() -> dict[str, torch.Tensor]:
        noises, latents = [], []
        for start in tqdm(range(0, count, 128), desc="sample weak student", disable=None):
            ids = range(start, min(start + 128, count))
            noise = normal(build.seed, ids, space.latent_shape, "start")
            noises.append(noise)
            latents.append(space.sample(unet, noise, table(captions[ids.start : ids.stop]), {}, 20, 1.0))
        return {"noise": torch.cat(noises), "latents": torch.cat(latents)}

    pairs = cached(build.work / f"{name}_ode.safetensors", make)
    start = copy.deepcopy(unet).train().requires_grad_(True)
    timestep = STUDENTS[name].start_timestep

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(count, (32,), generator=generator)
        conditioning = table([captions[i] for i in pick.tolist()])
        return F.mse_loss(
            one_step_x0(space, start, pairs["noise"][pick], conditioning, timestep), pairs["latents"][pick]
        )

    regressed = fit(build, f"{name}_regression", start, loss, build.steps(1500), 5e-4)
    config = start_config(build, name)
    distiller = build_distiller(
        config,
        student_space=space,
        teacher_space=space,
        student=regressed,
        bridge=Bridge.create(space, space, config.bridge),
        fake_network=space.load_network(),
        source=local_batches(prompts, dict.fromkeys(("student", "teacher"), table), 32, build.seed),
    )
    scores = LocalScores(space, unet, table([""]), START_GUIDANCE)
    for _ in tqdm(range(build.steps(100)), desc=f"{name}_start", disable=None):
        distillation_step(distiller, scores, 4, overlap=False)
    distiller.networks.student.half().save_pretrained(build.weights / f"{name}-onestep" / "unet")
