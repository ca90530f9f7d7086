"""The mean of students: its numbers against float64, what is refused and how it is named, memory, provenance."""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lanes import full_but
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raydistill.errors import InputError
from raydistill.export.merge import Source, merge_students, open_sources, read_provenance, shares_of, weighted_mean
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.export.tensors import write_safetensors
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.spaces.weights import Entry, read_header

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
TEACHERS = (
    ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=120, run_id="run-one"),
    ModelCard(
        teacher="stabilityai/stable-diffusion-3.5-medium",
        teacher_class="StableDiffusion3Pipeline",
        student="shapes:sd15",
        steps=300,
        run_id="run-two",
    ),
    ModelCard(teacher="org/a|b", teacher_class="SomebodysPipeline", student="shapes:sd15", steps=7),
)


def student(space, seed: int) -> UNet2DConditionModel:
    """A student of the family with weights of its own."""
    unet = space.load_network()
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def space(sd_folder):
    return load_space(sd_folder)


@pytest.fixture(scope="module")
def students(space):
    return [student(space, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def exports(space, students, tmp_path_factory):
    """Start timestep -> three float32 exports; "half" -> three float16 ones."""
    root = tmp_path_factory.mktemp("merge")
    kinds = {999: (999, torch.float32), 625: (625, torch.float32), "half": (999, torch.float16)}
    return {
        kind: [
            Export(export_student(space, unet, start, root / f"{kind}-{i}", TEACHERS[i], dtype), f"{kind}-{i}")
            for i, unet in enumerate(students)
        ]
        for kind, (start, dtype) in kinds.items()
    }


@pytest.fixture
def job(run_script):
    """`job(*arguments)` -> (exit code, stdout, stderr) of jobs/merge.py."""
    return partial(run_script, "merge")


def altered(export: Export, target: Path) -> Export:
    """A copy of an export that a test may change."""
    return Export(shutil.copytree(export.folder, target), target.name)


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("kind", full_but([999, 625], 999))
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_the_mean_is_the_float64_mean_and_draws_its_x0(kind, weights, space, students, exports, tmp_path):
    """diffusers' own loader reads it; its one step is our x_0 of a UNet with the averaged weights."""
    merge_students(open_sources(exports[kind]), shares_of(weights, 3), tmp_path / "mean")
    shares = [w / 8 for w in weights] if weights else [1 / 3] * 3
    states = [unet.state_dict() for unet in students]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "mean", use_safetensors=True)
    written = pipe.unet.state_dict()
    assert list(written) == list(states[0])
    for name, tensor in written.items():
        wanted = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        assert torch.equal(tensor, wanted.float()), name
        assert any(not torch.equal(tensor, state[name]) for state in states), name
    unet, prompts = space.load_network(), ["a red circle", "two blue squares"]
    unet.load_state_dict(written)
    noise = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = one_step_x0(space, unet, noise, space.encode_prompts(space.load_text(), prompts), kind)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent").images
    assert (ours - theirs).abs().max() <= 2e-5 * ours.abs().max()


def test_a_half_precision_mean_is_rounded_once(exports, tmp_path):
    merge_students(open_sources(exports["half"]), shares_of(None, 3), tmp_path / "mean")
    states = [load_file(export.folder / WEIGHTS) for export in exports["half"]]
    written = load_file(tmp_path / "mean" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    for name, tensor in written.items():
        assert torch.equal(tensor, (sum(state[name].double() for state in states) / 3).half()), name


def test_equal_students_stay_as_they_are(exports, tmp_path):
    sources = exports["half"][:1] + [altered(exports["half"][0], tmp_path / f"copy{i}") for i in range(2)]
    merge_students(open_sources(sources), shares_of([0.1, 0.7, 3.3], 3), tmp_path / "mean")
    before, after = (load_file(folder / WEIGHTS) for folder in (sources[0].folder, tmp_path / "mean"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    files = {file.relative_to(sources[0].folder) for file in sources[0].folder.rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path / "mean") for file in (tmp_path / "mean").rglob("*") if file.is_file()} == files
    for file in files - {WEIGHTS, Path("README.md")}:
        assert (tmp_path / "mean" / file).read_bytes() == (sources[0].folder / file).read_bytes(), file


def test_precisions_and_shards_mix(students, exports, tmp_path):
    """A float32 first student, a half-precision second one in shards: the VAE and text encoder count as the same."""
    sharded = altered(exports["half"][1], tmp_path / "sharded")
    shutil.rmtree(sharded.folder / "unet")
    students[1].half().save_pretrained(sharded.folder / "unet", max_shard_size="300KB")
    students[1].load_state_dict(load_file(exports[999][1].folder / WEIGHTS))
    students[1].float()
    assert len(list((sharded.folder / "unet").glob("*.safetensors"))) > 2
    merge_students(open_sources([exports[999][0], sharded]), shares_of(None, 2), tmp_path / "mean")
    written = load_file(tmp_path / "mean" / WEIGHTS)
    one, two = load_file(exports[999][0].folder / WEIGHTS), load_file(exports["half"][1].folder / WEIGHTS)
    assert all(torch.equal(written[k], ((one[k].double() + two[k].double()) / 2).float()) for k in one)


def test_shares_are_scaled_to_one():
    assert shares_of(None, 4) == [0.25] * 4
    assert shares_of([3, 1], 2) == [0.75, 0.25]
    for weights, said in {
        (1.0,): "1 weights for 2 students",
        (1.0, 0.0): "weight 0.0: must be a positive number",
        (1.0, -2.0): "weight -2.0",
        (math.nan, 1.0): "weight nan",
        (math.inf, 1.0): "weight inf",
    }.items():
        with pytest.raises(InputError, match=said):
            shares_of(weights, 2)


def test_other_networks_are_refused_by_their_first_tensor(space, exports, tmp_path):
    def with_unet(name: str, **settings) -> Export:
        export = altered(exports[999][1], tmp_path / name)
        config = space.part_config("unet") | settings
        UNet2DConditionModel.from_config(config).save_pretrained(export.folder / "unet")
        return export

    wider = with_unet("wider")
    weights = load_file(wider.folder / WEIGHTS)
    first = "conv_in.weight"
    shape = list(weights[first].shape)
    weights[first] = torch.zeros(48, *shape[1:])
    weights["time_embedding.linear_1.weight"] = torch.zeros(2, 2)
    save_file(weights, wider.folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"conv_in\.weight has the shape \[48, 4, 3, 3\], not \[40, 4, 3, 3\]"):
        open_sources([exports[999][0], wider])
    with pytest.raises(InputError, match="attention_head_dim"):  # changes no shape
        open_sources([exports[999][0], with_unet("heads", attention_head_dim=8)])
    with pytest.raises(InputError, match="block_out_channels"):
        open_sources([exports[999][0], with_unet("widths", block_out_channels=(48, 72))])
    lacking = altered(exports[999][1], tmp_path / "lacking")
    weights = load_file(lacking.folder / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, lacking.folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"conv_out\.bias is missing"):
        open_sources([exports[999][0], lacking])


def test_other_starts_predictions_and_schedules_are_refused(exports, sd_folder, tmp_path):
    first = exports[999][0]
    with pytest.raises(InputError, match=r"625-1 starts at timestep 625, but .*999-0 at 999"):
        open_sources([first, exports[625][1]])
    for name, values, said in (
        ("v", {"prediction_type": "v_prediction"}, "prediction_type differs: 'v_prediction', not 'epsilon'"),
        ("betas", {"beta_end": 0.02}, "beta_end differs: 0.02, not 0.012"),
        ("euler", {"_class_name": "EulerDiscreteScheduler"}, "has the scheduler EulerDiscreteScheduler, but"),
    ):
        other = altered(exports[999][1], tmp_path / name)
        change_json(other.folder / "scheduler" / "scheduler_config.json", **values)
        with pytest.raises(InputError, match=said):
            open_sources([first, other])
    early = altered(exports[625][1], tmp_path / "early")
    file = early.folder / "scheduler" / "scheduler_config.json"
    betas = json.loads(file.read_text())["trained_betas"]
    change_json(file, trained_betas=[*betas[:-1], 0.5])
    with pytest.raises(InputError, match="trained_betas differs$"):
        open_sources([exports[625][0], early])
    with pytest.raises(InputError, match="not the export of a one-step student"):
        open_sources([first, Export(sd_folder, "multi-step")])


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_students_of_another_latent_space_or_text_encoder_are_refused(part, exports, tmp_path):
    other = altered(exports[999][1], tmp_path / "other")
    (file,) = (other.folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[3]
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"of another family than .*: {part}: {name} has other values"):
        open_sources([exports[999][0], other])


def test_one_student_or_the_same_twice_is_no_mean(exports, tmp_path):
    with pytest.raises(InputError, match="at least two"):
        open_sources(exports[999][:1])
    (tmp_path / "link").symlink_to(exports[999][0].folder)
    with pytest.raises(InputError, match="named more than once"):
        open_sources([exports[999][0], Export(tmp_path / "link", "link")])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_end_the_merge_without_a_trace(value, exports, tmp_path):
    broken = altered(exports[999][1], tmp_path / "broken")
    weights = load_file(broken.folder / WEIGHTS)
    weights["mid_block.resnets.0.conv1.weight"].view(-1)[-1] = value
    save_file(weights, broken.folder / WEIGHTS, {"format": "pt"})
    sources = open_sources([exports[999][0], broken])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"broken/unet/.*mid_block\.resnets\.0\.conv1\.weight holds NaN or infinity"):
        merge_students(sources, shares_of(None, 2), tmp_path / "mean")
    assert sorted(tmp_path.iterdir()) == before


def test_a_mean_too_large_for_its_dtype_is_refused(exports, tmp_path):
    large = altered(exports[999][1], tmp_path / "large")
    weights = load_file(large.folder / WEIGHTS)
    weights["conv_in.bias"][0] = 1e6
    save_file(weights, large.folder / WEIGHTS, {"format": "pt"})
    sources = open_sources([exports["half"][0], large])
    with pytest.raises(InputError, match=r"conv_in\.bias: the mean is not finite in torch.float16"):
        merge_students(sources, shares_of(None, 2), tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


# -- tensor by tensor ---------------------------------------------------------------------------------------


def test_the_written_file_is_a_safetensors_file(tmp_path):
    """Read back by the library: mixed dtypes, odd sizes, a number, names of any kind."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5, generator=generator).half(),
        "a.ä": torch.randn(2, 3, 7, generator=generator),
        "brain": torch.randn(1, 1, generator=generator).bfloat16(),
        "number": torch.tensor(2.5),
        "turned": torch.randn(4, 6, generator=generator).T,
        "none": torch.zeros(0, 3),
    }
    entries = {k: Entry(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}
    asked = []
    write_safetensors(tmp_path / "x.safetensors", entries, lambda name: (asked.append(name), tensors[name])[1])
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[k].dtype == v.dtype and torch.equal(read[k], v) for k, v in tensors.items())
    assert sorted(asked) == sorted(tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="was announced"):
        write_safetensors(tmp_path / "y.safetensors", entries, lambda name: tensors[name].double())


def memory_kib(key: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_the_mean_of_a_tensor_is_the_same_in_pieces(piece, tmp_path, monkeypatch):
    """Also of a number and of nothing."""
    monkeypatch.setattr("raydistill.export.merge.PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "x": torch.randn(3, 5, generator=generator).half(),
            "number": torch.tensor(float(i)),
            "none": torch.zeros(0, 2),
        }
        for i in range(2)
    ]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    for name in states[0]:
        one, two = (state[name].double() for state in states)
        assert torch.equal(weighted_mean(name, files, [0.25, 0.75], torch.float32), (one / 4 + two * 0.75).float())


def test_memory_does_not_grow_with_the_model(exports, space, tmp_path):
    """Two students of 200 MB in 96 tensors: a few tensors in float64 are needed, not a third of one student."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("needs Linux's /proc/self/clear_refs to measure the peak")
    entries = {f"t{i}": Entry((512, 1024), "float32") for i in range(96)}
    folders = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        value = torch.full((512, 1024), float(number))
        write_safetensors(folder / WEIGHTS.name, entries, lambda name, value=value: value)
    family = exports[999][0].folder
    sources = []
    for folder in folders:
        tensors = {name: (folder / WEIGHTS.name, entry) for name, entry in entries.items()}
        sources.append(Source(Export(family, folder.name), load_space(family), 999, 1, tensors))
    gc.collect()
    reset.write_text("5")  # the most so far becomes what is used now
    before = memory_kib("VmRSS")
    merge_students(sources, [0.5, 0.5], tmp_path / "mean")
    assert memory_kib("VmHWM") - before < 64 * 1024  # the process has other uses too
    file = tmp_path / "mean" / WEIGHTS
    assert file.stat().st_size > 200e6
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("t95").eq(0.5).all()


# -- provenance -----------------------------------------------------------------------------------------------


def test_the_card_names_every_source_weight_teacher_and_licence(exports, tmp_path):
    sources = open_sources(exports[999])
    merge_students(sources, shares_of([1, 1, 2], 3), tmp_path / "mean")
    text = (tmp_path / "mean" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "several, see below")
    for value in (
        "### 999-0", "### 999-2", "| Weight | 0.25 |", "| Weight | 0.5 |", "run-one", "run-two", "Start timestep | 999",
        "shapes:flux; stabilityai/stable-diffusion-3.5-medium; org/a&#124;b", "num_inference_steps=1, guidance_scale=0",
        "the project's own licence", "Stability AI Community License", "- Teacher, org/a|b: unknown.",
        "- Student base, shapes:sd15: the project's own licence.", "torch.float32",
    ):  # fmt: skip
        assert value in text, value
    assert text.count("- Student base,") == 1
    sums = subprocess.run(
        ["sha256sum", *(str(e.folder / WEIGHTS) for e in exports[999])], capture_output=True, text=True, check=True
    )
    assert all(line.split()[0] in text for line in sums.stdout.splitlines())
    assert str(tmp_path) not in text
    assert str(exports[999][0].folder) not in text


def test_one_licence_stays_and_a_mean_of_means_keeps_all_terms(space, students, exports, tmp_path):
    twin = Export(export_student(space, students[1], 999, tmp_path / "twin", TEACHERS[0], torch.float32), "twin")
    merge_students(open_sources([exports[999][0], twin]), [0.5, 0.5], tmp_path / "own")
    assert read_provenance(tmp_path / "own").licence_name == "the project's own licence"
    merge_students(open_sources([Export(tmp_path / "own", "own"), exports[999][1]]), [0.5, 0.5], tmp_path / "both")
    card = read_provenance(tmp_path / "both")
    assert card.facts["Teacher"] == "shapes:flux; stabilityai/stable-diffusion-3.5-medium"
    assert [line.split(": ")[0] for line in card.terms] == [
        "- Teacher, shapes:flux", "- Student base, shapes:sd15", "- Teacher, stabilityai/stable-diffusion-3.5-medium",
    ]  # fmt: skip


@pytest.mark.parametrize("card", [None, "", "---\nlicense: [\n---\n", "---\n- a\n---\n## Licence\n", "\xff"])
def test_a_source_without_a_readable_card_has_unknown_terms(card, exports, tmp_path):
    other = altered(exports[999][1], tmp_path / "other")
    (other.folder / "README.md").unlink()
    if card is not None:
        (other.folder / "README.md").write_bytes(card.encode("latin-1"))
    merge_students(open_sources([exports[999][0], other]), [0.5, 0.5], tmp_path / "mean")
    text = (tmp_path / "mean" / "README.md").read_text()
    assert "- other: terms unknown" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
    assert "| Teacher | shapes:flux; unknown |" in text


# -- the job --------------------------------------------------------------------------------------------------


def test_the_job_merges_runs_and_the_result_draws(job, exports, tmp_path):
    for number, name in enumerate(("from-flux", "from-sd3")):
        shutil.copytree(exports["half"][number].folder, tmp_path / name / "export")
        (tmp_path / name / "config.yaml").touch()
    target = tmp_path / "new" / "mean"
    code, out, _ = job("from-flux", "from-sd3", "--weights", 3, 1, "--storage", tmp_path, "--out", target)
    assert code == 0
    assert "source    0.7500" in out
    assert str(target) in out
    assert "### from-sd3" in (target / "README.md").read_text()
    pipe = StableDiffusionPipeline.from_pretrained(target, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red circle", num_inference_steps=1, guidance_scale=0, output_type="pt").images
    assert images.isfinite().all()
    assert images.std() > 0.01


def test_wrong_input_ends_with_code_two_and_writes_nothing(job, exports, tmp_path):
    one, two, _ = (export.folder for export in exports[999])
    cases = [
        ((one,), "at least two"),
        ((one, "nowhere"), "nowhere: no such folder, and no run of that name"),
        ((one, two, "--weights", 1), "1 weights for 2 students"),
        ((one, two, "--weights", 1, "nan"), "weight nan: must be a positive number"),
        ((one, two, "--weights", "x", 1), "invalid float value: 'x'"),
        ((one, exports[625][1].folder), "starts at timestep 625"),
        ((one, two, "--out", one), "exists already"),
    ]
    for arguments, said in cases:
        code, out, error = job(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "mean")))
        assert code == 2, arguments
        assert said in error, (arguments, error)
        assert list(tmp_path.iterdir()) == []
    assert job(one, two)[0] == 2  # --out is required


def test_a_source_is_checked_without_its_unets_weights(exports, tmp_path):
    """A UNet of NaN passes the check, which reads names and shapes alone, and is found when it is averaged."""
    other = altered(exports[999][1], tmp_path / "other")
    weights = load_file(other.folder / WEIGHTS)
    save_file({k: torch.full_like(v, math.nan) for k, v in weights.items()}, other.folder / WEIGHTS, {"format": "pt"})
    sources = open_sources([exports[999][0], other])
    assert isinstance(sources[1], Source)
    assert sources[1].tensors.keys() == read_header(exports[999][0].folder / WEIGHTS).tensors.keys()
