"""When two teacher services compute the same answers: by contents of the model and by settings."""

from __future__ import annotations

import json
import shutil

import pytest
from raydistill.config.networks import TeacherServiceConfig

from raydistill.storage.fingerprint import fingerprint
from raydistill.teachers.registry import differences, identify

CONFIG = TeacherServiceConfig()
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration, weights, and a file that is neither."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(1000))
    (folder / "README.md").write_text("old")
    return folder


def overwrite(file, at: int) -> None:
    with file.open("r+b") as data:
        data.seek(at)
        data.write(b"changed")


def test_a_changed_configuration_or_name_is_another_model_and_a_copy_or_another_note_is_not(model, tmp_path):
    before = fingerprint(model)
    (model / "README.md").write_text("new")
    assert fingerprint(model) == fingerprint(shutil.copytree(model, tmp_path / "copy")) == before
    (model / "model_index.json").write_text(json.dumps(INDEX | {"a": 1}))
    changed = fingerprint(model)
    assert changed != before
    (model / "unet" / "weights.safetensors").rename(model / "unet" / "others.safetensors")
    assert fingerprint(model) not in (before, changed)


def test_only_the_model_and_what_decides_bits_are_differences(model, tmp_path):
    running = identify(str(model), CONFIG)
    copy = shutil.copytree(model, tmp_path / "copy")
    same = identify(str(copy), CONFIG.model_copy(update={"replicas": 3, "linger_s": 1.0, "request_timeout_s": 5.0}))
    assert differences(running, same) == []
    overwrite(copy / "unet" / "weights.safetensors", 0)
    found = differences(running, identify(str(copy), CONFIG.model_copy(update={"dtype": "bfloat16", "shards": 4})))
    assert found == [
        f"its model is {model}, and {copy} is another one (teacher.model)",
        "teachers.dtype: it runs with 'float32', not 'bfloat16'",
        "teachers.shards: it runs with 2, not 4",
    ]
