"""An exported student is an ordinary diffusers folder whose one step is exactly our own."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from raydistill.data.encode import TextEncoder
from raydistill.errors import InputError
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0

CARD = ModelCard(
    teacher="shapes:flux",
    teacher_class="FluxPipeline",
    student="shapes:sd15",
    steps=3000,
    run_id="run-id",
    config_hash="abc123",
    metrics={"mean": 0.75},
)
PROMPTS = ["a red circle", "a large blue square on a green background"]

# What a user does who has diffusers and nothing of ours.
USER = """
import sys
sys.modules["raydistill"] = None
try:
    import raydistill
    raise SystemExit("raydistill can be imported")
except ImportError:
    pass
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = torch.load(folder + ".pt", weights_only=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=given["dtype"], use_safetensors=True)
    images = pipe(given["prompts"], latents=given["noise"].to(given["dtype"]), num_inference_steps=1,
                  guidance_scale=0, output_type="pt").images
    torch.save(images.float(), folder + ".out.pt")
"""


def v_prediction_copy(folder: Path, target: Path) -> Path:
    """The same pipeline with a scheduler that says v-prediction."""
    shutil.copytree(folder, target)
    file = target / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    return target


@pytest.fixture(scope="module")
def exports(sd_folder, tmp_path_factory):
    """name -> (folder, our image, the image that plain diffusers drew in its own process)."""
    root = tmp_path_factory.mktemp("exports")
    v_folder = v_prediction_copy(sd_folder, root / "v-student")
    cases = {
        "t999": (sd_folder, 999, torch.float32),
        "t625": (sd_folder, 625, torch.float32),
        "t999-v": (v_folder, 999, torch.float32),
        "t625-v": (v_folder, 625, torch.float32),
        "t999-half": (sd_folder, 999, torch.float16),
        "t625-half": (sd_folder, 625, torch.float16),
    }
    results = {}
    for name, (folder, start, dtype) in cases.items():
        space = load_space(folder)
        generator = torch.Generator().manual_seed(len(results))
        unet, noise = space.load_network(), torch.randn(2, *space.latent_shape, generator=generator)
        conditioning = space.encode_prompts(space.load_text(), PROMPTS)
        with torch.no_grad():
            images = space.decode(space.load_vae(), one_step_x0(space, unet, noise, conditioning, start))
        export_student(space, unet, start, root / name, CARD, dtype)
        torch.save({"noise": noise, "prompts": PROMPTS, "dtype": dtype}, root / f"{name}.pt")
        results[name] = (root / name, (images + 1) / 2)
    command = [sys.executable, "-I", "-c", USER, *(str(folder) for folder, _ in results.values())]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return {
        name: (folder, ours, torch.load(f"{folder}.out.pt", weights_only=True))
        for name, (folder, ours) in results.items()
    }


@pytest.mark.parametrize("name", ["t999", "t625", "t999-v", "t625-v"])
def test_plain_diffusers_draws_our_picture(exports, name):
    _, ours, theirs = exports[name]
    assert ours.std() > 0.05  # not a blank picture
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["t999-half", "t625-half"])
def test_half_precision_export_draws_nearly_the_same(exports, name):
    _, ours, theirs = exports[name]
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().mean() < 0.01


def test_an_export_counts_the_same_prompts_as_cut_and_reads_the_same_tokens(exports, sd_folder):
    two = "a small red circle at the left and a large blue square at the right on a white background"
    prompts = [two, f"{two} at the left", two.upper(), "", "a red circle"]
    mine, theirs = TextEncoder(load_space(sd_folder)), TextEncoder(load_space(exports["t999"][0]))
    assert mine.are_cut(prompts).tolist() == theirs.are_cut(prompts).tolist() == [False, True, False, False, False]
    read = [
        StableDiffusionPipeline.from_pretrained(folder).tokenizer(prompts, padding="max_length", truncation=True).data
        for folder in (sd_folder, exports["t999"][0])
    ]
    assert read[0] == read[1]


def test_export_holds_safetensors_of_the_asked_dtype_and_no_origin(exports):
    folder = exports["t999-half"][0]
    names = [file.name for file in folder.rglob("*") if file.is_file()]
    assert sum(name.endswith(".safetensors") for name in names) == 3  # UNet, VAE, text encoder
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    assert not [file for file in folder.rglob("*.json") if "_name_or_path" in file.read_text()]
    from safetensors import safe_open

    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            dtypes = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118 (not a mapping)
            assert dtypes <= {torch.float16, torch.int64}, file


def test_model_card_says_how_to_call_and_under_which_terms(exports):
    text = (exports["t625"][0] / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert "num_inference_steps=1, guidance_scale=0" in text
    for value in ("shapes:flux", "shapes:sd15", "3000", "625", "run-id", "abc123", "0.75", "torch.float32"):
        assert value in text, value


def test_the_card_begins_with_what_a_prompt_alone_does(exports):
    """A folder cannot change the defaults of `__call__`, so the card says it before anything else."""
    head = (exports["t999"][0] / "README.md").read_text().split("```python")[0]
    assert "Call it with `num_inference_steps=1, guidance_scale=0`" in head
    assert "50 guided steps" in head
    defaults = inspect.signature(StableDiffusionPipeline.__call__).parameters
    assert (defaults["num_inference_steps"].default, defaults["guidance_scale"].default) == (50, 7.5)


def test_network_input_of_an_early_start_is_sigma_times_noise(sd_folder):
    """Against the closed form: alpha_bar = prod(1 - beta) of the scaled-linear schedule, in float64."""
    scheduler = load_space(sd_folder).one_step_scheduler(625)
    scheduler.set_timesteps(1)
    noise = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)
    seen = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(626)]
    alpha_bar = math.prod(1 - beta for beta in betas)
    assert scheduler.timesteps.tolist() == [625]
    torch.testing.assert_close(seen, noise * math.sqrt(1 - alpha_bar), rtol=1e-5, atol=1e-6)


def test_one_step_x0_is_the_closed_form_and_carries_gradients(sd_folder):
    space = load_space(sd_folder)
    seen = {}

    def network(x_t, timestep, encoder_hidden_states, return_dict):
        seen.update(x_t=x_t, timestep=timestep)
        return (weight * x_t,)

    weight = torch.tensor(0.3, requires_grad=True)
    noise, conditioning = torch.randn(2, *space.latent_shape), {"prompt_embeds": torch.zeros(2, 1, 1)}
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    for start in (999, 625):
        alpha_bar = math.prod(1 - beta for beta in betas[: start + 1])
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_0 = one_step_x0(space, network, noise, conditioning, start)
        scale = 1.0 if start == 999 else sigma
        assert seen["timestep"].tolist() == [start] * 2
        torch.testing.assert_close(seen["x_t"], noise * scale, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x_0, noise * scale * (1 - sigma * 0.3) / alpha, rtol=1e-4, atol=1e-5)
        assert torch.autograd.grad(x_0.sum(), weight)[0] != 0
    with pytest.raises(ValueError, match=r"start_timestep 1000 is outside 1 … 999"):
        one_step_x0(space, network, noise, conditioning, 1000)


def test_failed_export_keeps_the_earlier_one_and_leaves_nothing(sd_folder, tmp_path, monkeypatch):
    space = load_space(sd_folder)
    unet, target = space.load_network(), tmp_path / "export"
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    export_student(space, unet, 999, target, CARD)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())  # not cast in place
    written = (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def fail(*_: object) -> str:
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCard, "markdown", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            export_student(space, unet, 999, target, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == written

    with torch.no_grad():
        unet.conv_in.weight.mul_(1e7)
    with pytest.raises(InputError, match=r"not finite in torch.float16, the first is conv_in.weight"):
        export_student(space, unet, 999, target, CARD)
    export_student(space, unet, 999, target, CARD, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != written


def test_flow_students_and_impossible_starts_are_refused(sd_folder, flux_folder):
    with pytest.raises(InputError, match="no one-step scheduler for a FluxPipeline"):
        load_space(flux_folder).one_step_scheduler(500)
    with pytest.raises(InputError, match=r"start_timestep 0 is outside 1 … 999"):
        load_space(sd_folder).one_step_scheduler(0)
