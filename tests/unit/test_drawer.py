"""A cheaper sibling draws the pictures of synthesis; step-distilled models draw, and never teach."""

from __future__ import annotations

import json
import shutil

import pytest
from pair_sets import load_pairs
from tiny_flow_pipelines import save_flux2

from raydistill.config.reading import changed, drawing_config, draws, draws_pairs, draws_samples, load, stages_of
from raydistill.data import synthesis
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import Recipe
from raydistill.distillation.networks import guidance_scale
from raydistill.driver.preflight import check_inputs, open_drawer
from raydistill.errors import InputError
from raydistill.export.licences import student_licences
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.distilled import (
    check_scores,
    check_shared_space,
    drawing,
    step_distilled,
    teacher_sampling,
    without_scores,
)
from raydistill.spaces.meta import open_space
from raydistill.storage.fingerprint import identify

HUB = {  # what draws, and what teaches in its place
    "black-forest-labs/FLUX.1-schnell": ("black-forest-labs/FLUX.1-dev", 4),
    "Tongyi-MAI/Z-Image-Turbo": ("Tongyi-MAI/Z-Image", 8),
    "stabilityai/stable-diffusion-3.5-large-turbo": ("stabilityai/stable-diffusion-3.5-large", 4),
    "black-forest-labs/FLUX.2-klein-4B": ("black-forest-labs/FLUX.2-klein-base-4B", 4),
}
BY_NAME_ALONE = "stabilityai/stable-diffusion-3.5-large-turbo"  # its configuration is its base's


def teacher(model: str, *overrides: str):
    return load(overrides=[f"teacher.model={model}", *overrides])


def with_file(folder, part: str, **values):
    """Other values in a configuration file of a folder."""
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- which models are step-distilled ------------------------------------------------------------------------


@pytest.mark.parametrize("model", HUB)
def test_a_step_distilled_model_of_the_hub_is_refused_as_teacher_in_one_line_and_its_base_is_not(model):
    space = open_space(model)
    with pytest.raises(InputError, match=rf"^teacher\.model: {model} is step-distilled.*synthesis\.teacher") as told:
        check_scores(teacher(model), space)
    assert "\n" not in str(told.value)
    base = HUB[model][0]
    check_scores(teacher(base), open_space(base))


@pytest.mark.parametrize(
    "model",
    ["lodestones/Chroma1-HD", "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "Qwen/Qwen-Image",
     "black-forest-labs/FLUX.1-Krea-dev"],
)  # fmt: skip
def test_multi_step_models_are_not_taken_for_step_distilled_ones(model):
    space = open_space(model)
    assert step_distilled(space, model) is None
    assert step_distilled(space, "/somewhere/else") is None
    check_scores(teacher(model), space)
    if model == "lodestones/Chroma1-HD":
        with pytest.raises(InputError, match="Chroma1-Flash is step-distilled"):
            check_scores(teacher("lodestones/Chroma1-Flash"), space)


@pytest.mark.parametrize("model", [model for model in HUB if model != BY_NAME_ALONE])
def test_its_configuration_tells_it_under_any_name(model):
    assert step_distilled(open_space(model), "/somewhere/else")
    assert step_distilled(open_space(HUB[model][0]), "/somewhere/else") is None


def test_what_a_configuration_cannot_tell_is_told_by_name_with_any_revision_and_in_the_hub_s_cache():
    space = open_space(BY_NAME_ALONE)
    assert step_distilled(space, "/somewhere/else") is None
    org, name = BY_NAME_ALONE.split("/")
    for path in (f"{BY_NAME_ALONE}@main", f"/cache/hub/models--{org}--{name}/snapshots/{'0' * 40}"):
        assert step_distilled(space, path)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerAncestralDiscreteScheduler"}),
        ("unet/config.json", {"time_cond_proj_dim": 256}),
    ],
)
def test_consistency_models_and_sdxl_turbo_are_told_by_their_files(part, values, tmp_path):
    folder = shutil.copytree(WEIGHTS / "sdxl", tmp_path / "sdxl")
    assert step_distilled(load_space(folder), str(folder)) is None
    with_file(folder, part, **values)
    assert part in step_distilled(load_space(folder), str(folder))


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "sd15"])
def test_the_miniature_models_are_not(name):
    assert step_distilled(open_space(f"shapes:{name}"), f"shapes:{name}") is None


def test_a_step_distilled_folder_opens_and_may_stand_where_no_score_is_asked(tmp_path):
    folder = save_flux2(tmp_path / "distilled", is_distilled=True)
    space = load_space(folder)
    with pytest.raises(InputError, match="is_distilled=true in .*model_index.json"):
        check_scores(teacher(str(folder)), space)
    unscored = teacher(str(folder), "vsd.weight=0", "teacher.guidance_scale=null")
    check_scores(unscored, space)
    [note] = without_scores(unscored, space)
    assert note.endswith("the discriminator reads its features, and it draws in 4 steps without guidance")
    assert without_scores(teacher(str(folder)), space) == ()
    for asked, drawn in ((28, 4), (2, 2)):
        assert teacher_sampling(changed(unscored, {"teacher": {"sampling_steps": asked}}), space) == (drawn, 0.0)
    with pytest.raises(InputError, match=r"^teacher\.guidance_scale: .* takes no guidance \(0 to 1\), not 3.5"):
        check_scores(changed(unscored, {"teacher": {"guidance_scale": 3.5}}), space)
    shared = teacher("shapes:flux", "controls=[shared_space]")
    check_shared_space(shared, open_space("shapes:sd15"))
    with pytest.raises(InputError, match=r"^controls: shared_space learns from scores alone"):
        check_shared_space(changed(shared, {"vsd": {"weight": 0.0}}), open_space("shapes:sd15"))
    distilled = changed(shared, {"student": {"model": str(folder)}})
    with pytest.raises(
        InputError, match=r"^controls: the teacher of shared_space is .*, which is step-distilled \(is_dist"
    ):
        check_shared_space(distilled, space)


def test_a_teacher_of_scores_draws_its_own_pictures_as_it_is_told():
    space = open_space("shapes:flux")
    assert teacher_sampling(teacher("shapes:flux", "teacher.sampling_steps=28"), space) == (
        28,
        guidance_scale(load(), space),
    )


# -- how they draw ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", HUB)
def test_a_step_distilled_model_draws_in_its_own_steps_without_guidance(model):
    space, config = open_space(model), teacher(HUB[model][0], f"synthesis.teacher={model}")
    assert drawing(config, space) == (HUB[model][1], 0.0)
    assert drawing(teacher(model), space) == (HUB[model][1], 0.0)  # of jobs/synthesize.py alone
    assert drawing(changed(config, {"synthesis": {"sampling_steps": 2}}), space) == (2, 0.0)
    with pytest.raises(InputError, match=rf"^synthesis\.sampling_steps: {model} .* 1 to 8 steps, not 9"):
        drawing(changed(config, {"synthesis": {"sampling_steps": 9}}), space)
    with pytest.raises(InputError, match=rf"^synthesis\.guidance_scale: {model} .* no guidance .*not 3.5"):
        drawing(changed(config, {"synthesis": {"guidance_scale": 3.5}}), space)


def test_another_model_draws_with_the_teacher_s_steps_and_its_own_family_s_guidance():
    flux, sd3 = open_space("shapes:flux"), open_space("shapes:sd3")
    own = teacher("shapes:flux", "teacher.guidance_scale=2.5", "teacher.sampling_steps=7")
    assert drawing(own, flux) == (7, 2.5)
    sibling = changed(own, {"synthesis": {"teacher": "shapes:sd3"}})
    assert drawing(sibling, sd3) == (7, sd3.default_guidance_scale)
    told = changed(sibling, {"synthesis": {"sampling_steps": 3, "guidance_scale": 1.5}})
    assert drawing(told, sd3) == (3, 1.5)


# -- whose pictures -----------------------------------------------------------------------------------------


def test_a_sibling_of_the_same_vae_is_accepted_and_others_are_refused_with_both_names():
    config = load(overrides=["synthesis.teacher=shapes:sd3"])
    flux = load_space("shapes:flux")
    assert open_drawer(config, flux).pipeline_class == "StableDiffusion3Pipeline"
    assert open_drawer(load(overrides=["synthesis.teacher=shapes:flux"]), flux) is None
    other = changed(config, {"synthesis": {"teacher": "shapes:sdxl"}})
    with pytest.raises(
        InputError, match=r"^synthesis\.teacher: shapes:sdxl has latents of .*teacher\.model=shapes:flux"
    ):
        open_drawer(other, flux)


@pytest.mark.parametrize("damage", ["weights", "scaling"])
def test_the_same_latents_of_another_vae_are_refused(damage, tmp_path):
    folder = shutil.copytree(WEIGHTS / "sd3", tmp_path / "sd3")
    if damage == "scaling":
        with_file(folder, "vae/config.json", scaling_factor=0.5)
    else:
        from safetensors.torch import load_file, save_file

        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["decoder.conv_in.bias"] += 1
        save_file(tensors, file)
    with pytest.raises(InputError, match=r"^synthesis\.teacher: .*sd3 has another VAE than teacher\.model=shapes:flux"):
        open_drawer(load(overrides=[f"synthesis.teacher={folder}"]), load_space("shapes:flux"))


def test_the_check_before_a_launch_opens_the_drawer_of_a_run_that_draws(tmp_path):
    own = (f"storage={tmp_path}", "discriminator.real_data=null")
    with pytest.raises(InputError, match=r"^synthesis\.teacher: .*shapes:sdxl"):
        check_inputs(load(overrides=[*own, "synthesis.teacher=shapes:sdxl"]))


def test_a_sibling_s_rows_are_those_of_a_set_whose_teacher_it_is(tmp_path):
    flux, sd3, student = (load_space(f"shapes:{name}") for name in ("flux", "sd3", "sd15"))
    client = LocalTeacher(sd3, sd3.load_network())
    prompts = PromptSet(["a small red circle at the left on a white background"])
    told = {"student": student, "source": prompts, "count": 2, "batch_size": 2, "shard_size": 2, "steps": 2, "seed": 5}
    sets = []
    for name, recipe in {
        "sibling": Recipe(teacher=flux, drawer=sd3, guidance_scale=2.0, **told),
        "own": Recipe(teacher=sd3, guidance_scale=2.0, **told),
    }.items():
        assert synthesis.synthesise(recipe, tmp_path / name, client, progress=False) == 2
        sets.append(load_pairs(tmp_path / name))
    assert (sets[0].z_teacher == sets[1].z_teacher).all()
    assert (sets[0].z_student == sets[1].z_student).all()
    settings = [json.loads((tmp_path / name / "synthesis.json").read_text()) for name in ("sibling", "own")]
    assert settings[0]["drawer"] == ["StableDiffusion3Pipeline", identify(sd3.folder)[1]]
    assert settings[1]["drawer"] is None
    with pytest.raises(InputError, match="drawer"):
        synthesis.synthesise(Recipe(teacher=flux, guidance_scale=2.0, **told), tmp_path / "sibling", client)


# -- which sets a run makes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "stages", "pairs", "samples"),
    [
        ((), ["distill"], False, False),
        (("bridge.checkpoint=null",), ["synthesis", "bridge", "distill"], True, False),
        (("discriminator.real_data=null",), ["synthesis", "distill"], True, False),
        (("discriminator.real_data=null", "synthesis.images=x"), ["synthesis", "distill"], False, False),
        (
            ("discriminator.real_data=null", "synthesis.images=x", "discriminator.real_source=samples"),
            ["samples", "distill"], False, True,
        ),
        (
            ("discriminator.real_data=null", "discriminator.real_source=samples", "bridge.checkpoint=null"),
            ["synthesis", "bridge", "distill"], True, False,
        ),
        (
            (
                "discriminator.real_data=null", "discriminator.real_source=samples", "bridge.checkpoint=null",
                "synthesis.images=x",
            ),
            ["synthesis", "samples", "bridge", "distill"], False, True,
        ),
        (
            ("discriminator.real_data=null", "discriminator.real_source=samples", "bridge.pairs=x", "bridge.checkpoint=null"),
            ["samples", "bridge", "distill"], False, True,
        ),
    ],
)  # fmt: skip
def test_a_run_draws_pictures_for_what_lacks_them(overrides, stages, pairs, samples):
    config = load(overrides=[*overrides, "controls=[]"])
    assert stages_of(config) == stages
    assert (draws_pairs(config), draws_samples(config), draws(config)) == (pairs, samples, pairs or samples)


def test_the_drawer_has_a_service_of_its_own_with_its_own_shards():
    config = load(overrides=["synthesis.teacher=shapes:sd3", "synthesis.shards=1", "teachers.service=teacher-other"])
    drawer = drawing_config(config)
    assert (drawer.teacher.model, drawer.teachers.shards, drawer.teachers.service) == ("shapes:sd3", 1, None)
    assert drawing_config(load()) == load()


def test_terms_of_the_drawer_are_the_student_s_too():
    rows = student_licences("shapes:flux", "FluxPipeline", "shapes:sd15", "", None, "black-forest-labs/FLUX.1-schnell")
    assert (rows[-1][0], rows[-1][2].name) == ("Pictures drawn by", "Apache License 2.0")
