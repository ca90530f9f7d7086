"""A Stable Diffusion folder in the form of those that are published, which older libraries wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # new name -> old


def published(folder: Path, target: Path) -> Path:
    """A copy with the names and files of Stable Diffusion 1.5 on the hub; the same model.

    The tokenizer is vocab.json and merges.txt. Tensors of the text encoder begin with `text_model.`, and positions lie
    beside them. The VAE's attention has its old names. Pickles lie beside the safetensors.
    """
    shutil.copytree(folder, target)
    tokenizer, text, vae = (target / part for part in ("tokenizer", "text_encoder", "vae"))
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    for file in tokenizer.iterdir():
        file.unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({name: settings[name] for name in names}))
    kept = {key: settings[key] for key in (*names, "model_max_length", "tokenizer_class")}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(kept | {"name_or_path": "openai/clip"}, indent=2))

    state = load_file(text / "model.safetensors")
    state = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}
    positions = torch.arange(len(state["text_model.embeddings.position_embedding.weight"]))[None]
    save_file(state | {"text_model.embeddings.position_ids": positions}, text / "model.safetensors", {"format": "pt"})
    config = json.loads((text / "config.json").read_text())
    config.pop("dtype", None)
    config |= {"_name_or_path": "openai/clip", "torch_dtype": "float32", "transformers_version": "4.21.0"}
    (text / "config.json").write_text(json.dumps(config | {"model_type": "clip_text_model"}, indent=2))

    weights = vae / "diffusion_pytorch_model.safetensors"
    save_file({_old_name(name): value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    index = json.loads((target / "model_index.json").read_text()) | {
        "_name_or_path": "somebody/base",
        "_diffusers_version": "0.6.0",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    del index["image_encoder"]
    (target / "model_index.json").write_text(json.dumps(index))
    for part, name in ((vae, "diffusion_pytorch_model.bin"), (text, "pytorch_model.bin")):
        (part / name).write_bytes(b"a pickle")
    return target


def _old_name(name: str) -> str:
    for new, old in VAE_ATTENTION.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name
