"""What ships against what the teacher saw: one latent, two decoders."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from test_score_pictures import CAPTIONS, build_one

from raydistill.config.networks import StudentConfig
from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet
from raydistill.evaluation.consistency import FALL_DB, Consistency, TeacherDecoder
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.workers.alarms import Alarms
from raydistill.workers.observer import CONSISTENCY, Observer
from raydistill.workers.stage import Standing

START = 999


@pytest.fixture(scope="module")
def networks():
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    tables = [PromptTable(space, [*CAPTIONS, ""]) for space in (student, teacher)]
    distiller, _, _ = build_one(student, teacher, tables)
    return distiller.networks


@pytest.fixture
def consistency(networks):
    config = networks.config.evaluation.model_copy(update={"batch_size": 2})
    evaluator = StudentEvaluator(networks.student_space, FixedPrompts(PromptSet(CAPTIONS), 5, 3), config, "cpu")
    decoder = TeacherDecoder(networks.teacher_space, networks.device)
    return Consistency(networks, evaluator, decoder, 3)


@torch.no_grad()
def test_it_is_the_psnr_of_both_decodings_of_one_latent(networks, consistency):
    fixed, student, teacher = consistency.fixed, networks.student_space, networks.teacher_space
    assert len(fixed.captions) == 3
    conditioning = consistency.evaluator.table(fixed.captions)
    latents = one_step_x0(student, networks.student, fixed.noise(student, 0, 3), conditioning, START)
    ships = (student.decode(student.load_vae(), latents) + 1) / 2
    seen = (teacher.decode(teacher.load_vae(), networks.bridge(latents).float()) + 1) / 2
    seen = torch.nn.functional.interpolate(
        seen, size=ships.shape[-2:], mode="bilinear", antialias=True, align_corners=False
    )
    each = [-10 * math.log10((a - b).square().mean().item()) for a, b in zip(ships, seen, strict=True)]
    assert consistency.psnr(START) == pytest.approx(sum(each) / 3, abs=1e-2)


def test_a_bridge_that_reads_something_else_costs_decibels(networks, consistency):
    before = consistency.psnr(START)
    bias = next(p for name, p in networks.bridge.projector.named_parameters() if name.endswith("bias"))
    kept = {name: p.detach().clone() for name, p in networks.bridge.projector.named_parameters()}
    try:
        with torch.no_grad():
            bias.add_(0.5)
        assert consistency.psnr(START) < before
    finally:
        networks.bridge.projector.load_state_dict(kept, strict=False)
    assert consistency.psnr(START) == before


def test_what_is_not_finite_is_no_number_of_the_update(networks, consistency):
    networks.finite.note(torch.ones(1), "what an update has noted")
    consistency.decoder = lambda latents: torch.zeros(len(latents), 3, 64, 64)

    class Broken(torch.nn.Module):
        def forward(self, latents):
            return torch.full((len(latents), 8, 16, 16), float("nan"))

    bridge, networks.bridge = networks.bridge, Broken()
    try:
        consistency.psnr(START)
    finally:
        networks.bridge = bridge
    assert networks.finite.look() == []


def test_the_alarm_is_raised_once_and_its_best_lasts_in_checkpoints(capsys):
    values, tags = iter([20.0, 25.0, 25.0 - FALL_DB, 24.9 - FALL_DB, 10.0]), []
    standing = Standing()
    observer = SimpleNamespace(
        config=SimpleNamespace(student=StudentConfig(start_timestep=START)),
        consistency=SimpleNamespace(
            fixed=FixedPrompts(PromptSet(CAPTIONS), 3, 0), psnr=lambda start, steps: next(values)
        ),
        alarms=Alarms("distill", Config(), SimpleNamespace(tags=tags.append), standing),
    )
    measured = [Observer._consistency(observer, step)[CONSISTENCY] for step in range(5)]
    assert measured[:2] == [20.0, 25.0]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(tags) == 1
    assert said[0].startswith("consistency alarm: step 3: bridge/consistency_psnr fell to 21.9 dB from 25.0")
    again = Standing.of(standing.about("run"))
    assert again.consistency == 25.0
    assert "consistency" not in Standing().about("run"), "checkpoints of runs without it are as before"
