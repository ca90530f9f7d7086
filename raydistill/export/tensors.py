"""Weights of pipeline folders tensor by tensor: where each lies, whether two folders agree, writing without a copy.

At no time is more than one tensor of each folder in memory, whatever the size of the networks.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from raydistill.errors import InputError
from raydistill.spaces.weights import DTYPES, Entry, read_header

# A file of weights, or a shard of several; not a variant such as model.fp16.safetensors.
_WEIGHT_FILE = re.compile(r"[a-z_]+(-\d{5}-of-\d{5})?\.safetensors")
_CODES = {name: code for code, name in DTYPES.items()}  # torch's names -> safetensors'


def locate(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Name -> (file, shape and dtype) of the tensors of one part of a pipeline, in safetensors files.

    Raises:
        InputError: no such files, or a damaged one.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if _WEIGHT_FILE.fullmatch(file.name)]
    if not files:
        raise InputError(f"{folder}: no weights in safetensors")
    return {name: (file, entry) for file in files for name, entry in read_header(file).tensors.items()}


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened for it alone: pages that were read before do not stay mapped."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def first_difference(one: Path, other: Path) -> str | None:
    """The first tensor in which the same part of two folders differs, and how; None where they agree.

    Where one is a half-precision copy, the other is rounded to that precision first.

    Raises:
        InputError: as `locate`.
    """
    ours, theirs = locate(one), locate(other)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            return f"{name} is in {one if name in ours else other} alone"
        (our_file, our), (their_file, their) = ours[name], theirs[name]
        if our.shape != their.shape:
            return f"{name} has the shape {list(our.shape)} in {one}, and {list(their.shape)} in {other}"
        a, b = read_tensor(our_file, name), read_tensor(their_file, name)
        coarser = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(a.to(coarser), b.to(coarser)):
            return f"{name} has other values in {one} than in {other}"
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
