"""The whole method in one process: the shipped student learns from the shipped teacher through the shipped Bridge."""

from __future__ import annotations

import itertools

import pytest
import torch

from raydistill.bridge.model import Bridge
from raydistill.config import CONFIGS, load, resolve
from raydistill.data.prompts import read_prompts
from raydistill.distill.distiller import Distiller
from raydistill.distill.loop import load_real, load_unet
from raydistill.distill.schedule import distillation_step
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator, encode_table
from raydistill.shapes.building.starts import LocalScores
from raydistill.spaces import load_space

UPDATES, PICTURES = 20, 200


def conditioned(prompts, tables, size, seed):
    """What `conditioned_batches` gives, without Ray."""
    for slot in itertools.count():
        positions = list(range(slot * size, (slot + 1) * size))
        captions = prompts.at(seed, positions)[1]
        columns = {
            f"{role}.{name}": value[[rows[caption] for caption in captions]].numpy()
            for role, (table, rows) in tables.items()
            for name, value in table.items()
        }
        yield {"sample_id": positions} | columns


@pytest.mark.timeout(1200)
def test_twenty_updates_teach_a_student_what_its_prompts_ask_for():
    """Held-out prompts, none of which was trained on.

    Measured with run.seed 0, 1, 2: mean 0.55 -> 0.755, 0.748, 0.738, color 0.36 -> 0.595, 0.545, 0.495. A share of 200
    pictures has a standard deviation of 0.035, the mean of five 0.016.
    """
    config = load(CONFIGS / "shapes.yaml", [f"evaluation.count={PICTURES}"])
    assert config.distill.batch_size == 16
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    prompts, held_out = read_prompts(resolve(config.prompts.path)), read_prompts(resolve(config.evaluation.prompts))
    fixed = FixedPrompts(held_out, PICTURES, config.evaluation.seed)
    evaluator = StudentEvaluator(student, fixed, config.evaluation, "cpu")
    captions = ["", *prompts.prompts]
    tables = {"student": encode_table(student, captions), "teacher": encode_table(teacher, captions)}
    frozen = teacher.load_network()
    distiller = Distiller(
        config,
        student,
        teacher,
        load_unet(student, config.student.unet),
        Bridge.load(resolve(config.bridge.checkpoint), student, teacher),
        teacher.load_network(),
        load_real(resolve(config.discriminator.real_data), teacher, config.discriminator.real_count),
        conditioned(prompts, tables, config.distill.batch_size, config.run.seed),
    )
    empty = {name: value[:1] for name, value in tables["teacher"][0].items()}
    scores = LocalScores(teacher, frozen, empty, config.teacher.guidance_scale)

    def accuracy():
        return evaluator.accuracy(evaluator.draw(distiller.evaluated, config.student.start_timestep))

    before = accuracy()
    weights = [p.clone() for p in (*frozen.parameters(), *distiller.bridge.parameters())]
    for _ in range(UPDATES):
        distillation_step(distiller, scores, config.fake_score.updates, config.distill.overlap)
    after = accuracy()
    assert after["mean"] > before["mean"] + 0.10
    assert after["color"] > before["color"] + 0.08
    assert all(map(torch.equal, weights, (*frozen.parameters(), *distiller.bridge.parameters())))
