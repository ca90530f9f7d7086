"""The check of a model folder before a launch: all of it is opened as the actors of a run will, without its weights.

Parts are built from their configurations on the meta device, and compared with the headers of their weight files.
Tokenizers are loaded. Then one sample goes the whole way, on tensors without numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.folder import (
    NETWORK_WEIGHTS,
    TEXT_WEIGHTS,
    check_loaded,
    weight_files,
    weight_index,
    without_bars,
)
from raydistill.spaces.meta import WithoutNumbers, empty_part, empty_text_encoders, without_initial_values
from raydistill.spaces.settings import blaming, reading
from raydistill.spaces.weights import locate, misfits

STEPS = 4  # of the sampling schedule that is tried


def check_folder(space: Space, *, network: bool = True) -> None:
    """See that a run can load and use all of a folder that it needs. No weights are read.

    Args:
        network: False where the diffusion network's weights come from elsewhere.

    Raises:
        InputError: a part is missing, damaged, or does not fit the others; one line, with file and key where they
            can be told.
    """
    with reading(space.folder), torch.no_grad():
        space.path, space.prediction  # noqa: B018 - numbers are read before anything is made of them
        space.normalise(torch.zeros(1, *space.latent_shape))
        with blaming(space.part_config("scheduler"), type(space.scheduler)):
            space.start_sampling(STEPS)
        space.check_text_parts()
        parts = {name: empty_part(space, name) for name in ("vae", space.network_name)}
        _check_weights(space, "vae", parts["vae"])
        if network:
            _check_weights(space, space.network_name, parts[space.network_name])
        encoders = empty_text_encoders(space)
        for part in encoders:
            _check_text_weights(space, part)
        with without_initial_values(), WithoutNumbers():
            _check_passes(space, parts[space.network_name], parts["vae"], encoders)


def _check_weights(space: Space, part: str, module: nn.Module) -> None:
    """A diffusers network's files hold exactly its tensors; a VAE's may hold more, and have the names of old ones."""
    folder = Path(space.folder, part)
    found = locate(weight_files(folder, NETWORK_WEIGHTS))
    if part == "vae" and weight_index(folder, NETWORK_WEIGHTS) is None:  # of shards, diffusers reads no old names
        module._fix_state_dict_keys_on_load(found)  # as from_pretrained does
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if problem := misfits(expected, found, strangers=part != "vae"):
        raise InputError(f"{folder}: {problem}")


def _check_text_weights(space: Space, part: str) -> None:
    """transformers takes the tensors of a text encoder's files, which it may rename, and lacks none."""
    folder = Path(space.folder, part)
    hollow = {
        name: torch.empty(located.entry.shape, device="meta")
        for name, located in locate(weight_files(folder, TEXT_WEIGHTS)).items()
    }
    network_class = space.text_class(part)
    with reading(folder), without_bars():
        config = network_class.config_class.from_pretrained(folder)
        _, loading_info = network_class.from_pretrained(
            None,
            config=config,
            state_dict=hollow,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # they are told below
            output_loading_info=True,
        )
    check_loaded(folder, loading_info)


def _check_passes(space: Space, network: nn.Module, vae: nn.Module, encoders: dict[str, nn.Module]) -> None:
    """Text encoders, network and VAE fit together: shapes of one sample, all the way."""
    layout, shape = space.conditioning_layout, space.latent_shape
    with reading(f"{space.folder}: its text encoders"):
        encoded = space.encode_prompts(space.text_pipeline(encoders), ["a"])
    for name, (expected, _) in layout.items():
        if name not in encoded or tuple(encoded[name].shape[1:]) != expected:
            given = tuple(encoded[name].shape[1:]) if name in encoded else "not made"
            raise InputError(
                f"{space.folder}: {name} of a prompt is {given}, but its {space.network_name} takes {expected}"
            )
    encoded = {name: value.float() if value.is_floating_point() else value for name, value in encoded.items()}
    x_t, t_B = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    with blaming(space.part_config(space.network_name), type(network)):
        answer = space.predict(network, x_t, t_B, encoded)
    with blaming(space.vae_config, type(vae)):
        pictures = space.decode(vae, x_t)
        latents = space.encode(vae, pictures)
    if answer.shape != x_t.shape or latents.shape != x_t.shape:
        raise InputError(
            f"{space.folder}: of latents {tuple(shape)} its {space.network_name} makes {tuple(answer.shape[1:])} and its "
            f"VAE, from a picture and back, {tuple(latents.shape[1:])}"
        )
