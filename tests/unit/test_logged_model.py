"""The student in MLflow: a logged model that draws by itself, versions of it, and the best one by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from raydistill.driver.logged_model import log_student
from raydistill.errors import InputError
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import find_export
from raydistill.spaces import load_space
from raydistill.tracking.store import client_of, open_run

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def export(sd_folder, tmp_path_factory):
    space = load_space(sd_folder)
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_student(space, space.load_network(), 999, folder, card)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uri(storage):
    return f"sqlite:///{storage}/mlflow.db"


def logged(uri, storage, export, score: float | None, register: str | None) -> str:
    run = open_run(uri, "models", "a run", storage=storage, params={}, tags={})
    if score is not None:
        client_of(uri).log_metric(run, "student_after/mean", score)
    log_student(uri, run, export, "student_after/mean" if score is not None else None, register)
    return run


def test_the_logged_model_draws_what_the_export_draws_and_is_found_by_its_run(uri, storage, export, tmp_path):
    import mlflow

    run = logged(uri, storage, export, None, None)
    found = find_export(run, tmp_path, uri)
    assert (found.folder / "unet" / "config.json").read_bytes() == (export / "unet" / "config.json").read_bytes()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model(f"runs:/{run}/student")
    finally:
        mlflow.set_tracking_uri(before)
    pipeline = StableDiffusionPipeline.from_pretrained(export)
    noise = [torch.Generator().manual_seed(number) for number in range(2)]
    wanted = pipeline(PROMPTS, num_inference_steps=1, guidance_scale=0, generator=noise).images
    for drawn, picture in zip(model.predict(PROMPTS), wanted, strict=True):
        assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_the_champion_is_the_best_version(uri, storage, export, capsys):
    for score in (0.5, 0.9, 0.7):
        logged(uri, storage, export, score, "painter")
    assert find_export("models:/painter@champion", storage).name == "painter 2"
    assert find_export("models:/painter/3", storage).name == "painter 3"
    said = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "model     models:/painter/1, now models:/painter@champion",
        "model     models:/painter/2, now models:/painter@champion",
        "model     models:/painter/3",
    ]


@pytest.mark.parametrize("name", ["models:/painter@none", "models:/nobody/1", "models:/painter"])
def test_a_model_that_is_not_there_is_one_line(uri, storage, name):
    with pytest.raises(InputError, match=f"^{name}: sqlite:.*mlflow.db: "):
        find_export(name, storage, uri)


def test_a_store_that_refuses_the_model_loses_nothing(storage, export, capsys):
    log_student(f"sqlite:///{storage}/other.db", "0" * 32, export, None, None)
    assert f"it is in {export}" in capsys.readouterr().out
