"""Weights and code in model folders from anywhere: damage becomes one line, and no code runs."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import (
    INDEX,
    TEXT,
    TEXT_WEIGHTS,
    UNET,
    UNET_WEIGHTS,
    VAE,
    VAE_WEIGHTS,
    change,
    refused,
    said,
    sd15_copy,
    used,
)
from safetensors.torch import load_file, save_file

from raydistill.export.pipeline import ModelCard, export_student
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return sd15_copy(tmp_path / "model")


# -- weights ------------------------------------------------------------------------------------------------


def lying(file: Path, header: Callable[[dict], object]) -> None:
    """The file's header as `header` changes it, over the same bytes."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + size])
    text = json.dumps(header(content) or content).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(header: dict) -> str:
    return next(name for name in header if name != "__metadata__")


def _reshaped(header: dict) -> None:
    name = next(name for name, about in header.items() if len(set(about.get("shape", ()))) > 1)
    header[name]["shape"] = header[name]["shape"][::-1]


def _renamed(header: dict) -> None:
    header["other.weight"] = header.pop(first(header))


def _beyond(header: dict) -> None:
    header[first(header)]["data_offsets"] = [0, 2**60]


WEIGHT_FAULTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "cut behind its header": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "a header of 2^63 bytes": lambda file: file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:]),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "other shapes": lambda file: lying(file, _reshaped),
    "other names": lambda file: lying(file, _renamed),
    "numbers beyond the file": lambda file: lying(file, _beyond),
    "no tensors": lambda file: save_file({}, file),
}


@pytest.mark.parametrize("file", [VAE_WEIGHTS, UNET_WEIGHTS, TEXT_WEIGHTS])
@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_are_not_those_of_the_configuration_are_one_line(folder, file, fault):
    WEIGHT_FAULTS[fault](folder / file)
    assert str((folder / file).parent) in refused(folder)


def sharded(folder: Path, stem: str, variant: str = "") -> Path:
    """The weights of a part in two files and an index; returns the index."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    where = {}
    for number in (1, 2):
        name = f"{stem}{variant}-{number:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize(
    "weight_map", [[], {}, "all", None, {"a": 5}, {"a": "../model_index.json"}, {"a": "\0"}, {"a": "no.safetensors"}]
)
def test_an_index_of_weights_that_lies_is_named(folder, weight_map):
    index = sharded(folder / "unet", "diffusion_pytorch_model")
    check_folder(load_space(folder))
    change(index, weight_map=weight_map)
    assert str(index) in refused(folder)


def test_a_shard_that_is_cut_or_holds_anothers_tensors_is_named(folder):
    sharded(folder / "unet", "diffusion_pytorch_model")
    one, two = sorted((folder / "unet").glob("*-of-*.safetensors"))
    whole = two.read_bytes()
    two.write_bytes(whole[: len(whole) // 2])
    assert str(two) in refused(folder)
    two.write_bytes(one.read_bytes())
    assert "is also in" in refused(folder)


def without(file: Path, wanted: Callable[[str], bool]) -> str:
    """Take the first tensor of this kind from a file; returns its name."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if wanted(name))
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    return name


def test_old_names_in_shards_are_refused_as_diffusers_cannot_read_them(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / VAE_WEIGHTS)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    save_file(tensors, folder / VAE_WEIGHTS, {"format": "pt"})
    used(folder)
    sharded(folder / "vae", "diffusion_pytorch_model")
    assert "to_k.bias is missing" in refused(folder)
    assert "to_k.bias is missing" in said(load_space(folder).load_vae)


@pytest.mark.parametrize("file", [VAE_WEIGHTS, UNET_WEIGHTS, TEXT_WEIGHTS])
def test_a_missing_tensor_is_named_wherever_the_part_is_loaded(folder, file, caplog, monkeypatch):
    """diffusers leaves it on the meta device, and says so in a list of its own."""
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)  # to what pytest listens to
        caplog.set_level(logging.WARNING, library)
    name = without(folder / file, lambda name: name.endswith("norm_out.weight") or "layer_norm1.weight" in name)
    space = load_space(folder)
    load = {VAE_WEIGHTS: space.load_vae, UNET_WEIGHTS: space.load_network, TEXT_WEIGHTS: space.load_text}[file]
    assert said(load) == f"{(folder / file).parent}: weights do not fit config.json: {name} is missing"
    assert not [line for line in caplog.messages if name in line]


def test_the_jobs_name_a_missing_tensor_in_one_line(folder, tmp_path, run_script):
    space = load_space(folder)
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    export = export_student(space, space.load_network(), 999, tmp_path / "export", card)
    name = without(export / VAE_WEIGHTS, lambda name: name.endswith("norm_out.weight"))
    code, out, error = run_script("sample", export, "--prompt", "a", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2
    (line,) = error.splitlines()
    assert line == f"error: {export}/vae: weights do not fit config.json: {name} is missing"
    assert "Traceback" not in out + error


def test_a_text_encoder_of_other_shapes_is_named_with_its_tensor(folder):
    tensors = load_file(folder / TEXT_WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    shape = tuple(tensors[name].shape)
    save_file(tensors | {name: torch.zeros(3, 5)}, folder / TEXT_WEIGHTS, {"format": "pt"})
    wrong = rf"weights do not fit config.json: {name} has shape (3, 5), not {shape}"
    assert refused(folder) == said(load_space(folder).load_text) == f"{folder}/text_encoder: {wrong}"


def test_an_attention_of_convolutions_is_refused_with_the_reason(folder):
    """As original checkpoints have it. diffusers does not read it either."""
    tensors = load_file(folder / VAE_WEIGHTS)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    save_file(tensors | {name: tensors[name][:, :, None, None]}, folder / VAE_WEIGHTS, {"format": "pt"})
    line = refused(folder)
    assert f"{name} has shape {(*tensors[name].shape, 1, 1)}" in line
    assert "a 1x1 convolution" in line
    assert name in said(load_space(folder).load_vae)


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_that_holds_only_the_fp16_variant_is_read_as_a_hub_model_is(folder, shards):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        if shards:
            sharded(folder / part, stem, ".fp16")
        else:
            (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    space, plain = load_space(folder), load_space(WEIGHTS / "sd15")
    check_folder(space)
    for load in ("load_network", "load_vae"):
        found, expected = (getattr(s, load)().state_dict() for s in (space, plain))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    found, expected = (s.encode_prompts(s.load_text(), ["a circle"])["prompt_embeds"] for s in (space, plain))
    assert torch.equal(found, expected)


def test_weights_of_plain_names_go_before_a_variant(folder):
    shutil.copy(folder / VAE_WEIGHTS, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    WEIGHT_FAULTS["empty"](folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    check_folder(load_space(folder))
    load_space(folder).load_vae()


# -- no code ------------------------------------------------------------------------------------------------


class Touch:
    """A pickle that writes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def _python(folder: Path, ran: Path, monkeypatch) -> None:
    """Code wherever diffusers and transformers would look for it, if they were allowed to."""
    code = f"import os; os.mkdir({str(ran)!r})\n"
    for name in ("pipeline.py", "my_code.py", "unet/my_code.py", "text_encoder/my_code.py", "vae/autoencoder_kl.py"):
        (folder / name).write_text(code)
    for file in ("__init__.py", "unet/__init__.py", "text_encoder/modeling_clip.py", "tokenizer/tokenization_clip.py"):
        (folder / file).write_text(code)
    monkeypatch.syspath_prepend(str(folder))


CODE: dict[str, Callable[[Path], object]] = {
    "nothing names it": lambda folder: None,
    "a pipeline of its own": lambda folder: change(folder / INDEX, _class_name=["pipeline", "Own"]),
    "an encoder of its own": lambda folder: change(folder / INDEX, text_encoder=["my_code", "CLIPTextModel"]),
    "a tokenizer of its own": lambda folder: change(folder / INDEX, tokenizer=["my_code", "CLIPTokenizer"]),
    "a network of its own": lambda folder: change(folder / INDEX, unet=["my_code", "UNet2DConditionModel"]),
    "auto_map": lambda folder: [
        change(folder / file, auto_map={"AutoModel": "my_code.Own", "AutoTokenizer": "my_code.Own"})
        for file in (TEXT, UNET, VAE, "tokenizer/tokenizer_config.json")
    ],
    "a tokenizer class": lambda folder: change(
        folder / "tokenizer/tokenizer_config.json",
        tokenizer_class="my_code.Own",
        auto_map={"AutoTokenizer": ["my_code.Own"] * 2},
    ),
    "a custom pipeline": lambda folder: change(folder / INDEX, custom_pipeline="pipeline.py", trust_remote_code=True),
    "a quantiser": lambda folder: change(folder / TEXT, quantization_config={"quant_method": "my_code"}),
}


@pytest.mark.parametrize("kind", CODE)
def test_no_code_of_a_folder_runs(folder, kind, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    _python(folder, ran, monkeypatch)
    CODE[kind](folder)
    said(lambda: used(folder), lambda: load_space(folder).load_text(), lambda: load_space(folder).load_network())
    assert not ran.exists()


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("ending", [".bin", ".safetensors", ".pt"])
def test_no_pickle_of_a_folder_is_read(folder, part, ending, tmp_path):
    ran = tmp_path / "ran"
    (folder / f"{part}.safetensors").unlink()
    name = f"{part}{ending}".replace("text_encoder/model.bin", "text_encoder/pytorch_model.bin")
    (folder / name).write_bytes(pickle.dumps(Touch(ran)))
    refused(folder)
    space = load_space(folder)
    assert said(space.load_text, space.load_network, space.load_vae)
    assert not ran.exists()
