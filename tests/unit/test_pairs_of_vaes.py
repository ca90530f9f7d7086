"""Sets of pairs say by which VAEs they were encoded, and are refused for others; latents in bfloat16."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from pair_sets import write_upscaled
from safetensors.torch import load_file, save_file

from raydistill.config.reading import load
from raydistill.data import synthesis
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.pairs import VAES, PairSet, open_pairs, shard_file, write_pairs
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import Recipe
from raydistill.data.vae import PairEncoder
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError, StageFailed
from raydistill.spaces import load_space
from raydistill.spaces.loaded import vae_fingerprint

PROMPTS = PromptSet(["a red circle", "a blue square", "a green triangle"], ids=[3, 4, 9])


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def local(spaces):
    return LocalTeacher(spaces[0], spaces[0].load_network())


def other_vae(space, folder):
    """The same model with one number of its VAE moved: no shape tells them apart."""
    shutil.copytree(space.folder, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"][0] += 0.5
    save_file(weights, file)
    return load_space(folder)


@pytest.fixture(scope="module")
def others(spaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    return other_vae(spaces[0], folder / "teacher"), other_vae(spaces[1], folder / "student")


def make(local, spaces, folder, count=3, **more):
    recipe = Recipe(
        teacher=spaces[0], student=spaces[1], source=PROMPTS, count=count, batch_size=2, shard_size=2, seed=5, steps=2,
        **more,
    )  # fmt: skip
    synthesis.synthesise(recipe, folder, local)
    return folder


@pytest.fixture(scope="module")
def pairs(local, spaces, tmp_path_factory):
    return make(local, spaces, tmp_path_factory.mktemp("pairs"))


def test_pairs_are_of_the_vaes_that_encoded_them(pairs, spaces, others):
    teacher, student = spaces
    assert open_pairs(pairs, teacher, student).vaes == {
        "teacher": {vae_fingerprint(teacher): shard_file(pairs, 0)},
        "student": {vae_fingerprint(student): shard_file(pairs, 0)},
    }
    for role, column, pair in (("teacher", "z_T", (others[0], student)), ("student", "z_S", (teacher, others[1]))):
        said = rf"pairs-00000\.parquet: column {column} was encoded by another VAE \(sha256 [0-9a-f]{{12}}…\) than the {role}'s"
        with pytest.raises(InputError, match=said):
            open_pairs(pairs, *pair)
    assert open_pairs(pairs, teacher, student).silent == 0
    open_pairs(pairs, teacher)  # a discriminator has no use for the student's side


def test_one_foreign_shard_is_found_among_others(pairs, spaces, others, tmp_path):
    shutil.copytree(pairs, tmp_path / "set")
    rows = PairSet(pairs).rows([0, 1])
    write_pairs(
        tmp_path / "set", 7, prompts=rows.prompts, prompt_ids=rows.prompt_ids, seeds=rows.seeds, z_teacher=rows.z_teacher,
        z_student=rows.z_student, vaes={"teacher": vae_fingerprint(others[0])},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"pairs-00007\.parquet: column z_T was encoded by another VAE"):
        open_pairs(tmp_path / "set", *spaces)


def test_sets_that_say_nothing_are_taken_by_their_shape(spaces, others, tmp_path):
    folder = write_upscaled(tmp_path)
    assert len(open_pairs(folder, *spaces)) == len(open_pairs(folder, *others)) == 24


@pytest.mark.parametrize("key", ["bridge.pairs", "discriminator.real_data"])
def test_a_configuration_with_pairs_of_another_vae_is_refused_by_key(local, spaces, others, pairs, tmp_path, key):
    overrides = [f"storage={tmp_path}", "student.unet=null", f"student.model={spaces[1].folder}", f"{key}={pairs}"]
    overrides += ["bridge.checkpoint=null", "evaluation.judge=null"]
    with pytest.raises(InputError, match=rf"^{key}: .*pairs-00000\.parquet: column z_T was encoded by another VAE"):
        check_inputs(load(overrides=[*overrides, f"teacher.model={others[0].folder}"]))


def test_rows_of_another_vae_are_not_mixed_into_a_set(local, spaces, others, pairs, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "set")
    with pytest.raises(InputError, match=r"student_vae was '[0-9a-f]+…, now '[0-9a-f]+…"):
        make(local, (spaces[0], others[1]), folder, count=5)
    settings = json.loads((folder / "synthesis.json").read_text())
    for key in ("teacher_vae", "student_vae", "dtype"):  # as an earlier version began it
        del settings[key]
    (folder / "synthesis.json").write_text(json.dumps(settings))
    file = shard_file(folder, 0)
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    make(local, spaces, folder, count=5)
    assert len(open_pairs(folder, *spaces)) == 5
    assert VAES not in (pq.read_schema(file).metadata or {})
    with pytest.raises(InputError, match="dtype was 'float16', now 'bfloat16'"):
        make(local, spaces, folder, count=7, dtype="bfloat16")


def test_bfloat16_keeps_what_float16_cannot_hold_in_less_room(local, spaces, pairs, tmp_path, monkeypatch):
    half = PairSet(pairs).rows(range(3))
    kept = make(local, spaces, tmp_path / "bfloat16", dtype="bfloat16")
    rows = open_pairs(kept, *spaces).rows(range(3))
    assert rows.z_teacher.dtype == rows.z_student.dtype == torch.bfloat16
    torch.testing.assert_close(rows.z_teacher.float(), half.z_teacher.float(), rtol=2**-8, atol=1e-6)

    encode = PairEncoder.encode
    monkeypatch.setattr(
        PairEncoder, "encode", lambda *a: tuple(x * 1e6 if n == 0 else x for n, x in enumerate(encode(*a)))
    )
    large = make(local, spaces, tmp_path / "large", dtype="bfloat16")
    assert PairSet(large).rows([0]).z_teacher.float().abs().max() > 65504
    with pytest.raises(StageFailed, match="not finite in float16"):
        make(local, spaces, tmp_path / "overflow")

    normal = torch.randn(16, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for dtype in (torch.float16, torch.bfloat16):
        z = normal.to(dtype)
        count = range(len(z))
        file = write_pairs(
            tmp_path / str(dtype), 0, prompts=["x"] * len(z), prompt_ids=count, seeds=count, z_teacher=z, z_student=z
        )
        assert torch.equal(PairSet(tmp_path / str(dtype)).rows([3, 1]).z_teacher, z[[3, 1]])
        sizes[dtype] = file.stat().st_size / (2 * z.numel())
    assert sizes[torch.float16] < 1.8
    assert sizes[torch.bfloat16] < 0.85 * sizes[torch.float16]


def test_shards_of_both_kinds_of_number_are_no_set(local, spaces, pairs, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "set")
    kept = make(local, spaces, tmp_path / "bfloat16", dtype="bfloat16")
    shutil.copy(shard_file(kept, 0), shard_file(folder, 5))
    with pytest.raises(InputError, match=r"pairs-00005\.parquet: column z_T holds uint16, others of the set do not"):
        PairSet(folder)
