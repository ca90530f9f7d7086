"""SDXL's start with a LoRA merged (Lightning, Hyper-SDXL, DMD2, LCM), in every layout of names that these are published in."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lanes import full_but
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.starts import check_lora, load_start

BLOCKS = ("to_q", "to_v", "proj_in", "ff.net.2", "conv1", "time_emb_proj")  # attention, and a residual block's
OUTSIDE = ("conv_in", "time_embedding.linear_1", "add_embedding.linear_1")  # of no block, which Lightning adapts too
SGM = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1"}  # a residual block's layers in the original's names
SGM_OUTSIDE = dict(zip(OUTSIDE, ("input_blocks_0_0", "time_embed_0", "label_emb_0_0"), strict=True))
UNREAD = "add_embedding.linear_1"  # diffusers leaves it out where its own names are written with underscores


@pytest.fixture(scope="module")
def space(diffusion_folders):
    return load_space(diffusion_folders["sdxl"])


@pytest.fixture(scope="module")
def lora(space):
    """Layer -> (down, up), random, of rank 3."""
    unet = space.load_network()
    unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=[*BLOCKS, *OUTSIDE]))
    generator = torch.Generator().manual_seed(4)
    state = get_peft_model_state_dict(unet)
    factors = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in state.items()}
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in factors)
    return {layer: (factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"]) for layer in layers}


def sgm_name(layer: str, layers_per_block: int = 1) -> str:
    """A layer in the names of the original, on which kohya's trainer works."""
    if layer in SGM_OUTSIDE:
        return SGM_OUTSIDE[layer]
    found = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d))?\.(resnets|attentions)\.(\d)\.(.+)", layer)
    side, block, kind, number, rest = found.groups()
    rest = SGM.get(rest, rest.replace(".", "_"))
    if side == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}_{rest}"
    place = int(block) * (layers_per_block + 1) + int(number) + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks_{place}_{int(kind == 'attentions')}_{rest}"


def diffusers_names(lora):
    ends = ("lora_A", "lora_B")
    return {f"unet.{layer}.{end}.weight": v for layer, both in lora.items() for end, v in zip(ends, both, strict=True)}


def older_diffusers_names(lora):
    ends = ("lora.down", "lora.up")
    return {f"unet.{layer}.{end}.weight": v for layer, both in lora.items() for end, v in zip(ends, both, strict=True)}


def kohya_names(lora, name_of=lambda layer: layer.replace(".", "_")):
    state = {}
    for layer, (down, up) in lora.items():
        stem = f"lora_unet_{name_of(layer)}"
        state |= {f"{stem}.lora_down.weight": down.half(), f"{stem}.lora_up.weight": up.half()}
        state[f"{stem}.alpha"] = torch.tensor(1.5)  # half of the rank
    return state


LAYOUTS = {
    "diffusers": diffusers_names,
    "older_diffusers": older_diffusers_names,
    "kohya": lambda lora: kohya_names({n: v for n, v in lora.items() if n != UNREAD}),
    "kohya_of_the_original": lambda lora: kohya_names(lora, sgm_name),
}


@pytest.mark.parametrize("layout", full_but(LAYOUTS, "kohya_of_the_original"))
def test_the_merged_start_is_what_diffusers_fuses(layout, space, lora, tmp_path):
    file = tmp_path / f"{layout}.safetensors"
    save_file({name: value.contiguous() for name, value in LAYOUTS[layout](lora).items()}, file)
    adapted = lora.keys() - ({UNREAD} if layout == "kohya" else set())
    assert f"merged into {len(adapted)} layers" in check_lora(space, str(file))
    pipe = StableDiffusionXLPipeline.from_pretrained(space.folder)
    begun = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted, found = pipe.unet.state_dict(), load_start(space, None, str(file)).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert {n for n in found if not torch.equal(found[n], begun[n])} == {f"{layer}.weight" for layer in adapted}
    layer = sorted(adapted)[-1]
    down, up = (factor.half().float() if "kohya" in layout else factor for factor in lora[layer])
    share = 0.5 if "kohya" in layout else 1.0
    change = (up.flatten(1) @ down.flatten(1)).reshape(found[f"{layer}.weight"].shape) * share
    torch.testing.assert_close(found[f"{layer}.weight"] - begun[f"{layer}.weight"], change, rtol=1e-4, atol=1e-5)


def test_a_layer_that_diffusers_would_leave_out_is_not_lost_in_silence(space, lora, tmp_path):
    save_file(kohya_names(lora), tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=f"{len(lora) - 1} of its {len(lora)} layers are there"):
        check_lora(space, str(tmp_path / "more.safetensors"))


def test_a_lora_of_a_text_encoder_of_sdxl_is_refused(space, lora, tmp_path):
    """Kohya's trainers name them lora_te1 and lora_te2."""
    for number in (1, 2):
        name = f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"
        texts = {f"{name}.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}
        save_file(kohya_names(lora) | texts | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "both.safetensors")
        with pytest.raises(InputError, match="it changes a text encoder too"):
            check_lora(space, str(tmp_path / "both.safetensors"))
