"""Folders of public models at their real size, without their numbers: weight files are headers and a hole behind them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from tiny_diffusion_pipelines import chatglm_tokenizer
from tiny_flow_pipelines import gemma_tokenizer, qwen_tokenizer

from raydistill.shapes import miniatures
from raydistill.spaces import load_space
from raydistill.spaces.meta import empty_part, empty_text_encoders, without_initial_values
from raydistill.spaces.published import write_folder

DTYPES = {torch.int64: "I64"}  # all others are stored in half precision


def write_hollow(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of these names and shapes that takes no room on a disk; its numbers are all zero."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        dtype = DTYPES.get(tensor.dtype, "F16")
        start, end = end, end + tensor.numel() * (8 if dtype == "I64" else 2)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def write_hollow_network(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A diffusers network's weights; of large ones in files of 10 GB and an index, as diffusers saves them."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        size += 2 * tensor.numel()
        if size > 10**10:
            shards.append({})
            size = 2 * tensor.numel()
        shards[-1][name] = tensor
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        write_hollow(folder / f"{stem}.safetensors", tensors)
        return
    files = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for name, shard in files.items():
        write_hollow(folder / name, shard)
    index = {"weight_map": {key: name for name, shard in files.items() for key in shard}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(name: str, folder: Path):
    """A small tokenizer of the class that a public model names."""
    if name.startswith("CLIP"):
        return miniatures.clip_tokenizer()
    if name.startswith("T5"):
        return miniatures.t5_tokenizer()
    if name.startswith("Gemma"):
        return gemma_tokenizer()
    return chatglm_tokenizer(folder) if name.startswith("ChatGLM") else qwen_tokenizer()


def write_model(sizes: str, folder: Path) -> Path:
    """The folder of a public model (`spaces.published`): its own configurations, small tokenizers, hollow weights."""
    write_folder(sizes, folder)
    space = load_space(folder)
    for part in (space.network_name, "vae"):
        write_hollow_network(folder / part, empty_part(space, part).state_dict())
    with without_initial_values():
        for part, encoder in empty_text_encoders(space).items():
            write_hollow(folder / part / "model.safetensors", encoder.state_dict())
    for part, (_, name) in space.parts("tokenizer").items():
        told = json.loads((folder / part / "tokenizer_config.json").read_text())
        _tokenizer(name, folder / part).save_pretrained(folder / part)
        file = folder / part / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
    return folder
