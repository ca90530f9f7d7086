"""The planner on Bridge training, encoders, autoscaled teachers and real pairs: counts against real tensors, and what follows."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml
from few_blocks import write_shortened
from lanes import full_but
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raydistill.bridge.trainer import build_trainer
from raydistill.config.reading import CONFIGS, load
from raydistill.data.pairs import write_pairs
from raydistill.errors import InputError
from raydistill.planning import report
from raydistill.planning.counting import count_bridge, count_run, count_trainer, count_vae
from raydistill.planning.counts import Cost, changed
from raydistill.planning.gpus import GIB, read_gpus
from raydistill.planning.memory import ROLES, check_launch, encoder_bytes, host_bytes, saved_by_sharing, trainer_needs
from raydistill.planning.meter import Meter
from raydistill.planning.schedule import phases, replicas, schedule
from raydistill.spaces import load_space, meta
from raydistill.spaces.meta import nbytes, open_space
from raydistill.storage.resolve import resolve

SHARE = 8
TEACHERS = sorted(file.stem for file in (CONFIGS / "teachers").glob("*.yaml"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The miniature's real Bridge trainer, on pairs of noise."""
    folder, generator = tmp_path_factory.mktemp("pairs"), torch.Generator().manual_seed(0)
    config = load(overrides=["bridge.checkpoint=null", f"bridge.batch_size={SHARE}"])
    shapes = (load_space(resolve(model)).latent_shape for model in (config.teacher.model, config.student.model))
    z_teacher, z_student = (torch.randn(40, *shape, generator=generator) for shape in shapes)
    ids = list(range(40))
    write_pairs(
        folder,
        0,
        prompts=[f"a red circle {i}" for i in ids],
        prompt_ids=ids,
        seeds=ids,
        z_teacher=z_teacher,
        z_student=z_student,
    )
    return config, build_trainer(config, folder)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_bridges_step_is_counted_as_real_tensors_cost(trainer, parts):
    config, real = trainer
    config = config.model_copy(update={"bridge": config.bridge.model_copy(update={"micro_batches": parts})})
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    counted = count_bridge(config, student, teacher, SHARE)
    real.settings = real.objective.settings = config.bridge
    batch = real.objective.batch(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        real.step(batch)
    assert counted.step.flops == pytest.approx(flops.get_total_flops(), rel=0.05)
    vae = teacher.load_vae()
    with Meter("cpu") as memory:
        for module in (real.bridge, real.objective.probe.network):
            for tensor in (*module.parameters(), *module.buffers()):
                memory.watch(tensor)
        for state in real.optimizer.state.values():
            for value in state.values():
                memory.watch(value)
        peak = memory.count(lambda: real.step(batch)).peak
    assert counted.step.peak - nbytes(vae.parameters()) == pytest.approx(peak, rel=0.1)


@pytest.mark.full
def test_parts_of_the_pairs_need_less_memory_for_the_same_arithmetic(trainer):
    config, _ = trainer
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    parted = config.model_copy(update={"bridge": config.bridge.model_copy(update={"micro_batches": 4})})
    whole, parts = (count_bridge(c, student, teacher, SHARE) for c in (config, parted))
    assert parts.step.flops == whole.step.flops
    assert parts.step.peak < 0.6 * whole.step.peak


def test_flops_of_a_vae_are_those_counted_on_real_tensors(trainer):
    config, _ = trainer
    space = load_space(resolve(config.teacher.model))
    counted, vae = count_vae(open_space(config.teacher.model)), space.load_vae()
    pictures = torch.zeros(counted.batch, 3, space.resolution, space.resolution)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as encoding:
            latents = space.encode(vae, pictures)
        with FlopCounterMode(display=False) as decoding, Meter("cpu") as memory:
            decoded = memory.count(lambda: space.decode(vae, latents))
    assert counted.encode.flops == pytest.approx(encoding.get_total_flops(), rel=0.05)
    assert counted.decode.flops == pytest.approx(decoding.get_total_flops(), rel=0.05)
    weights = nbytes(vae.parameters())
    assert counted.decode.peak == pytest.approx(decoded.peak - weights, rel=0.2)


@pytest.mark.full
def test_a_bridge_that_is_trained_along_is_counted_with_its_pairs():
    settings = ["distill.batch_size=4", "bridge.batch_size=4"]
    student, teacher = (open_space(f"shapes:{name}") for name in ("sd15", "flux"))
    alone = count_trainer(load(overrides=settings), student, teacher)
    along = count_trainer(load(overrides=[*settings, "bridge.trainable=true"]), student, teacher)
    assert along.make == dataclasses.replace(alone.make, peak=along.make.peak)
    assert along.student.flops > alone.student.flops
    assert along.weights.optimizers > alone.weights.optimizers, "Adam's moments of the projector"
    gpus = ["distill.gpus_per_worker=1", "teachers.gpus_per_rank=1"]
    lines = check_launch(load(overrides=[*settings, *gpus, "bridge.trainable=true"]), ["trainer"])
    assert lines[0].startswith("fits: trainer: ")


# -- real pairs -------------------------------------------------------------------------------------------


@pytest.fixture
def shortened(monkeypatch):
    """Public models at their real widths with two blocks."""
    monkeypatch.setattr(meta, "write_folder", write_shortened)


@pytest.mark.parametrize("teacher", full_but(TEACHERS, "flux1_dev"))
def test_every_role_of_a_ready_pair_can_be_checked_before_its_launch(teacher, shortened):
    """With the networks' real widths, and few of their blocks: what is missing to count them would be missing here."""
    config = load(CONFIGS / f"{teacher}_sd15.yaml", ["bridge.depths=[1]", "bridge.attention.depth_fraction=0.1"])
    lines = check_launch(config)
    assert [line.split(": ")[1] for line in lines] == [role for role in ROLES if role != "drawer rank"]


@pytest.mark.full
def test_the_bridge_to_the_largest_teacher_fits_the_gpus_it_asks_for():
    """FLUX.1 at its full size, half of whose blocks are behind the Bridge."""
    (line,) = check_launch(load(CONFIGS / "flux1_dev_sd15.yaml"), ["Bridge training"])
    assert line.startswith("fits: Bridge training: needs ")


@pytest.mark.full
def test_a_ready_pair_computes_the_largest_part_that_needs_no_recomputation():
    """On the H100 that it asks for: twice as many samples at once would need more, on a line that never says too much."""
    config = load(CONFIGS / "sd35_medium_sd15.yaml")
    assert not config.distill.gradient_checkpointing
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    part = config.distill.batch_size // config.distill.micro_batches
    half, whole = (
        count_trainer(changed(config, batch_size=size, micro_batches=1, workers=1), student, teacher).peak
        for size in (part // 2, part)
    )
    has = 0.9 * read_gpus()[config.plan.trainer_gpu].memory_gib * GIB
    assert whole <= has < whole + 2 * (whole - half)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["4090", "L40S"])
def test_sd35_medium_teaches_sd15_on_gpus_of_24_and_48_gb(kind, tmp_path):
    """With configs/24gb.yaml on 24 GB, and as it is, but for recomputed activations, on 48 GB: every role fits."""
    own = tmp_path / "own.yaml"
    small = ["24gb.yaml"] if kind == "4090" else []
    own.write_text(
        yaml.safe_dump({"extends": ["paper.yaml", "teachers/sd35_medium.yaml", "students/sd15.yaml", *small]})
    )
    config = load(own, [f"plan.{role}_gpu={kind}" for role in ("trainer", "teacher", "encoder")])
    if kind == "L40S":
        config = changed(config, gradient_checkpointing=True)
    part = config.distill.batch_size // config.distill.micro_batches
    share = config.bridge.batch_size // config.distill.workers // config.bridge.micro_batches
    two_parts = {"batch_size": 2 * part, "micro_batches": 2}  # more of them need no more but their inputs
    config = changed(config, **two_parts).model_copy(
        update={"bridge": config.bridge.model_copy(update={"batch_size": 16 * share, "micro_batches": 2})}
    )
    lines = check_launch(config)
    assert [line.split(": ")[1] for line in lines] == [role for role in ROLES if role != "drawer rank"]
    if kind == "4090":
        (trainer,) = [line for line in lines if line.startswith("fits: trainer")]
        assert 17 < float(re.search(r"needs ([\d.]+) GiB", trainer).group(1)) < 19, "as configs/24gb.yaml says"


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_rank_of_a_ready_pair_computes_repeats(teacher):
    config = load(CONFIGS / f"{teacher}_sd15.yaml")
    size = config.distill.batch_size // config.distill.micro_batches
    assert size % (config.teachers.slice * config.teachers.shards) == 0


def test_an_encoder_that_its_share_cannot_hold_is_refused(tmp_path):
    file = tmp_path / "gpus.yaml"
    row = "{memory_gib: 1, bf16_tflops: 1, fp32_tflops: 1, link_gbytes: 1, per_node: 1, price: 1, spot_price: 1}"
    file.write_text(f"tiny: {row}\nlarge: {row.replace('memory_gib: 1,', 'memory_gib: 80,')}\n")
    settings = [f"plan.gpus={file}", "plan.trainer_gpu=large", "plan.teacher_gpu=large", "plan.encoder_gpu=tiny"]
    settings += ["prompts.gpus_per_encoder=0.001", "synthesis.gpus_per_encoder=0.001", "bridge.checkpoint=null"]
    with pytest.raises(InputError) as error:
        check_launch(load(overrides=settings))
    for key in ("prompts.gpus_per_encoder", "synthesis.gpus_per_encoder"):
        assert f"{key}=0.001 tiny has 0.0; raise {key}" in str(error.value)
    fits = check_launch(load(overrides=[*settings[:-3], "prompts.gpus_per_encoder=1"]))
    assert [line.split(":")[1] for line in fits] == [" text encoder"]


@pytest.mark.full
def test_only_the_teachers_text_encoders_are_counted_in_half_precision(counts):
    def held(dtype: str) -> float:
        return host_bytes(counts, load(overrides=[f"prompts.encoder_dtype={dtype}"]))["text encoders"]

    sizes = {name: text.parameters for name, text in counts.text.items()}
    of_teacher = sum(size for name, size in sizes.items() if name.startswith("teacher"))
    assert held("float32") == 4 * sum(sizes.values())
    assert held("bfloat16") == held("float32") - 2 * of_teacher
    assert 0 < of_teacher < sum(sizes.values())
    whole, half = (
        encoder_bytes(counts, load(overrides=[f"prompts.encoder_dtype={dtype}"]), "text encoder")
        for dtype in ("float32", "bfloat16")
    )
    assert whole / 2 < half < whole


# -- autoscaled teachers, and what is not asked of them ---------------------------------------------------


@pytest.fixture(scope="module")
def counts():
    return count_run(load(overrides=["distill.batch_size=4", "bridge.checkpoint=null"]))


GPUS = ["distill.gpus_per_worker=1", "teachers.gpus_per_rank=1", "teachers.shards=1", "distill.batch_size=4"]


def test_teachers_are_planned_as_the_service_scales_them(counts):
    scaled = ["teachers.max_replicas=6", "teachers.target_ongoing_requests=4", "synthesis.in_flight=16"]
    config = load(overrides=[*GPUS, *scaled, "distill.workers=8", "bridge.checkpoint=null", "bridge.pairs=null"])
    parts = {phase.name: phase.gpus for phase in phases(counts, config, read_gpus())}
    assert [replicas(config, ongoing) for ongoing in (0, 4, 5, 16, 100)] == [1, 1, 2, 4, 6]
    assert parts["synthesis"] == {"H100": 4}, "16 requests of the one actor that asks"
    assert parts["Bridge training"] == {"H100": 8}, "no teacher is held meanwhile"
    assert parts["distillation"] == {"H100": 8 + 1}, "trainers ask in bursts: no more is counted on than is kept"


def test_real_images_ask_no_teacher(counts):
    settings = [*GPUS, "bridge.checkpoint=null", "bridge.pairs=null", "synthesis.count=1000", "vsd.weight=0"]
    drawn, real = (
        {phase.name: phase for phase in phases(counts, load(overrides=o), read_gpus())}
        for o in (settings, [*settings, "synthesis.images=/pictures"])
    )
    assert drawn["synthesis"].gpus == {"H100": 1}
    assert real["synthesis"].gpus == {}
    assert real["synthesis"].bound == "VAEs"
    assert real["synthesis"].hours < drawn["synthesis"].hours
    bounded = load(overrides=[*settings, "synthesis.images=hf://datasets/org/name/*.tar", "synthesis.image_count=500"])
    half = {phase.name: phase for phase in phases(counts, bounded, read_gpus())}["synthesis"]
    assert half.hours == pytest.approx(real["synthesis"].hours / 2)
    roles = ROLES
    assert not roles["teacher rank"].used(load(overrides=[*settings, "synthesis.images=/pictures"]))
    assert roles["teacher rank"].used(load(overrides=settings))


def test_images_are_for_the_bridge_and_a_sibling_s_few_pictures_for_the_discriminator(counts):
    heavy = dataclasses.replace(counts.network.score, flops=1e15, flops_32=0.0)
    counts = dataclasses.replace(counts, drawer=dataclasses.replace(counts.network, score=heavy, own_steps=4))
    settings = [
        *GPUS, "bridge.checkpoint=null", "bridge.pairs=null", "synthesis.images=/pictures", "synthesis.image_count=3000",
        "synthesis.count=64", "discriminator.real_data=null", "discriminator.real_source=samples",
        "synthesis.teacher=shapes:sd3", "synthesis.shards=2", "distill.workers=8",
    ]  # fmt: skip

    def parts(*more):
        return {phase.name: phase for phase in phases(counts, load(overrides=[*settings, *more]), read_gpus())}

    found = parts()
    assert {name: part.gpus for name, part in found.items()} == {
        "synthesis": {}, "samples": {"H100": 2}, "Bridge training": {"H100": 8}, "distillation": {"H100": 8 + 1},
    }  # fmt: skip
    assert found["samples"].bound == "teachers"
    assert parts("synthesis.sampling_steps=8")["samples"].hours == pytest.approx(2 * found["samples"].hours)
    assert parts("synthesis.count=128")["samples"].hours == pytest.approx(2 * found["samples"].hours)
    assert parts("synthesis.image_count=6000")["synthesis"].hours == pytest.approx(2 * found["synthesis"].hours)
    used = {role for role, it in ROLES.items() if it.used(load(overrides=settings))}
    assert {"drawer rank", "teacher rank"} <= used
    own = load(overrides=[*settings[:-3], "vsd.weight=0"])
    assert not ROLES["drawer rank"].used(own)
    assert ROLES["teacher rank"].used(own)


def test_shared_copies_are_gathered_once_a_pass_and_part(counts):
    """A part of a fake update has three passes, with the real samples' features; a part of the student's, three too."""
    gpus, settings = read_gpus(), [*GPUS, "distill.workers=8", "distill.micro_batches=2"]
    alone, shared = (
        schedule(counts, load(overrides=[*settings, f"fake_score.shard={on}"]), gpus) for on in ("false", "true")
    )
    once = counts.trainer.weights.fake_frozen * 7 / 8 / (1e9 * gpus["H100"].link_gbytes)
    assert shared.make == alone.make
    assert shared.fake - alone.fake == pytest.approx(2 * 3 * once)
    assert shared.student - alone.student == pytest.approx(2 * 3 * once)


def test_a_shared_student_is_gathered_for_each_pass_and_its_other_parts_lie_elsewhere(counts):
    """Two passes of a make and a fake update of two steps; three ways of an update's part: there twice, and gradients back."""
    gpus = read_gpus()
    settings = [*GPUS, "distill.workers=8", "distill.micro_batches=2", "student.steps=2", "student.ema_decay=0.9"]
    whole, own = (load(overrides=[*settings, f"student.shard={on}"]) for on in ("false", "true"))
    alone, shared = (schedule(counts, config, gpus) for config in (whole, own))
    weights = counts.trainer.weights
    assert 0.9 * counts.trainer.gradients["student"] < weights.student_blocks < counts.trainer.gradients["student"]
    speed = 1e9 * gpus["H100"].link_gbytes
    once = weights.student_blocks * 7 / 8 / speed
    assert shared.make - alone.make == pytest.approx(2 * 2 * once)
    assert shared.fake - alone.fake == pytest.approx(2 * 2 * once)
    summed = 2 * 7 / 8 * weights.student_blocks / speed
    assert shared.student - alone.student == pytest.approx(2 * 3 * once - summed)
    # of weights, moments and average, and of gradients in the student's update
    blocks, block = weights.student_blocks, weights.student_block
    for phase, copies, gathered in (("make", 4, 2), ("student", 5, 4)):
        saved = saved_by_sharing(counts.trainer, own, phase)
        assert saved == pytest.approx(copies * blocks * 7 / 8 - gathered * block)
        assert saved_by_sharing(counts.trainer, whole, phase) == 0
    assert "student.shard: a trainer receives" in report._requests(counts, own, gpus)
    # rank 0 evaluates with student and average whole, beside its share of all
    idle = dataclasses.replace(counts.trainer, make=(none := Cost(0, 0)), fake=none, student=none)
    beside = counts.trainer.resident - saved_by_sharing(counts.trainer, own, "make")
    assert trainer_needs(idle, own) == beside + weights.student


def test_a_request_that_is_filled_up_with_repeats_is_said(counts):
    gpus = read_gpus()
    filled = report._requests(counts, load(overrides=["distill.batch_size=4", "teachers.slice=8"]), gpus)
    assert "ITS 4 SAMPLES ARE FILLED UP TO 16 with repeats: 2 rank(s) take slices of 8" in filled
