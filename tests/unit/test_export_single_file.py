"""A student in one file: names against diffusers' own reader, the picture of the file, and of the ComfyUI workflow."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from export_students import export_of, one_step_of
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from raydistill.errors import InputError
from raydistill.export.original_layout import original_names
from raydistill.export.single_file import load_single_file, write_single_file
from raydistill.export.source import Export, find_export

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}
STUDENTS = (("sd15", 999), ("sd21", 625))

# What a user does who has diffusers, the folder that was written, and no network.
USER = """
import sys
sys.modules["raydistill"] = None
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
noise = torch.load("noise.pt", weights_only=True)
for file, config, image in zip(*[iter(sys.argv[1:])] * 3):
    pipe = StableDiffusionPipeline.from_single_file(file, config=config, local_files_only=True, dtype=torch.float32)
    drawn = pipe("two blue squares", latents=noise, num_inference_steps=1, guidance_scale=0, output_type="pt").images
    torch.save(drawn, image)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """model -> (its export, folder of the single file, what the check of the picture found)."""
    root = tmp_path_factory.mktemp("single-file")
    found = {}
    for model, start in STUDENTS:
        export = export_of(model, start, root / model / "export")
        folder = root / f"{model}-file"
        folder.mkdir()
        found[model] = (export, folder, write_single_file(export, folder))
    return found


def own_picture(export: Export, noise: torch.Tensor) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(export.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("two blue squares", latents=noise, output_type="pt", **ONE_STEP).images
    assert image.std() > 0.05  # not a blank one
    return image


@pytest.mark.parametrize(("model", "start"), STUDENTS)
def test_from_single_file_draws_the_exports_picture(model, start, written):
    export, folder, apart = written[model]
    assert apart <= 0.01
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    pipe = load_single_file(folder / f"{model}.safetensors")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("two blue squares", latents=noise, output_type="pt", **ONE_STEP).images
    assert torch.equal(image, own_picture(export, noise))


@pytest.mark.full
def test_from_single_file_needs_neither_raydistill_nor_network(written, tmp_path):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    torch.save(noise, tmp_path / "noise.pt")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # nobody answers there
    files = [(folder / f"{m}.safetensors", folder / "config", f"{m}.pt") for m, (_, folder, _) in written.items()]
    command = [sys.executable, "-c", USER, *(str(value) for file in files for value in file)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for model, (export, _, _) in written.items():
        assert torch.equal(torch.load(tmp_path / f"{model}.pt", weights_only=True), own_picture(export, noise))


def test_the_file_says_how_to_draw_and_keeps_dtype_and_terms(written):
    _, folder, _ = written["sd21"]
    with safe_open(folder / "sd21.safetensors", "pt") as opened:
        metadata = opened.metadata()
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512"
    assert metadata["raydistill.start_timestep"] == "625"
    assert metadata["raydistill.sigmas"].startswith("2.5017")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for said in ("1 step and CFG 1", "| sigmas | 2.5017", "## Licence", "shapes:flux", 'config="config"'):
        assert said in card, said
    names = {file.name for file in folder.iterdir()}
    assert names == {"sd21.safetensors", "sd21-comfyui.json", "config", "README.md"}
    assert not list((folder / "config").rglob("*.safetensors"))


@pytest.mark.parametrize(("model", "start"), STUDENTS)
def test_the_comfyui_workflow_is_the_pipelines_step(model, start, written):
    """ComfyUI's arithmetic (comfy/model_sampling.py, k_diffusion/sampling.py) with the workflow's numbers."""
    export, folder, _ = written[model]
    graph = json.loads((folder / f"{model}-comfyui.json").read_text())
    for node in graph.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(source in graph for source, _ in links)
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_kind["CheckpointLoaderSimple"]["ckpt_name"] == f"{model}.safetensors"
    assert (by_kind["SamplerCustom"]["cfg"], by_kind["KSamplerSelect"]["sampler_name"]) == (1.0, "euler")
    assert (by_kind["KarrasScheduler"]["steps"], by_kind["ModelSamplingDiscrete"]["sampling"]) == (1, "eps")

    sigma = by_kind["KarrasScheduler"]["sigma_max"]  # of one step, get_sigmas_karras gives [sigma_max, 0]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    timestep = int((sigmas.log() - math.log(sigma)).abs().argmin())
    assert timestep == start
    whole = math.isclose(float(sigmas[-1]), sigma, rel_tol=1e-5) or sigma > float(sigmas[-1])
    assert whole == (start == 999)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    x = noise * (math.sqrt(1 + sigma**2) if whole else sigma)
    pipe = StableDiffusionPipeline.from_pretrained(export.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    embeds, _ = pipe.encode_prompt("a red circle", "cpu", 1, False)
    with torch.no_grad():
        predicted = pipe.unet(x / math.sqrt(1 + sigma**2), timestep, embeds).sample
    ours = x - sigma * predicted  # Euler from sigma to 0
    theirs = pipe("a red circle", latents=noise, output_type="latent", **ONE_STEP).images
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


# -- names at the real sizes --------------------------------------------------------------------------------


def text_encoder(**settings) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **settings))


@pytest.fixture(scope="module")
def real():
    """version -> UNet, VAE and text encoder of Stable Diffusion's real shapes, on tensors without numbers."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        first = UNet2DConditionModel(cross_attention_dim=768)
        second = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        clip = text_encoder(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        open_clip = text_encoder(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    return {1: (first, vae, clip), 2: (second, vae, open_clip)}


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_reads_every_tensor_back_by_its_name(version, real):
    """Of the real networks' names, diffusers' converters make the names that we started from."""
    unet, vae, text = real[version]
    names = original_names(unet.state_dict(), vae.state_dict(), text.state_dict(), unet.config)
    marks = {name: torch.tensor([hash(name) % 2**31]) for network in real[version] for name in network.state_dict()}
    checkpoint = {original: torch.cat([marks[name] for name in joined]) for original, (_, joined) in names.items()}
    assert len(marks) == sum(len(joined) for _, joined in names.values())
    back = convert_ldm_unet_checkpoint(copy.copy(checkpoint), unet.config)
    back |= convert_ldm_vae_checkpoint(copy.copy(checkpoint), vae.config)
    if version == 1:
        found = convert_ldm_clip_checkpoint(checkpoint)
    else:
        small = copy.copy(text)
        small.config = copy.copy(text.config)
        small.config.hidden_size = 1  # rows of the marks of q, k and v
        twice = {k: v[:, None] if k.endswith("in_proj_weight") else v for k, v in checkpoint.items()}
        found = {k: v.flatten() for k, v in convert_open_clip_checkpoint(small, twice).items()}
    back |= {name.removeprefix("text_model."): value for name, value in found.items()}
    own = {name.removeprefix("text_model."): value for name, value in marks.items()}
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


def test_names_are_those_of_the_published_checkpoints(real):
    """Names as they stand in v1-5-pruned-emaonly.safetensors and v2-1_512-ema-pruned.safetensors."""
    found = {}
    for version, (unet, vae, text) in real.items():
        found[version] = original_names(unet.state_dict(), vae.state_dict(), text.state_dict(), unet.config)
    for name in (
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.2.downsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.norm_out.bias",
        "first_stage_model.post_quant_conv.weight",
    ):
        assert name in found[1], name
        assert name in found[2], name
    assert "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight" in found[1]
    assert found[2]["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias"][1] == tuple(
        name
        for kind in "qkv"
        for name in real[2][2].state_dict()
        if name.endswith(f"encoder.layers.22.self_attn.{kind}_proj.bias")
    )
    assert "cond_stage_model.model.positional_embedding" in found[2]
    assert sum(name.startswith("model.diffusion_model.") for name in found[1]) == 686
    assert sum(name.startswith("first_stage_model.") for name in found[1]) == 248


def test_a_network_without_a_place_in_the_layout_is_refused():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, class_embed_type="timestep")
    with pytest.raises(InputError, match=r"unet: class_embedding\.linear_1\.bias has no place"):
        original_names(unet.state_dict(), (), (), unet.config)


# -- the job ------------------------------------------------------------------------------------------------


def test_the_job_writes_beside_the_run_and_never_twice(run_script, tmp_path):
    export_of("sd15", 999, tmp_path / "mine" / "export")
    (tmp_path / "mine" / "config.yaml").touch()
    arguments = ("export", "mine", "--format", "single-file", "--storage", tmp_path)
    code, out, error = run_script(*arguments)
    assert code == 0, error
    assert str(tmp_path / "mine" / "single-file") in out
    assert "num_inference_steps=1, guidance_scale=0" in out.splitlines()[-1]
    assert (tmp_path / "mine" / "single-file" / "mine.safetensors").is_file()
    code, _, error = run_script(*arguments)
    assert code == 2
    assert error == f"error: {tmp_path / 'mine' / 'single-file'} exists already; name a new folder\n"


def test_wrong_requests_end_with_two_and_write_nothing(run_script, tmp_path):
    folder = find_export(str(export_of("sd15", 999, tmp_path / "some" / "folder").folder), tmp_path).folder
    for arguments, said in [
        ((folder, "--format", "single-file"), "name a folder to write with --out"),
        ((folder, "--format", "gguf"), "invalid choice: 'gguf'"),
        ((folder, "--format", "single-file", "--energy", 0.5), "--energy belongs to --format lora"),
        ((folder, "--format", "lora", "--energy", 2), "'2': a number above 0 and at most 1 is needed"),
        ((folder, "--format", "lora", "--out", tmp_path / "out"), "name --base"),
        ((folder, "--format", "onnx"), "optimum-onnx 0.1.0 needs transformers<4.58"),
        ((folder, "--format", "openvino"), "optimum-intel 2.2.0 needs transformers<5.6"),
        ((folder, "--format", "onnx", "--optimum", "nowhere"), "--optimum nowhere: no such program"),
        ((folder, "--format", "onnx", "--optimum", sys.executable), "No module named 'optimum'; install with"),
        ((folder, "--format", "hub"), "org/name is needed"),
        ((folder, "--format", "hub", "--repo", "name"), "--repo name: the hub's repository as org/name is needed"),
        (("nowhere", "--format", "single-file"), "nowhere: no such folder, and no run of that name"),
    ]:
        code, _, error = run_script("export", *arguments, "--storage", tmp_path)
        assert code == 2, arguments
        assert said in error, (arguments, error)
        assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_the_students_of_these_tests_differ_from_their_base():
    base, student = (
        load_file(Path(one_step_of("sd15")[which], "diffusion_pytorch_model.safetensors")) for which in (0, 1)
    )
    assert any(not torch.equal(base[name], student[name]) for name in base)
