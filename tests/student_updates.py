"""Updates of students whose network is no SD UNet, for tests of their families."""

from __future__ import annotations

import itertools

import torch
from answers import Answer

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.distillation.batches import Real
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller

PROMPTS = ["a small red circle at the left on a white background", "two blue squares"]


def distiller(space, teacher, *settings):
    """A worker of two samples a batch, with a Bridge and teacher samples that chance made."""
    small = ["bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=2", "discriminator.width=8"]
    small += ["student.rank=2", "student.ema_decay=0.5"]
    config = load(overrides=[*small, "distill.batch_size=2", "fake_score.updates=1", *settings])
    tables = {role: PromptTable(one, PROMPTS)(PROMPTS) for role, one in {"student": space, "teacher": teacher}.items()}
    columns = {f"{role}.{name}": value.numpy() for role, table in tables.items() for name, value in table.items()}
    torch.manual_seed(1)
    return build_distiller(
        config,
        student_space=space,
        teacher_space=teacher,
        student=space.load_network(),
        bridge=Bridge.create(space, teacher, config.bridge),
        fake_network=teacher.load_network(),
        real=Real(torch.randn(2, *teacher.latent_shape), tables["teacher"], torch.arange(2)),
        source=({"sample_id": [2 * i, 2 * i + 1]} | columns for i in itertools.count()),
    )


def stepped(worker, teacher, steps):
    """The worker after these updates, whose teacher always answers the same."""
    scores = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        distillation_step(worker, lambda made: Answer(scores), 1, overlap=True)
    return worker
