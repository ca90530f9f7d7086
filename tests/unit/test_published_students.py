"""One-step checkpoints: every accepted format gives the same bits, everything else is refused by name and runs nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from perturbed_unet import perturbed
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from raydistill.distillation.networks import load_unet
from raydistill.errors import InputError
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.spaces import load_space
from raydistill.spaces.published_students import load_student, open_student


@pytest.fixture(scope="module")
def space(sd_folder):
    return load_space(sd_folder)


@pytest.fixture(scope="module")
def student(space):
    """The network whose weights are wanted."""
    return perturbed(space, 1)


@pytest.fixture(scope="module")
def other(space):
    """Another network of the same architecture, which must not be taken."""
    return perturbed(space, 2)


@pytest.fixture(scope="module")
def state(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def behind(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def saved(content, path: Path, **how) -> Path:
    torch.save(content, path, **how)
    return path


def safetensors(state: dict, path: Path, **metadata: str) -> Path:
    save_file(state, path, metadata=metadata)
    return path


def assert_same_bits(unet, state: dict) -> None:
    weights = unet.state_dict()
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], value.float()), name
    assert not any(tensor.is_meta for tensor in (*unet.parameters(), *unet.buffers()))


# -- folders ----------------------------------------------------------------------------------------------


def test_a_unet_folder_and_a_pipeline_folder_give_their_bits(space, student, state, tmp_path):
    student.save_pretrained(tmp_path / "alone")
    assert_same_bits(load_student(space, tmp_path / "alone"), state)
    student.save_pretrained(tmp_path / "pipeline" / "unet")
    assert_same_bits(load_student(space, tmp_path / "pipeline"), state)
    assert_same_bits(load_unet(space, str(tmp_path / "pipeline")), state)


def test_a_sharded_folder_is_put_together(space, student, state, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = open_student(space, tmp_path)
    assert len(checkpoint.files) == len(list(tmp_path.glob("*.safetensors")))
    assert str(tmp_path) in checkpoint.describe()
    assert_same_bits(load_student(space, tmp_path), state)


def test_a_half_precision_folder_keeps_its_values(space, student, state, tmp_path):
    unet = UNet2DConditionModel.from_config(student.config)
    unet.load_state_dict(state)
    unet.half().save_pretrained(tmp_path, variant="fp16")
    assert_same_bits(load_student(space, tmp_path), {name: value.half() for name, value in state.items()})


def test_the_ema_folder_goes_before_the_raw_one(space, student, other, state, tmp_path):
    student.save_pretrained(tmp_path / "unet_ema")
    other.save_pretrained(tmp_path / "unet")
    assert_same_bits(load_student(space, tmp_path), state)


def test_dmd2s_checkpoint_folder_gives_its_generator(space, state, other, tmp_path):
    saved(OrderedDict(state), tmp_path / "pytorch_model.bin")
    guidance = behind("fake_unet.", other.state_dict()) | behind("real_unet.", other.state_dict())
    saved(guidance, tmp_path / "pytorch_model_1.bin")
    assert_same_bits(load_student(space, tmp_path), state)
    with pytest.raises(InputError, match=r"pytorch_model_1\.bin: no UNet: conv_in\.weight is missing.*fake_unet\."):
        open_student(space, tmp_path / "pytorch_model_1.bin")


# -- single files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "unet.", "model.unet.", "ema."])
def test_safetensors_with_and_without_a_prefix(prefix, dtype, space, state, tmp_path):
    cast = {name: value.to(dtype) for name, value in state.items()}
    file = safetensors(behind(prefix, cast), tmp_path / "student.safetensors")
    assert open_student(space, file).prefix == prefix
    assert_same_bits(load_student(space, file), cast)


WRAPPED = {
    "plain": lambda state, other: state,
    "ordered": lambda state, other: OrderedDict(state),
    "parameters": lambda state, other: {name: torch.nn.Parameter(value) for name, value in state.items()},
    "data parallel": lambda state, other: behind("module.", state),
    "state_dict": lambda state, other: {"state_dict": behind("unet.", state), "step": 3, "lr": 1e-5, "note": "text"},
    "compiled": lambda state, other: {"model": behind("_orig_mod.", state)},
    "DMD2 unified": lambda state, other: behind("feedforward_model.", state),
    "SiD EMA": lambda state, other: {"ema": state},
    "EMA before raw": lambda state, other: {"G": other, "G_ema": state, "optimizer": {"state": {0: {"m": other}}}},
    "EMA prefix": lambda state, other: behind("student.", other) | behind("ema.", state),
    "EMA inside": lambda state, other: {"state_dict": behind("unet.", other) | behind("unet_ema.", state)},
    "EMA in the raw one": lambda state, other: other | behind("ema.", state),
    "beside an optimizer": lambda state, other: state | {"optimizer": {"state": {0: {"m": torch.zeros(2)}}}},
    "own checkpoint": lambda state, other: {
        "student": other,
        "ema": state,
        "fake": {"conv_in.lora_A": torch.zeros(2)},
        "discriminator": {"conv.weight": torch.zeros(2)},
        "optimizers": {"student": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-6}]}},
    },
    "pipeline": lambda state, other: behind("unet.", state) | {"vae.conv_in.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_torch_files_wrapped_in_every_known_way(name, space, state, other, tmp_path):
    file = saved(WRAPPED[name](state, dict(other.state_dict())), tmp_path / "student.pt")
    assert_same_bits(load_student(space, file), state)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_torch_files_of_every_suffix(suffix, space, state, tmp_path):
    assert_same_bits(load_unet(space, str(saved(state, tmp_path / f"student{suffix}"))), state)


def test_the_taken_network_is_named(space, state, other, tmp_path):
    file = saved({"G": other.state_dict(), "ema": state}, tmp_path / "student.pt")
    assert open_student(space, file).describe() == f"student starts from {file}, tensors ema.* (not G.*)"


def test_tensors_with_attributes_as_fsdp_saves_them(space, state, tmp_path):
    """DMD2's float32 files name torch._tensor._rebuild_from_type_v2 in their pickle."""
    marked = {name: value.clone() for name, value in state.items()}
    for value in marked.values():
        value._is_sharded = False
    file = saved(marked, tmp_path / "pytorch_model.bin")
    assert b"_rebuild_from_type_v2" in file.read_bytes()
    assert_same_bits(load_student(space, file), state)


def test_averaged_models_and_the_obsolete_format(space, student, state, tmp_path):
    averaged = AveragedModel(student)
    assert "n_averaged" in averaged.state_dict()
    assert_same_bits(load_student(space, saved(averaged.state_dict(), tmp_path / "swa.pt")), state)
    old = saved({"ema": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_bits(load_student(space, old), state)


def test_the_loaded_network_is_the_students_own(space, state, student, tmp_path):
    """It computes what the saved network computes, and does not live in the file."""
    file = saved({"ema": state}, tmp_path / "student.pt")
    unet = load_student(space, file)
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same_bits(unet, state)
    given = (torch.randn(1, *space.latent_shape), 625, torch.randn(1, 20, 64))
    aligned = copy.deepcopy(student)  # weights that diffusers maps from a file lie at any address: other rounding
    with torch.no_grad():
        assert torch.equal(unet(*given, return_dict=False)[0], aligned(*given, return_dict=False)[0])
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


# -- refusals ---------------------------------------------------------------------------------------------


class Malicious:
    """Writes a file when it is unpickled in the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("how", ["zip", "obsolete", "bare", "folder", "pkl"])
def test_a_pickle_with_code_is_refused_and_never_run(how, space, state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    marker, target = tmp_path / "executed", tmp_path / "student.pt"
    content = {"ema": state, "extra": Malicious(marker)}
    if how == "zip":
        saved(content, target)
    elif how == "obsolete":
        saved(content, target, _use_new_zipfile_serialization=False)
    elif how == "folder":
        target = tmp_path / "folder"
        target.mkdir()
        saved(content, target / "diffusion_pytorch_model.bin")
    else:
        target = tmp_path / f"student.{'pt' if how == 'bare' else 'pkl'}"
        target.write_bytes(pickle.dumps(content, protocol=2))
    for read in (open_student, load_student):
        with pytest.raises(InputError, match=str(target)) as error:
            read(space, target)
        assert "weights_only" not in str(error.value)  # torch's advice to switch it off
    if how not in ("pkl", "bare"):
        assert "asks for posix.system, which is code" in str(error.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()  # so the file was dangerous


def test_a_whole_pickled_network_is_refused_and_its_conversion_named(space, student, tmp_path):
    """As SiD-LSG publishes its students and keeps its training states."""
    file = tmp_path / "batch512_sd21_t625_7168_v2.pkl"
    file.write_bytes(pickle.dumps({"ema": student}))
    with pytest.raises(InputError, match=r"never opened.*state_dict\(\)}, 'batch512_sd21_t625_7168_v2\.pt'"):
        open_student(space, file)
    training = saved({"G_ema": student}, tmp_path / "training-state.pt")
    with pytest.raises(InputError, match=r"training-state\.pt: its pickle asks for diffusers\..*UNet2DConditionModel"):
        open_student(space, training)


BLOCK = "down_blocks.0.resnets.0.conv1.weight"


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


CHANGED = {
    "a missing tensor": (lambda s: without(s, BLOCK), f"{BLOCK} is missing"),
    "the first tensor": (lambda s: without(s, "conv_in.weight"), "conv_in.weight is missing.*first tensor is"),
    "another shape": (
        lambda s: s | {BLOCK: torch.zeros(40, 41, 3, 3)},
        rf"{BLOCK} has the shape \[40, 41, 3, 3\], not \[40, 40, 3, 3\]",
    ),
    "several differences": (
        lambda s: without(s, "conv_out.bias") | {BLOCK: torch.zeros(1), "aaa": torch.zeros(1)},
        rf"{BLOCK} has the shape \[1\], .* \(and 2 more differences\)",
    ),
    "an unexpected tensor": (lambda s: s | {"surprise.weight": torch.zeros(2)}, "surprise.weight is not a tensor of"),
    "a stray tensor": (lambda s: {"ema": s, "surprise": torch.zeros(2)}, "surprise is not a tensor of"),
    "whole numbers": (lambda s: s | {BLOCK: s[BLOCK].to(torch.int8)}, f"{BLOCK} is (int8|I8), but float32"),
    "double precision": (lambda s: {"ema": {n: v.double() for n, v in s.items()}}, "ema.conv_in.weight is float64"),
    "a LoRA": (
        lambda s: {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 40)},
        r"holds a LoRA \(the first tensor of it is unet.down_blocks.0.attentions.0.to_q.lora_A.weight\)",
    ),
    "a LoRA beside it": (lambda s: s | {"mid_block.to_q.lora_down.weight": torch.zeros(4, 40)}, "holds a LoRA"),
    "no EMA of two": (
        lambda s: {"G": s, "student": s},
        r"several networks \(G.conv_in.weight, student.conv_in.weight\)",
    ),
    "two EMAs": (lambda s: {"ema": s, "unet_ema": s}, "several networks"),
    "names of another layout": (
        lambda s: behind("model.diffusion_model.input_blocks.", s),
        "conv_in.weight is missing, alone and behind",
    ),
    "an EMA without names": (lambda s: {"decay": 0.9, "shadow_params": list(s.values())}, "conv_in.weight is missing"),
    "no tensors": (lambda s: {"epoch": 3}, "conv_in.weight is missing"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_tensors_are_refused_and_the_first_is_named(name, space, state, tmp_path):
    change, message = CHANGED[name]
    file = saved(change(state), tmp_path / "student.pt")
    with pytest.raises(InputError, match=rf"{file}: .*{message}"):
        open_student(space, file)
    flat = change(state)
    if all(isinstance(value, torch.Tensor) for value in flat.values()):
        file = safetensors(flat, tmp_path / "student.safetensors")
        with pytest.raises(InputError, match=rf"{file}: .*{message}"):
            open_student(space, file)


def test_sparse_tensors_are_refused(space, state, tmp_path):
    file = saved(state | {"conv_in.bias": state["conv_in.bias"].to_sparse()}, tmp_path / "student.pt")
    with pytest.raises(InputError, match="conv_in.bias is sparse_coo"):
        open_student(space, file)


def test_weights_that_are_not_finite_are_refused_on_loading(space, state, tmp_path):
    broken = state[BLOCK].clone()
    broken[0, 0, 0, 0] = float("nan")
    file = safetensors(state | {BLOCK: broken}, tmp_path / "student.safetensors")
    with pytest.raises(InputError, match=f"{file}: {BLOCK} holds NaN or infinity"):
        load_student(space, file)


def test_damaged_files_and_foreign_formats_are_refused(space, state, tmp_path):
    whole = {
        ".safetensors": safetensors(state, tmp_path / "whole.safetensors").read_bytes(),
        ".pt": saved(state, tmp_path / "whole.pt").read_bytes(),
    }
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n"
    for suffix, data in whole.items():
        for name, content in {"cut": data[: len(data) // 2], "empty": b"", "pointer": pointer}.items():
            file = tmp_path / (name + suffix)
            file.write_bytes(content)
            with pytest.raises(InputError, match=f"{file}: damaged"):
                open_student(space, file)
    for name in ("student.ckpt", "student.gguf", "student"):
        (tmp_path / name).write_bytes(whole[".pt"])
        with pytest.raises(
            InputError, match=r"names a folder, or a file that ends in \.safetensors, \.bin, \.pt, \.pth"
        ):
            open_student(space, tmp_path / name)
    with pytest.raises(InputError, match="no such file or folder"):
        open_student(space, tmp_path / "nowhere.pt")


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_folders_of_another_network_are_refused(space, student, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"lora: no weights of a UNet .*it holds pytorch_lora_weights\.safetensors"):
        open_student(space, tmp_path / "lora")

    ControlNetModel.from_unet(student).save_pretrained(tmp_path / "controlnet")
    with pytest.raises(InputError, match=r"controlnet/config\.json: is a ControlNetModel"):
        open_student(space, tmp_path / "controlnet")

    student.save_pretrained(tmp_path / "heads")
    change_json(tmp_path / "heads" / "config.json", attention_head_dim=8)  # the same shapes, another function
    with pytest.raises(InputError, match=r"heads/config\.json: .*attention_head_dim is 8, but its UNet has 4"):
        open_student(space, tmp_path / "heads")
    change_json(tmp_path / "heads" / "config.json", attention_head_dim=[4, 4], sample_size=96)  # the same function
    open_student(space, tmp_path / "heads")

    for text in ("{", "[]"):
        (tmp_path / "heads" / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"heads/config\.json: .*JSON"):
            open_student(space, tmp_path / "heads")


def test_shards_must_lie_beside_their_index(space, student, tmp_path):
    student.save_pretrained(tmp_path / "unet", max_shard_size="500KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    first, second, *_ = sorted((tmp_path / "unet").glob("*.safetensors"))
    change_json(index, weight_map={"conv_in.weight": f"../unet/{first.name}"})
    with pytest.raises(InputError, match=r"index\.json: names \.\./unet/.* not a file beside it"):
        open_student(space, tmp_path / "unet")
    change_json(index, weight_map={"a": first.name, "b": second.name})
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="is also in another file"):
        open_student(space, tmp_path / "unet")


# -- where it starts --------------------------------------------------------------------------------------


def test_a_stated_start_is_found_and_the_configuration_decides(space, state, student, tmp_path):
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    cases = {
        saved({"ema": state}, tmp_path / "batch512_sd21_cfg4.54.54.5_t625_7168_v2.pt"): (625, "its name"),
        saved({"ema": state, "args": {"init_timestep": 625}}, tmp_path / "a.pt"): (625, "args.init_timestep"),
        safetensors(state, tmp_path / "b.safetensors", start_timestep="625"): (625, "start_timestep"),
        export_student(space, student, 625, tmp_path / "early", card, torch.float32): (625, "its scheduler"),
        export_student(space, student, 999, tmp_path / "last", card, torch.float32): (999, "its scheduler"),
        saved(state, tmp_path / "dmd2_t5_unet.pt"): (None, ""),
        saved({"ema": state, "start_timestep": 5000, "init_timestep": True}, tmp_path / "c.pt"): (None, ""),
    }
    for path, stated in cases.items():
        checkpoint = open_student(space, path)
        assert (checkpoint.start_timestep, checkpoint.start_source) == stated, path
        assert checkpoint.start_conflict(stated[0] or 999) is None
        assert_same_bits(load_student(space, path), state)
    text = open_student(space, tmp_path / "early").start_conflict(999)
    assert "starts at timestep 625 according to its scheduler" in text
    assert "student.start_timestep=999 decides" in text
