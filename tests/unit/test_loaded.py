"""One network in many files: VAEs and text encoders are compared and hashed by what their modules hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from lanes import full_but
from safetensors.torch import load_file, save_file

from raydistill.bridge.model import Bridge, check_pair
from raydistill.config.networks import BridgeConfig
from raydistill.errors import InputError
from raydistill.export.merge import merge_students, open_sources
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.export.tensors import first_difference
from raydistill.export.upgrade import find_upgrade
from raydistill.spaces import load_space
from raydistill.spaces.loaded import has_vae, vae_fingerprint

CARD = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
TINY = BridgeConfig(projector="mlp", embed_dim=8)
VAE, TEXT = Path("vae/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def rewrite(file: Path, change) -> None:
    """Write a file's tensors again, as `change` returns them."""
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file, {"format": "pt"})


def older(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE's attention as diffusers named it in 2022."""
    renamed = dict(weights)
    for new, old in OLDER.items():
        for name in [name for name in renamed if f".{new}." in name]:
            renamed[name.replace(f".{new}.", f".{old}.")] = renamed.pop(name)
    assert any(".proj_attn." in name for name in renamed)
    return renamed


def in_shards(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    (folder / VAE).unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="200KB")
    assert len(list((folder / "vae").glob("*-of-*.safetensors"))) > 1


DISGUISES = {
    "fp16 in names": lambda folder: [
        file.rename(file.with_name(file.name.replace(".safe", ".fp16.safe"))) for file in (folder / VAE, folder / TEXT)
    ],
    "old attention names": lambda folder: rewrite(folder / VAE, older),
    "shards": in_shards,
    "a tensor that no module keeps": lambda folder: rewrite(
        folder / VAE, lambda weights: weights | {"loss.logvar": torch.zeros(())}
    ),
    "position_ids": lambda folder: rewrite(
        folder / TEXT, lambda weights: weights | {"embeddings.position_ids": torch.arange(77)[None]}
    ),
    "text_model.": lambda folder: rewrite(
        folder / TEXT, lambda weights: {f"text_model.{name}": value for name, value in weights.items()}
    ),
    "text_model. and position_ids": lambda folder: rewrite(
        folder / TEXT,
        lambda weights: (
            {f"text_model.{name}": value for name, value in weights.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        ),
    ),
}
OF_VAE = ("old attention names", "shards", "a tensor that no module keeps")


@pytest.fixture(scope="module")
def exports(sd_folder, tmp_path_factory) -> list[Export]:
    """Two one-step students of one base."""
    root, space = tmp_path_factory.mktemp("held"), load_space(sd_folder)
    folders = [export_student(space, space.load_network(), 999, root / n, CARD, torch.float32) for n in ("a", "b")]
    return [Export(folder, folder.name) for folder in folders]


@pytest.fixture(scope="module")
def bridge(sd_folder, flux_folder, tmp_path_factory) -> Path:
    made = Bridge.create(load_space(sd_folder), load_space(flux_folder), TINY)
    return made.save(tmp_path_factory.mktemp("bridge") / "bridge")


@pytest.fixture
def disguised(tmp_path):
    """`disguised(folder, how)` -> a copy that says the same in other files."""

    def copy(folder: Path, how: str) -> Path:
        target = shutil.copytree(folder, tmp_path / f"{Path(folder).name}-{how}")
        DISGUISES[how](target)
        return target

    return copy


def hashed_before(folder: Path) -> str:
    """As the version before this test hashed a VAE: names and dtypes of its files."""
    config = json.loads((folder / "vae/config.json").read_text())
    digest = hashlib.sha256(json.dumps([config.get(key) for key in ("scaling_factor", "shift_factor")]).encode())
    weights = {k: v for file in (folder / "vae").glob("*.safetensors") for k, v in load_file(file).items()}
    for name in sorted(weights):
        value = weights[name]
        digest.update(
            f"{name}|{value.dtype}|{tuple(value.shape)}|".encode() + value.flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


@pytest.mark.parametrize("how", full_but(DISGUISES, "text_model. and position_ids", "old attention names"))
def test_siblings_in_other_files_are_merged(how, exports, disguised, tmp_path):
    other = disguised(exports[1].folder, how)
    sources = open_sources([exports[0], Export(other, "b")])
    merge_students(sources, [0.5, 0.5], tmp_path / "mean")
    merge_students(sources[::-1], [0.5, 0.5], tmp_path / "back")
    mean, back = (load_space(tmp_path / name) for name in ("mean", "back"))
    assert first_difference(mean, back, "vae") is first_difference(mean, back, "text_encoder") is None


@pytest.mark.parametrize("how", OF_VAE)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_bridge_takes_its_vaes_in_other_files(how, role, bridge, sd_folder, flux_folder, disguised):
    folders = {"student": sd_folder, "teacher": flux_folder}
    other = disguised(folders[role], how)
    assert vae_fingerprint(load_space(other)) == vae_fingerprint(load_space(folders[role]))
    pair = folders | {role: other}
    Bridge.load(bridge, load_space(pair["student"]), load_space(pair["teacher"]))


@pytest.mark.parametrize("how", OF_VAE)
def test_an_export_upgrades_with_a_base_in_other_files(how, bridge, flux_folder, sd_folder, disguised, exports):
    base = disguised(sd_folder, how)
    assert find_upgrade(exports[0], str(bridge), str(flux_folder), str(base)).base.folder == str(base)


def test_a_half_precision_export_of_an_old_base_upgrades(bridge, flux_folder, sd_folder, disguised, tmp_path):
    base = disguised(sd_folder, "old attention names")
    space = load_space(base)
    folder = export_student(space, space.load_network(), 999, tmp_path / "half", CARD, torch.float16)
    assert find_upgrade(Export(folder, "half"), str(bridge), str(flux_folder), str(base)).base.folder == str(base)


@pytest.mark.parametrize("before", [None, *OF_VAE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bridge_of_the_version_before_stays_valid(before, dtype, bridge, sd_folder, flux_folder, tmp_path):
    """Also where its VAE now lies in files of the present names, and wider ones."""
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    rewrite(folder / VAE, lambda weights: {name: value.to(dtype) for name, value in weights.items()})
    now = shutil.copytree(folder, tmp_path / "now")
    rewrite(now / VAE, lambda weights: {name: value.float() for name, value in weights.items()})
    if before is not None:
        DISGUISES[before](folder)
    old = shutil.copytree(bridge, tmp_path / "old") / "bridge.json"
    saved = json.loads(old.read_text())
    saved["student"]["vae_sha256"] = hashed_before(folder)
    old.write_text(json.dumps(saved))
    teacher = load_space(flux_folder)
    check_pair(old.parent, load_space(folder), teacher)
    if before != "a tensor that no module keeps":  # which nobody can know of
        check_pair(old.parent, load_space(now), teacher)
    assert vae_fingerprint(load_space(now)) == vae_fingerprint(load_space(folder))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("before", [{"shift_factor": 0.0}, {"shift_factor": None}, {"shift_factor": 0}, {}], ids=str)
@pytest.mark.parametrize("now", [{"shift_factor": 0.0}, {"shift_factor": None}, {}], ids=str)
def test_no_shift_may_be_written_in_any_way(before, now, role, bridge, sd_folder, flux_folder, tmp_path):
    """Also a scale of 1, as a whole number or not."""
    folders = {"student": sd_folder, "teacher": flux_folder}
    file, hashed = Path("vae/config.json"), {}
    for name, keys, one in (("before", before, 1), ("now", now, 1.0)):
        folder = shutil.copytree(folders[role], tmp_path / name)
        config = {k: v for k, v in json.loads((folder / file).read_text()).items() if k != "shift_factor"}
        (folder / file).write_text(json.dumps(config | keys | {"scaling_factor": one}))
        hashed[name] = hashed_before(folder)
    assert has_vae(load_space(tmp_path / "now"), hashed["before"])
    old = shutil.copytree(bridge, tmp_path / "bridge") / "bridge.json"
    saved = json.loads(old.read_text())
    saved[role]["vae_sha256"] = hashed["before"]
    old.write_text(json.dumps(saved))
    pair = folders | {role: tmp_path / "now"}
    check_pair(old.parent, load_space(pair["student"]), load_space(pair["teacher"]))
    (folder / file).write_text(json.dumps(config | {"shift_factor": 0.5, "scaling_factor": 1.0}))
    assert not has_vae(load_space(folder), hashed["before"])


def test_a_present_hash_is_that_of_the_version_before(sd_folder, flux_folder):
    """Of a folder in present names: Bridges made now are read there, and shipped ones here."""
    for folder in (sd_folder, flux_folder):
        assert vae_fingerprint(load_space(folder)) == hashed_before(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_values_shapes_and_scalings_are_told(part, exports, bridge, sd_folder, flux_folder, tmp_path):
    """The first tensor that differs is named, by the module's own name."""
    one = load_space(exports[0].folder)
    file = {"vae": VAE, "text_encoder": TEXT}[part]
    other = shutil.copytree(exports[1].folder, tmp_path / "other")
    name = max(load_file(other / file), key=lambda name: "attentions.0.to_q.weight" in name or "q_proj.weight" in name)
    assert "q" in name

    def moved(weights):
        return weights | {name: weights[name] + 1e-3}

    rewrite(other / file, moved)
    said = f"{name} has other values in {exports[0].folder / part} than in {other / part}"
    assert first_difference(one, load_space(other), part) == said
    with pytest.raises(InputError, match=f"is of another family than .*{part}: .*has other values"):
        open_sources([exports[0], Export(other, "other")])
    if part == "vae":
        rewrite(other / file, older)
        assert first_difference(one, load_space(other), part) == said
        assert not has_vae(load_space(other), vae_fingerprint(one))
        with pytest.raises(InputError, match="its VAE is not that of .*has other values"):
            find_upgrade(Export(other, "other"), str(bridge), str(flux_folder), str(sd_folder))


def test_half_precision_copies_are_the_same_and_others_are_not(exports, tmp_path):
    one, parts = load_space(exports[0].folder), ("vae", "text_encoder")

    def copied(name: str, change) -> bool:
        folder = shutil.copytree(exports[0].folder, tmp_path / name)
        for file in (VAE, TEXT):
            rewrite(folder / file, lambda weights: {k: change(v) for k, v in weights.items()})
        other = load_space(folder)
        found = {first_difference(*pair, part) is None for pair in ((one, other), (other, one)) for part in parts}
        assert len(found) == 1
        return found.pop()

    assert copied("half", torch.Tensor.half)
    assert copied("bfloat", torch.Tensor.bfloat16)
    assert not copied("moved", lambda value: value + 1e-6)
    assert not copied("half and moved", lambda value: (value + 2e-3).half())


@pytest.mark.full
def test_the_jobs_take_an_old_base(run_script, exports, bridge, sd_folder, flux_folder, disguised, tmp_path):
    base, sibling = disguised(sd_folder, "old attention names"), disguised(exports[1].folder, "position_ids")
    upgrade = ("--upgrade", "--bridge", bridge, "--teacher", flux_folder, "--base", base)
    code, out, error = run_script(
        "sample", exports[0].folder, "--prompt", "a", *upgrade, "--out", tmp_path / "pictures"
    )
    assert (code, "1 of 64 px" in out) == (0, True), error
    code, _, error = run_script("merge", exports[0].folder, sibling, "--out", tmp_path / "mean")
    assert code == 0, error
