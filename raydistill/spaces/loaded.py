"""What the modules of a pipeline folder hold once they are loaded. Weights are compared and hashed by it.

Files say the same in many ways: an attention's `query` or `to_q`, a `text_model.` in front, a `position_ids` that no
module keeps, one file or shards, `.fp16.` in a name, half-precision numbers stored in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from raydistill.spaces.base import Space
from raydistill.spaces.folder import weight_files
from raydistill.spaces.settings import read_settings

OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the narrowest that loses nothing is what a hash is made of


def loaded_weights(space: Space, part: str) -> dict[str, torch.Tensor]:
    """Name -> tensor of the VAE or a text encoder as it is loaded, real numbers in float32; by the module's own names.

    Raises:
        InputError: weights are missing or damaged.
    """
    module = space.load_vae() if part == "vae" else space.load_text().components[part]
    return module.state_dict()


def exact_dtypes(weights: Mapping[str, torch.Tensor]) -> list[torch.dtype]:
    """Those of DTYPES in which all real numbers of a module are what they are; float32 always is."""
    real = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    narrow = [dtype for dtype in DTYPES[:-1] if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in real)]
    return [*narrow, DTYPES[-1]]


def vae_fingerprint(space: Space) -> str:
    """sha256 of the tensors that the VAE holds (name, dtype, shape, bytes) and of its latent scaling.

    How the files name, split, order or widen the tensors does not matter. Raises InputError as `loaded_weights`.
    """
    return _of_space(space)[0]


def has_vae(space: Space, sha256: str) -> bool:
    """Whether this is the VAE that was hashed, by `vae_fingerprint` or by a version that hashed what files say."""
    folder = Path(space.folder, "vae")
    return any(
        sha256 in _of_loaded(type(space), space.folder, scaling) for scaling in _scalings(space.vae_config)
    ) or any(sha256 == _of_files(folder, scaling) for scaling in _scalings(read_settings(folder / "config.json")))


def _of_space(space: Space) -> tuple[str, ...]:
    return _of_loaded(type(space), space.folder, _scalings(space.vae_config)[0])


@cache
def _of_loaded(family: type[Space], folder: str, scaling: str) -> tuple[str, ...]:
    """Hashes of what the VAE holds: the present one, then those of its files in other dtypes and with older names."""
    weights = family(folder).load_vae().state_dict()
    older = {_old_name(name): tensor for name, tensor in weights.items()}
    return tuple(
        _digest(scaling, {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})
        for tensors in (weights, older)
        for dtype in exact_dtypes(weights)
    )


def _old_name(name: str) -> str:
    """The name that diffusers gave a tensor of a VAE's attention at first."""
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


def _of_files(folder: Path, scaling: str) -> str:
    """As earlier versions hashed a VAE: by the names and dtypes of its files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, "diffusion_pytorch_model"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    return _digest(scaling, tensors)


def _scalings(config: Mapping[str, Any]) -> list[str]:
    """The latent scaling as JSON: as the configuration writes it, then in other spellings of the same numbers."""
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    if scale is None and config.get("latents_std") is not None:  # one number a channel
        return [json.dumps([config.get("latents_mean"), config["latents_std"]])]
    shifts = [shift, None, 0.0, 0] if not shift else _spellings(shift)
    return list(dict.fromkeys(json.dumps([one, other]) for one in _spellings(scale) for other in shifts))


def _spellings(value: Any) -> list[Any]:
    return [value, int(value), float(value)] if isinstance(value, (int, float)) and value == int(value) else [value]


def _digest(scaling: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(scaling.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
