"""A student as a LoRA of its base: ranks against the singular values, the picture of base and LoRA."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from export_students import export_of
from safetensors.torch import load_file

from raydistill.errors import InputError
from raydistill.export.lora import FILE, find_base, lora_of, truncated, write_lora
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.9, 2), (0.95, 3), (0.98, 4), (1.0, 4)])
def test_the_rank_is_the_smallest_that_keeps_the_energy(shape, energy, rank):
    """Squares 50, 40, 5, 5 of 100: the shares are 0.5, 0.9, 0.95, 1."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(shape[0], 4, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(shape[1], 4, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([50.0, 40.0, 5.0, 5.0], dtype=torch.float64).sqrt()
    D = U @ torch.diag(values) @ V.T
    down, up, kept = truncated(D, energy - 1e-9)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    best = torch.linalg.svd(D)
    expected = best.U[:, :rank] @ torch.diag(best.S[:rank]) @ best.Vh[:rank]
    if rank != 3:  # two equal values: which of them is kept is open
        torch.testing.assert_close(up @ down, expected)
    assert kept == pytest.approx(float((up @ down).square().sum()))
    assert up.norm() == pytest.approx(float(down.norm()))  # neither factor is small beside float16


@pytest.fixture(scope="module")
def base():
    return load_space(WEIGHTS / "sd15")


@pytest.fixture(scope="module")
def student(base, tmp_path_factory):
    """An export whose linear layers and convolutions are not its base's, in directions of rank 3."""
    unet = base.load_network()
    generator = torch.Generator().manual_seed(1)
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            rows, columns = layer.weight.shape[0], layer.weight[0].numel()
            sides = [torch.randn(size, 3, generator=generator) for size in (rows, columns)]
            layer.weight.data += 0.3 * layer.weight.std() / 3**0.5 * (sides[0] @ sides[1].T).reshape(layer.weight.shape)
    root = tmp_path_factory.mktemp("lora")
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=7)
    folder = export_student(base, unet, 999, root / "mine" / "export", card, torch.float32)
    return Export(folder, "mine"), unet


def test_base_and_lora_draw_the_students_picture(student, base, tmp_path):
    """As the README says, with diffusers alone. Within 0.5 / 255 on average, and the base's picture is far from it."""
    export, _ = student
    report = write_lora(export, base, "shapes:sd15", 0.9999, tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("PATH_OF_THIS_FOLDER", str(tmp_path)).replace('"shapes:sd15"', repr(str(WEIGHTS / "sd15")))
    *setup, _ = code.strip().splitlines()
    names: dict = {}
    exec("\n".join(setup), names)
    pipe, own = names["pipe"], StableDiffusionPipeline.from_pretrained(export.folder, dtype=torch.float32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        pipe.to(torch.float32)
        return pipe("two blue squares", latents=noise, output_type="pt", **ONE_STEP).images

    assert isinstance(pipe.scheduler, DDIMScheduler)
    wanted = draw(own)
    assert 255 * (draw(pipe) - wanted).abs().mean() < 0.5
    pipe.unload_lora_weights()
    assert 255 * (draw(pipe) - wanted).abs().mean() > 8
    assert "ranks 3 to 3" in report
    assert "warning" not in report
    card = (tmp_path / "README.md").read_text()
    assert "base_model: shapes:sd15\n" in card.split("---")[1]
    assert "## Licence" in card
    tensors = load_file(tmp_path / FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_different_ranks_are_added_without_a_scale(student, base):
    """W + B A of every layer is the student's W, whatever its neighbours' ranks."""
    _, unet = student
    other = base.load_network()
    other.load_state_dict(unet.state_dict())
    other.conv_in.weight.data += 0.1 * torch.randn(other.conv_in.weight.shape)  # of full rank
    lora = lora_of(other, base.load_network(), 1 - 1e-9)
    assert lora.ranks["conv_in"] > lora.ranks["mid_block.resnets.0.conv1"]
    adapted = base.load_network()
    adapted.load_lora_adapter(dict(lora.state), prefix=None, metadata=lora.config().to_dict())
    adapted.fuse_lora()
    for name in lora.ranks:
        found, wanted = adapted.get_submodule(name).weight, other.get_submodule(name).weight
        assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max(), name


def test_the_report_warns_where_norms_and_biases_changed_too(base, tmp_path):
    """The shipped student was trained in all its weights; what it reports is the picture's true distance."""
    export = export_of("sd15", 999, tmp_path / "mine" / "export")
    folder = tmp_path / "lora"
    folder.mkdir()
    report = write_lora(export, base, "shapes:sd15", 0.99, folder)
    assert "98." in report
    assert "warning   that is another picture" in report


def test_what_is_no_difference_is_refused(student, base, tmp_path):
    export, _ = student
    unet = base.load_network()
    with pytest.raises(InputError, match="has the base's weights; there is nothing to write"):
        lora_of(unet, unet, 0.99)
    with pytest.raises(InputError, match="has other tensors than the student's"):
        lora_of(unet, load_space(WEIGHTS / "sd21").load_network(), 0.99)
    with pytest.raises(InputError, match="name --base"):
        find_base(export, None)
    with pytest.raises(InputError, match="nowhere does not exist"):
        find_base(export, "nowhere")
    with pytest.raises(InputError, match="is a FluxPipeline, but a StableDiffusionPipeline or "):
        find_base(export, "shapes:flux")


def test_the_job_takes_the_base_of_the_run(run_script, tmp_path):
    export_of("sd21", 625, tmp_path / "mine" / "export")
    (tmp_path / "mine" / "config.yaml").write_text("student:\n  model: shapes:sd21\n")
    code, out, error = run_script("export", "mine", "--format", "lora", "--storage", tmp_path)
    assert code == 0, error
    folder = tmp_path / "mine" / "lora"
    assert {file.name for file in folder.iterdir()} == {FILE, "README.md", "scheduler"}
    assert "EulerDiscreteScheduler.from_pretrained" in (folder / "README.md").read_text()
    assert "checked   ranks" in out
