"""A run folder that version 0.1 wrote opens: its configuration, its pairs and Bridge, and its checkpoints."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.pairs import PairSet
from raydistill.data.shards import check_settings
from raydistill.distillation.networks import load_real, load_unet
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import check_inputs
from raydistill.driver.run_folder import open_run_folder
from raydistill.driver.stages import recipe_of
from raydistill.errors import InputError
from raydistill.workers.checkpoint import load_state
from raydistill.workers.stage import Standing

RUN = Path(__file__).parents[1] / "run_of_version_0_1"


@pytest.fixture
def begun(tmp_path):
    """(configuration, folder) of a copy."""
    shutil.copytree(RUN / "begun", tmp_path / "begun")
    saved = tmp_path / "begun" / "config.yaml"
    for source, copy in ((RUN / "run.yaml", tmp_path / "run.yaml"), (saved, saved)):
        copy.write_text(source.read_text().replace("MODELS", str(RUN / "models")))
    return load(tmp_path / "run.yaml", [f"storage={tmp_path}", "run.name=begun"]), tmp_path / "begun"


def test_its_configuration_may_go_on_and_a_changed_key_is_named(begun, tmp_path):
    config, folder = begun
    assert open_run_folder(config).path == folder
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["student"]["lr"] == config.student.lr
    other = load(tmp_path / "run.yaml", [f"storage={tmp_path}", "run.name=begun", "student.lr=0.5"])
    with pytest.raises(InputError, match=r"student\.lr: 0\.001 -> 0\.5"):
        open_run_folder(other)


def test_its_pairs_and_bridge_are_those_of_its_models(begun):
    config, folder = begun
    inputs = check_inputs(config)
    check_settings(folder / "pairs", recipe_of(config, inputs).settings())
    assert len(PairSet(folder / "pairs", inputs.teacher.latent_shape, inputs.student.latent_shape)) == 16
    Bridge.load(folder / "bridge", inputs.student, inputs.teacher)


@pytest.mark.full
def test_a_distiller_takes_its_newest_checkpoint(begun):
    config, folder = begun
    inputs = check_inputs(config)
    real = load_real(folder / "pairs", inputs.teacher, 16)
    distiller = build_distiller(
        config,
        student_space=inputs.student,
        teacher_space=inputs.teacher,
        student=load_unet(inputs.student, None),
        bridge=Bridge.load(folder / "bridge", inputs.student, inputs.teacher),
        fake_network=inputs.teacher.load_network(),
        source=itertools.repeat({}),
        real=real,
    )
    newest = max((folder / "distill" / "checkpoints").glob("checkpoint_*/"))
    state, about = load_state(newest)
    standing = Standing.of(about)
    assert (standing.step, standing.best, standing.stopped) == (2, 2.0, None)
    assert standing.about(about["mlflow_run"]) == about
    distiller.load_state_dict(state)
    assert distiller.updates == 2
    again = distiller.state_dict()
    assert again.keys() == state.keys()
    for name, value in state["student"].items():
        assert torch.equal(again["student"][name], value)
    moments = [entry["exp_avg_sq"] for entry in again["optimizers"]["fake"]["state"].values()]
    assert any(moment.any() for moment in moments)
