"""Collapse alarm and values that are not finite: measured, named, counted, and what is kept then."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import pytest
import torch
from answers import Answer

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.pairs import PairSet
from raydistill.distillation.batches import Real
from raydistill.distillation.collapse import CollapseAlarm, drift, mean_and_std, moments
from raydistill.distillation.finite import Finite
from raydistill.distillation.networks import load_unet
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.errors import NonFiniteError
from raydistill.evaluation.evaluator import Measured
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.teachers.request import NonFiniteScores
from raydistill.workers.checkpoint import load_state
from raydistill.workers.observer import Observer
from raydistill.workers.stage import Stage, Standing


def latents(count, seed=0):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [0.5, 1.0, 2.0]
    ).view(3, 1, 1) + torch.tensor([1.0, 0.0, -2.0]).view(3, 1, 1)


def test_moments_are_those_of_each_channel():
    x = latents(7)
    mean, std = mean_and_std(moments(x))
    for channel in range(3):
        values = x[:, channel].double().flatten()
        assert mean[channel].item() == pytest.approx(values.mean().item(), rel=1e-9)
        assert std[channel].item() == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_drift_counts_standard_deviations_of_the_reference():
    x = latents(50)
    reference = moments(x)
    _, std = mean_and_std(reference)
    assert drift(reference, reference) == 0
    moved = x.double() + std.view(3, 1, 1)
    assert drift(moments(moved), reference) == pytest.approx(1, rel=1e-6)
    dark = x.clone()
    dark[:, 1] -= 3 * std[1].float()  # one channel of three
    assert drift(moments(dark), reference) == pytest.approx(1, rel=1e-5)
    mean = x.double().mean((0, 2, 3), keepdim=True)
    assert drift(moments((x - mean) * math.e + mean), reference) == pytest.approx(1, rel=1e-5)
    assert math.isfinite(drift(moments(torch.zeros_like(x)), reference))


def test_the_reference_of_many_samples_is_that_of_all_of_them():
    x = latents(150)  # three chunks, the last one smaller
    torch.testing.assert_close(CollapseAlarm(1.0, x.half()).reference, moments(x.half()))


def test_only_a_drift_that_lasts_raises_the_alarm():
    healthy, gone = moments(latents(50)), moments(latents(50) + 4)
    guard = CollapseAlarm(1.0, latents(50))
    guard.observe(gone)  # a spike
    assert guard.reason is None
    for _ in range(30):
        guard.observe(healthy)
        assert guard.reason is None
    updates = next(n for n in range(1, 100) if (guard.observe(gone), guard.reason)[1])
    assert 1 < updates <= 10
    assert "drift from the teacher's samples" in guard.reason
    assert "distill.drift_limit=1" in guard.reason
    assert CollapseAlarm(None, latents(50)).observe(gone)["guard/latent_drift"] > 1  # measured, whatever the limit


def test_without_teacher_samples_the_start_is_the_reference_also_after_a_resume():
    guard = CollapseAlarm(0.5, None)
    assert guard.observe(moments(latents(50)))["guard/latent_drift"] == 0
    first = guard.observe(moments(latents(50) + 4))
    assert first["guard/latent_drift"] > 1
    resumed = CollapseAlarm(0.5, None)
    resumed.load_state_dict(guard.state_dict())
    later = moments(latents(50) + 5)
    assert resumed.observe(later) == guard.observe(later)
    while guard.reason is None:
        guard.observe(later)
    assert "drift from its start" in guard.reason


# -- a worker ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    samples = PairSet(WEIGHTS / "samples" / "flux").rows(range(16))
    tables = [space.encode_prompts(space.load_text(), samples.prompts) for space in (student, teacher)]
    return student, teacher, samples, tables


@pytest.fixture
def build(shipped):
    student, teacher, samples, tables = shipped

    def start(*overrides):
        settings = ["distill.batch_size=4", "fake_score.updates=1", "evaluation.count=4", "evaluation.periodic_count=4"]
        config = load(
            overrides=[*settings, "evaluation.grid=4", "distill.steps=6", "distill.evaluate_every=2", *overrides]
        )

        def batches():
            for slot in itertools.count():
                ids = list(range(slot * 4, slot * 4 + 4))
                rows = [i % 16 for i in ids]
                yield {"sample_id": ids} | {
                    f"{role}.{name}": value[rows].numpy()
                    for role, table in zip(("student", "teacher"), tables, strict=True)
                    for name, value in table.items()
                }

        return build_distiller(
            config,
            student_space=student,
            teacher_space=teacher,
            student=load_unet(student, config.student.unet),
            bridge=Bridge.load(WEIGHTS / "bridge" / "sd15-flux", student, teacher),
            fake_network=teacher.load_network(),
            real=Real(samples.z_teacher.clone(), tables[1], torch.arange(16)),
            source=batches(),
        )

    return start


def no_scores(made):
    return Answer(torch.zeros_like(made.x_t))


def spoil(module):
    next(p for p in module.parameters() if p.ndim > 1).data.view(-1)[0] = float("nan")


def spoil_weights(of):
    return lambda worker: spoil(of(worker))


def spoil_real(worker):
    worker.real.latents[:] = float("inf")


def spoil_rate(name):
    def change(worker):
        worker.gradients.optimizers[name].param_groups[0]["lr"] = 3e38  # of a float32, as large as it can be

    return change


@pytest.mark.parametrize(
    ("change", "source", "count"),
    [
        (spoil_weights(lambda w: w.networks.student), "the student's x0: not finite in samples .* of 4", 4),
        (spoil_weights(lambda w: w.networks.bridge.projector), "the Bridge's output: not finite in samples .* of 4", 4),
        (
            spoil_weights(lambda w: w.networks.fake.network),
            "the fake score, which starts as the teacher's copy: .* of 4",
            4,
        ),
        (spoil_weights(lambda w: w.networks.discriminator), "the discriminator loss", 1),
        (spoil_real, "the teacher samples of discriminator.real_data: not finite in samples .* of 4", 4),
        (spoil_rate("fake"), "the fake weights after their update", 1),
        (spoil_rate("discriminator"), "the discriminator weights after their update", 1),
        (spoil_rate("student"), "the student weights after their update", 1),
    ],
)
def test_a_value_that_is_not_finite_is_caught_where_it_arises(build, change, source, count):
    worker = build()
    change(worker)
    with pytest.raises(NonFiniteError, match=f"^{source}") as caught:
        distillation_step(worker, no_scores, 1, overlap=True)
    assert caught.value.count == count


def test_a_teachers_score_that_is_not_finite_changes_no_weight(build):
    worker = build("distill.micro_batches=2", "distill.non_finite_share=0")
    before = [p.clone() for p in worker.networks.student.parameters()]
    parts = list(worker.make())
    scores = [torch.zeros_like(part.x_t) for part in parts]
    scores[1][0, 0, 0, 0] = float("inf")  # the first part's gradients are there by then
    with pytest.raises(NonFiniteError, match=r"^the teacher's score: not finite in samples \[0\] of 2"):
        worker.student_update(parts, scores)
    assert all(map(torch.equal, before, worker.networks.student.parameters()))


def test_errors_of_values_keep_their_count_between_processes():
    finite = Finite()
    finite.note(torch.tensor([1.0, float("nan"), float("inf")]), "x", elsewhere=True)
    with pytest.raises(NonFiniteError) as caught:
        finite.look()
    for error, count, rows in ((caught.value, 2, [1, 2]), (NonFiniteScores("teacher: NaN", 3), 3, ())):
        copied = pickle.loads(pickle.dumps(error))
        assert (str(copied), copied.count, copied.rows, type(copied)) == (str(error), count, rows, type(error))
        assert copied.elsewhere is error.elsewhere is (error is caught.value)


# -- what is kept -------------------------------------------------------------------------------------------


class Log:
    """Takes what the run's MLflow would."""

    def __init__(self):
        self.tagged, self.values = [], {}

    def tags(self, values):
        self.tagged.append(values)

    def metrics(self, values, step):
        self.values |= {(key, step): value for key, value in values.items()}

    def image(self, *_):
        pass

    artifact = image


@pytest.fixture
def observe(build, tmp_path):
    def start(*overrides):
        worker = build(*overrides)
        stage = Stage(name="distill", config={}, folder=str(tmp_path), mlflow_uri="", mlflow_run="run")
        return worker, Observer(stage, worker.config, worker, Log(), Standing())

    return start


def go(worker, observer, step):
    distillation_step(worker, no_scores, 1, overlap=True)
    observer.after_step(step, 1, {"time/step": 1.0})


def test_without_a_judge_a_student_that_drifts_away_is_not_the_best(observe, tmp_path):
    worker, observer = observe("evaluation.judge=null", "distill.drift_limit=50", "distill.stop_on_collapse=true")
    observer.before()
    assert load_state(tmp_path / "best")[1]["step"] == 0
    for step in (1, 2):
        go(worker, observer, step)
    assert load_state(tmp_path / "best")[1]["step"] == 2
    assert observer.standing.collapse is None
    assert observer.tracker.tagged == []
    worker.alarm.limit = 1e-3
    for step in (3, 4):
        go(worker, observer, step)
    assert observer.standing.collapse.startswith("step 3: the latents' drift from the teacher's samples is")
    assert observer.tracker.tagged == [{"collapse_alarm": observer.standing.collapse}]  # once
    assert load_state(tmp_path / "best")[1]["step"] == 2
    good = load_state(tmp_path / "best")[0]["student"]
    observer.standing.step, observer.standing.stopped = 4, observer.standing.collapse
    observer.finish()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["best_step"], result["stopped"]) == (4, 2, observer.standing.collapse)
    assert all(torch.equal(value, good[name]) for name, value in worker.networks.evaluated.state_dict().items())
    assert (tmp_path / "export" / "model_index.json").is_file()
    worker.alarm.limit = None
    go(worker, observer, 5)
    assert observer.standing.collapse is None  # it is over


def test_a_judged_student_whose_score_falls_raises_the_alarm_and_the_best_stays(observe, tmp_path):
    worker, observer = observe("distill.drift_limit=null")
    observer.before()
    for step in (1, 2):
        go(worker, observer, step)
    best = observer.standing.best
    assert best > 0.2
    for parameter in worker.networks.evaluated.parameters():
        parameter.data.zero_()
    observer.after_step(4, 1, {"time/step": 1.0})
    assert observer.standing.collapse.startswith("step 4: evaluation fell to ")
    consistency, collapse = observer.tracker.tagged  # its picture is no longer the one that the teacher sees
    assert consistency["consistency_alarm"].startswith("step 4: bridge/consistency_psnr fell to ")
    assert collapse == {"collapse_alarm": observer.standing.collapse}
    assert load_state(tmp_path / "best")[1] == {"step": 2, "score": best}
    for name in ("eval/periodic_mean", "0-overview/score"):
        curve = {step for key, step in observer.tracker.values if key == name}
        assert curve == {0, 2, 4}  # it begins with the start


def test_a_student_that_ends_below_its_start_is_said_to_be_worse(observe, tmp_path, capsys):
    worker, observer = observe("distill.drift_limit=null")
    observer.before()
    before = json.loads((tmp_path / "before.json").read_text())
    for parameter in worker.networks.evaluated.parameters():
        parameter.data.zero_()
    observer.best.keep(1, 0.0)
    observer.standing.step = 1
    observer.finish()
    after = json.loads((tmp_path / "result.json").read_text())["after"]
    assert after["mean"] < before["mean"]
    said = f"eval/mean on held-out prompts is {after['mean']:.3f}, and was {before['mean']:.3f} at the start"
    assert observer.tracker.tagged == [{"worse_than_start": said}]
    assert said in capsys.readouterr().out


# -- other metrics ------------------------------------------------------------------------------------------


def measured_as(observer, values):
    """The observer measures these: clipscore of each picture, evaluation by evaluation; None: the metric failed."""
    coming = iter(values)

    def evaluate(evaluator):
        found = next(coming)
        return torch.zeros(4, 3, 8, 8), Measured().with_columns({} if found is None else {"clipscore": found})

    observer._evaluate = evaluate


CLIP = ("evaluation.metrics=[clipscore]", "evaluation.metric=clipscore", "distill.drift_limit=null")


def watch(observer, steps):
    for step in steps:
        observer.after_step(step, 1, {"time/step": 1.0})


def test_the_chosen_metric_keeps_the_best_and_a_fall_of_half_its_spread_raises_the_alarm(observe, tmp_path):
    _, observer = observe(*CLIP)
    measured_as(observer, [[mean - 3, mean, mean + 3] for mean in (29, 30, 28.6, 28.4)])
    watch(observer, (2, 4, 6))
    assert load_state(tmp_path / "best")[1] == {"step": 4, "score": 30}
    assert observer.standing.collapse is None
    observer._compare(8, observer._periodic_evaluation(8), None)
    assert observer.standing.collapse == "step 8: evaluation fell to 28.400 from 30.000"
    assert observer.tracker.values["0-overview/score", 6] == pytest.approx(28.6)


def test_a_plateau_ends_the_stage_as_a_collapse_does_and_exports_the_best(observe, tmp_path, capsys):
    _, observer = observe(*CLIP, "distill.stop_on_plateau=2")
    first, mixed, risen = [20.0, 30.0, 40.0], [19.0, 30.0, 42.0], [20.5, 30.5, 40.5]
    measured_as(observer, [first, mixed, risen, [20.0, 31.0, 40.8], [21.0, 30.0, 41.0], risen])
    distill, standing = observer.config.distill, observer.standing
    watch(observer, (2, 4))  # 1/3 higher, but pictures rise by -1, 0 and 2: the error is 0.88
    kept = Standing.of(json.loads(json.dumps(standing.about("run"))))  # what a resume reads
    assert kept == standing
    assert (kept.peak, kept.peak_scores, kept.flat) == (30, first, 1)
    watch(observer, (6,))  # every picture by 0.5, which the spread of 10 between pictures does not hide
    assert (standing.peak, standing.peak_scores, standing.flat, standing.plateau) == (30.5, risen, 0, None)
    for step in (8, 10):  # by -0.5, 0.5, 0.3 and by 0.5, -0.5, 0.5
        observer._compare(step, observer._periodic_evaluation(step), None)
    told = "step 10: clipscore has not risen above 30.500 by its noise (0.333) in 2 evaluations"
    assert standing.plateau == told
    assert f"plateau: {told}" in capsys.readouterr().out
    standing.step, standing.stopped = 10, standing.plateau
    (tmp_path / "before.json").write_text('{"clipscore": 28.0}')
    observer.finish()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["stopped"], result["best_step"], result["steps"]) == (told, 10, 10)
    assert standing.ended(distill.model_copy(update={"stop_on_plateau": 3})) is None  # a resume that waits longer
    assert standing.ended(distill.model_copy(update={"stop_on_plateau": None, "stop_on_collapse": True})) is None


def test_without_the_peaks_pictures_the_rise_is_held_against_the_error_of_the_mean():
    standing = Standing.of(Standing(peak=30.0, flat=1).about("run"))  # of a checkpoint of an earlier version
    assert standing.observe([20.5, 30.5, None, 40.5]) == pytest.approx(10 / 3**0.5)
    assert (standing.peak, standing.flat) == (30.0, 2)
    assert standing.observe([40.0, 41.0, None, 42.0]) == pytest.approx(1 / 3**0.5)
    assert (standing.peak, standing.flat, standing.peak_scores) == (41.0, 0, [40.0, 41.0, None, 42.0])


def test_a_rise_counts_from_one_standard_error_on():
    for scores, flat in (([20.1, 30.2, 40.9], 0), ([19.8, 30.3, 40.5], 1)):  # 0.40 against 0.25; 0.20 against 0.21
        standing = Standing(peak=30.0, peak_scores=[20.0, 30.0, 40.0])
        standing.observe(scores)
        assert standing.flat == flat


def test_a_metric_that_fails_keeps_the_best_as_it_is_and_the_last_where_there_is_none(observe, tmp_path):
    _, observer = observe(*CLIP)
    measured_as(observer, [None, [24.0, 26.0], None])
    watch(observer, (2,))
    assert load_state(tmp_path / "best")[1]["step"] == 2
    watch(observer, (4, 6))
    assert load_state(tmp_path / "best")[1] == {"step": 4, "score": 25}
