"""Streams of pictures: every worker's order and what is held out of it, going on at a position, and pairs that are those of
a stored set. Without Ray."""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
import tracemalloc

import numpy as np
import pytest
import torch
from pair_sets import load_pairs
from PIL import Image

from raydistill.bridge.trainer import build_trainer
from raydistill.config.reading import load
from raydistill.data import pair_stream, picture_order, picture_shards, synthesis
from raydistill.data.images import open_images
from raydistill.data.pair_stream import Encoding, StreamedPairs, decode, encode, position_of, read
from raydistill.data.picture_order import PictureOrder, Position
from raydistill.data.pictures import Filters, open_pictures
from raydistill.data.synthesis import Recipe
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.workers.checkpoint import load_state, save_state

SHARDS, ROWS = 5, 9


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def write_tars(folder, shards=SHARDS, rows=ROWS, bad=()):
    """A WebDataset; pictures of these numbers are none."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for row in range(rows):
                number = shard * rows + row
                data = b"no picture" if number in bad else png(number)
                for suffix, content in (("png", data), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_pictures(write_tars(tmp_path_factory.mktemp("set")))


def order_of(pictures, share=(0, 1), **more):
    return PictureOrder(pictures=pictures, **{"seed": 3, "share": share, "held_out": 0.2, "window": 7} | more)


def keys(rows):
    return [row.key for row, _ in rows]


def epoch_of(order, epoch=0):
    rows = itertools.takewhile(lambda it: it[1].window.epoch <= epoch, order.rows())
    return [row.key for row, after in rows if after.window.epoch == epoch]


def test_an_epoch_of_all_workers_has_every_picture_once_but_those_that_are_held_out(pictures):
    everything = {row.key for row in pictures.rows(0)}
    held_out = {row.key for row in order_of(pictures).validation(1000)}
    assert len(everything) == SHARDS * ROWS
    assert 3 <= len(held_out) <= 16
    epochs = []
    for world in (1, 2, 7):  # more workers than shards share them by row
        for epoch in (0, 1):
            seen = [key for rank in range(world) for key in epoch_of(order_of(pictures, (rank, world)), epoch)]
            assert sorted(seen) == sorted(everything - held_out)
            epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert epoch_of(order_of(pictures, seed=4)) != epochs[0]
    assert [row.key for row in order_of(pictures).validation(2)] == [
        row.key for row in order_of(pictures, (1, 2)).validation(2)
    ]


def test_rows_are_mixed_within_windows_alone(pictures):
    whole, single = order_of(pictures, window=1000, held_out=1e-9), order_of(pictures, window=1, held_out=1e-9)
    assert sorted(epoch_of(whole)) == sorted(epoch_of(single))
    shards = [key >> 32 for key in epoch_of(single)]
    assert [shard for shard, _ in itertools.groupby(shards)] == pictures.order(3, 0).tolist()
    assert len(list(itertools.groupby(key >> 32 for key in epoch_of(whole)))) > 2 * SHARDS


@pytest.mark.parametrize("share", [(0, 1), (1, 2), (2, 7)])
def test_going_on_at_any_position_gives_the_same_rows(pictures, share):
    order, count = order_of(pictures, share), 40
    rows = list(itertools.islice(order.rows(), count))
    for done in range(0, count - 1, 6):
        again = list(itertools.islice(order.rows(rows[done][1]), count - done - 1))
        assert keys(again) == keys(rows[done + 1 :])
        assert [after for _, after in again] == [after for _, after in rows[done + 1 :]]


def test_large_pictures_wait_on_the_disk_and_change_no_row(tmp_path, monkeypatch):
    """10 MB of pictures in one window, in a stream that holds 1 MB of them."""
    large, each = 40, 256 << 10
    noise = np.random.default_rng(0).bytes(each + large)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as archive:
        for number in range(large):
            member = tarfile.TarInfo(f"{number:04}.jpg")
            member.size = each
            archive.addfile(member, io.BytesIO(noise[number : number + each]))
    for number in range(large):
        (tmp_path / f"{number:04}.jpg").write_bytes(noise[number : number + each])
    del noise
    for source in (tmp_path / "set", tmp_path):
        shown = open_pictures(str(source) if source.name == "set" else f"{source}/*.jpg")
        order = order_of(shown, window=1000)

        def rows_of(order=order) -> list:
            some = itertools.takewhile(lambda it: it[1].window.epoch == 0, order.rows())
            held_out = [hash(row.data) for row in order.validation(1000)]
            return [(row.key, hash(row.data), after) for row, after in some] + held_out

        monkeypatch.undo()
        expected = rows_of()
        for module, name in ((picture_order, "WINDOW_BYTES"), (picture_shards, "AHEAD_BYTES")):
            monkeypatch.setattr(module, name, 1 << 20)
        monkeypatch.setattr(picture_shards, "READERS", 1)
        tracemalloc.start()
        assert rows_of() == expected
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20
    monkeypatch.setattr(pair_stream, "CHUNK_BYTES", 3 * each)
    chunks = itertools.islice(read(order, Position(), 4, 16), 5)
    assert [len(chunk.rows) for chunk in chunks] == [3, 1, 3, 3, 3]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"none has no room for pictures .* name another folder in TMPDIR"):
        next(order.rows())


def test_pictures_of_held_out_prompts_are_passed_over(pictures):
    some = Filters(captions=frozenset({"picture 7", "picture 30"}))
    gone = {0 << 32 | 7, 3 << 32 | 3}
    kept_out = gone & {row.key for row in order_of(pictures).validation(1000)}
    assert set(epoch_of(order_of(pictures))) - set(epoch_of(order_of(pictures, filters=some))) == gone - kept_out
    every = Filters(captions=frozenset(f"picture {number}" for number in range(SHARDS * ROWS)))
    with pytest.raises(InputError, match="nothing to train on in reader 0's share of 1"):
        next(order_of(pictures, filters=every).rows())
    with pytest.raises(InputError, match=r"no picture is held out \(bridge\.validation_share=1e-09\)"):
        next(order_of(pictures, held_out=1e-9).validation(5))


# -- pairs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


@pytest.fixture(scope="module")
def encoding(spaces):
    return Encoding(teacher=spaces[0], student=spaces[1], seed=3, posterior="sample", dtype="float16")


def chunks_of(order, encoding, encoder, start=Position(), validation=0, size=4):  # noqa: B008
    for chunk in read(order, start, validation, size):
        yield encode(decode(chunk, encoding.teacher.resolution), encoder)


def streamed(order, encoding, state=None, validation=0, size=4, limit=0):
    encoder = encoding.encoder("cpu")
    chunks = chunks_of(order, encoding, encoder, position_of(state), validation, size)
    return StreamedPairs(chunks, seed=3, max_failed_rows=limit, state=state)


@pytest.mark.parametrize("changed", [0.0, 0.5])
def test_pairs_are_those_of_a_stored_set(tmp_path, spaces, changed):
    asked = ["run.seed=3", "synthesis.posterior=sample", f"synthesis.augment_share={changed}"]
    asked += [f"teacher.model={spaces[0].folder}", f"student.model={spaces[1].folder}"]
    encoding = Encoding.of(load(overrides=asked))
    (tmp_path / "folder").mkdir()
    for number in range(6):
        (tmp_path / "folder" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "folder" / f"{number}.txt").write_text(f"picture {number}")
    images = open_images(tmp_path / "folder")
    recipe = Recipe(
        teacher=spaces[0],
        student=spaces[1],
        source=images,
        count=6,
        batch_size=4,
        shard_size=6,
        seed=3,
        posterior="sample",
        augment_share=changed,
    )
    synthesis.synthesise(recipe, tmp_path / "pairs")
    stored = load_pairs(tmp_path / "pairs")
    order = order_of(open_pictures(str(tmp_path / "folder")), held_out=1e-9)
    pairs = streamed(order, encoding).next(np.arange(6))
    numbers = pairs.prompt_ids.tolist()  # the only shard's rows
    assert sorted(numbers) == list(range(6)) != numbers
    assert torch.equal(pairs.z_teacher, stored.z_teacher[numbers])
    assert torch.equal(pairs.z_student, stored.z_student[numbers])
    assert pairs.prompts == [f"picture {number}" for number in numbers]
    assert pairs.ids.tolist() == list(range(6))


def same(a, b):
    return a.prompts == b.prompts and torch.equal(a.z_teacher, b.z_teacher) and torch.equal(a.z_student, b.z_student)


def test_batches_go_on_behind_a_checkpoint_past_bad_pictures_and_ends_of_epochs(tmp_path, encoding):
    pictures = open_pictures(write_tars(tmp_path, 2, 6, bad=(0, 4, 9)))
    order = order_of(pictures, held_out=0.1)
    held_out = [row.caption for row in order.validation(100)]
    assert held_out
    pairs, batches, states = streamed(order, encoding, validation=100, limit=3), [], []
    assert [f"picture {number}" for number in (0, 4, 9)] != held_out
    kept = pairs.held_out()
    assert set(kept.prompts) == set(held_out) - {"picture 0", "picture 4", "picture 9"}
    for _ in range(12):
        batches.append(pairs.next(np.arange(3)))
        states.append(pairs.state() | {"seen": pairs.failed})
    assert not set(kept.prompts) & {prompt for batch in batches for prompt in batch.prompts}
    assert max(state["epoch"] for state in states) >= 3
    assert max(state["failed"] for state in states) == len({0, 4, 9} - {int(p.split()[1]) for p in held_out})
    for done in (0, 2, 5, 8):
        (tmp_path / f"{done}").mkdir()
        save_state(tmp_path / f"{done}", {"cursors": [states[done]]}, {"step": done})
        state = load_state(tmp_path / f"{done}")[0]["cursors"][0]
        again = streamed(
            order, encoding, {k: v for k, v in state.items() if k != "seen"}, size=5, limit=3
        )  # chunks of another size
        for later in range(done + 1, 12):
            assert same(again.next(np.arange(3)), batches[later])
            assert again.failed == states[later]["seen"]


def test_too_many_bad_pictures_end_it_with_the_last_one_named(tmp_path, encoding):
    pictures = open_pictures(write_tars(tmp_path, 1, 8, bad=(2, 5, 6)))
    pairs = streamed(order_of(pictures, held_out=1e-9), encoding, limit=2)
    said = r"3 pictures of this worker's epoch cannot be used, more than synthesis\.max_failed_rows=2; the last one: 000\.tar, 000[256]"
    with pytest.raises(InputError, match=said):
        pairs.next(np.arange(8))
    patient = streamed(order_of(pictures, held_out=1e-9), encoding, limit=3)
    seen = [patient.next(np.arange(1)).prompts[0] for _ in range(15)]  # three epochs of five
    assert sorted(seen[:5]) == sorted(seen[5:10]) == sorted(seen[10:])
    assert patient.failed <= 3


def test_a_bridge_learns_from_a_stream_as_from_a_stored_set(tmp_path, spaces, encoding, sd_folder, flux_folder):
    """The streamed objective and a stored one take the same steps on the same pairs."""
    config = load(
        overrides=[
            f"student.model={sd_folder}", f"teacher.model={flux_folder}", "bridge.batch_size=4", "bridge.embed_dim=16",
            "bridge.depths=[2]", "bridge.checkpoint=null", "bridge.source=stream", "run.seed=3",
        ]
    )  # fmt: skip
    order = order_of(open_pictures(write_tars(tmp_path, 3, 8)))
    pairs = streamed(order, encoding, validation=100)
    trainer = build_trainer(config, None)
    trainer.objective.kept = pairs.held_out()
    losses = [trainer.step(pairs.next(np.arange(4 * step, 4 * step + 4)))["loss/bridge"] for step in range(4)]
    assert all(np.isfinite(losses))
    before = trainer.validation()[0]
    assert before == trainer.validation()[0]
    assert sum(len(part) for part in trainer.objective.held_out(1000, 3)) == len(trainer.objective.kept)
