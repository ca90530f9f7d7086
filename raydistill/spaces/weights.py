"""Weight files of networks: their names and shapes before their weights, and never their code.

    .safetensors        its header
    .bin .pt .pth       torch.save, read with weights_only=True: tensors, numbers and text. Nested dictionaries become
                        dotted names: {"ema": {"conv_in.weight": …}} is ema.conv_in.weight

Nothing here trusts a file: whatever is wrong with one ends as a InputError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from raydistill.errors import InputError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names -> torch's


class Entry(NamedTuple):
    """One tensor, without its numbers."""

    shape: tuple[int, ...]
    dtype: str  # as torch writes it; of a sparse tensor the layout


class Located(NamedTuple):
    """One tensor of a network whose weights may lie in several files."""

    file: Path
    entry: Entry


class Header(NamedTuple):
    """What a file says before its weights are read."""

    tensors: dict[str, Entry]
    numbers: dict[str, int]  # whole numbers that lie beside the tensors


def read_header(file: Path) -> Header:
    """Names, shapes and dtypes of a file's tensors. No weights are read.

    Raises:
        InputError: another suffix, a damaged file, or a pickle that asks for code.
    """
    if _is_safetensors(file):
        with _open_safetensors(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            metadata = opened.metadata() or {}
            tensors = {
                name: Entry(tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
        numbers = {name: int(text) for name, text in metadata.items() if re.fullmatch(r"[0-9]{1,9}", text)}
        return Header(tensors, numbers)
    leaves = _torch_leaves(file, map_location="meta")
    return Header(
        {name: Entry(tuple(v.shape), _dtype(v)) for name, v in leaves.items() if isinstance(v, torch.Tensor)},
        {name: v for name, v in leaves.items() if isinstance(v, int) and not isinstance(v, bool)},
    )


def locate(files: Sequence[Path]) -> dict[str, Located]:
    """Every tensor of a network's files by its name; no weights are read.

    Raises:
        InputError: as `read_header`, or a tensor is in two files.
    """
    found: dict[str, Located] = {}
    for file in files:
        for name, entry in read_header(file).tensors.items():
            if name in found:
                raise InputError(f"{file}: {name} is also in {found[name].file.name}")
            found[name] = Located(file, entry)
    return found


def misfits(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Located], *, strangers: bool = True
) -> str | None:
    """What keeps files from being the weights of a network: the first five tensors, in one line. None: nothing.

    Args:
        expected: name -> shape.
        strangers: tensors that the network lacks count too.
    """
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    wrong += [f"{name} is unknown" for name in sorted(set(found) - set(expected)) if strangers]
    for name in sorted(set(expected) & set(found)):
        shape, dtype = found[name].entry
        if shape != expected[name]:
            wide = len(shape) > len(expected[name]) and shape == (*expected[name], 1, 1)
            why = " (a 1x1 convolution, as diffusers never wrote it: drop both ones)" if wide else ""
            wrong.append(f"{name} has shape {shape}, not {expected[name]}{why}")
        elif re.match("[IUB]", dtype) and name.endswith(("weight", "bias")):  # whole numbers, by safetensors' names
            wrong.append(f"{name} is {dtype}: quantised weights are not read")
    if not wrong:
        return None
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return f"weights do not fit config.json: {'; '.join(wrong[:5])}{more}"


def read_tensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 copy on the CPU) of the tensors that are wanted; the rest of the file is not read.

    Raises:
        InputError: as `read_header`.
    """
    if _is_safetensors(file):
        with _open_safetensors(file) as opened:
            for name in filter(wanted, opened.keys()):
                yield name, _float32(opened.get_tensor(name))
        return
    with file.open("rb") as stream:  # only torch.save's present format, a zip file, can be mapped
        mapped = stream.read(4) == b"PK\x03\x04"
    for name, value in _torch_leaves(file, map_location="cpu", mmap=mapped).items():
        if isinstance(value, torch.Tensor) and wanted(name):
            yield name, _float32(value)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")


def _is_safetensors(file: Path) -> bool:
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: weights are read from files that end in {', '.join(SUFFIXES)}")
    return file.suffix == ".safetensors"


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # a file from anywhere may fail in any way
        raise InputError(f"{file}: damaged, or not a safetensors file ({error})") from error


def _torch_leaves(file: Path, **how: Any) -> dict[str, Any]:
    """Dotted name -> tensor or plain value."""
    try:
        return dict(_leaves(torch.load(file, weights_only=True, **how)))
    except Exception as error:  # a file from anywhere may fail in any way
        # torch's own message advises weights_only=False: not repeated here.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            problem = f"damaged, or not a torch.save file of tensors ({type(error).__name__})"
        else:
            problem = f"its pickle asks for {code[1]}, which is code; save the network's state_dict() alone"
        raise InputError(f"{file}: {problem}") from None


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
