"""SDXL as a student: its step against diffusers' UNet called by hand, its update on an equal grid, its export."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from export_students import ONE_STEP
from student_updates import PROMPTS, distiller, stepped

from raydistill.bridge.model import reach
from raydistill.data.encode import TextEncoder
from raydistill.errors import InputError
from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.export.lora import write_lora
from raydistill.export.merge import merge_students, open_sources, shares_of
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.single_file import write_single_file
from raydistill.export.source import Export
from raydistill.pictures.picture import Picture
from raydistill.spaces import load_space, load_student_space
from raydistill.spaces.one_step import one_step_x0

SETTINGS = ("student.start_timestep=399", "student.lr=1e-2")


@pytest.fixture(scope="module")
def space(diffusion_folders):
    return load_student_space(diffusion_folders["sdxl"])


@pytest.fixture(scope="module")
def text(space):
    return TextEncoder(space).encode(PROMPTS)


def noise_of(space):
    return torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("start", [399, 999])
def test_the_step_is_diffusers_unet_by_hand_with_sdxls_conditioning(start, space, text):
    """Plain noise at both; prompts, pooled text and sizes from diffusers' own pipeline; eps to x0 in float64."""
    pipe, noise = StableDiffusionXLPipeline.from_pretrained(space.folder), noise_of(space)
    side = space.resolution
    with torch.no_grad():
        ours = one_step_x0(space, space.load_network(), noise, text, start)
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2)
        conditions = {"text_embeds": pooled.double(), "time_ids": sizes}
        eps = pipe.unet.double()(noise.double(), start, embeds.double(), added_cond_kwargs=conditions).sample
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(start + 1)]
    alpha_bar = math.prod(1 - root**2 for root in roots)
    wanted = (noise - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# -- a run's update -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(space, diffusion_folders):
    """A worker whose student is a LoRA, after an update; the teacher's grid is the student's."""
    teacher = load_space(diffusion_folders["pixart"])
    assert reach(space, teacher, prior=True) == (0, 1)
    worker = distiller(space, teacher, *SETTINGS, "student.kind=lora")
    return stepped(worker, teacher, 2)


def test_an_update_moves_the_whole_student_or_its_lora_through_a_bridge_of_no_up_blocks(space, lora, diffusion_folders):
    teacher = load_space(diffusion_folders["pixart"])
    assert lora.networks.bridge.prior.doublings == 0
    whole = stepped(distiller(space, teacher, *SETTINGS), teacher, 2)
    start = space.load_network().state_dict()
    moved = {n for n, v in whole.networks.student.state_dict().items() if not torch.equal(v, start[n])}
    assert {"add_embedding.linear_1.weight", "conv_in.weight", "mid_block.attentions.0.proj_in.weight"} <= moved
    assert all(value.abs().max() > 0 for value in lora.state_dict()["student"].values())


# -- the export -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(space, lora, tmp_path_factory):
    card = ModelCard(
        teacher="shapes:flux", teacher_class="FluxPipeline", student=space.folder, steps=2,
        student_class=space.pipeline_class,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl") / "mine" / "export"
    return Export(export_student(space, lora.networks.evaluated, 399, folder, card, torch.float32), "mine")


def drawn(pipe, space):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=noise_of(space), output_type="latent", **ONE_STEP).images


def test_the_export_is_an_sdxl_folder_that_draws_the_runs_picture(space, text, lora, export):
    with torch.no_grad():
        wanted = one_step_x0(space, lora.networks.evaluated, noise_of(space), text, 399)
    pipe = StableDiffusionXLPipeline.from_pretrained(export.folder)
    assert pipe.config.force_zeros_for_empty_prompt == space.index["force_zeros_for_empty_prompt"]
    torch.testing.assert_close(drawn(pipe, space), wanted, rtol=1e-4, atol=1e-3)
    assert pipe.scheduler.timesteps.tolist() == [399]
    card = (export.folder / "README.md").read_text()
    assert "from diffusers import StableDiffusionXLPipeline" in card
    assert "StableDiffusionPipeline" not in card
    base = StableDiffusionXLPipeline.from_pretrained(space.folder)
    base.scheduler = pipe.scheduler
    assert (drawn(base, space) - wanted).abs().mean() > 1e-3  # the LoRA does something
    base.load_lora_weights(export.folder / "lora")
    torch.testing.assert_close(drawn(base, space), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.full
def test_everything_that_reads_an_export_reads_this_one(space, export, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(export.folder)
    subject = find_subject(str(export.folder), tmp_path)
    painter = load_painter(subject, "cpu", torch.float32)
    pictures = [Picture(i, i, prompt, 3) for i, prompt in enumerate(PROMPTS)]
    latents = painter.latents(pictures)
    pipe.set_progress_bar_config(disable=True)
    from raydistill.diffusion.noise import normal

    noise = torch.cat([normal(3, [i], space.latent_shape, "sample") for i in range(2)])
    theirs = pipe(PROMPTS, latents=noise, output_type="latent", **ONE_STEP).images
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-3)

    other = tmp_path / "other"
    card = ModelCard(
        teacher="t", teacher_class="FluxPipeline", student="s", steps=1, student_class=space.pipeline_class
    )
    export_student(space, space.load_network(), 399, other, card, torch.float32)
    merge_students(open_sources([export, Export(other, "other")]), shares_of(None, 2), tmp_path / "mean")
    mean = StableDiffusionXLPipeline.from_pretrained(tmp_path / "mean").unet.state_dict()
    name = "mid_block.attentions.0.proj_in.weight"
    halves = [StableDiffusionXLPipeline.from_pretrained(f).unet.state_dict()[name] for f in (export.folder, other)]
    torch.testing.assert_close(mean[name], sum(halves) / 2)

    difference = write_lora(Export(other, "other"), load_space(export.folder), "base", 0.9999, _new(tmp_path / "svd"))
    assert "differs by" in difference
    with pytest.raises(InputError, match="is a StableDiffusionXLPipeline, whose original layout is not written"):
        write_single_file(export, _new(tmp_path / "single"))


def _new(folder):
    folder.mkdir()
    return folder


def test_families_that_give_no_students_are_refused(diffusion_folders):
    with pytest.raises(InputError, match="is a KolorsPipeline, but a StableDiffusionPipeline or StableDiffusionXLPip"):
        load_student_space(diffusion_folders["kolors"])
