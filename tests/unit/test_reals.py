"""Teacher samples for the discriminator: every row once an epoch, the same whoever reads it, in bounded memory."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_sets import load_pairs, write_upscaled

from raydistill.config.reading import load
from raydistill.data import reals
from raydistill.data.pairs import ROW_GROUP, shard_file, write_pairs
from raydistill.data.reals import RealOrder, RealSet, most_bytes, window_of
from raydistill.data.stream import own_rows
from raydistill.distillation.batches import Real, RealFeed, StreamedReals

LANES, SIZE, FAKES = 4, 6, 2


def order(rows=101, group=8, window=3, seed=0, lanes=LANES):
    starts = np.array([*range(0, rows, group), rows])
    return RealOrder(starts, window=window, seed=seed, lanes=lanes, size=SIZE, fakes=FAKES)


def of_lane(order, lane, count):
    """Rows that a lane reads, the first `count`."""
    slots = -(-count // SIZE)
    positions = [slot * order.slot_size + lane * SIZE + i for slot in range(slots) for i in range(SIZE)]
    return order.rows(positions[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of 150 and 70 rows, whose latents are their own numbers."""
    folder = tmp_path_factory.mktemp("reals")
    for shard, first, count in ((0, 0, 150), (3, 150, 70)):
        ids = torch.arange(first, first + count)
        latents = ids[:, None, None, None].expand(-1, 2, 4, 4)
        write_pairs(
            folder,
            shard,
            prompts=[f"caption {i}" for i in ids.tolist()],
            prompt_ids=ids,
            seeds=ids,
            z_teacher=latents.float(),
            z_student=latents[:, :1, :2, :2].float(),
            previews=[b"picture"] * count,
        )
    return folder


# -- the order -------------------------------------------------------------------------------------------


def test_every_lane_reads_rows_of_its_own_and_all_of_them_once_an_epoch():
    found = [of_lane(order(), lane, 2 * 26)[: 2 * (25 + (lane == 3))] for lane in range(LANES)]
    for rows in found:
        first, second = np.split(rows, 2)
        assert sorted(first) == sorted(second) == list(range(min(rows), max(rows) + 1))
        assert first.tolist() != second.tolist()
    assert sorted(np.concatenate([np.split(rows, 2)[0] for rows in found])) == list(range(101))


def test_the_seed_decides_the_order_and_the_place_in_it_nothing_else():
    one, same, other = (order(seed=seed) for seed in (0, 0, 1))
    positions = np.arange(500)
    assert (one.rows(positions) == same.rows(positions)).all()
    assert (one.rows(positions) != other.rows(positions)).any()
    alone = [int(one.rows([position])[0]) for position in positions[::37]]
    assert alone == one.rows(positions)[::37].tolist()
    assert (pickle.loads(pickle.dumps(one)).rows(positions) == one.rows(positions)).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_workers_reads_the_same_rows_of_a_slot(world):
    """Lanes are of the configured workers, not of those that are there."""
    one = order()
    slot = np.arange(one.slot_size) + 5 * one.slot_size
    parts = [own_rows(rank, world, LANES * 2, SIZE // 2) for rank in range(world)]
    read = np.concatenate([order().rows(slot[part.start : part.stop]) for part in parts])
    assert read.tolist() == one.rows(slot).tolist()


def test_the_fake_scores_updates_read_one_position_after_the_other():
    one = order()
    per_update = (1 + FAKES) * one.slot_size
    ids = [id for id in range(4 * per_update) if id % per_update >= one.slot_size]  # none of the student's own slots
    assert one.positions(ids).tolist() == list(range(4 * FAKES * one.slot_size))
    slots = [one.slot(slot) for slot in range(4 * (1 + FAKES))]
    assert slots == [None, 0, 1, None, 2, 3, None, 4, 5, None, 6, 7]


def test_rows_are_mixed_among_neighbouring_groups_which_are_begun_one_by_one():
    rows = order(rows=800, group=8, window=5, lanes=1).rows(np.arange(800))
    groups = rows // 8
    first = [int(np.flatnonzero(groups == group)[0]) for group in range(100)]
    last = [int(np.flatnonzero(groups == group)[-1]) for group in range(100)]
    open_at = [sum(a <= i <= b for a, b in zip(first, last, strict=True)) for i in range(800)]
    assert max(open_at) <= 5 + 1
    assert np.mean(open_at) > 3, "rows of one group do not come one after the other"


def test_a_small_set_is_mixed_completely():
    rows = order(rows=64, group=8, window=8, lanes=1).rows(np.arange(64))
    assert sorted(rows) == list(range(64))
    assert max(rows[:16]) > 40
    assert min(rows[:16]) < 24


def test_more_workers_than_rows_share_all_rows():
    few = order(rows=3)
    for lane in range(LANES):
        assert sorted(of_lane(few, lane, 3)) == [0, 1, 2]


def test_epochs_are_counted():
    one = order(rows=100, lanes=1)
    assert [one.epoch(position) for position in (0, 49, 99, 100, 249)] == [0.01, 0.5, 1.0, 1.01, 2.5]


# -- the set ---------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_set_and_a_copy_reads_for_itself(folder):
    samples, all_rows = RealSet(folder, (2, 4, 4)), load_pairs(folder)
    rows = [219, 0, 149, 150, 63, 64, 0]
    for one in (samples, pickle.loads(pickle.dumps(samples))):
        assert len(one) == 220
        assert torch.equal(one.latents(rows), all_rows.z_teacher[rows])
        assert one.captions(rows) == [all_rows.prompts[row] for row in rows]
    with pytest.raises(IndexError, match=r"0 … 219"):
        samples.latents([220])


def test_a_number_takes_the_first_rows_and_none_takes_all(folder):
    few = RealSet(folder, (2, 4, 4), 70)
    assert len(few) == 70
    assert few.starts.tolist() == [0, 64, 70]
    assert few.first(1000)[:, 0, 0, 0].tolist() == list(range(70))
    assert len(RealSet(folder, (2, 4, 4), 10_000)) == len(RealSet(folder, (2, 4, 4))) == 220


def test_shards_are_written_in_small_row_groups_and_older_ones_of_one_group_are_read_too(folder, tmp_path):
    parquet = pq.ParquetFile(shard_file(folder, 0))
    assert [parquet.metadata.row_group(i).num_rows for i in range(3)] == [ROW_GROUP, ROW_GROUP, 150 - 2 * ROW_GROUP]
    older = shard_file(tmp_path, 0)
    pq.write_table(pq.read_table(shard_file(folder, 0)), older)
    samples = RealSet(tmp_path, (2, 4, 4))
    assert samples.starts.tolist() == [0, 150]
    assert samples.latents([149, 3])[:, 0, 0, 0].tolist() == [149, 3]


def test_memory_is_bounded_and_each_group_is_read_once_an_epoch(tmp_path, monkeypatch):
    """30 groups of 64 rows; a window of four of them."""
    for shard in range(3):
        latents = torch.arange(640).float()[:, None, None, None] + 640 * shard
        rows = range(640)
        write_pairs(
            tmp_path, shard, prompts=[""] * 640, prompt_ids=rows, seeds=rows, z_teacher=latents, z_student=latents
        )
    monkeypatch.setattr(reals, "WINDOW_BYTES", 4 * 64 * 2)
    samples = RealSet(tmp_path, (1, 1, 1))
    order = RealOrder(samples.starts, window=window_of(samples.starts, 2), seed=0, lanes=1, size=16, fakes=1)
    assert order.window == 4
    for epoch in (0, 1):
        for first in range(0, 1920, 16):
            rows = order.rows(np.arange(first, first + 16) + epoch * 1920)
            assert samples.latents(rows).flatten().tolist() == rows.tolist()
            assert samples._latents.cache_info().currsize * 64 * 2 <= most_bytes(2) == 6 * 64 * 2
    assert 54 <= samples.reads <= 66, "30 groups, twice; what is held at the seam is not read again"


# -- what the discriminator gets ---------------------------------------------------------------------------


def settings(*overrides):
    return load(overrides=["distill.batch_size=4", "fake_score.updates=2", *overrides])


def captions_stream(samples, order, first=0):
    """What the stream brings of teacher samples, from update `first` of the fake score on."""
    for slot in itertools.count(first):
        positions = np.arange(4) + slot * order.slot_size
        rows = order.rows(positions)
        yield {"sample_id": positions, "prompt_id": rows, "teacher.text": rows[:, None].astype(np.float32)}


def test_streamed_samples_are_those_of_memory_in_parts_of_any_size(folder):
    config = settings()
    samples = RealSet(folder, (2, 4, 4))
    order = RealOrder.of(config, samples)
    streamed = RealFeed(config, StreamedReals(captions_stream(samples, order), samples, order))
    table = {"text": torch.arange(220)[:, None].float()}
    memory = RealFeed(config, Real(samples.first(220), table, torch.arange(220), samples.starts))
    for fake in range(120):
        update, place = divmod(fake, 2)
        ids = torch.arange(4) + (3 * update + place + 1) * 4
        parts = ids.split(2 if fake % 3 else 4)
        if fake % 5 in (2, 3):  # an update that takes fewer: what comes after them is left out, or before them
            parts = parts[:1] if fake % 5 == 2 else parts[-1:]
        for part in parts:
            (latents, texts), (same, same_texts) = streamed.of(part), memory.of(part)
            assert torch.equal(latents, same)
            assert torch.equal(texts["text"], same_texts["text"])
            assert torch.equal(latents[:, 0, 0, 0], texts["text"][:, 0]), "each with its own caption"
    metrics = streamed.pop_metrics()
    assert metrics["data/real_epoch"] == memory.pop_metrics()["data/real_epoch"] == pytest.approx(480 / 220)
    assert 4 <= metrics["data/real_groups"] <= 5
    assert metrics["time/data"] > 0
    assert streamed.pop_metrics()["data/real_groups"] == 0


def test_a_stream_of_other_samples_is_not_taken_for_the_updates_own(folder):
    config, samples = settings(), RealSet(folder, (2, 4, 4))
    order = RealOrder.of(config, samples)
    feed = RealFeed(config, StreamedReals(captions_stream(samples, order, first=1), samples, order))
    with pytest.raises(RuntimeError, match="the stream brings teacher samples"):
        feed.of(torch.arange(4, 8))


def test_a_file_that_is_gone_is_an_error_of_storage_that_may_pass(tmp_path):
    write_upscaled(tmp_path)
    samples = RealSet(tmp_path, (8, 16, 16))
    shard_file(tmp_path, 0).rename(tmp_path / "away")
    with pytest.raises(OSError, match="pairs-00000"):
        samples.latents([0])
    (tmp_path / "away").rename(shard_file(tmp_path, 0))
    assert samples.latents([0]).shape == (1, 8, 16, 16)
