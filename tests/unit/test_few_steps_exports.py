"""Exports of students of several steps: plain diffusers draws the same latents, and every form says how."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from test_few_steps import CAPTIONS, CARD, fixture_folders, fixture_world, updated, worker_of  # noqa: F401

from raydistill.diffusion.noise import normal
from raydistill.diffusion.timesteps import student_timesteps
from raydistill.errors import InputError
from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.export.few_steps import steps_of_folder
from raydistill.export.lora import load_lora
from raydistill.export.merge import merge_students, open_sources
from raydistill.export.one_picture import difference
from raydistill.export.pipeline import export_student, how_to_draw, usage
from raydistill.export.sampling import pictures_of, typed_prompts
from raydistill.export.single_file import write_single_file
from raydistill.export.source import Export, open_student_export
from raydistill.spaces import load_student_space
from raydistill.spaces.one_step import one_step_x0, student_x0
from raydistill.spaces.sd import StableDiffusionSpace


def drawn_by_diffusers(folder, steps, seed, count=2):
    """Latents of plain diffusers, which draws all noise from one generator."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    asked = {"num_inference_steps": steps, "guidance_scale": 0} | dict(load_student_space(folder).call_arguments)
    return pipe(CAPTIONS[:count], generator=generator, output_type="latent", **asked).images


CASES = [("sd15", 999, 2), ("sd15", 625, 4), ("v-prediction", 999, 4), ("sdxl", 399, 4), ("pixart", 400, 2)]


@pytest.mark.parametrize(("model", "start", "steps"), CASES)
def test_plain_diffusers_draws_the_students_own_latents(model, start, steps, folders, tmp_path):
    space = load_student_space(folders[model])
    unet = space.load_network()
    export_student(space, unet, start, tmp_path / "export", CARD, torch.float32, steps=steps)
    opened = open_student_export(Export(tmp_path / "export", "x"))
    assert opened[1:] == (student_timesteps(start, steps)[0], steps)
    theirs = drawn_by_diffusers(tmp_path / "export", steps, seed=3)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(2, *space.latent_shape, generator=generator) for _ in range(steps)]
    text = space.encode_prompts(space.load_text(), CAPTIONS[:2])
    with torch.no_grad():
        ours = student_x0(space, unet, noise[0], text, start, steps, noise.__getitem__)
        other = one_step_x0(space, unet, noise[0], text, start)
    assert (ours - other).abs().max() > 1e-2 * ours.abs().max()
    assert (ours - theirs).abs().max() <= 2e-5 * ours.abs().max()


@pytest.fixture(scope="module")
def exports(world, tmp_path_factory):
    """Of two students of four steps, and of one of one step."""
    folder, space = tmp_path_factory.mktemp("students"), world[0]
    unet, other = space.load_network(), space.load_network()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.9)
    for name, network, steps in (("one", unet, 4), ("two", other, 4), ("single", unet, 1)):
        export_student(space, network, 999, folder / name, CARD, torch.float32, steps=steps)
    return {name: Export(folder / name, name) for name in ("one", "two", "single")}


def test_samplers_draw_an_export_in_its_steps_with_each_pictures_own_noise(exports, world, tmp_path):
    subject = find_subject(str(exports["one"].folder), tmp_path)
    assert subject.title == "one, 4 steps from t = 999"
    painter = load_painter(subject, "cpu", torch.float32)
    pictures = pictures_of(typed_prompts(CAPTIONS[:2]), [3])
    space = world[0]
    text = space.encode_prompts(space.load_text(), CAPTIONS[:2])

    def again(step):
        return torch.cat([normal(p.seed, [p.prompt_id], space.latent_shape, "sample", step) for p in pictures])

    with torch.no_grad():
        wanted = student_x0(space, space.load_network(), again(0), text, 999, 4, again)
    assert torch.equal(painter.latents(pictures), wanted)
    assert (painter.latents(pictures[1:]) - wanted[1:]).abs().max() < 1e-4
    with pytest.raises(InputError, match=r"this student takes 4 steps, without guidance"):
        find_subject(str(exports["one"].folder), tmp_path, steps=1)
    assert find_subject(str(exports["single"].folder), tmp_path).steps == 1
    weights = find_subject(str(space.folder), tmp_path, unet=str(exports["one"].folder))
    assert (weights.start_timestep, weights.steps) == (999, 4), "and so are its weights in another folder"
    assert torch.equal(load_painter(weights, "cpu", torch.float32).latents(pictures), wanted)


def test_a_call_with_a_prompt_alone_is_refused_and_the_card_says_how(exports):
    folder = exports["one"].folder
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*scheduler")
        pipe = DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="original_steps"):
        pipe("a red circle", guidance_scale=0)
    assert steps_of_folder(folder) == 4
    assert steps_of_folder(exports["single"].folder) == 1
    assert "num_inference_steps=4, guidance_scale=0" in (card := (folder / "README.md").read_text())
    assert "**four** network evaluations" in card
    assert "few-step" in card
    assert how_to_draw(folder).startswith("num_inference_steps=4, guidance_scale=0")
    assert "one-step" in (exports["single"].folder / "README.md").read_text()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_card_says_all_that_a_family_has_its_pipeline_called_with(steps):
    class Ours(StableDiffusionSpace):
        call_arguments = {"clean_caption": False, "clip_skip": 2, "negative_prompt": "a=b"}

    assert (
        f'("a prompt", num_inference_steps={steps}, guidance_scale=0, clean_caption=False, clip_skip=2, '
        "negative_prompt='a=b')"
    ) in usage(Ours, "float16", steps)


def test_students_of_equal_steps_are_averaged_and_other_ones_refused(exports, tmp_path):
    merge_students(open_sources([exports["one"], exports["two"]]), [0.5, 0.5], tmp_path / "mean")
    merged = open_student_export(Export(tmp_path / "mean", "mean"))
    assert merged[1:] == (999, 4)
    assert "num_inference_steps=4" in (tmp_path / "mean" / "README.md").read_text()
    with pytest.raises(InputError, match=r"single draws in 1 steps, but .*one in 4"):
        open_sources([exports["one"], exports["single"]])


def test_forms_for_one_step_alone_are_refused(exports, tmp_path):
    with pytest.raises(
        InputError, match=r"a student of 4 steps, and --format single-file is written for one step alone"
    ):
        write_single_file(exports["one"], tmp_path)


@pytest.mark.full
def test_a_lora_of_four_steps_draws_the_merged_students_picture(world, tmp_path):
    worker = updated(worker_of(world, "student.steps=4", "student.kind=lora", "distill.batch_size=4"), 1)
    space = world[0]
    export_student(space, worker.networks.evaluated, 999, tmp_path / "export", CARD, torch.float32, steps=4)
    opened = load_student_space(tmp_path / "export")
    assert difference(opened, lambda: load_lora(space, tmp_path / "export" / "lora")) < 0.1
    assert "num_inference_steps=4" in (tmp_path / "export" / "lora" / "README.md").read_text()
    plain = difference(opened, lambda: DiffusionPipeline.from_pretrained(tmp_path / "export"))
    assert plain < 1e-3


@pytest.mark.full
def test_the_mlflow_model_draws_in_all_steps(exports):
    from raydistill.export.mlflow_student import Student  # mlflow is slow to import

    folder = exports["one"].folder
    model = Student()
    model.load_context(SimpleNamespace(artifacts={"pipeline": str(folder)}))
    (ours,) = model.predict(CAPTIONS[:1])
    pipe = DiffusionPipeline.from_pretrained(folder)
    generator = [torch.Generator().manual_seed(0)]
    (wanted,) = pipe(CAPTIONS[:1], num_inference_steps=4, guidance_scale=0, generator=generator).images
    assert ours.tobytes() == wanted.tobytes()
    other = DiffusionPipeline.from_pretrained(exports["single"].folder)
    (single,) = other(CAPTIONS[:1], num_inference_steps=1, guidance_scale=0, generator=generator).images
    assert ours.tobytes() != single.tobytes()
