"""Weights of pipeline folders: whether two folders agree, and reading and writing one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from raydistill.spaces.base import Space
from raydistill.spaces.folder import weight_files
from raydistill.spaces.loaded import exact_dtypes, loaded_weights
from raydistill.spaces.weights import DTYPES, Entry, read_header

_CODES = {name: code for code, name in DTYPES.items()}  # torch's names -> safetensors'


def locate(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Name in its file -> (file, shape and dtype), of the weights of one part of a pipeline.

    Raises:
        InputError: there are none in safetensors, or a file is damaged.
    """
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    return {
        name: (file, entry) for file in weight_files(folder, stem) for name, entry in read_header(file).tensors.items()
    }


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened for it alone: pages that were read before do not stay mapped."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def first_difference(one: Space, other: Space, part: str) -> str | None:
    """The first tensor in which the VAE or text encoder of two folders differs, and how; None where they agree.

    What the loaded modules hold is compared. Where one is a half-precision copy, the other is rounded to that first.

    Raises:
        InputError: as `loaded_weights`.
    """
    ours, theirs = loaded_weights(one, part), loaded_weights(other, part)
    coarser = min((exact_dtypes(weights)[0] for weights in (ours, theirs)), key=lambda dtype: dtype.itemsize)
    here, there = Path(one.folder, part), Path(other.folder, part)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            return f"{name} is in {here if name in ours else there} alone"
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            return f"{name} has the shape {list(a.shape)} in {here}, and {list(b.shape)} in {there}"
        if a.is_floating_point():
            a, b = a.to(coarser), b.to(coarser)
        if not torch.equal(a, b):
            return f"{name} has other values in {here} than in {there}"
    return None


def write_safetensors(
    file: Path,
    entries: Mapping[str, Entry],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in the order of its header, asking for one tensor at a time.

    The format (github.com/huggingface/safetensors): the header's length as a little-endian uint64, the header in JSON
    padded with blanks to a multiple of 8, then the tensors without gaps.

    Args:
        file: is created.
        entries: name -> shape and dtype (float32, float16 or bfloat16) of every tensor.
        tensor_of: a tensor of that shape and dtype, by its name.
        metadata: what the header says besides.
    """
    names = sorted(entries, key=lambda name: (-_dtype(entries[name]).itemsize, name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        shape, dtype = entries[name]
        begin, end = end, end + math.prod(shape) * _dtype(entries[name]).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = tensor_of(name)
            if (tuple(tensor.shape), tensor.dtype) != (entries[name].shape, _dtype(entries[name])):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, but {entries[name]} was announced")
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _dtype(entry: Entry) -> torch.dtype:
    return getattr(torch, entry.dtype)
