"""A LoRA that is merged into the student's start: diffusers' own merge is the reference; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from raydistill.config.reading import load
from raydistill.distillation.networks import load_unet
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.export.licences import student_licences
from raydistill.export.pipeline import ModelCard
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.starts import check_lora, load_start


def write_lora(model: str, folder, rank: int = 3, targets=("to_q", "to_v", "proj_in")):
    """A LoRA of peft with random factors, as diffusers saves it; returns its file."""
    unet = load_space(WEIGHTS / model).load_network()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def space():
    return load_space(WEIGHTS / "sd15")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return write_lora("sd15", tmp_path_factory.mktemp("lora"))


def fused(file, unet=None):
    """By diffusers' own words."""
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd15", dtype=torch.float32)
    pipe.unet = pipe.unet if unet is None else unet
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet.state_dict()


@pytest.mark.parametrize("start", [None, "shapes:sd15-onestep"])
def test_the_merged_start_is_what_diffusers_fuses(start, space, lora):
    base = load_unet(space, start).state_dict()
    wanted = fused(lora, None if start is None else load_unet(space, start))
    network = load_unet(space, start, str(lora.parent))  # a folder that holds one
    found = network.state_dict()
    assert found.keys() == wanted.keys() == base.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    assert changed == {n for n in base if n.endswith(("to_q.weight", "to_v.weight", "proj_in.weight"))}
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not getattr(network, "peft_config", None)


def test_a_file_in_kohyas_names_with_alpha_in_half_precision_is_read_too(space, lora, tmp_path):
    state = {}
    for name, value in load_file(lora).items():
        layer, _, factor = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        stem = "lora_unet_" + layer.replace(".", "_")
        state[f"{stem}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value.half()
        state[f"{stem}.alpha"] = torch.tensor(6.0)
    file = tmp_path / "kohya.safetensors"
    save_file(state, file)
    wanted, ours = fused(file), load_start(space, None, str(lora)).state_dict()
    found = load_start(space, None, str(file)).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    for name, value in found.items():
        torch.testing.assert_close(value, ours[name], rtol=0, atol=2e-3 * ours[name].abs().max().item())


@pytest.mark.full
def test_a_start_is_checked_without_the_students_weights_and_told(lora, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    inputs = check_inputs(load(overrides=[f"storage={tmp_path}", "student.unet=null", f"student.lora_start={lora}"]))
    assert inputs.notes == (f"student starts with the LoRA {lora} merged into {layers_of(lora)} layers",)


def layers_of(file) -> int:
    return len({name.rpartition(".lora_")[0] for name in load_file(file)})


def test_what_is_no_lora_of_the_student_is_refused_in_one_line(space, lora, tmp_path):
    state, two = load_file(lora), tmp_path / "two"
    two.mkdir()
    for name in ("a", "b"):
        save_file(state, two / f"{name}.safetensors")
    texts = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{k}.weight": torch.ones(2, 2) for k in "AB"
    }
    wrong = {
        tmp_path / "lora.bin": (None, "read from .safetensors alone, never from a pickle"),
        two: (None, "name one file; its .safetensors: a.safetensors, b.safetensors"),
        tmp_path / "unet.safetensors": ({"conv_in.weight": torch.ones(2)}, r"no LoRA \(conv_in.weight is not"),
        tmp_path / "text.safetensors": (state | texts, "it changes a text encoder too"),
        write_lora("sd21", tmp_path / "sd21"): (None, "does not fit the UNet of"),
        tmp_path / "more.safetensors": (
            state | {name.replace("down_blocks.0", "down_blocks.7"): value.clone() for name, value in state.items()},
            "does not fit the UNet of .*: [0-9]+ of its [0-9]+ layers are there",
        ),
    }
    (tmp_path / "lora.bin").write_bytes(b"a pickle")
    for file, (tensors, message) in wrong.items():
        if tensors is not None:
            save_file(tensors, file)
        for read in (
            lambda file=file: check_lora(space, str(file)),
            lambda file=file: load_start(space, None, str(file)),
        ):
            with pytest.raises(InputError, match=message) as raised:
                read()
            assert str(raised.value).startswith("student.lora_start: ")
            assert "\n" not in str(raised.value)
    state[next(iter(state))].fill_(float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="holds NaN or infinity"):
        load_start(space, None, str(tmp_path / "nan.safetensors"))


def test_terms_and_card_name_the_lora():
    name = "latent-consistency/lcm-lora-sdv1-5"
    rows = student_licences("shapes:flux", "", "shapes:sd15", "", None, lora=name)
    assert [(role, model) for role, model, _ in rows][-1] == ("Student start", name)
    card = ModelCard(
        teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1, lora_start=name
    ).markdown(999, torch.float16)
    assert f"| LoRA merged into it | {name} |" in card
    assert f"- Student start, {name}: unknown. The terms of this LoRA apply too" in card
