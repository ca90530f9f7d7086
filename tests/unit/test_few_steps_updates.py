"""Students of a few steps in the updates: where each sample is evaluated, and samples that are left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_few_steps import fixture_world, state_of, updated, worker_of  # noqa: F401

from raydistill.config.reading import load
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.timesteps import student_timesteps
from raydistill.evaluation.consistency import Consistency, TeacherDecoder
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator


def test_both_updates_evaluate_the_student_where_each_sample_is(world):  # noqa: F811
    worker, seen = worker_of(world, "student.steps=4", "distill.batch_size=4"), []
    worker.networks.student.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))

    def steps_at(evaluation):
        return [student_timesteps(999, 4).index(int(at)) for at in evaluation[1]]

    parts = list(worker.make())
    seen.clear()
    worker.student_update(parts, [part.x_t * 0.5 for part in parts])
    assert len(seen) == 1, "no rollout: what its step sees was found before"
    assert torch.equal(seen[0][0], parts[0].seen)
    assert steps_at(seen[0]) == worker.rollout.step_of(torch.arange(4)).tolist()
    seen.clear()
    worker.fake_update()
    assert [len(evaluation[0]) for evaluation in seen] == [3, 2, 1, 4]
    assert steps_at(seen[-1]) == worker.rollout.step_of(torch.arange(4, 8)).tolist()


def test_what_is_shown_during_a_run_is_drawn_with_all_steps(world):  # noqa: F811
    """The consistency of its pictures, and the pictures of its scores."""
    networks, seen = worker_of(world, "student.steps=4", "student.ema_decay=null").networks, []
    networks.student.register_forward_pre_hook(lambda _, given: seen.append(int(given[1][0])))
    fixed = FixedPrompts(PromptSet(["a red circle"]), 1, seed=5)
    evaluator = StudentEvaluator(world[0], fixed, load(overrides=["evaluation.metrics=[]"]).evaluation, "cpu")
    Consistency(networks, evaluator, TeacherDecoder(world[1], networks.device), 1).psnr(999, 4)
    assert seen == student_timesteps(999, 4)
    seen.clear()
    text = evaluator.table(fixed.captions)
    with torch.no_grad():
        networks.drawn(fixed.noise(world[0], 0, 1), text, lambda step: fixed.noise(world[0], 0, 1, step))
    assert seen == student_timesteps(999, 4)


def spoilt(source, bad):
    """Batches whose samples with this id have a caption that the student cannot read."""
    for batch in source:
        embeds = batch["student.prompt_embeds"].copy()
        embeds[[number == bad for number in batch["sample_id"]]] = float("nan")
        yield batch | {"student.prompt_embeds": embeds}


def without(source, bad):
    for batch in source:
        kept = [row for row, number in enumerate(batch["sample_id"]) if number != bad]
        yield {name: np.asarray(column)[kept] for name, column in batch.items()}


LEFT = ("student.steps=4", "distill.batch_size=4", "distill.non_finite_share=0.25", "student.ema_decay=null")


def test_a_sample_of_a_later_step_is_left_out_and_the_others_keep_what_they_see(world):  # noqa: F811
    whole, three = (worker_of(world, *LEFT, "student.max_grad_norm=1e9") for _ in range(2))
    bad = whole.rollout.step_of(torch.arange(4)).argmax().item()
    whole.batches.source, three.batches.source = spoilt(whole.batches.source, bad), without(three.batches.source, bad)
    norms = []
    for worker in (whole, three):
        parts = list(worker.make())
        worker.student_update(parts, [part.x_t * 0.5 for part in parts])
        norms.append((metrics := worker.pop_metrics())["student/grad_norm"])
        assert metrics.get("guard/left_out", 0) == (worker is whole)
    assert norms[0] == pytest.approx(0.75 * norms[1], rel=1e-3)


@pytest.mark.full
def test_a_float16_student_overflows_beside_a_sample_that_is_left_out(world):  # noqa: F811
    """In the same update, of two parts."""
    half = ("distill.mixed_precision=true", "student.autocast=float16", "distill.micro_batches=2")
    worker = worker_of(world, *LEFT, *half)
    bad = worker.rollout.step_of(torch.arange(4)).argmax().item()
    worker.batches.source, worker.gradients.scale.value = spoilt(worker.batches.source, bad), 2.0**32
    metrics = updated(worker, 1).pop_metrics()
    assert (metrics["guard/left_out"], worker.left_out[0][1]) == (1, [bad])
    assert metrics["student/gradient_scale"] == 2.0 ** (32 - metrics["guard/overflows"]) < 2.0**32
    assert all(value.isfinite().all() for value in state_of(worker).values())
