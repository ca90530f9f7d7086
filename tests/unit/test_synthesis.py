"""Sets of teacher samples: both latents describe one picture, no interruption or order of arrival changes a row, and
rows that fail are recorded."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_sets import load_pairs
from PIL import Image
from safetensors.torch import load_file, save_file

from raydistill.data import synthesis
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.pairs import PairSet, existing_shards, shard_file
from raydistill.data.prompts import PromptSet
from raydistill.data.shards import Request, changed_share
from raydistill.data.synthesis import AskedRows, Recipe, TeacherAsker, encode_rows
from raydistill.data.vae import PairEncoder, resized
from raydistill.diffusion.noise import normal, uniform
from raydistill.errors import InputError, StageFailed
from raydistill.pictures.augment import augmented
from raydistill.spaces import load_space
from raydistill.storage.fingerprint import identify

PROMPTS = PromptSet(["a red circle", "a blue square", "a green triangle"], ids=[3, 4, 9])
SETTINGS = {"batch_size": 2, "shard_size": 4, "steps": 2, "guidance_scale": 2.0, "seed": 5}


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def local(spaces):
    return LocalTeacher(spaces[0], spaces[0].load_network())


def synthesise(client, teacher, student, prompts, folder, *, forbidden=(), max_failed_rows=0, **numbers) -> int:
    told = Recipe(teacher=teacher, student=student, source=prompts, **numbers)
    return synthesis.synthesise(told, folder, client, forbidden=forbidden, max_failed_rows=max_failed_rows)


@pytest.fixture(scope="module")
def whole_folder(local, spaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert synthesise(local, *spaces, PROMPTS, folder, count=7, **SETTINGS) == 7
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder):
    return load_pairs(whole_folder)


def pillow_resized(images, pixels: int) -> torch.Tensor:
    """Pillow's antialiased bilinear resizing, in float."""
    planes = [
        Image.fromarray(p).resize((pixels, pixels), Image.Resampling.BILINEAR) for p in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes])).unflatten(0, images.shape[:2])


def same(a, b) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("prompt_ids", "seeds", "z_teacher", "z_student")
    )
    return tensors and a.prompts == b.prompts and a.previews == b.previews


class StopsAfter:
    """A teacher that goes away after a number of answers."""

    def __init__(self, teacher, answers: int) -> None:
        self.teacher, self.answers = teacher, answers

    def generate(self, *arguments):
        if self.answers == 0:
            raise ConnectionError("gone")
        self.answers -= 1
        return self.teacher.generate(*arguments)


def test_rows_of_a_guidance_of_zero_show_the_prompt(spaces, local, tmp_path):
    sets = []
    for scale, prompts in ((0.0, PROMPTS), (1.0, PROMPTS), (0.0, PromptSet([" "] * 3, ids=[3, 4, 9]))):
        folder = tmp_path / str(len(sets))
        synthesise(local, *spaces, prompts, folder, count=2, **SETTINGS | {"guidance_scale": scale})
        sets.append(load_pairs(folder))
    assert same(*sets[:2])
    assert not torch.equal(sets[0].z_teacher, sets[2].z_teacher)


def test_rows_hold_the_sampled_picture_in_both_spaces(whole, spaces, local):
    teacher, student = spaces
    assert len(whole) == 7
    assert set(whole.seeds.tolist()) == {5}
    ids, texts = PROMPTS.at(5, np.arange(7))
    assert whole.prompt_ids.tolist() == ids.tolist()
    assert whole.prompts == texts

    text = teacher.load_text()
    noise = normal(5, range(7), teacher.latent_shape, "synthesis")
    latents = teacher.sample(
        local.network, noise, teacher.encode_prompts(text, texts), teacher.encode_prompts(text, [""]), 2, 2.0
    )
    with torch.no_grad():
        images = teacher.decode(teacher.load_vae(), latents)
        z_teacher = teacher.encode(teacher.load_vae(), images)
        z_student = student.encode(student.load_vae(), pillow_resized(images, 32))
    torch.testing.assert_close(whole.z_teacher.float(), z_teacher, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(whole.z_student.float(), z_student, rtol=2e-3, atol=2e-3)


def test_preview_is_the_picture(whole, spaces, local):
    preview = Image.open(io.BytesIO(whole.previews[0]))
    assert preview.format == "PNG"
    assert preview.size == (64, 64)
    teacher, text = spaces[0], spaces[0].load_text()
    noise = normal(5, range(2), teacher.latent_shape, "synthesis")
    prompts, empty = teacher.encode_prompts(text, whole.prompts[:2]), teacher.encode_prompts(text, [""])
    with torch.no_grad():
        image = teacher.decode(teacher.load_vae(), local.generate(noise, prompts, empty, 2, 2.0).result())[0]
    pixels = (image.permute(1, 2, 0) + 1) * 127.5
    assert (torch.from_numpy(np.array(preview)).float() - pixels).abs().max() <= 1


def test_interrupted_set_goes_on_to_the_same_rows(whole, spaces, local, tmp_path):
    settings = SETTINGS | {"shard_size": 2}
    with pytest.raises(ConnectionError):
        synthesise(StopsAfter(local, 3), *spaces, PROMPTS, tmp_path, count=7, **settings)
    assert existing_shards(tmp_path) == [0]
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **settings) == 5
    assert same(load_pairs(tmp_path), whole)


def test_shards_that_are_there_are_not_made_again(whole, spaces, local, tmp_path):
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=4, **SETTINGS) == 4
    written = (tmp_path / "pairs-00000.parquet").stat().st_mtime_ns
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 3
    assert (tmp_path / "pairs-00000.parquet").stat().st_mtime_ns == written
    assert same(load_pairs(tmp_path), whole)
    assert synthesise(StopsAfter(local, 0), *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 0


def test_larger_count_completes_a_short_last_shard(whole, spaces, local, tmp_path):
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=5, **SETTINGS) == 5
    assert existing_shards(tmp_path) == [0, 1]
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 3
    assert same(load_pairs(tmp_path), whole)


def test_held_out_prompts_are_refused_before_anything_is_written(spaces, local, tmp_path):
    with pytest.raises(InputError, match="1 held-out prompts.*'a blue square'"):
        synthesise(local, *spaces, PROMPTS, tmp_path / "set", count=2, forbidden={"a blue square", "other"}, **SETTINGS)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("text", [None, '{"seed": ', "[1]"])
def test_shards_of_unknown_settings_are_not_continued(spaces, local, tmp_path, text):
    synthesise(local, *spaces, PROMPTS, tmp_path, count=1, **SETTINGS)
    (tmp_path / "synthesis.json").unlink()
    if text is not None:
        (tmp_path / "synthesis.json").write_text(text)
    with pytest.raises(InputError, match=r"synthesis\.json, which says how they were made, cannot be read"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS)


def test_rows_of_other_settings_are_not_mixed(spaces, local, tmp_path):
    synthesise(local, *spaces, PROMPTS, tmp_path, count=1, **SETTINGS)
    with pytest.raises(InputError, match="seed was 5, now 6"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS | {"seed": 6})
    with pytest.raises(InputError, match="prompts was"):
        synthesise(local, *spaces, PromptSet(["else"]), tmp_path, count=7, **SETTINGS)


def test_bits_of_a_row_do_not_depend_on_its_batch(spaces):
    encoder = PairEncoder(*spaces)
    latents = normal(0, range(11), spaces[0].latent_shape, "latents")
    z_teacher, z_student, pngs = encoder.encode(encoder.decode(latents))
    assert z_teacher.shape == latents.shape
    assert z_student.shape == (11, *spaces[1].latent_shape)
    alone = encoder.encode(encoder.decode(latents[9:]))
    assert torch.equal(z_teacher[9:], alone[0])
    assert torch.equal(z_student[9:], alone[1])
    assert pngs[9:] == alone[2]


def test_posterior_samples_are_the_rows_own_draws_around_the_mean(spaces):
    teacher, student = spaces
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = PairEncoder(teacher, student, posterior="sample", seed=8)
    z_teacher, z_student, _ = encoder.encode(pictures, [4, 0, 9])
    for space, images, z, purpose in (
        (teacher, pictures, z_teacher, "posterior_T"),
        (student, resized(pictures, 32), z_student, "posterior_S"),
    ):
        with torch.no_grad():
            posterior = space.load_vae().encode(images).latent_dist
        noise = normal(8, [4, 0, 9], space.latent_shape, purpose)
        expected = space.normalise(posterior.mean + posterior.logvar.mul(0.5).exp() * noise)
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(z, space.normalise(posterior.mean), atol=1e-2)
    again, _, _ = encoder.encode(pictures[1:2], [0])
    assert torch.equal(again[0], z_teacher[1])
    with pytest.raises(ValueError, match="rows must be given"):
        encoder.encode(pictures)


# -- changed pictures ---------------------------------------------------------------------------------------


CHANGED = SETTINGS | {"augment_share": 0.5}


@pytest.fixture(scope="module")
def changed(local, spaces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    synthesise(local, *spaces, PROMPTS, folder, count=7, **CHANGED)
    return load_pairs(folder)


def test_both_latents_of_a_changed_row_are_of_the_changed_picture_and_other_rows_stay(changed, whole, spaces, local):
    teacher, student = spaces
    rows = uniform(5, range(7), "augment").numpy() < 0.5
    assert 0 < rows.sum() < 7
    differs = [not torch.equal(a, b) for a, b in zip(changed.z_teacher, whole.z_teacher, strict=True)]
    assert differs == rows.tolist()
    assert (changed.prompts, changed.prompt_ids.tolist()) == (whole.prompts, whole.prompt_ids.tolist())
    told = recipe(spaces, 7)
    batches = [TeacherAsker(local, told).ask(Request(first, 1)).result() for first in np.flatnonzero(rows).tolist()]
    pictures = PairEncoder(*spaces).decode(torch.from_numpy(np.concatenate([batch["latents"] for batch in batches])))
    pictures = augmented(pictures, 5, np.flatnonzero(rows), 1.0)
    with torch.no_grad():
        z_teacher = teacher.encode(teacher.load_vae(), pictures)
        z_student = student.encode(student.load_vae(), resized(pictures, 32))
    torch.testing.assert_close(changed.z_teacher[rows].float(), z_teacher, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(changed.z_student[rows].float(), z_student, rtol=2e-3, atol=2e-3)


def test_changed_rows_survive_an_interruption_and_are_not_mixed_with_others(changed, spaces, local, tmp_path):
    settings = CHANGED | {"shard_size": 2}
    with pytest.raises(ConnectionError):
        synthesise(StopsAfter(local, 3), *spaces, PROMPTS, tmp_path, count=7, **settings)
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **settings) == 5
    assert same(load_pairs(tmp_path), changed)
    assert json.loads((tmp_path / "synthesis.json").read_text())["augment_share"] == changed_share(tmp_path) == 0.5
    with pytest.raises(InputError, match="augment_share was 0.5, now 0.0"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **settings | {"augment_share": 0.0})


def test_a_set_that_was_begun_before_pictures_could_be_changed_goes_on_unchanged(spaces, local, tmp_path):
    synthesise(local, *spaces, PROMPTS, tmp_path, count=4, **SETTINGS)
    file = tmp_path / "synthesis.json"
    written = json.loads(file.read_text())
    assert written.pop("augment_share") == 0.0
    file.write_text(json.dumps(written))
    assert changed_share(tmp_path) == 0.0
    with pytest.raises(InputError, match="augment_share was 0.0, now 0.5"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **CHANGED)
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 3


# -- order of arrival ---------------------------------------------------------------------------------------


def recipe(spaces, count, **changes) -> Recipe:
    return Recipe(teacher=spaces[0], student=spaces[1], source=PROMPTS, count=count, **SETTINGS | changes)


@pytest.fixture(scope="module")
def encoded(local, spaces, tmp_path_factory):
    """Encoded batches of rows 0 … 6, in order."""
    told = recipe(spaces, 7)
    asker, encoder = TeacherAsker(local, told), told.encoder("cpu")
    requests = told.writer(tmp_path_factory.mktemp("empty"), 0).requests(2)
    return [encode_rows(encoder, asker.ask(request).result()) for request in requests]


@pytest.mark.parametrize("seed", range(4))
def test_order_of_arrival_changes_no_byte(whole_folder, encoded, spaces, tmp_path, seed):
    writer = recipe(spaces, 7).writer(tmp_path, 0)
    batches = [split for batch in encoded for split in halves(batch)]
    random.Random(seed).shuffle(batches)
    written = [file.name for batch in batches for file in writer.add(batch)]
    writer.finish()
    assert sorted(written) == ["pairs-00000.parquet", "pairs-00001.parquet"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (whole_folder / name).read_bytes()


def halves(batch):
    return [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, None))]


def test_a_row_that_comes_twice_counts_once_and_a_missing_one_is_named(encoded, spaces, tmp_path):
    writer = recipe(spaces, 7).writer(tmp_path, 0)
    assert writer.add(encoded[0]) == writer.add(encoded[0]) == []
    assert (writer.done, writer.missing) == (2, 5)
    assert [file.name for file in writer.add(encoded[1])] == ["pairs-00000.parquet"]
    assert writer.add(encoded[1]) == []
    writer.add(encoded[3])
    with pytest.raises(StageFailed, match="2 rows were not made, the first of them row 4"):
        writer.finish()
    assert existing_shards(tmp_path) == [0]


def test_rows_say_where_they_come_from(whole_folder, spaces):
    table = pq.read_table(shard_file(whole_folder, 1))
    assert table["row"].to_pylist() == [4, 5, 6]
    name, revision = identify(spaces[0].folder)
    assert set(table["teacher"].to_pylist()) == {name}
    assert set(table["teacher_revision"].to_pylist()) == {revision}


# -- failures -----------------------------------------------------------------------------------------------


class Overflows:
    """A teacher whose pictures of some noises are not finite."""

    def __init__(self, teacher, rows) -> None:
        self.teacher = teacher
        self.noise = normal(5, rows, teacher.space.latent_shape, "synthesis")

    def generate(self, noise, *arguments):
        samples = self.teacher.generate(noise, *arguments)
        hit = torch.tensor([any(torch.equal(one, bad) for bad in self.noise) for one in noise])

        class Spoilt:
            def result(self, check_finite=True):
                latents = samples.result()
                latents[hit, 0, 0, 0] = float("nan")
                return latents

        return Spoilt()


def test_a_failed_rows_latents_are_zero_and_the_answer_itself_is_left_alone():
    """It may lie in the object store, where others read it."""
    answer = torch.ones(3, 1, 2, 2)
    answer[1, 0, 0, 0] = float("inf")
    before = answer.clone()
    samples = SimpleNamespace(result=lambda check_finite: answer)
    found = AskedRows(np.arange(3), samples, np.array(["", "", "no text"], dtype=object)).result()
    assert torch.equal(answer, before)
    assert found["failure"].tolist() == ["", "the teacher's sample is not finite", "no text"]
    assert found["latents"].reshape(3, -1).tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]


def test_a_set_that_was_begun_before_texts_had_a_dtype_goes_on_in_float32(spaces, local, tmp_path):
    synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS)
    file = tmp_path / "synthesis.json"
    written = json.loads(file.read_text())
    assert written.pop("text_dtype") == "float32"
    file.write_text(json.dumps(written))
    assert synthesise(local, *spaces, PROMPTS, tmp_path, count=7, **SETTINGS) == 0
    with pytest.raises(InputError, match="text_dtype was 'float32', now 'bfloat16'"):
        synthesise(local, *spaces, PROMPTS, tmp_path, count=7, text_dtype="bfloat16", **SETTINGS)


def failures(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def test_failed_rows_are_recorded_and_cost_no_other_row(whole, spaces, local, tmp_path):
    teacher = Overflows(local, [2, 5])
    assert synthesise(teacher, *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=2, **SETTINGS) == 7
    left = [0, 1, 3, 4, 6]
    pairs = load_pairs(tmp_path)
    assert torch.equal(pairs.z_teacher, whole.z_teacher[left])
    assert torch.equal(pairs.z_student, whole.z_student[left])
    assert pairs.prompts == [whole.prompts[row] for row in left]
    assert [(entry["row"], entry["prompt_id"], entry["prompt"], entry["reason"]) for entry in failures(tmp_path)] == [
        (row, int(whole.prompt_ids[row]), whole.prompts[row], "the teacher's sample is not finite") for row in (2, 5)
    ]
    (tmp_path / "failures.jsonl").unlink()  # it is made from the shards
    assert synthesise(StopsAfter(local, 0), *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=2, **SETTINGS) == 0
    assert [entry["row"] for entry in failures(tmp_path)] == [2, 5]


def test_too_many_failures_end_the_set_and_a_higher_limit_continues_it(spaces, local, tmp_path):
    teacher = Overflows(local, [1, 2, 5])
    with pytest.raises(StageFailed, match=r"3 rows failed, more than synthesis.max_failed_rows=2; .*row 5: the teach"):
        synthesise(teacher, *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=2, **SETTINGS)
    assert [entry["row"] for entry in failures(tmp_path)] == [1, 2, 5]
    assert existing_shards(tmp_path) == [0]
    assert synthesise(teacher, *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=3, **SETTINGS) == 3
    assert len(load_pairs(tmp_path)) == 4
    assert [entry["row"] for entry in failures(tmp_path)] == [1, 2, 5]


def test_a_shard_whose_rows_all_failed_is_complete_and_empty(whole, spaces, local, tmp_path):
    teacher = Overflows(local, range(4))
    assert synthesise(teacher, *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=9, **SETTINGS) == 7
    assert synthesise(teacher, *spaces, PROMPTS, tmp_path, count=7, max_failed_rows=9, **SETTINGS) == 0
    pairs = PairSet(tmp_path)
    assert len(pairs) == 3
    assert torch.equal(pairs.rows([2, 0]).z_teacher, whole.z_teacher[[6, 4]])


def poisoned(folder, copy):
    """A copy of a FLUX folder whose CLIP does not survive the word "blue"."""
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    from transformers import CLIPTokenizer

    (token,) = CLIPTokenizer.from_pretrained(copy / "tokenizer")("blue", add_special_tokens=False).input_ids
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    weights[name][token] = float("nan")
    save_file(weights, file, {"format": "pt"})
    return copy


def test_a_prompt_that_the_text_encoder_cannot_read_fails_alone(whole, spaces, local, flux_folder, tmp_path):
    space = load_space(poisoned(flux_folder, tmp_path / "model"))
    teacher = dataclasses.replace(local, space=space)
    synthesise(teacher, space, spaces[1], PROMPTS, tmp_path / "set", count=7, max_failed_rows=7, **SETTINGS)
    blue = [row for row, prompt in enumerate(whole.prompts) if "blue" in prompt]
    assert [entry["row"] for entry in failures(tmp_path / "set")] == blue
    assert {entry["reason"] for entry in failures(tmp_path / "set")} == {"the text encoders' output is not finite"}
    left = [row for row in range(7) if row not in blue]
    assert torch.equal(load_pairs(tmp_path / "set").z_teacher, whole.z_teacher[left])


def test_rows_of_a_retrained_teacher_are_not_mixed(spaces, local, flux_folder, tmp_path):
    synthesise(local, *spaces, PROMPTS, tmp_path / "set", count=1, **SETTINGS)
    shutil.copytree(flux_folder, tmp_path / "retrained")
    (file,) = (tmp_path / "retrained" / "transformer").glob("*.safetensors")
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file, {"format": "pt"})
    other = load_space(tmp_path / "retrained")
    with pytest.raises(InputError, match="teacher_revision was"):
        synthesise(local, other, spaces[1], PROMPTS, tmp_path / "set", count=7, **SETTINGS)
