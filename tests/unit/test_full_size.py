"""Every real family at its real widths and grids on the meta device: shapes of all tensors of a run, end to end.

Networks have fewer blocks than the published ones, which no shape depends on; widths, grids, text lengths and VAEs are
those of the published models. No weights, no network, no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from few_blocks import write_shortened
from lanes import full_but
from safetensors.torch import save_file

from raydistill.config.reading import CONFIGS, load
from raydistill.config.schema import Config
from raydistill.data.vae import resized
from raydistill.planning import meter
from raydistill.planning.counting import count_bridge, distiller
from raydistill.spaces import hub_models, load_space
from raydistill.spaces.base import Space
from raydistill.spaces.meta import empty_conditioning, empty_part, open_space, without_initial_values

BATCH = 2
TEACHERS = {  # channels, tokens and width of the text, pooled width, does the network see conditional and empty prompts
    "sdxl": (4, 77, 2048, 1280, True),
    "kolors": (4, 256, 4096, 4096, True),
    "pixart_sigma": (4, 300, 4096, None, True),
    "sd35_medium": (16, 77 + 256, 4096, 768 + 1280, True),
    "sd35_large": (16, 77 + 256, 4096, 768 + 1280, True),
    "flux1_dev": (16, 512, 4096, 768, False),
    "flux2_klein": (32, 512, 7680, None, True),
    "chroma": (16, 512, 4096, None, True),
    "sana15": (32, 300, 2304, None, True),
    "qwen_image": (16, 512, 3584, None, True),
}
SIDES = {"sana15": 32}  # of latents; others have 128
STUDENTS = {"sd15": 768, "sd21_base": 1024}  # width of the text
FEATURE_GRID = {"sdxl": 32, "kolors": 32, "sana15": 32}  # a UNet's middle block; others see patches of 2 x 2
FEWER_OF_A_STUDENT = {"layers_per_block": 1}


def shortened(model: str, folder: Path, fewer: dict[str, Any] | None = None) -> Space:
    """The Space of a public model whose network has few blocks."""
    write_shortened(hub_models()[model].sizes, folder, fewer)
    if model.endswith("FLUX.2-klein-base-4B"):  # its latents' statistics are stored with the weights
        names = {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}
        save_file(names, folder / "vae" / "diffusion_pytorch_model.safetensors")
    space = load_space(folder)
    space.load_part = partial(empty_part, space)
    return space


def student_of(config: Config) -> Space:
    return open_space(config.student.model)


@dataclass
class Seen:
    """Shapes of what the networks of a worker were called with, and of what they answered."""

    student: list[tuple[int, ...]] = field(default_factory=list)
    bridge: list[tuple[int, ...]] = field(default_factory=list)
    discriminator: list[tuple[int, ...]] = field(default_factory=list)

    def watch(self, worker: Any) -> None:
        for name in ("student", "bridge", "discriminator"):
            module = getattr(worker.networks, name)
            module = module.heads[0] if name == "discriminator" else module
            module.register_forward_hook(partial(self._note, getattr(self, name)))

    @staticmethod
    def _note(shapes: list[tuple[int, ...]], module: Any, args: Any, output: Any) -> None:
        output = output if isinstance(output, torch.Tensor) else output[0]
        shapes.append((*args[0].shape, *output.shape))


PAIRS = [*(f"{teacher}_sd15" for teacher in TEACHERS), "sd35_medium_sd21_base"]


@pytest.fixture(params=full_but(PAIRS, "sdxl_sd15", "sd35_medium_sd15"))
def pair(request, tmp_path) -> tuple[str, Config, Space, Space]:
    """(name of the teacher, configuration, student, teacher): every family with SD 1.5, and one with SD 2.1."""
    settings = [f"distill.batch_size={BATCH}", "distill.micro_batches=1", "distill.gradient_checkpointing=false"]
    settings += ["bridge.depths=[1]", "bridge.micro_batches=1"]
    config = load(CONFIGS / f"{request.param}.yaml", settings)
    student = shortened(config.student.model, tmp_path / "student", FEWER_OF_A_STUDENT)
    teacher = next(name for name in TEACHERS if request.param.startswith(name))
    return teacher, config, student, shortened(config.teacher.model, tmp_path / "teacher")


def test_a_picture_has_the_latents_of_its_family_in_both_spaces(pair):
    name, _, student, teacher = pair
    picture = torch.empty(1, 3, 1024, 1024, device="meta")
    with meter.counted(), torch.no_grad():
        z_teacher = teacher.encode(teacher.load_vae(), picture)
        z_student = student.encode(student.load_vae(), resized(picture, student.resolution))
        drawn = teacher.decode(teacher.load_vae(), z_teacher)
    side = SIDES.get(name, 128)
    assert z_teacher.shape == (1, TEACHERS[name][0], side, side)
    assert z_student.shape == (1, 4, 64, 64)
    assert drawn.shape == picture.shape


def test_a_step_has_the_shapes_of_its_family_from_noise_to_loss(pair):
    """make, the teacher's guided score, a fake update and the student's update, as a worker does them."""
    name, config, student, teacher = pair
    channels, tokens, width, pooled, guided_twice = TEACHERS[name]
    side = SIDES.get(name, 128)
    width_S = STUDENTS["sd15" if config.student.start_timestep == 999 else "sd21_base"]
    seen, rows = Seen(), []
    with meter.counted():
        worker = distiller(config, student, teacher, BATCH)
        seen.watch(worker)
        (made,) = worker.make()  # one micro-batch
        assert made.seen.shape == (BATCH, 4, 64, 64)
        assert made.x_t.shape == (BATCH, channels, side, side)
        assert made.t_B.shape == (BATCH,)
        assert made.student_conditioning["prompt_embeds"].shape == (BATCH, 77, width_S)
        assert made.teacher_conditioning["prompt_embeds"].shape == (BATCH, tokens, width)
        if pooled:
            assert made.teacher_conditioning["pooled_prompt_embeds"].shape == (BATCH, pooled)

        network = teacher.load_network(torch.bfloat16)
        network.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )
        layout = teacher.conditioning_layout
        conditioning, empty = (empty_conditioning(layout, n, torch.bfloat16) for n in (BATCH, 1))
        with torch.no_grad():
            x_t, t_B = made.x_t.to("meta"), made.t_B.to("meta")  # they come on the CPU, to be sent
            scores = teacher.predict_x0(network, x_t, t_B, conditioning, empty, config.teacher.guidance_scale)
        assert scores.shape == made.x_t.shape
        assert scores.dtype == torch.float32
        assert rows == [BATCH * (2 if guided_twice else 1)]

        worker.fake_update()
        worker.student_update([made], [scores])
    grid = FEATURE_GRID.get(name, 64)
    assert set(seen.student) == {(BATCH, 4, 64, 64) * 2}
    assert set(seen.bridge) == {(BATCH, 4, 64, 64, BATCH, channels, side, side)}
    assert len(seen.bridge) == 3  # make, the fake update, the student's update
    for _, features, height, across, *logits in seen.discriminator:
        assert (height, across) == (grid, grid)
        assert features >= 320
        assert logits[0] == BATCH
    assert len(seen.discriminator) == 3  # real, fake, and the generator's
    assert set(worker.gradients.optimizers) == {"student", "fake", "discriminator"}
    for optimizer in worker.gradients.optimizers.values():
        moments = [state["exp_avg_sq"].shape for state in optimizer.state.values()]
        assert moments == [p.shape for group in optimizer.param_groups for p in group["params"]]


def test_a_bridge_step_has_the_shapes_of_its_family(pair):
    """L1 in the teacher's space and attention fidelity through the teacher's first blocks."""
    name, config, student, teacher = pair
    tree = config.model_dump()
    tree["bridge"]["depths"] = [6, 6, 6, 6, 6]
    tree["bridge"]["attention"] |= {"depth_fraction": 1.0, "layers": 2}
    counted = count_bridge(Config.model_validate(tree), student, teacher, 1)
    more = 0.52e6 if name == "sana15" else 0  # to go down
    assert 4.7e6 < counted.parameters - more < 5.2e6  # the paper's "about 5 M"
    assert counted.step.flops > 0
    assert counted.probe > 1e7


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_draws_one_step_latents_at_its_real_size(student):
    config = load(CONFIGS / f"sd35_medium_{student}.yaml")
    space = student_of(config)
    with meter.counted(), torch.no_grad():
        from raydistill.spaces.one_step import one_step_x0

        conditioning = empty_conditioning(space.conditioning_layout, BATCH)
        assert conditioning["prompt_embeds"].shape == (BATCH, 77, STUDENTS[student])
        noise = torch.empty(BATCH, *space.latent_shape, device="meta")
        z_student = one_step_x0(space, space.load_network(), noise, conditioning, config.student.start_timestep)
        picture = space.decode(space.load_vae(), z_student)
    assert z_student.shape == (BATCH, 4, 64, 64)
    assert picture.shape == (BATCH, 3, 512, 512)


@pytest.mark.parametrize("name", TEACHERS)
def test_text_encoders_give_what_the_network_takes(name):
    """Widths of all encoders of a family make up the width of its conditioning."""
    space = open_space(load(CONFIGS / f"{name}_sd15.yaml").teacher.model)
    _, tokens, width, pooled, _ = TEACHERS[name]
    lengths = space.text_lengths
    configs = {part: space.part_config(part) for part in lengths}
    hidden = {part: c.get("d_model") or c.get("hidden_size") for part, c in configs.items()}
    made = {
        "sdxl": lambda: (lengths["text_encoder"], sum(hidden.values())),
        "kolors": lambda: (lengths["text_encoder"], hidden["text_encoder"]),
        "pixart_sigma": lambda: (lengths["text_encoder"], hidden["text_encoder"]),
        **dict.fromkeys(("chroma", "sana15", "qwen_image"), lambda: (lengths["text_encoder"], hidden["text_encoder"])),
        "flux1_dev": lambda: (lengths["text_encoder_2"], hidden["text_encoder_2"]),
        "flux2_klein": lambda: (lengths["text_encoder"], 3 * hidden["text_encoder"]),
    }.get(name, lambda: (lengths["text_encoder"] + lengths["text_encoder_3"], hidden["text_encoder_3"]))
    assert made() == (tokens, width)
    if name.startswith("sd35"):
        assert hidden["text_encoder"] + hidden["text_encoder_2"] == pooled
    if name == "flux1_dev":
        assert hidden["text_encoder"] == pooled


def test_building_without_values_leaves_no_real_tensor_unfilled():
    """Even by a function that somebody imported while the values of meta tensors were left out."""
    with without_initial_values():
        kept = torch.nn.init.ones_
        assert torch.nn.init.zeros_(torch.empty(3, device="meta")).is_meta
        assert torch.equal(torch.nn.init.ones_(torch.zeros(3)), torch.ones(3))
    assert torch.equal(kept(torch.zeros(3)), torch.ones(3))
    assert torch.nn.init.ones_ is not kept
