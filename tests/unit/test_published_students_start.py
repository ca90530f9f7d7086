"""A published student's start: prediction type and timestep, and what the check before a run says of them."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from perturbed_unet import perturbed
from safetensors.torch import save_file

from raydistill.config.reading import load
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.published_students import open_student

# Settings in which SD 2.1-base's UNet departs from the defaults of its class.
SD21 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def space(sd_folder):
    return load_space(sd_folder)


@pytest.fixture(scope="module")
def student(space):
    """The network whose weights are wanted."""
    return perturbed(space, 1)


@pytest.fixture(scope="module")
def state(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def saved(content, path: Path, **how) -> Path:
    torch.save(content, path, **how)
    return path


def safetensors(state: dict, path: Path, **metadata: str) -> Path:
    save_file(state, path, metadata=metadata)
    return path


BLOCK = "down_blocks.0.resnets.0.conv1.weight"


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def test_a_pipeline_of_another_prediction_type_is_refused(space, student, tmp_path):
    """SD 2.1 and 2.1-base share every shape, but one predicts v."""
    student.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER | {"prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match=r"scheduler_config\.json: its UNet predicts 'v_prediction', .* 'epsilon'"):
        open_student(space, tmp_path)
    file.write_text(json.dumps(SCHEDULER))
    assert open_student(space, tmp_path).start_timestep is None


# -- before a job starts ----------------------------------------------------------------------------------


@pytest.mark.full
def test_preflight_refuses_a_wrong_start_and_reports_a_right_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = f"storage={tmp_path / 'storage'}"
    state = load_space(WEIGHTS / "sd15").load_network().state_dict()
    wrong = safetensors(without(state, BLOCK), tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=f"{wrong}: .*{BLOCK} is missing"):
        check_inputs(load(overrides=[storage, f"student.unet={wrong}"]))
    assert not (tmp_path / "storage").exists()

    right = saved({"ema": state}, tmp_path / "sid_t625.pt")
    config = load(overrides=[storage, f"student.unet={right}"])
    notes = check_inputs(config).notes
    assert notes[0] == f"student starts from {right}, tensors ema.*"
    assert notes[1].startswith(f"warning: {right} starts at timestep 625 according to its name, but student.start")
    assert config.student.start_timestep == 999
    assert (
        len(check_inputs(load(overrides=[storage, f"student.unet={right}", "student.start_timestep=625"])).notes) == 1
    )
    assert check_inputs(load(overrides=[storage, "student.unet=null"])).notes == ()


def published(folder: Path):
    """The Space of SD 2.1-base's configuration files, and its tensors: 866 million numbers, no memory for them."""
    for name, config in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": SD21,
        "scheduler/scheduler_config.json": SCHEDULER,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD21)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(866e6, rel=0.01)
    return load_space(folder), unet.state_dict()


def write_holes(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    """A float32 safetensors file whose data are a hole in the file system."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(stream.tell() + end)
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_published_size_is_checked_without_its_weights(suffix, tmp_path):
    """3.5 GB of weights; the check may not take a tenth of them in memory."""
    space, tensors = published(tmp_path / "sd21")
    file, cut = tmp_path / f"student{suffix}", tmp_path / f"cut{suffix}"
    last = next(reversed(tensors))
    for target, held in ((file, tensors), (cut, without(tensors, last))):
        if suffix == ".safetensors":
            write_holes(held, target)
        else:
            empty = {name: torch.empty(tensor.shape) for name, tensor in held.items()}
            with torch.serialization.skip_data():  # leaves holes for the weights
                torch.save({"ema": empty}, target)
            del empty
    assert file.stat().st_size > 3.4e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    assert open_student(space, file).files == (file,)
    with pytest.raises(InputError, match=f"{cut}: .*{last} is missing"):
        open_student(space, cut)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
