"""Tiny pipelines of every family, and what a role needs of them; made on the CPU, before the pretence begins."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_diffusion_pipelines as diffusion
import tiny_flow_pipelines as flow
import torch
from diffusers import UNet2DConditionModel
from pretended_tensors import CUDA

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import build_objective
from raydistill.config.reading import load
from raydistill.config.schema import Config
from raydistill.data.encode import TextEncoder, to_numpy
from raydistill.data.pairs import write_pairs
from raydistill.distillation.batches import Real
from raydistill.distillation.updates import Distiller, build_distiller
from raydistill.spaces import load_space
from raydistill.spaces.base import Space

CAPTIONS = [
    "a small red circle at the left on a white background",
    "a large blue square at the top on a black background",
    "a small green cross at the center on a gray background",
    "a large red square at the right on a white background",
]
SMALL = (
    "bridge.embed_dim=12", "bridge.depths=[2]", "bridge.heads=2", "bridge.window=4", "bridge.attention.rows=8",
    "bridge.batch_size=4", "fake_score.rank=4", "discriminator.width=8", "distill.batch_size=4",
    "fake_score.updates=1", "distill.mixed_precision=true", "prompts.encoder_dtype=bfloat16",
)  # fmt: skip
IN_PARTS = "distill.micro_batches=2"
SAVE = flow.SAVE | {"sdxl": diffusion.save_sdxl, "kolors": diffusion.save_kolors, "pixart": diffusion.save_pixart}
FAMILIES = tuple(SAVE)
STUDENTS = {"pixart-alpha": diffusion.save_pixart_alpha, "sana": flow.save_sana}  # beside the plain SD one


def small_student_unet(latent_side: int) -> UNet2DConditionModel:
    """Of 4x4 latents: the Bridge doubles them, as from SD 1.5 to its teachers."""
    return diffusion.randomised(
        UNet2DConditionModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=diffusion.miniatures.TEXT_WIDTH,
            norm_num_groups=8,
        )
    )


class Bench:
    """One family as the teacher, its student, and the conditioning of a few captions.

    Args:
        family: the teacher's; behind a "+", the student's, of STUDENTS.
        folder: an empty one for pipelines and pairs.
    """

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        family, _, student = family.partition("+")
        self.teacher = load_space(SAVE[family](folder / family))
        self.student = load_space(STUDENTS[student](folder / "student")) if student else self._student()
        encoders = {
            "student": TextEncoder(self.student, torch.bfloat16),
            "teacher": TextEncoder(self.teacher, torch.bfloat16),
        }
        self.tables = {role: encoder.encode(CAPTIONS) for role, encoder in encoders.items()}
        self.empty = encoders["teacher"].encode_unconditional()
        self.scale = self.teacher.default_guidance_scale

    def _student(self) -> Space:
        """Latents half as wide as the teacher's, or as wide."""
        plain = diffusion.sd21_unet
        if self.teacher.latent_shape[1] == 8:
            diffusion.sd21_unet = small_student_unet
        try:
            return load_space(diffusion.save_sd21(self.folder / "student", "epsilon"))
        finally:
            diffusion.sd21_unet = plain

    def config(self, *overrides: str) -> Config:
        models = (f"student.model={self.student.folder}", f"teacher.model={self.teacher.folder}")
        return load(overrides=[*SMALL, *models, *overrides])

    def latents(self, count: int = 4, space: Space | None = None) -> torch.Tensor:
        shape = (space or self.teacher).latent_shape
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))

    @functools.cached_property
    def pairs(self) -> Path:
        """A set of 40."""
        folder, numbers = self.folder / "pairs", list(range(40))
        write_pairs(
            folder,
            0,
            prompts=[CAPTIONS[i % len(CAPTIONS)] for i in numbers],
            prompt_ids=numbers,
            seeds=numbers,
            z_teacher=self.latents(40),
            z_student=self.latents(40, self.student),
        )
        return folder

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """As the stream of conditioned batches gives them."""
        for slot in itertools.count():
            rows = [i % len(CAPTIONS) for i in range(size)]
            yield {"sample_id": list(range(slot * size, (slot + 1) * size))} | {
                f"{role}.{name}": to_numpy(value[rows])
                for role, table in self.tables.items()
                for name, value in table.items()
            }

    def distiller(self, *overrides: str, **parts: Any) -> Distiller:
        """A worker's, on the device."""
        config = self.config(*overrides)
        return build_distiller(
            config,
            student_space=self.student,
            teacher_space=self.teacher,
            student=self.student.load_network(),
            bridge=Bridge.create(self.student, self.teacher, config.bridge),
            fake_network=self.teacher.load_network(),
            real=Real(self.latents(8), self.tables["teacher"], torch.arange(8) % len(CAPTIONS)),
            source=self.batches(config.distill.batch_size),
            anchor=build_objective(config, self.pairs, CUDA) if config.bridge.trainable else None,
            device=CUDA,
            **parts,
        )
