"""Samples whose values are not finite: they count as zero, are named and counted, and too many end the run as ever."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mean_of_two import averaging
from test_updates import LocalTeacher, batches, configuration, flat, make_distiller

from raydistill.distillation.schedule import distillation_step
from raydistill.errors import NonFiniteError
from raydistill.teachers.request import ScoreRequest

BAD = 2  # of samples 0 … 3


def gradients_of(distiller, update):
    """What each optimizer is stepped on, before clipping."""
    taken, step = {}, distiller.gradients.step

    def spy(**norms):
        for name in norms:
            gradients = [p.grad for p in distiller.gradients.parameters(name) if p.grad is not None]
            taken[name] = torch.cat([one.flatten() for one in gradients])
        return step(**norms)

    distiller.gradients.step = spy
    update()
    distiller.gradients.step = step
    return taken


def without(source, bad=BAD):
    """The same batches without one sample."""
    kept = [row for row in range(4) if row != bad]
    for batch in source:
        yield {name: np.asarray(column)[kept] for name, column in batch.items()}


def scores_of(distiller, spaces, tables):
    parts = list(distiller.make())
    teacher = LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()})
    return parts, [teacher(part).result() for part in parts]


@pytest.mark.parametrize("count", [1, 4])
def test_a_teachers_score_that_is_not_finite_counts_as_zero(spaces, tables, count):
    """Also where it is all of a part of the batch."""
    config = configuration(distill__micro_batches=count)
    distiller, three = make_distiller(config, spaces, tables), make_distiller(configuration(), spaces, tables)
    three.batches.source = without(batches(tables))
    parts, scores = scores_of(distiller, spaces, tables)
    place, row = divmod(BAD, 4 // count)
    scores[place][row, 0, 0, 0] = float("nan")
    found = gradients_of(distiller, lambda: distiller.student_update(parts, scores))["student"]
    expected = gradients_of(three, lambda: three.student_update(*scores_of(three, spaces, tables)))["student"]
    assert found.norm() > 0
    assert (found - 0.75 * expected).norm() < 1e-4 * found.norm()
    metrics = distiller.pop_metrics()
    assert metrics["guard/left_out"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    told = f"the teacher's score: not finite in samples [{row}] of {4 // count} (sample ids [2])"
    assert distiller.left_out == [(told, [BAD])]


@pytest.mark.parametrize("fake_weight", [0.0, pytest.param(0.1, marks=pytest.mark.full)])
def test_a_teacher_sample_that_is_not_finite_is_left_out_of_its_half_alone(spaces, tables, fake_weight):
    """Also where both halves are one phase, and where the features' statistics are measured with it."""
    changes = {"discriminator__fake_weight": fake_weight, "discriminator__standardize": True}
    config = configuration(distill__non_finite_share=0.25, fake_score__updates=1, **changes)
    clean, spoilt = (make_distiller(config, spaces, tables) for _ in range(2))
    first = spoilt.feed.order.rows(spoilt.feed.order.positions(torch.arange(4, 8)))[BAD]
    spoilt.real.latents[first] = float("inf")
    for one in (clean, spoilt):
        one.batches.next()  # the student's
    expected, found = (gradients_of(one, one.fake_update) for one in (clean, spoilt))
    for name in ("fake", "discriminator"):
        assert torch.isfinite(found[name]).all()
        assert found[name].norm() > 0
        assert not torch.equal(found[name], expected[name]) or name == "fake"
    for head in spoilt.networks.discriminator.heads:
        assert torch.isfinite(head.mean).all()
        assert torch.isfinite(head.spread).all()
    assert {tuple(samples) for _, samples in spoilt.leaving_out.left_out} == {(4 + BAD,)}
    again = configuration(distill__non_finite_share=0, fake_score__updates=1, **changes)
    strict = make_distiller(again, spaces, tables)
    strict.real.latents[first] = float("inf")
    strict.batches.next()
    with pytest.raises(NonFiniteError, match=r"real_data: not finite in samples \[2\] of 4 \(sample ids \[6\]\)"):
        strict.fake_update()


def test_parts_of_one_sample_are_as_many_passes_and_the_curves_those_of_what_is_left(spaces, tables):
    """As workers that share the fake score need it; one sample may be left out of the smallest batch."""
    config = configuration(distill__micro_batches=4, fake_score__batch_size=16, fake_score__updates=1)
    distiller, three = make_distiller(config, spaces, tables), make_distiller(configuration(), spaces, tables)
    distiller.batches.source, passes = spoilt_caption(tables, (1,)), []
    three.batches.source = without(batches(tables), 1)
    for one in (distiller, three):
        parts, scores = scores_of(one, spaces, tables)
        one.networks.fake.register_forward_hook(lambda *_: passes.append(0))
        one.student_update(parts, scores)
    assert len(passes) == 4 + 1
    found, expected = (one.pop_metrics() for one in (distiller, three))
    for name in ("loss/vsd", "loss/gan", "latents/mean", "latents/std", "student/latent_std", "student/grad_norm"):
        scale = 0.75 if name == "student/grad_norm" else 1.0
        assert found[name] == pytest.approx(scale * expected[name], rel=1e-3), name
    found = gradients_of(distiller, distiller.fake_update)  # of two samples, of which one is left out
    assert all(torch.isfinite(one).all() and one.norm() > 0 for one in found.values())
    assert [samples for _, samples in distiller.leaving_out.left_out] == [[5]]
    none = make_distiller(configuration(distill__micro_batches=4, distill__non_finite_share=1), spaces, tables)
    none.batches.source = spoilt_caption(tables, range(4))
    with pytest.raises(NonFiniteError, match="nothing is left of the batch"):
        list(none.make())


def spoilt_caption(tables, rows=(BAD,), role="student"):
    """Batches whose samples of these places have a caption that this network cannot read."""
    for batch in batches(tables):
        name = f"{role}.prompt_embeds"
        batch[name] = batch[name].copy()
        batch[name][list(rows)] = float("nan")
        yield batch


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_sample_whose_caption_is_not_finite_is_left_out_from_the_start(spaces, tables, role):
    """The teachers get zeros in its place, and curves stay finite."""
    config = configuration(fake_score__updates=1)
    distiller = make_distiller(config, spaces, tables)
    distiller.batches.source = spoilt_caption(tables, role=role)
    seen = []
    teacher = LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()})

    def submit(made):
        seen.append(made.x_t)
        ScoreRequest(made.x_t, made.t_B, made.teacher_conditioning, None, 1.0).payload()  # refuses what is not finite
        return teacher(made)

    for _ in range(2):
        distillation_step(distiller, submit, 1, overlap=True)
    metrics = distiller.pop_metrics()
    assert not seen[0][BAD].any()
    assert all(torch.isfinite(x_t).all() for x_t in seen)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["guard/left_out"] == 4  # once in each of two makes and two updates of the fake score
    assert all(
        torch.isfinite(flat(network)).all() for network in (distiller.networks.student, distiller.networks.fake.network)
    )
    strict = make_distiller(configuration(distill__non_finite_share=0.25), spaces, tables)
    strict.batches.source = spoilt_caption(tables, (0, 1), role)
    said = r"sample ids \[0, 1\]\); 50.0% of the samples are more than distill\.non_finite_share=0\.25"
    with pytest.raises(NonFiniteError, match=said):
        list(strict.make())
    before = flat(strict.networks.student).clone()
    with pytest.raises(NonFiniteError, match=r"distill\.non_finite_share"):
        strict.fake_update()
    assert torch.equal(before, flat(strict.networks.student))


def two_workers(config, spaces, tables):
    of_rank = averaging()
    workers = [make_distiller(config, spaces, tables) for _ in range(2)]
    for rank, worker in enumerate(workers):
        worker.gradients.average, worker.workers = of_rank(rank), 2
    return workers


@pytest.mark.parametrize("what", ["caption", "teacher sample"])
def test_workers_agree_on_what_is_left_out_and_stay_the_same(spaces, tables, what):
    """One of two has a sample that is not finite: both do the phase again, and go on with the same weights.

    A teacher sample of the first update spoils the statistics of the features too, which are means over both.
    """
    standardize = what == "teacher sample"
    config = configuration(fake_score__updates=1, discriminator__standardize=standardize)
    workers = two_workers(config, spaces, tables)
    if standardize:
        feed = workers[1].feed
        workers[1].real.latents[feed.order.rows(feed.order.positions(torch.arange(4, 8)))[BAD]] = float("inf")
    else:
        workers[1].batches.source = spoilt_caption(tables)
    teachers = [LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()}) for _ in workers]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: distillation_step(one[0], one[1], 1, True), zip(workers, teachers, strict=True)))
    for part in ("student", "discriminator"):
        one, other = (flat(getattr(worker.networks, part)) for worker in workers)
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
    assert [worker.pop_metrics()["guard/left_out"] for worker in workers] == [2, 2], "those of both, on both"
    assert [len(worker.left_out) for worker in workers] == [0, 2], "named by the one whose they are"


def test_a_worker_with_few_such_samples_leaves_the_naming_to_the_one_with_too_many(spaces, tables):
    workers = two_workers(configuration(fake_score__updates=1), spaces, tables)
    for worker, rows in zip(workers, ((BAD,), (0, 1)), strict=True):
        worker.batches.source = spoilt_caption(tables, rows)
    with ThreadPoolExecutor(2) as pool:
        errors = [one.exception(120) for one in [pool.submit(worker.fake_update) for worker in workers]]
    assert all(isinstance(error, NonFiniteError) for error in errors)
    assert [error.elsewhere for error in errors] == [True, False]
    assert "another worker has too many" in str(errors[0])
    assert "50.0% of the samples" in str(errors[1])


def test_where_both_halves_are_stepped_on_together_a_bad_gradient_of_the_head_changes_nothing(spaces, tables):
    distiller = make_distiller(configuration(discriminator__step_together=True), spaces, tables)
    next(distiller.networks.discriminator.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    before = torch.cat([p.detach().flatten() for p in distiller.networks.fake.trainable().values()])
    with pytest.raises(NonFiniteError, match="the discriminator gradient"):
        distiller.fake_update()
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in distiller.networks.fake.trainable().values()]))


@pytest.mark.full
def test_where_both_halves_are_stepped_on_together_they_read_the_same_features(spaces, tables):
    """The head's gradient then does not depend on what the fake score's step changes."""
    found = {}
    for together in (False, True):
        for rate in (1e-3, 1e-2):
            settings = {"discriminator__step_together": together, "fake_score__lr": rate, "fake_score__kind": "full"}
            distiller = make_distiller(configuration(**settings), spaces, tables)
            found[together, rate] = gradients_of(distiller, distiller.fake_update)
    assert torch.equal(found[True, 1e-3]["discriminator"], found[True, 1e-2]["discriminator"])
    assert not torch.equal(found[False, 1e-3]["discriminator"], found[False, 1e-2]["discriminator"])
    assert torch.equal(found[False, 1e-3]["fake"], found[True, 1e-3]["fake"])
