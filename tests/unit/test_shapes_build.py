"""Parts of the embedded world's builder, and what its files must not tell."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from raydistill.build_shapes import forget_paths, link_duplicates, run_stages
from raydistill.build_shapes.bridges import vary
from raydistill.build_shapes.frame import Build
from raydistill.build_shapes.models import without_padding
from raydistill.build_shapes.parts import _AttributeReader, build_part, text_part, vae_part
from raydistill.shapes import WEIGHTS
from raydistill.shapes.captions import single_scenes
from raydistill.shapes.miniatures import GEMMA_WIDTH, sana_instruction
from raydistill.shapes.render import render
from raydistill.spaces import load_space


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "pixels"), [(16, 64), (1, 32), (3, 40)])
def test_varied_pictures_are_pictures_and_reproducible(count, pixels):
    images = render(single_scenes()[::45][:count], 64, seed=0)
    images = torch.nn.functional.interpolate(images, size=pixels)
    given = images.clone()
    torch.manual_seed(1)
    varied = vary(images, generator(7))
    torch.manual_seed(2)  # nothing may come from the global state
    assert torch.equal(varied, vary(images, generator(7)))
    assert not torch.equal(varied, vary(images, generator(8)))
    assert torch.equal(images, given)
    assert varied.shape == images.shape
    assert varied.dtype == torch.float32
    assert -1 <= varied.min() <= varied.max() <= 1


def test_varied_pictures_lie_between_and_beside_the_given_ones():
    images = render(single_scenes()[::45], 64, seed=0)
    varied = vary(images, generator(7))
    change = (varied - images).abs().flatten(1).mean(1)
    assert change.min() > 0.01
    assert varied.flatten(1).std(1).min() > 0.02  # and none is flat
    distances = (varied.flatten(1)[:, None] - images.flatten(1)[None]).abs().mean(2).amin(1)
    assert distances.median() > 0.05  # nor another of the given ones


def test_forget_paths_removes_origins_and_nothing_else(tmp_path):
    told = {"_class_name": "AutoencoderKL", "_name_or_path": "/home/me/vae", "scaling_factor": 0.5, "ä": [1, None]}
    plain = '{"_class_name":"UNet",   "layers": 2}'
    for folder in ("vae", "deep/er/text_encoder", "unet", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(told))
    (tmp_path / "deep/er/text_encoder" / "config.json").write_text(json.dumps({"_name_or_path": "", "d": 1}))
    (tmp_path / "unet" / "config.json").write_text(plain)
    (tmp_path / "other" / "data.json").write_text(json.dumps(told))
    forget_paths(tmp_path)
    del told["_name_or_path"]
    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == told
    assert json.loads((tmp_path / "deep/er/text_encoder" / "config.json").read_text()) == {"d": 1}
    assert (tmp_path / "unet" / "config.json").read_text() == plain
    assert "_name_or_path" in json.loads((tmp_path / "other" / "data.json").read_text())
    once = (tmp_path / "vae" / "config.json").read_bytes()
    forget_paths(tmp_path)
    assert (tmp_path / "vae" / "config.json").read_bytes() == once


def test_parts_that_models_share_are_shipped_once(tmp_path):
    for model, text in (("flux", "a"), ("sd15", "b"), ("sd3", "a"), ("sd21", "b"), ("sdxl", "c")):
        for part in ("vae", "unet"):
            (tmp_path / model / part).mkdir(parents=True)
            (tmp_path / model / part / "weights").write_text(text if part == "vae" else model)
    link_duplicates(tmp_path)
    links = {str(path.relative_to(tmp_path)): path for path in tmp_path.glob("*/*") if path.is_symlink()}
    assert {name: path.readlink().as_posix() for name, path in links.items()} == {
        "sd21/vae": "../sd15/vae",
        "sd3/vae": "../flux/vae",
    }
    assert (tmp_path / "sd3" / "vae" / "weights").read_text() == "a"
    link_duplicates(tmp_path)  # again: nothing more to do
    assert (tmp_path / "flux" / "vae" / "weights").read_text() == "a"


@pytest.mark.parametrize(
    ("part", "shipped"), [("clip", "flux/tokenizer"), ("t5", "flux/tokenizer_2"), ("gemma", "sana/tokenizer")]
)
def test_a_rebuilt_tokenizer_is_the_shipped_one_byte_by_byte(tmp_path, part, shipped):
    build = Build(tmp_path / "work", tmp_path / "weights", scale=0)
    build_part(build, part)
    text_part(build, part)[0].save_pretrained(tmp_path / "saved")
    files = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (WEIGHTS / shipped).iterdir()}


@torch.no_grad()
def test_sanas_encoder_learned_from_the_tokens_that_its_pipeline_reads():
    """The instruction once in front of all captions gives what the pipeline's tokens, all of them in every row, give."""
    space = load_space(WEIGHTS / "sana")
    captions = [single_scenes()[5].caption, f"{single_scenes()[7].caption.split(' on ')[0]} and a small red circle"]
    text = space.load_text()
    lead = torch.tensor([text.tokenizer.encode(sana_instruction())[:-1]])
    reader = _AttributeReader(text.text_encoder, GEMMA_WIDTH, lead)
    behind = text.tokenizer(
        [f" {caption}" for caption in captions], padding="max_length", max_length=20, add_special_tokens=False,
        padding_side="right", return_tensors="pt",
    )  # fmt: skip
    coded = space.encode_prompts(text, captions)
    read = coded["prompt_attention_mask"][:, 1:, None]  # without the pipeline's mark in front
    wanted = (coded["prompt_embeds"][:, 1:] * read).sum(1) / read.sum(1)
    torch.testing.assert_close(reader(behind.input_ids), reader.head(wanted), atol=1e-5, rtol=1e-4)

    # and the network does not read the padding that the builder leaves out
    network, x_t = space.load_network(), torch.randn(2, *space.latent_shape, generator=generator(3))
    short = without_padding(coded)
    assert short["prompt_embeds"].shape[1] < 30 < coded["prompt_embeds"].shape[1]
    predictions = [space.predict(network, x_t, torch.tensor([0.3, 0.8]), some) for some in (coded, short)]
    torch.testing.assert_close(*predictions, atol=1e-5, rtol=1e-4)


@pytest.mark.full
def test_a_sana_style_teacher_is_built_with_few_steps_and_goes_on(tmp_path):
    build = Build(tmp_path / "work", tmp_path / "weights", scale=0.0001)
    run_stages(build, ("prompts", "gemma", "sana_vae", "sana"))
    shutil.rmtree(tmp_path / "work" / "parts")  # from now on its parts are read from the shipped model
    space = load_space(tmp_path / "weights" / "sana")
    assert space.latent_shape == (16, 4, 4) == load_space(WEIGHTS / "sana").latent_shape
    assert vae_part(build, "sana_vae").config.scaling_factor == space.load_vae().config.scaling_factor != 1
    before = (tmp_path / "weights/sana/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    run_stages(build, ("gemma", "sana_vae", "sana"))
    assert (tmp_path / "weights/sana/transformer/diffusion_pytorch_model.safetensors").read_bytes() == before
    embeds = space.encode_prompts(space.load_text(), ["a small red circle at the left on a white background", ""])
    assert embeds["prompt_attention_mask"].sum(1).tolist() == [12, 0]  # 11 words, and the instruction's first one


def strings(tree):
    """All keys and texts of a JSON tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree


ABSOLUTE = re.compile(r"^(file://)?(/|~/|[A-Za-z]:[\\/])[\w.]")


def test_no_shipped_file_tells_where_it_was_made():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    texts, looked = {}, set()
    for file in files:
        if file.suffix == ".json":
            texts[file] = set(strings(json.loads(file.read_text())))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                texts[file] = set(strings(opened.metadata() or {}))
        elif file.suffix == ".parquet":
            metadata = pq.read_schema(file).metadata or {}
            texts[file] = {part.decode() for pair in metadata.items() for part in pair}
        elif file.suffix == ".txt":
            texts[file] = set(file.read_text().splitlines())
        looked.add(file.suffix)
    assert {".json", ".safetensors", ".parquet", ".txt"} <= looked
    assert [(file, text) for file, some in texts.items() for text in some if ABSOLUTE.match(text)] == []
    assert [file for file, some in texts.items() if "_name_or_path" in some] == []
    # whatever the format: no home, build or temporary folder in any byte
    folders = re.compile(rb"/(home|root|tmp|work|opt|usr|mnt|Users)/[\w.-]+")
    assert [(file, found.group()) for file in files if (found := folders.search(file.read_bytes()))] == []


@pytest.mark.parametrize("text", ["/home/me/vae", "file:///x", "/x", "~/models", "C:\\models"])
def test_an_absolute_path_would_be_seen(text):
    assert ABSOLUTE.match(text)
    assert not any(ABSOLUTE.match(word) for word in ("a/b", "</s>", "/", "size/color", "▁/", "diffusers"))
