"""Parts that a student shares with its base: copied byte for byte, never written anew by a library.

A library writes a part in the form of its own version. Older versions, which open the base, may not open that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raydistill.errors import InputError
from raydistill.spaces.folder import plain_name, variant, weight_files, weight_index
from raydistill.spaces.settings import read_settings
from raydistill.spaces.weights import read_header

STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' and transformers'
TEXTS = (".json", ".txt", ".model", ".jinja")  # configurations and vocabularies
_OTHER_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"(?!float32")\w*"')


def copy_part(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy one part of a pipeline: configuration, vocabulary, and the weights in safetensors.

    Args:
        source: its folder.
        target: is created.
        dtype: of the weights. Where they have another, they are rounded to it, and tensors keep their names. None: any.

    Raises:
        InputError: no weights, damaged ones, or some that are not finite in `dtype`.
    """
    target.mkdir()
    for file in source.iterdir():
        text = file.suffix in TEXTS and ".index." not in file.name and not file.name.startswith(".")
        if text and file.is_file():  # no folder, and no link that leads nowhere
            shutil.copyfile(file, target / file.name)
    if (source / "config.json").is_file():  # a network; schedulers and tokenizers name theirs otherwise
        stem = next((stem for stem in STEMS if any(source.glob(f"{stem}*.safetensors*"))), STEMS[1])
        kinds = _copy_weights(source, target, stem, dtype)
        _load_in_float32(target / "config.json", inferred=stem == "model" and kinds != {"float32"})


def _copy_weights(source: Path, target: Path, stem: str, dtype: torch.dtype | None) -> set[str]:
    """Returns the dtypes of the real numbers in the copy."""
    files, index = weight_files(source, stem), weight_index(source, stem)
    kinds = {entry.dtype for file in files for entry in read_header(file).tensors.values()}
    kinds = {kind for kind in kinds if not kind.startswith(("I", "U", "BOOL"))}
    wanted = str(dtype).removeprefix("torch.")
    if dtype is not None and kinds != {wanted}:
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        save_file(rounded(state, dtype, str(source)), target / f"{stem}.safetensors", {"format": "pt"})
        return {wanted}
    plain = variant(source, stem) is not None  # a variant becomes the only weights there are
    names = {file.name: plain_name(file) if plain else file.name for file in files}
    if len(set(names.values())) < len(names):
        raise InputError(f"{index}: names {', '.join(names)}, which are the same but for the variant")
    for name, copy in names.items():
        shutil.copyfile(source / name, target / copy)
    if index is not None:
        shutil.copyfile(index, target / plain_name(index))
        if any(name != copy for name, copy in names.items()):
            settings = read_settings(index)
            settings["weight_map"] = {tensor: names[str(file)] for tensor, file in settings["weight_map"].items()}
            (target / plain_name(index)).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return kinds


def _load_in_float32(file: Path, inferred: bool) -> None:
    """Have transformers load a network in float32 where no dtype is asked for, as diffusers loads its own.

    transformers goes by the configuration's dtype, else by that of the weights. A pipeline of two dtypes does not run.

    Args:
        inferred: the weights would give another dtype.
    """
    text = file.read_text(encoding="utf-8")
    changed = _OTHER_DTYPE.sub(r'\1"float32"', text)
    if inferred and not read_settings(file).keys() & {"dtype", "torch_dtype"}:
        changed = text.replace("{", '{\n  "torch_dtype": "float32",', 1)
    if changed != text:
        file.write_text(changed, encoding="utf-8")


def rounded(state: Mapping[str, torch.Tensor], dtype: torch.dtype, owner: str) -> dict[str, torch.Tensor]:
    """Weights on the CPU, real numbers in `dtype`. Raises InputError, which names `owner`, where one is not finite."""
    cpu = {name: value.detach().to("cpu") for name, value in state.items()}
    result = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cpu.items()}
    broken = [name for name, value in result.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{len(broken)} weights of {owner} are not finite in {dtype}, the first is {broken[0]}")
    return result


def forget_origin(file: Path) -> None:
    """Remove `_name_or_path` from a configuration that a library wrote: a folder of the machine that trained."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    if tree.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
