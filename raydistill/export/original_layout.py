"""Names of a Stable Diffusion pipeline's tensors in the original layout, which most other tools read.

The original is CompVis' and Stability AI's `latent-diffusion`: one file for UNet (`model.diffusion_model.`), VAE
(`first_stage_model.`) and text encoder (`cond_stage_model.`). SD 1.x has the text encoder as transformers names it,
SD 2.x as OpenCLIP does. The way back is diffusers' `from_single_file`, the reference of the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from raydistill.errors import InputError

_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_TOP = re.compile(r"(?:(?:encoder|decoder)\.conv_(?:in|out)|(?:post_)?quant_conv)\.\w+")
_VAE_NORM = re.compile(r"(encoder|decoder)\.conv_norm_out\.(\w+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.([\w.]+)\.(\w+)")
_VAE_ATTENTION = {  # diffusers' names, and those that it wrote before its version 0.14
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one tensor in OpenCLIP, in this order


def original_names(
    unet: Iterable[str], vae: Iterable[str], text: Iterable[str], unet_config: Mapping[str, object]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The original name of every tensor -> (part, the diffusers names that are joined along their rows).

    Args:
        unet, vae, text: names of the tensors of the pipeline's three networks.
        unet_config: config.json of the UNet; linear projections mark SD 2.x.

    Raises:
        InputError: a tensor that the original layout has no place for.
    """
    layers, ups = int(unet_config["layers_per_block"]), len(unet_config["up_block_types"])
    attention = ["CrossAttn" in str(kind) for kind in unet_config["up_block_types"]]
    blocks = 1 + max((int(match[2]) for name in vae if (match := _VAE_BLOCK.fullmatch(name))), default=ups - 1)
    clip = _open_clip if unet_config.get("use_linear_projection") else _clip
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for part, names, rename in (  # a renamer gives None for a name that it does not know
        ("unet", unet, lambda name: _unet(name, layers, attention)),
        ("vae", vae, lambda name: _vae(name, blocks)),
        ("text_encoder", text, lambda name: clip(name.removeprefix("text_model."))),
    ):
        for name in sorted(names, key=_order):
            if name.endswith("position_ids"):  # a buffer of older versions, the numbers from 0
                continue
            original = rename(name)
            if original is None:
                raise InputError(f"{part}: {name} has no place in the layout of Stable Diffusion 1.x or 2.x")
            found[original] = (part, (*found.get(original, (part, ()))[1], name))
    return found


def _order(name: str) -> tuple[str, int]:
    """Query before key before value; all else by name."""
    number = next((number for number, one in enumerate(_QKV) if f".{one}." in name), 0)
    return (re.sub(r"\.self_attn\.[qkv]_proj\.", ".self_attn.qkv.", name), number)


def _unet(name: str, layers: int, attention: list[bool]) -> str | None:
    """Of `layers` residual blocks a level; `attention` says which levels of the way up have any."""
    stem, _, kind = name.rpartition(".")
    if stem in _UNET_TOP:
        return f"model.diffusion_model.{_UNET_TOP[stem]}.{kind}"
    if match := _UNET_MIDDLE.fullmatch(name):
        what, number, rest = match.groups()
        block = "middle_block.1" if what == "attentions" else f"middle_block.{2 * int(number)}"
    elif match := _UNET_BLOCK.fullmatch(name):
        way, level, what, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (layers + 1) + (1 if way == "down" else 0)
        side = "input_blocks" if way == "down" else "output_blocks"
        if what == "downsamplers":
            return f"model.diffusion_model.{side}.{first + layers}.0.op.{kind}"
        if what == "upsamplers":
            return f"model.diffusion_model.{side}.{first + layers}.{2 if attention[level] else 1}.conv.{kind}"
        block = f"{side}.{first + number}.{1 if what == 'attentions' else 0}"
    else:
        return None
    if what == "resnets":
        layer = _UNET_RESNET.get(rest.rpartition(".")[0])
        rest = None if layer is None else f"{layer}.{kind}"
    return None if rest is None else f"model.diffusion_model.{block}.{rest}"


def _vae(name: str, blocks: int) -> str | None:
    if _VAE_TOP.fullmatch(name):
        return f"first_stage_model.{name}"
    if match := _VAE_NORM.fullmatch(name):
        return f"first_stage_model.{match[1]}.norm_out.{match[2]}"
    if match := _VAE_MIDDLE.fullmatch(name):
        side, what, number, layer, kind = match.groups()
        if what == "attentions":
            layer = _VAE_ATTENTION.get(layer)
            return None if layer is None else f"first_stage_model.{side}.mid.attn_1.{layer}.{kind}"
        return f"first_stage_model.{side}.mid.block_{int(number) + 1}.{_shortcut(layer)}.{kind}"
    if match := _VAE_BLOCK.fullmatch(name):
        side, level, what, number, rest = match[1], int(match[2]), match[3], match[4], match[5]
        block = f"down.{level}" if side == "encoder" else f"up.{blocks - 1 - level}"  # the original counts from below
        inner = f"block.{number}" if what == "resnets" else what.removesuffix("rs")
        return f"first_stage_model.{side}.{block}.{inner}.{_shortcut(rest)}"
    return None


def _shortcut(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def _clip(name: str) -> str | None:
    return f"cond_stage_model.transformer.text_model.{name}"


def _open_clip(name: str) -> str | None:
    if name in _OPEN_CLIP_TOP:
        return f"cond_stage_model.model.{_OPEN_CLIP_TOP[name]}"
    match = _CLIP_LAYER.fullmatch(name)
    if match is None:
        return None
    number, layer, kind = match.groups()
    block = f"cond_stage_model.model.transformer.resblocks.{number}"
    if layer in _QKV:
        return f"{block}.attn.in_proj_{kind}"
    layer = _OPEN_CLIP_LAYER.get(layer)
    return None if layer is None else f"{block}.{layer}.{kind}"
