"""Networks of a pipeline folder on the meta device: shapes without weights, at any size, in moments."""

from __future__ import annotations

import functools
import importlib
import tempfile
import weakref
from typing import Any

import torch
from torch import nn

from raydistill.errors import InputError
from raydistill.planning.meter import without_initial_values
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space, diffusers_class
from raydistill.spaces.published import HUB_MODELS, write_folder
from raydistill.spaces.text_lengths import text_lengths
from raydistill.storage.hub import cached
from raydistill.storage.resolve import local_path

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # conditioning: name -> shape of one sample, dtype


# -- networks -------------------------------------------------------------------------------------------


def open_space(model: str) -> Space:
    """The Space of a folder or of a hub model (whose configuration files are in the package, or else in the cache).

    Its networks come without weights, on the meta device.

    Raises:
        InputError: a hub model that is neither known nor cached.
        InputError: not a pipeline folder of a known family.
    """
    folder = local_path(model)
    name = HUB_MODELS.get(model.partition("@")[0])
    if folder.exists() or name is None:
        space = load_space(folder if folder.exists() else cached(model))
    else:
        temporary = tempfile.TemporaryDirectory(prefix="raydistill-")
        space = load_space(write_folder(name, temporary.name))
        weakref.finalize(space, temporary.cleanup)
    space.load_part = functools.partial(empty_part, space)
    space.assume_values()
    return space


def empty_part(space: Space, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A diffusers network of the folder on the meta device, frozen."""
    config = space.part_config(name)
    with without_initial_values(), torch.device("meta"):
        network = diffusers_class(config).from_config(config)
    return (network if dtype == torch.float32 else network.to(dtype)).eval().requires_grad_(False)


def empty_text_encoders(space: Space) -> dict[str, nn.Module]:
    """The text encoders that model_index.json names, by their part's name, on the meta device."""
    encoders = {}
    for part, entry in space.index.items():
        if part.startswith("text_encoder") and isinstance(entry, list) and entry[1] is not None:
            library = "diffusers.pipelines.kolors" if entry[0] == "kolors" else entry[0]
            network_class = getattr(importlib.import_module(library), entry[1])
            config = network_class.config_class(**space.part_config(part))
            # ChatGLM's own way of leaving weights empty would allocate them.
            settings = {"empty_init": False} if entry[0] == "kolors" else {}
            with torch.device("meta"):
                encoders[part] = network_class(config, **settings).eval().requires_grad_(False)
    return encoders


def conditioning_layout(space: Space) -> Layout:
    """Names, shapes of one sample and dtypes of what the family's `encode_prompts` returns."""
    config, lengths = space.part_config(space.network_name), text_lengths(space)
    family, real = type(space).__name__, torch.float32
    if family in ("SDXLSpace", "KolorsSpace"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        return {
            "prompt_embeds": ((lengths["text_encoder"], width), real),
            "pooled_prompt_embeds": ((pooled,), real),
            "time_ids": ((6,), torch.int64),
        }
    if family == "StableDiffusionSpace":
        return {"prompt_embeds": ((lengths["text_encoder"], config["cross_attention_dim"]), real)}
    if family == "PixArtSigmaSpace":
        length = lengths["text_encoder"]
        layout: Layout = {
            "prompt_embeds": ((length, config["caption_channels"]), real),
            "prompt_attention_mask": ((length,), torch.int64),
        }
        sizes = {"resolution": ((2,), torch.int64), "aspect_ratio": ((1,), real)}
        return layout | (sizes if space.takes_sizes else {})
    if family == "StableDiffusion3Space":
        length = lengths["text_encoder"] + lengths["text_encoder_3"]
        return {
            "prompt_embeds": ((length, config["joint_attention_dim"]), real),
            "pooled_prompt_embeds": ((config["pooled_projection_dim"],), real),
        }
    if family == "FluxSpace":
        return {
            "prompt_embeds": ((lengths["text_encoder_2"], config["joint_attention_dim"]), real),
            "pooled_prompt_embeds": ((config["pooled_projection_dim"],), real),
        }
    if family == "Flux2KleinSpace":
        return {"prompt_embeds": ((lengths["text_encoder"], config["joint_attention_dim"]), real)}
    if family == "ZImageSpace":
        return {
            "prompt_embeds": ((lengths["text_encoder"], config["cap_feat_dim"]), real),
            "prompt_tokens": ((), torch.int64),
        }
    raise InputError(
        f"teacher.model: planning does not know the conditioning of {family}; name its tensors in "
        "raydistill/counting.py (conditioning_layout)"
    )


def empty_conditioning(layout: Layout, batch: int, dtype: torch.dtype = torch.float32) -> Conditioning:
    """Meta tensors [B, …]; real-valued ones in `dtype`."""
    return {
        name: torch.empty(batch, *shape, dtype=dtype if kind.is_floating_point else kind, device="meta")
        for name, (shape, kind) in layout.items()
    }


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
