"""Students of several steps: what each step sees, the same bits in every order, pictures, and their draw in diffusers."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import tiny_diffusion_pipelines as tiny
import tiny_flow_pipelines as flow
import torch
from answers import Answer
from diffusers import LCMScheduler

from raydistill.bridge.model import Bridge
from raydistill.config.networks import StudentConfig
from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.noise import normal
from raydistill.diffusion.timesteps import least_start, student_timesteps
from raydistill.distillation.batches import MicroBatch, Real
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import _check_steps
from raydistill.errors import InputError, NonFiniteError
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.export.few_steps import few_step_scheduler
from raydistill.export.pipeline import ModelCard
from raydistill.planning.counting import count_trainer
from raydistill.spaces import load_space, load_student_space
from raydistill.spaces.meta import open_space
from raydistill.spaces.one_step import one_step_x0, student_x0

CAPTIONS = ["a small red circle at the left on a white background", "two blue squares", ""]
SMALL = (
    "bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=4", "fake_score.updates=1",
    "discriminator.width=8", "student.lr=1e-3", "student.ema_decay=0.5", "student.rank=4", "distill.batch_size=8",
)  # fmt: skip
CARD = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=3)


# -- timesteps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "steps", "wanted"),
    [
        (999, 1, [999]),
        (999, 2, [999, 499]),
        (999, 4, [999, 749, 499, 249]),
        (625, 2, [625, 312]),
        (625, 4, [623, 467, 311, 155]),
        (399, 4, [399, 299, 199, 99]),
    ],
)
def test_the_steps_lie_evenly_down_as_in_diffusers(start, steps, wanted):
    assert student_timesteps(start, steps) == wanted
    scheduler = LCMScheduler(num_train_timesteps=wanted[0] + 1, original_inference_steps=steps)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == wanted


@pytest.mark.parametrize("steps", [2, 4])
def test_the_least_start_is_drawn_by_diffusers_too(steps, world):
    """One below it, the last step would be t = 0, where the scheduler returns x_t."""
    space, start = world[0], least_start(steps)
    scheduler = few_step_scheduler(space, start, steps)
    scheduler.set_timesteps(steps)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(scheduler.timesteps[-1])
    assert (float(skip), float(out)) == (pytest.approx(0, abs=1e-18), 1)
    with pytest.raises(InputError, match=f"start_timestep {start - 1} is outside {start} "):
        few_step_scheduler(space, start - 1, steps)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["student.steps=3"], r"student\.steps"),
        (["student.steps=4", "student.start_timestep=6"], r"4 steps \(student\.steps\) begin at 7 or above"),
    ],
)
def test_wrong_numbers_of_steps_are_one_line(keys, message):
    with pytest.raises(InputError, match=message) as error:
        load(overrides=keys)
    assert "\n" not in str(error.value)


def test_what_cannot_be_exported_is_refused_before_a_run_and_a_scaled_start_is_told(world, tmp_path):
    sana = load_student_space(flow.save_sana(tmp_path / "sana"))
    with pytest.raises(InputError, match=r"^student\.steps=4: .* no scheduler of few steps for .* velocity; use 1$"):
        _check_steps(StudentConfig(steps=4), sana)
    assert _check_steps(StudentConfig(steps=4), world[0]) == []
    (note,) = _check_steps(StudentConfig(steps=4, start_timestep=625), world[0])
    assert "plain noise at t = 623" in note


# -- a worker ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="folders")
def fixture_folders(sd_folder, diffusion_folders, tmp_path_factory):
    """Of students and a teacher."""
    root = tmp_path_factory.mktemp("sd21")
    kinds = {"v-prediction": "v_prediction", "sd21": "epsilon"}
    return {"sd15": sd_folder, **diffusion_folders} | {k: tiny.save_sd21(root / k, kind) for k, kind in kinds.items()}


@pytest.fixture(scope="module", name="world")
def fixture_world(sd_folder, flux_folder):
    spaces = load_space(sd_folder), load_space(flux_folder)
    tables = [PromptTable(space, CAPTIONS)(CAPTIONS) for space in spaces]
    return *spaces, dict(zip(("student", "teacher"), tables, strict=True))


def worker_of(world, *settings, first=0):
    """Its first batch is that of slot `first`."""
    student, teacher, tables = world
    config = load(overrides=[*SMALL, *settings])
    size = config.distill.batch_size

    def batches():
        for slot in itertools.count(first):
            ids = list(range(slot * size, slot * size + size))
            yield {"sample_id": ids} | {
                f"{role}.{name}": value[[i % 2 for i in ids]].numpy()
                for role, table in tables.items()
                for name, value in table.items()
            }

    torch.manual_seed(7)
    latents = torch.randn(4, *teacher.latent_shape)
    bridge = Bridge.create(student, teacher, config.bridge)
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=bridge,
        fake_network=teacher.load_network(),
        real=Real(latents, tables["teacher"], torch.arange(4) % 3),
        source=batches(),
    )


def updated(worker, count, overlap=True):
    def submit(made):
        return Answer(made.x_t * 0.5)

    for _ in range(count):
        distillation_step(worker, submit, 1, overlap=overlap)
    return worker


def state_of(worker):
    state = worker.state_dict()
    parts = {"student", "ema", "fake", "discriminator"} & state.keys()
    return {f"{part}.{n}": v.clone() for part in parts for n, v in state[part].items()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.full
@pytest.mark.parametrize(("model", "start"), [("sd21", 625), ("sdxl", 399)])
def test_other_students_learn_in_four_steps(model, start, folders):
    """From an early start; SDXL's conditioning is not of real numbers alone."""
    spaces = load_student_space(folders[model]), load_space(folders["pixart"])
    tables = [PromptTable(space, CAPTIONS)(CAPTIONS) for space in spaces]
    world = *spaces, dict(zip(("student", "teacher"), tables, strict=True))
    worker = worker_of(world, "student.steps=4", f"student.start_timestep={start}", "distill.batch_size=4")
    before = state_of(worker)
    after = state_of(updated(worker, 1))
    changed = [name for name in before if name.startswith("student.") and not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * sum(name.startswith("student.") for name in before)
    assert all(value.isfinite().all() for value in after.values())


def part_of(world, ids):
    text = {name: value[[i % 2 for i in ids]] for name, value in world[2]["student"].items()}
    empty = {}
    return MicroBatch(
        sample_ids=torch.tensor(ids), student_conditioning=text, teacher_conditioning=empty, fake_conditioning=empty
    )


def test_a_step_sees_the_students_own_earlier_ones_noised_again(world):
    worker, ids = worker_of(world, "student.steps=4"), [8, 9, 10, 11, 12]
    space, unet = world[0], worker.networks.student
    seen, timestep_B = worker.rollout.seen(part_of(world, ids))
    assert not seen.requires_grad
    found = worker.rollout.step_of(torch.tensor(ids)).tolist()
    assert sorted(found[:4]) == [0, 1, 2, 3], "four ids that follow each other have all the steps"
    timesteps = student_timesteps(999, 4)
    assert timestep_B.tolist() == [timesteps[step] for step in found]
    for row, (number, step) in enumerate(zip(ids, found, strict=True)):
        text = {name: value[[number % 2]] for name, value in world[2]["student"].items()}
        x_t = normal(0, [number], space.latent_shape, "latents")
        for before, at in itertools.pairwise(timesteps[: step + 1]):
            t, later = torch.tensor([before / 999]), torch.tensor([at / 999])
            with torch.no_grad():
                eps = space.predict(unet, x_t, t, text)
            (alpha, sigma), (alpha2, sigma2) = space.path.alpha_sigma(t), space.path.alpha_sigma(later)
            again = normal(0, [number], space.latent_shape, "student_noise", timesteps.index(at))
            x_t = alpha2 * (x_t - sigma * eps) / alpha + sigma2 * again
        assert (seen[row] - x_t[0]).abs().max() <= 1e-4 * x_t.abs().max(), (number, step)
    assert not torch.equal(seen, worker_of(world, "student.steps=4", "run.seed=1").rollout.seen(part_of(world, ids))[0])


def test_an_earlier_step_that_is_not_finite_names_its_sample(world):
    worker, ids = worker_of(world, "student.steps=4"), [8, 9, 10, 11]
    bad = ids[worker.rollout.step_of(torch.tensor(ids)).argmax()]
    part = part_of(world, ids)
    part.student_conditioning["prompt_embeds"][ids.index(bad)] = torch.nan
    worker.rollout.seen(part)
    with pytest.raises(NonFiniteError, match="the student's x0") as error:
        worker.networks.finite.look()
    assert error.value.samples == [bad]


def test_all_steps_are_trained_equally_often(world):
    rollout = worker_of(world, "student.steps=2").rollout
    chosen = rollout.step_of(torch.arange(4000))
    assert chosen.view(-1, 2).sum(1).eq(1).all()
    assert 800 < chosen.view(-1, 2)[:, 0].sum() < 1200, "chance decides which comes first"
    assert torch.equal(chosen[700:900], rollout.step_of(torch.arange(700, 900)))


def test_one_step_is_what_it_was(world):
    worker = worker_of(world)
    assert worker.config.student.steps == 1
    (made,) = worker.make()
    assert made.timestep_B is None
    assert torch.equal(made.seen, normal(0, range(8), world[0].latent_shape, "latents"))


@pytest.mark.parametrize(
    "settings",
    [
        ("distill.micro_batches=2", "discriminator.weight=0"),
        pytest.param(("student.kind=lora", "distill.mixed_precision=true"), marks=pytest.mark.full),
        pytest.param(("fake_score.kind=full", "discriminator.shared_pass=true"), marks=pytest.mark.full),
    ],
)
def test_overlap_and_a_resume_change_no_bit(world, settings):
    build = partial(worker_of, world, "student.steps=4", "distill.batch_size=4", *settings)
    half, whole = updated(build(), 1), state_of(updated(build(), 2))
    assert equal(state_of(half), state_of(updated(build(), 1, overlap=False)))
    rest = build(first=2)
    assert not equal(whole, state_of(rest))
    rest.load_state_dict(copy.deepcopy(half.state_dict()))
    assert equal(whole, state_of(updated(rest, 1)))


@pytest.mark.full
def test_parts_of_a_batch_are_the_whole_batch(world):
    """Up to rounding: other parts hold other numbers of each step. The rate is small for Adam makes signs of gradients."""
    few = ("student.steps=2", "student.ema_decay=null")
    norms = []
    for parts in (1, 2, 8):
        worker = updated(worker_of(world, *few, f"distill.micro_batches={parts}"), 1)
        metrics = worker.pop_metrics()
        norms.append([metrics[name] for name in ("student/grad_norm", "loss/vsd", "loss/fake", "latents/std")])
    assert torch.allclose(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=1e-3)
    assert torch.allclose(torch.tensor(norms[0]), torch.tensor(norms[2]), rtol=1e-3)


def test_the_trained_step_alone_has_a_gradient(world):
    """That of a sample's later step is of one evaluation: it equals the one with what it sees held fixed."""
    worker = worker_of(world, "student.steps=4")
    (made,) = worker.make()
    networks = worker.networks
    evaluations = []
    handle = networks.student.register_forward_hook(lambda module, args, output: evaluations.append(output[0]))
    networks.x(made.seen, made.student_conditioning, made.timestep_B).sum().backward()
    handle.remove()
    assert [len(output) for output in evaluations] == [8], "one evaluation of all samples, and no rollout"


@pytest.mark.full
def test_the_planner_counts_the_steps_before(world, sd_folder, flux_folder):
    """One and a half more evaluations without graph in make and in each fake update, on average."""
    student, teacher = (open_space(str(folder)) for folder in (sd_folder, flux_folder))
    counted = {}
    for steps in (1, 4):
        settings = [f"student.steps={steps}", f"student.model={sd_folder}", f"teacher.model={flux_folder}"]
        counted[steps] = count_trainer(load(overrides=[*SMALL, "student.unet=null", *settings]), student, teacher)
    more = {
        part: getattr(counted[4], part).flops - getattr(counted[1], part).flops for part in ("make", "fake", "student")
    }
    assert more["student"] == 0
    assert more["make"] == more["fake"] > 0
    evaluation = evaluation_flops(student, 8)
    assert more["make"] == pytest.approx(1.5 * evaluation, rel=1e-6)


def evaluation_flops(space, samples):
    from raydistill.planning.meter import counted
    from raydistill.spaces.meta import empty_conditioning

    with counted() as meter, torch.no_grad():
        unet, noise = space.load_network(), torch.empty(samples, *space.latent_shape, device="meta")
        text = empty_conditioning(space.conditioning_layout, samples)
        return meter.count(lambda: one_step_x0(space, unet, noise, text, 999)).flops


# -- pictures ---------------------------------------------------------------------------------------------------


def test_evaluations_draw_with_all_steps_each_picture_with_its_own_noise(world, monkeypatch):
    space, unet = world[0], world[0].load_network()
    fixed = FixedPrompts(PromptSet(CAPTIONS[:2]), 3, seed=5)
    evaluator = StudentEvaluator(space, fixed, load(overrides=["evaluation.metrics=[]"]).evaluation, "cpu")
    drawn = evaluator.draw(unet, 999, 4)
    text = evaluator.table(fixed.captions)
    with torch.no_grad():
        again = lambda step: normal(5, range(3), space.latent_shape, "evaluation", step)  # noqa: E731
        wanted = student_x0(space, unet, again(0), text, 999, 4, again)
    assert torch.equal(drawn, space.decode(evaluator.vae, wanted))
    assert (drawn - evaluator.draw(unet, 999)).abs().mean() > 1e-3
    few = StudentEvaluator(space, fixed, evaluator.config.model_copy(update={"batch_size": 1}), "cpu").draw(
        unet, 999, 4
    )
    assert (few - drawn).abs().max() < 1e-4, "in batches of one as well"
