"""A step-distilled network in a base model's folder: it draws as diffusers does by hand, and is told as what it is."""

from __future__ import annotations

import json

import diffusers
import pytest
import tiny_diffusion_pipelines as tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from raydistill.commands.assemble import main
from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.diffusion.noise import normal
from raydistill.driver.preflight import open_drawer
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.distilled import STEPS_KEY, check_scores, drawing

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, file of a network, arguments, folder) of a pipeline that was assembled."""
    folder = tmp_path_factory.mktemp("assemble")
    base, file, target = (
        tiny.save_sdxl(folder / "sdxl"),
        folder / "four_steps_unet.safetensors",
        folder / "there" / "fast",
    )
    weights = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    other = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_file({name: value.half() for name, value in other.items()}, file)
    return base, file, ["assemble", str(base), "--network", str(file), "--steps", "4", "--out", str(target)], target


def run(monkeypatch, arguments) -> int:
    monkeypatch.setattr("sys.argv", arguments)
    return main()


def test_a_published_network_draws_in_its_steps_on_trailing_timesteps_without_guidance(made, monkeypatch, capsys):
    base, file, arguments, folder = made
    assert run(monkeypatch, arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"pipeline  {folder}: 4 steps without guidance"
    space = load_space(folder)
    config = load(overrides=[f"teacher.model={base}", f"synthesis.teacher={folder}", "discriminator.real_data=null"])
    assert open_drawer(config, load_space(base)).folder == space.folder  # of the same VAE
    assert drawing(config, space) == (4, 0.0)
    with pytest.raises(InputError, match=rf"is step-distilled \({STEPS_KEY}=4 in .*model_index\.json\)"):
        check_scores(load(overrides=[f"teacher.model={folder}"]), space)
    # as the model cards say it
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    pipe.unet.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    noise = normal(0, [0], space.latent_shape, "assemble")
    told = {"num_inference_steps": 4, "guidance_scale": 0, "latents": noise, "output_type": "latent"}
    expected = pipe(PROMPT, **told).images
    text = TextEncoder(space)
    latents = space.sample(
        space.load_network(), noise, text.encode([PROMPT]), text.encode_unconditional(), *drawing(config, space)
    )
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    there = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    torch.testing.assert_close(there(PROMPT, **told).images, expected, rtol=0, atol=1e-4)


def test_a_lora_is_merged_into_the_base(made, tmp_path, monkeypatch):
    base = made[0]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    state = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path / "lora", {name: value.contiguous() for name, value in state.items()})
    out = ["--lora", str(tmp_path / "lora"), "--steps", "8", "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert run(monkeypatch, ["assemble", str(base), *out]) == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = load_space(tmp_path / "out").load_network().state_dict()
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    changed = [name for name, value in found.items() if not torch.equal(value, before[name])]
    assert {name.rpartition("attn")[2][2:] if "to_q" in name else "conv1.weight" for name in changed} == {
        "to_q.weight", "conv1.weight"
    }  # fmt: skip
    assert drawing(load(overrides=["synthesis.teacher=out"]), load_space(tmp_path / "out")) == (8, 0.0)


def test_what_cannot_be_assembled_is_one_line_and_leaves_nothing(made, tmp_path, monkeypatch, capsys):
    base, file, (_, _, *rest), _ = made
    rest = [*rest[:-1], str(tmp_path / "out")]
    weights = load_file(file)
    save_file(
        {name: value for name, value in weights.items() if "mid_block" not in name}, tmp_path / "part.safetensors"
    )
    (tmp_path / "lora.bin").write_bytes(b"no")
    wrong = {
        "--steps 1: step-distilled models that predict noise draw in 2 to 8": [str(base), *rest, "--steps", "1"],
        "out exists already": [str(base), *rest, "--out", str(tmp_path)],
        "mid_block.attentions.0.norm.weight is missing": [
            str(base),
            *rest,
            "--network",
            str(tmp_path / "part.safetensors"),
        ],
        "--lora: ": [str(base), *rest, "--lora", str(tmp_path / "lora.bin")],
        "draws on a flow": ["shapes:flux", *rest],
    }
    for said, arguments in wrong.items():
        assert run(monkeypatch, ["assemble", *arguments]) == 2, said
        told = capsys.readouterr().err
        assert said.removeprefix("out ") in told, told
        assert told.count("\n") == 1
        assert not (tmp_path / "out").exists()
    index = base.parent / "there" / "fast" / "model_index.json"
    good = index.read_text()
    index.write_text(json.dumps(json.loads(good) | {STEPS_KEY: 40}))
    with pytest.raises(InputError, match=rf"model_index\.json: {STEPS_KEY} is 40, not 1 to 8"):
        drawing(load(), load_space(index.parent))
    index.write_text(good)
