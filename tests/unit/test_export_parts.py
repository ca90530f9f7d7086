"""What a student shares with its base is copied byte for byte, so that all that opens the base opens the student."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from published_base import published
from safetensors.torch import load_file, save_file

from raydistill.errors import InputError
from raydistill.export.merge import merge_students, open_sources, shares_of
from raydistill.export.parts import copy_part
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0

CARD = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="org/base", steps=1)
PROMPTS = ["a small red circle", "two blue squares at the left"]
PARTS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def base(sd_folder, tmp_path_factory):
    return published(sd_folder, tmp_path_factory.mktemp("published") / "base")


@pytest.fixture(scope="module")
def space(base):
    return load_space(base)


@pytest.fixture(scope="module")
def exports(space, tmp_path_factory):
    """dtype -> folder."""
    root = tmp_path_factory.mktemp("exports")
    return {
        dtype: export_student(space, space.load_network(), 999, root / str(dtype), CARD, dtype)
        for dtype in (torch.float32, torch.float16)
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_did_not_change_are_the_bases_own_bytes(part, base, exports):
    theirs = {name: data for name, data in contents(base / part).items() if not name.endswith(".bin")}
    assert contents(exports[torch.float32] / part) == theirs
    half = contents(exports[torch.float16] / part)
    assert half.keys() == theirs.keys()
    assert {name for name in theirs if half[name] != theirs[name]} == {n for n in theirs if n.endswith(".safetensors")}


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_rounded_weights_keep_their_names(file, base, exports):
    whole, half = load_file(base / file), load_file(exports[torch.float16] / file)
    assert half.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(half[name], value.half() if value.is_floating_point() else value), name


def test_the_index_names_the_bases_classes(base, exports):
    for folder in exports.values():
        index = json.loads((folder / "model_index.json").read_text())
        theirs = json.loads((base / "model_index.json").read_text())
        assert {part: index[part] for part in PARTS} == {part: theirs[part] for part in PARTS}
        assert index["safety_checker"] == index["feature_extractor"] == [None, None]
        assert "_name_or_path" not in index


def test_diffusers_draws_our_picture_with_the_copied_parts(space, exports):
    noise = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = space.encode_prompts(space.load_text(), PROMPTS)
    with torch.no_grad():
        ours = space.decode(space.load_vae(), one_step_x0(space, space.load_network(), noise, conditioning, 999))
    for dtype, folder in exports.items():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="pt").images
        error = ((ours + 1) / 2 - theirs).abs()
        assert error.max() <= 1e-4 if dtype == torch.float32 else error.mean() < 0.01


def test_a_mean_of_students_has_the_same_bytes(space, base, exports, tmp_path):
    folders = [exports[torch.float32], shutil.copytree(exports[torch.float32], tmp_path / "other")]
    merge_students(open_sources([Export(f, f.name) for f in folders]), shares_of(None, 2), tmp_path / "mean")
    for part in PARTS:
        assert contents(tmp_path / "mean" / part) == contents(folders[0] / part)


def test_weights_in_shards_are_copied_as_they_lie(base, tmp_path):
    source = shutil.copytree(base / "text_encoder", tmp_path / "sharded")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, source / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    copy_part(source, tmp_path / "same", torch.float32)
    copy_part(source, tmp_path / "half", torch.float16)
    (source / "pytorch_model.bin").unlink()
    assert contents(tmp_path / "same") == contents(source)
    assert sorted(contents(tmp_path / "half")) == ["config.json", "model.safetensors"], "one file"
    assert load_file(tmp_path / "half" / "model.safetensors").keys() == state.keys()


def test_what_is_no_file_is_not_copied(base, tmp_path):
    source = shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    (source / "old.json").symlink_to(tmp_path / "gone")
    (source / "d.json").mkdir()
    copy_part(source, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(base / "tokenizer")


def half_in_shards(source: Path, stem: str, shard: str) -> dict[str, torch.Tensor]:
    """Leave only the fp16 variant in two files and an index; returns what they hold."""
    state = {name: value.half() for name, value in load_file(source / f"{stem}.safetensors").items()}
    (source / f"{stem}.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for i in (1, 2):
        held, file = names[i - 1 :: 2], shard.format(stem=stem, i=i)
        save_file({name: state[name] for name in held}, source / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
    (source / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize(
    "shard",
    [
        "{stem}.fp16-0000{i}-of-00002.safetensors",  # diffusers and transformers now
        "{stem}-0000{i}-of-00002.fp16.safetensors",  # diffusers before
        "{stem}-0000{i}-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize(
    ("part", "stem"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")], ids=["vae", "text_encoder"]
)
def test_a_variant_in_shards_is_copied_whole_under_plain_names(part, stem, shard, space, exports, tmp_path):
    base = shutil.copytree(exports[torch.float32], tmp_path / "base")
    state = half_in_shards(base / part, stem, shard)
    for name, dtype in (("same", torch.float16), ("any", None)):
        copy_part(base / part, tmp_path / name, dtype)
        written = contents(tmp_path / name)
        index = json.loads(written[f"{stem}.safetensors.index.json"])
        shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
        assert set(index["weight_map"].values()) == shards == {f for f in written if f.endswith(".safetensors")}
        assert index["metadata"] == {"total_size": 7}
        for name_of, file in index["weight_map"].items():
            assert torch.equal(load_file(tmp_path / name / file)[name_of], state[name_of])
        assert index["weight_map"].keys() == state.keys()
    copy_part(base / part, tmp_path / "wide", torch.float32)
    assert load_file(tmp_path / "wide" / f"{stem}.safetensors").keys() == state.keys()


def test_exports_and_means_of_a_base_with_a_variant_in_shards_draw(sd_folder, tmp_path):
    """In present names: diffusers reads no old ones from shards."""
    space = load_space(sd_folder)
    base = export_student(space, space.load_network(), 999, tmp_path / "base", CARD, torch.float32)
    wanted = load_space(shutil.copytree(base, tmp_path / "one file a part")).load_vae().half()
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        half_in_shards(base / part, stem, "{stem}.fp16-0000{i}-of-00002.safetensors")
    made = export_student(load_space(base), space.load_network(), 999, tmp_path / "export", CARD, torch.float16)
    other = shutil.copytree(base, tmp_path / "sibling")
    mean = merge_students(open_sources([Export(f, f.name) for f in (base, other)]), [0.5, 0.5], tmp_path / "mean")
    for folder in (made, mean):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        for mine, theirs in zip(pipe.vae.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(mine.half(), theirs)
        assert pipe("a", num_inference_steps=1, guidance_scale=0, output_type="pt").images.isfinite().all()


def test_shards_that_are_the_same_but_for_the_variant_are_refused(exports, tmp_path):
    source = shutil.copytree(exports[torch.float16] / "vae", tmp_path / "vae")
    half_in_shards(source, "diffusion_pytorch_model", "{stem}-{i}.fp16.safetensors")
    index = source / "diffusion_pytorch_model.safetensors.index.fp16.json"
    two = source / "diffusion_pytorch_model-2.fp16.safetensors"
    two.rename(source / "diffusion_pytorch_model-1.safetensors")
    index.write_text(index.read_text().replace(two.name, "diffusion_pytorch_model-1.safetensors"))
    with pytest.raises(InputError, match=rf"{index}: names .*, which are the same but for the variant"):
        copy_part(source, tmp_path / "copy")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({}, {"torch_dtype": "float32"}),
    ],
)
def test_a_half_precision_copy_says_float32_and_nothing_else_changes(said, kept, base, tmp_path):
    """transformers would load it in half precision, and diffusers the rest in float32."""
    source = shutil.copytree(base / "text_encoder", tmp_path / "text")
    config = json.loads((source / "config.json").read_text())
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config | said))
    copy_part(source, tmp_path / "copy", torch.float16)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config | kept
    if said == kept:
        assert (tmp_path / "copy" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_weights_too_large_for_the_dtype_and_missing_ones_are_refused(base, tmp_path):
    source = shutil.copytree(base / "vae", tmp_path / "vae")
    weights = source / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    name = min(state)
    save_file(state | {name: state[name] * 0 + 1e6}, weights)
    with pytest.raises(InputError, match=rf"1 weights of .*vae are not finite in torch.float16, the first is {name}"):
        copy_part(source, tmp_path / "half", torch.float16)
    weights.unlink()
    with pytest.raises(InputError, match=r"vae: no .*safetensors"):
        copy_part(source, tmp_path / "none")


# -- other versions ---------------------------------------------------------------------------------------

# What a user does who has older libraries; torch is the one that is installed here.
USER = """
import sys, torch, diffusers, transformers
print(diffusers.__version__, transformers.__version__)
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
given = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    images = pipe(given["prompts"], latents=given["noise"], num_inference_steps=1, guidance_scale=0,
                  output_type="pt").images
    torch.save(images, folder + ".pt")
"""


@contextmanager
def older_environment(folder: Path, packages: list[str]) -> Iterator[Path]:
    """The Python of a new environment: these packages with all that they need, and the torch that runs here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python, site = folder / "bin" / "python", next(folder.glob("lib/python*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *packages], check=True)
    (site / "torch_of_this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")  # looked at last
    yield python
    shutil.rmtree(folder)  # 200 MB, which pytest would keep


@pytest.mark.full
@pytest.mark.parametrize(
    "packages",
    [
        ["diffusers==0.31.0", "transformers==4.46.3"],
        ["diffusers==0.35.2", "transformers==4.57.1"],
    ],
    ids=lambda packages: packages[1],
)
def test_older_libraries_open_the_student_as_they_open_its_base(packages, space, exports, tmp_path):
    noise = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(0))
    torch.save({"noise": noise, "prompts": PROMPTS}, tmp_path / "given.pt")
    folders = [shutil.copytree(folder, tmp_path / str(dtype)) for dtype, folder in exports.items()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with older_environment(tmp_path / "environment", packages) as python:
        command = [python, "-c", USER, tmp_path / "given.pt", *folders]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [package.partition("==")[2] for package in packages]
    for folder in folders:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        ours = pipe(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="pt").images
        theirs = torch.load(f"{folder}.pt", weights_only=True)
        assert ours.std() > 0.05
        assert (ours - theirs).abs().max() <= 1e-3
