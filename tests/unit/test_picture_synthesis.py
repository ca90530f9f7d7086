"""Pairs of streamed pictures: the same rows whatever interrupts, from one seed; what is left out and what fails is told."""

from __future__ import annotations

import json

import pytest
import torch
from pair_sets import load_pairs
from picture_sets import png, write_tar, write_tars

from raydistill.config.reading import load
from raydistill.data.ordered_shards import OrderedWriter, caption_id, fewer_than_asked
from raydistill.data.pairs import existing_shards
from raydistill.data.pictures import Filters, open_pictures
from raydistill.data.prompts import PromptSet
from raydistill.data.shards import notes_of
from raydistill.data.synthesis import Recipe, decode_rows, encode_rows, streamed_rows, synthesise
from raydistill.driver.preflight import Inputs
from raydistill.driver.stages import recipe_of
from raydistill.errors import InputError, StageFailed
from raydistill.spaces import load_space


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    write_tars(folder, (4, 6, 5))
    return folder


def recipe(spaces, tars, **changes) -> Recipe:
    made = {"source": open_pictures(str(tars)), "count": None, "batch_size": 2, "shard_size": 4, "seed": 5}
    return Recipe(teacher=spaces[0], student=spaces[1], **(made | changes))


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(spaces, tars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert synthesise(recipe(spaces, tars), folder) == 15
    return folder


def test_rows_are_the_pictures_in_the_order_of_the_stream(whole, spaces, tars):
    pairs = load_pairs(whole)
    rows = list(open_pictures(str(tars)).rows(5))
    assert pairs.prompts == [row.caption for row in rows]
    assert pairs.prompt_ids.tolist() == [caption_id(row.caption, row.key) for row in rows]
    picture = torch.from_numpy(rows[7].picture(64))[None] / 127.5 - 1
    with torch.no_grad():
        z = spaces[0].encode(spaces[0].load_vae(), picture)
    torch.testing.assert_close(pairs.z_teacher[7:8].float(), z, rtol=2e-3, atol=2e-3)
    assert existing_shards(whole) == [0, 1, 2, 3]
    assert notes_of(whole)["pictures"] == str(tars)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_interrupted_set_goes_on_to_the_same_bytes(whole, spaces, tars, tmp_path, shards):
    told = recipe(spaces, tars)
    writer = told.writer(tmp_path, 0)
    encoder, batches = told.encoder("cpu"), streamed_rows(told.source.rows(5), 3)
    while len(existing_shards(tmp_path)) < shards:
        writer.add(encode_rows(encoder, decode_rows(next(batches), 64)))
    assert synthesise(told, tmp_path) == 15 - 4 * shards
    assert contents(tmp_path) == contents(whole)
    assert synthesise(told, tmp_path) == 0


def test_a_bound_takes_the_first_rows_and_a_larger_one_goes_on(whole, spaces, tars, tmp_path):
    assert synthesise(recipe(spaces, tars, count=6), tmp_path) == 6
    assert len(load_pairs(tmp_path)) == 6
    assert synthesise(recipe(spaces, tars, count=6), tmp_path) == 0
    assert synthesise(recipe(spaces, tars, count=8), tmp_path) == 4
    assert synthesise(recipe(spaces, tars), tmp_path) == 7
    assert contents(tmp_path) == contents(whole)
    assert synthesise(recipe(spaces, tars, count=9), tmp_path) == 0


def test_samples_of_a_posterior_are_of_the_picture_not_of_how_far_the_set_had_come(spaces, tars, tmp_path):
    for folder, first in (("a", None), ("b", 5)):
        for count in (first, 12) if first else (12,):
            synthesise(recipe(spaces, tars, posterior="sample", count=count), tmp_path / folder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_failed_and_left_out_rows_are_told_and_survive_an_interruption(spaces, tmp_path):
    members = [(f"{n}.png", b"none" if n in (1, 6) else png(n)) for n in range(9)]
    texts = [(f"{n}.txt", "held out" if n in (3, 8) else f"cap {n}") for n in range(9)]
    source = write_tar(tmp_path / "a.tar", [member for pair in zip(members, texts, strict=True) for member in pair])
    told = recipe(spaces, source, filters=Filters(captions={"held out"}), shard_size=3, licence="CC0 1.0")
    assert synthesise(told, tmp_path / "whole", max_failed_rows=2) == 7
    pairs = load_pairs(tmp_path / "whole")
    assert pairs.prompts == ["cap 0", "cap 2", "cap 4", "cap 5", "cap 7"]
    failures = [json.loads(line) for line in (tmp_path / "whole" / "failures.jsonl").read_text().splitlines()]
    assert [(f["row"], f["prompt"]) for f in failures] == [(1, "cap 1"), (5, "cap 6")]
    assert failures[0]["reason"].startswith("a.tar, 1: UnidentifiedImageError")
    assert notes_of(tmp_path / "whole")["licence"] == "CC0 1.0"
    for count in (2, 4, None):
        synthesise(
            recipe(spaces, source, filters=Filters(captions={"held out"}), shard_size=3, licence="CC0 1.0", count=count),
            tmp_path / "parts", max_failed_rows=2,
        )  # fmt: skip
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    writer = told.writer(tmp_path / "whole", 2)
    assert isinstance(writer, OrderedWriter)
    assert (writer.left_out, writer.done, writer.complete) == (2, 7, True)
    with pytest.raises(
        StageFailed, match=r"2 rows failed, more than synthesis.max_failed_rows=1; .* row 5: a\.tar, 6: "
    ):
        synthesise(told, tmp_path / "strict", max_failed_rows=1)


def test_a_run_takes_bound_filters_and_licence_from_its_configuration(spaces, tars):
    settings = ["image_count=7", "min_pixels=9", "licence=CC0 1.0", "shard_size=3"]
    config = load(overrides=[f"synthesis.{setting}" for setting in [f"images={tars}", *settings]])
    held_out = PromptSet(["Cap  3", "cap 5"])
    told = recipe_of(config, Inputs(*spaces, PromptSet(["x"]), held_out, images=open_pictures(str(tars))))
    assert (told.count, told.shard_size, told.licence) == (7, 3, "CC0 1.0")
    assert told.filters == Filters(min_pixels=9, captions=frozenset(held_out.prompts))
    out = [row.caption for row in told.source.rows(5, filters=told.filters) if row.left_out]
    assert sorted(out) == ["cap 3", "cap 5"]
    assert not told.samples


def test_a_set_of_which_nothing_can_be_used_fails(spaces, tars, tmp_path):
    with pytest.raises(
        StageFailed, match="no picture could be used: 0 rows failed, 15 were left out \\(held-out captions, synth"
    ):
        synthesise(recipe(spaces, tars, filters=Filters(min_pixels=65)), tmp_path)


def test_other_pictures_filters_or_kinds_of_source_are_refused(whole, spaces, tars, tmp_path):
    with pytest.raises(InputError, match="holds rows of other settings .*min_pixels was 0, now 8"):
        synthesise(recipe(spaces, tars, filters=Filters(min_pixels=8)), whole)
    write_tars(tmp_path, (3,))
    with pytest.raises(InputError, match="holds rows of other settings .*images was"):
        synthesise(recipe(spaces, tmp_path), whole)


def test_progress_expects_what_the_shards_so_far_lead_to_expect(spaces, tars, tmp_path):
    writer = recipe(spaces, tars, count=10).writer(tmp_path, 0)
    assert writer.count == 1
    counts = []
    for batch in streamed_rows(open_pictures(str(tars)).rows(5), 1):
        told = {"z_T": [0.0], "z_S": [0.0], "preview": [b""]}
        if writer.complete or writer.done % 4 == 3:
            break
        writer.add(batch | told)
        counts.append(writer.count)
    assert all(done < count <= 10 for done, count in enumerate(counts, start=1))


def test_a_set_that_ends_before_the_pictures_that_were_asked_for_says_so(spaces, tars, tmp_path):
    gone = frozenset(row.caption for row in list(open_pictures(str(tars)).rows(5))[:4])
    synthesise(recipe(spaces, tars, count=12, filters=Filters(captions=gone)), tmp_path)
    told = fewer_than_asked(tmp_path, 12)
    assert told.startswith("there are 11 pictures, and synthesis.image_count asks for 12; 4 were left out")
    assert fewer_than_asked(tmp_path, 11) is None
    assert fewer_than_asked(tmp_path, None) is None
