"""Fingerprints of models and of sets of pairs: what changes an answer shows, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from raydistill.data import pairs
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.storage.fingerprint import BLOCK_BYTES, SAMPLE_BYTES, WHOLE_BYTES, content_hash, fingerprint, identify


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(WEIGHTS / "sd15", tmp_path / "model")


def overwrite(file, at: int) -> None:
    with file.open("r+b") as data:
        data.seek(at)
        data.write(b"changed")


def test_every_byte_of_a_network_of_usual_size_counts(model):
    """Pieces spread over a file once missed half of the tensors."""
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    content, before = file.read_bytes(), fingerprint(model / "unet")
    for at in range(4096, len(content), len(content) // 40):
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([content[at] ^ 1]))
            stream.flush()
            assert fingerprint(model / "unet") != before, at
            stream.seek(at)
            stream.write(content[at : at + 1])
    assert fingerprint(model / "unet") == before


@pytest.mark.parametrize("name", ["unet.safetensors", "pytorch_model.bin", "unet.pt", "unet.pth", "merges.txt",
                                  "spiece.model", "chat_template.jinja", "vocab.json"])  # fmt: skip
def test_each_kind_of_file_that_a_model_is_read_from_counts_in_a_folder_and_alone(tmp_path, name):
    file = tmp_path / "model" / "part" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"before")
    before = fingerprint(tmp_path / "model"), fingerprint(file)
    file.write_bytes(b"after!")
    after = fingerprint(tmp_path / "model"), fingerprint(file)
    assert before[0] != after[0]
    assert before[1] != after[1]
    (tmp_path / "model" / "README.md").write_text("says more")
    assert fingerprint(tmp_path / "model") == after[0]


def test_of_a_large_file_each_mib_counts(tmp_path):
    """One of 24 GB takes seconds. A hole on the disk takes the place of the weights."""
    file = tmp_path / "weights.safetensors"
    with file.open("wb") as hole:
        hole.truncate(WHOLE_BYTES + BLOCK_BYTES * 7 // 2)
    before = fingerprint(file)
    places = [8, BLOCK_BYTES - 7, BLOCK_BYTES, WHOLE_BYTES - BLOCK_BYTES + SAMPLE_BYTES - 7, WHOLE_BYTES]
    for at in places:
        overwrite(file, at)
        assert fingerprint(file) != before, at
        with file.open("r+b") as hole:
            hole.seek(at)
            hole.write(bytes(7))
        assert fingerprint(file) == before
    os.truncate(file, file.stat().st_size - 1)
    assert fingerprint(file) != before


def test_what_no_space_loads_does_not_count(model):
    """Parts of the whole pipeline, weights of other tools beside it, and parts that the index does not name."""
    before = fingerprint(model, ("safety_checker",))
    for name in ("unet_ema/old.safetensors", "safety_checker/model.safetensors", "v1-5-pruned.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"other")
    index = model / "model_index.json"
    text = index.read_text()
    index.write_text(json.dumps(json.loads(text) | {"safety_checker": ["diffusers", "Checker"]}))
    assert fingerprint(model, ("safety_checker",)) != before, "the index counts"
    index.write_text(text)
    assert fingerprint(model, ("safety_checker",)) == before
    (model / "unet" / "more.safetensors").write_bytes(b"other")
    assert fingerprint(model, ("safety_checker",)) != before


@pytest.mark.parametrize("of", [fingerprint, identify, content_hash])
def test_links_that_lead_nowhere_or_upwards_and_folders_named_like_files_do_no_harm(model, of):
    before = of(model)
    for part in ("unet", "safety_checker"):
        (model / part).mkdir(exist_ok=True)
        (model / part / "old.safetensors").symlink_to(model / "gone")
        (model / part / "upwards").symlink_to(model)
        (model / part / "d.json").mkdir()
    assert of(model) == before


@pytest.mark.parametrize("of", [fingerprint, identify])
def test_a_file_that_cannot_be_read_is_named_in_one_line(model, of):
    file = model / "unet" / "more.safetensors"
    file.symlink_to("/proc/self/mem")  # is there, and each read fails
    with pytest.raises(InputError, match=rf"^{file} cannot be read: Input/output error$"):
        of(model)


def test_the_revisions_that_sets_of_pairs_have_kept_stay(tmp_path):
    """A changed revision would refuse to go on with a set that took weeks. Values of version 0.1."""
    model = tmp_path / "model"
    for name, content in {
        "model_index.json": b'{"_class_name": "X", "_diffusers_version": "0.1"}',
        "unet/config.json": b'{"b": 1, "a": [2]}',
        "unet/other.json": b'{"b": 1}',
        "unet/large.safetensors": bytes(range(256)) * 10000,
        "unet/.hidden/x.json": b"1",
        "vae/small.safetensors": b"small",
        "vae/w.bin": b"b",
    }.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    (model / "alias").symlink_to(model / "vae")
    assert identify(model) == ("model", "95db3439e2751481")
    assert identify(WEIGHTS / "flux")[1] == "5780e37ec268f3d1"
    assert identify(WEIGHTS / "sd15")[1] == "a395fd43b2fb85ee"


# -- sets of pairs ------------------------------------------------------------------------------------------


def write(folder, shard, seed, prompts=("a", "b")):
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    numbers = range(len(prompts))
    pairs.write_pairs(
        folder, shard, prompts=prompts, prompt_ids=numbers, seeds=numbers, z_teacher=latents, z_student=latents
    )


def test_a_set_is_known_by_its_shards_of_which_only_the_ends_are_read(tmp_path, monkeypatch):
    for shard in range(3):
        write(tmp_path / "set", shard, shard)
    before = pairs.fingerprint(tmp_path / "set")
    assert pairs.fingerprint(shutil.copytree(tmp_path / "set", tmp_path / "copy")) == before
    (tmp_path / "set" / "README.md").write_text("says more")
    (tmp_path / "set" / ".new.pairs-00003.parquet").write_bytes(b"being written")
    assert pairs.fingerprint(tmp_path / "set") == before
    seen = {before}
    write(tmp_path / "set", 1, 7)  # other latents
    seen.add(pairs.fingerprint(tmp_path / "set"))
    write(tmp_path / "set", 1, 1, ("a", "c"))
    seen.add(pairs.fingerprint(tmp_path / "set"))
    write(tmp_path / "set", 1, 1)
    assert pairs.fingerprint(tmp_path / "set") == before
    write(tmp_path / "set", 3, 3)
    seen.add(pairs.fingerprint(tmp_path / "set"))
    assert len(seen) == 4
    monkeypatch.setattr(pairs, "END_BYTES", 64)  # less than the footer, which is then read as long as it is
    ends = pairs.fingerprint(tmp_path / "set")
    write(tmp_path / "set", 1, 7)
    assert pairs.fingerprint(tmp_path / "set") != ends


def test_of_a_large_shard_the_footer_is_read_and_no_more(tmp_path):
    """Sets have thousands of shards of 100 MB, on network file systems."""
    write(tmp_path, 0, 0)
    file = pairs.shard_file(tmp_path, 0)
    end = file.read_bytes()
    with file.open("wb") as hole:  # a terabyte, of which a hole on the disk takes the place
        hole.seek(1 << 40)
        hole.write(end)
    before = pairs.fingerprint(tmp_path)
    overwrite(file, (1 << 40) + len(end) - 20)
    assert pairs.fingerprint(tmp_path) != before


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    file = pairs.shard_file(tmp_path, 0)
    file.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"^{file} cannot be read: No such file"):
        pairs.fingerprint(tmp_path)
