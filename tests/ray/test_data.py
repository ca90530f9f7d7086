"""The stream of conditioned batches: every position once, in order, from any slot on, and nothing left behind."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import psutil
import pytest
import ray
import torch
from pair_sets import write_upscaled

from raydistill.data import ray_data
from raydistill.data.encode import TextEncoder, conditioning
from raydistill.data.prompts import PromptSet
from raydistill.data.reals import RealOrder, RealSet
from raydistill.data.stream import FakeRows, RealCaptions, conditioned_batches, own_rows, slot_positions
from raydistill.spaces import load_space

PROMPTS = PromptSet([f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square")])
SEED, WORLD, BATCH = 3, 2, 4


@pytest.fixture(scope="module")
def folders(sd_folder, flux_folder):
    return {"student": str(sd_folder), "teacher": str(flux_folder)}


@pytest.fixture
def stream(ray_cluster, folders):
    """`stream(first, stop, rank)`; whatever a test leaves open is closed."""
    opened = []

    def start(first, stop, rank=0, **changes):
        settings = {"seed": SEED, "rows": own_rows(rank, WORLD, WORLD, BATCH), "slot_size": WORLD * BATCH} | changes
        opened.append(conditioned_batches(PROMPTS, folders, first=first, stop=stop, **settings))
        return opened[-1]

    yield start
    for batches in opened:
        batches.close()


@pytest.fixture(scope="module")
def expected(folders):
    """role -> conditioning of all prompts, encoded here."""
    return {role: TextEncoder(load_space(folder)).encode(PROMPTS.prompts) for role, folder in folders.items()}


def check(batch, slot: int, rank: int, expected) -> None:
    """Ids, prompts and conditioning of one slot, bit for bit."""
    positions = slot_positions(slot, own_rows(rank, WORLD, WORLD, BATCH), WORLD * BATCH)
    ids, prompts = PROMPTS.at(SEED, positions)
    assert batch["sample_id"].dtype == np.int64
    assert batch["sample_id"].tolist() == positions.tolist()
    assert batch["prompt_id"].tolist() == ids.tolist()
    assert list(batch["prompt"]) == prompts
    for role, tables in expected.items():
        columns = conditioning(batch, role)
        assert columns.keys() == tables.keys()
        for name, table in tables.items():
            assert torch.equal(columns[name], table[ids - 1]), (slot, role, name)


def encoders() -> list[psutil.Process]:
    """Living processes of Ray Data's actor pools in this session's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def encoders_since(earlier: list[psutil.Process]) -> list[psutil.Process]:
    """Those that other tests left behind, and Ray still ends, are not this one's."""
    return [process for process in encoders() if process not in earlier]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_slots_of_all_workers_cover_every_position_once_however_many_there_are(world):
    """Six parts of five rows; four workers have one or two parts each."""
    rows = [own_rows(rank, world, 6, 5) for rank in range(world)]
    positions = [slot_positions(slot, own, 30) for slot in range(4) for own in rows]
    assert np.concatenate(positions).tolist() == list(range(120))
    assert {len(own) for own in rows} == ({5, 10} if world == 4 else {30 // world})


def test_batches_come_in_order_with_the_numbers_of_the_text_encoders(stream, expected):
    batches = list(stream(5, 11, rank=1, encoders=2))
    assert len(batches) == 6
    for slot, batch in enumerate(batches, start=5):
        check(batch, slot, 1, expected)


@pytest.mark.full
def test_resume_from_any_slot_gives_the_same_batches(stream, expected):
    interrupted = stream(0, 6)
    for slot in range(3):
        check(next(interrupted), slot, 0, expected)
    interrupted.close()
    rest = list(stream(3, 6))
    assert len(rest) == 3
    for slot, batch in enumerate(rest, start=3):
        check(batch, slot, 0, expected)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Captions of 24 teacher samples, read by two workers with two updates of the fake score each."""
    samples = RealSet(write_upscaled(tmp_path_factory.mktemp("samples")), (8, 16, 16))
    settings = {"window": 1, "seed": SEED, "lanes": WORLD, "size": BATCH, "fakes": 2}
    return RealCaptions(samples, RealOrder(samples.starts, **settings))


@pytest.mark.full
def test_captions_of_teacher_samples_ride_along_each_position_once_also_after_a_resume(
    stream, captions, expected, folders
):
    """Updates 1 to 3; the last one by one worker alone. Behind each of the fake score's slots come its teacher samples."""
    per_update, everybody = 3, range(WORLD * BATCH)
    two = [list(stream(per_update, 3 * per_update, rank, reals=captions)) for rank in range(WORLD)]
    one = list(stream(3 * per_update, 4 * per_update, rows=everybody, reals=captions))
    texts = TextEncoder(load_space(folders["teacher"])).encode(captions.samples.captions(range(24)))
    seen: list[int] = []  # positions
    for rank, batches in [*enumerate(two), (None, one)]:
        assert [bool(batch["real"].all()) for batch in batches] == [False, False, True, False, True] * (
            len(batches) // 5
        )
        prompts = [batch for batch in batches if not batch["real"].any()]
        for slot, batch in enumerate(prompts, start=3 * per_update if rank is None else per_update):
            if rank is not None:
                check(batch, slot, rank, expected)
        for batch in (batch for batch in batches if batch["real"].all()):
            rows = captions.order.rows(batch["sample_id"])
            assert batch["prompt_id"].tolist() == rows.tolist()
            assert list(batch["prompt"]) == captions.samples.captions(rows)
            for name, value in conditioning(batch, "teacher").items():
                assert torch.equal(value, texts[name][rows])
            seen += batch["sample_id"].tolist()
    assert sorted(seen) == list(range(2 * 8, 8 * 8)), "eight samples of each of two updates of the fake score"


@pytest.mark.full
def test_what_the_fake_score_drops_is_neither_encoded_nor_brought(stream, captions, expected, folders):
    """Three of each four samples, of two lanes that one worker has; also from a slot within an update on."""
    own, texts = (
        range(WORLD * BATCH),
        TextEncoder(load_space(folders["teacher"])).encode(captions.samples.captions(range(24))),
    )
    fake = FakeRows.of(own, 1, BATCH, 3, 2)
    assert fake == FakeRows((0, 1, 2, 4, 5, 6), 2)
    assert FakeRows.of(own, 1, BATCH, BATCH, 2) is None
    plain = list(stream(3, 9, rows=own, reals=captions))
    for first in (3, 4):
        few = list(stream(first, 9, rows=own, reals=captions, fake=fake))
        assert [len(batch["sample_id"]) for batch in few] == ([8, 6, 6, 6, 6] * 2)[first - 3 :]
        for batch, whole in zip(few, plain[first - 3 :], strict=True):
            rows = slice(None) if len(batch["sample_id"]) == 8 else list(fake.rows)
            assert batch.keys() == whole.keys()
            for name, column in whole.items():
                assert np.array_equal(batch[name], column[rows]), name
    assert torch.equal(conditioning(few[-1], "teacher")["prompt_embeds"], texts["prompt_embeds"][few[-1]["prompt_id"]])


@pytest.mark.full
def test_closing_ends_the_encoders(stream):
    earlier = encoders()
    batches = stream(0, 1000)
    next(batches)
    assert len(encoders_since(earlier)) == 1
    batches.close()
    deadline = time.monotonic() + 60
    while encoders_since(earlier) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not encoders_since(earlier)


@pytest.mark.full
def test_many_slots_share_blocks_without_changing_the_batches(stream, expected, monkeypatch):
    monkeypatch.setattr(ray_data, "MAX_BLOCKS", 3)
    batches = list(stream(1, 9))
    assert len(batches) == 8
    for slot, batch in enumerate(batches, start=1):
        check(batch, slot, 0, expected)


@pytest.mark.full
def test_memory_limit_below_one_batch_slows_down_but_does_not_block(stream, expected):
    batches = list(stream(0, 4, in_flight_bytes=1))
    assert len(batches) == 4
    check(batches[3], 3, 0, expected)


@pytest.mark.full
def test_killed_encoder_loses_and_repeats_no_position(stream, expected):
    earlier = encoders()
    batches = stream(0, 40, in_flight_bytes=1)
    check(next(batches), 0, 0, expected)
    (victim,) = encoders_since(earlier)
    victim.kill()
    victim.wait(30)
    count = 1
    for slot, batch in enumerate(batches, start=1):
        check(batch, slot, 0, expected)
        count += 1
    assert count == 40
    assert victim.pid not in [process.pid for process in encoders()]


@pytest.mark.full
def test_workers_stream_side_by_side_when_most_cpus_are_taken(ray_cluster, folders):
    """The stages must fit beside trainers that reserve nearly all of the cluster."""

    @ray.remote(num_cpus=3.6)
    class Worker:
        def read(self, rank: int) -> list[int]:
            stream = conditioned_batches(
                PROMPTS, folders, seed=SEED, first=2, stop=5, rows=own_rows(rank, 2, 2, BATCH), slot_size=2 * BATCH
            )
            return [position for batch in stream for position in batch["sample_id"].tolist()]

    workers = [Worker.remote() for _ in range(2)]
    read = ray.get([worker.read.remote(rank) for rank, worker in enumerate(workers)], timeout=400)
    for worker in workers:
        ray.kill(worker)
    assert sorted(read[0] + read[1]) == list(range(2 * 2 * BATCH, 5 * 2 * BATCH))


def test_nothing_to_read_starts_nothing(stream):
    assert list(stream(7, 7)) == []


@pytest.mark.parametrize(
    ("changes", "said"), [({"rows": range(4, 9)}, "rows"), ({"rows": range(0)}, "rows"), ({"first": 8}, "first")]
)
def test_wrong_numbers_are_refused(stream, changes, said):
    settings = {"first": 0, "stop": 7} | changes
    with pytest.raises(ValueError, match=said):
        next(stream(settings.pop("first"), settings.pop("stop"), **settings))


@pytest.mark.full
def test_waiting_batches_leave_the_trainers_processor_alone(stream):
    """Ray Data's executor lives in the trainer's process; while its buffer is full it must not spin there."""
    batches = stream(0, 2000, in_flight_bytes=1 << 20)
    next(batches)
    time.sleep(5)  # until the buffers are full
    before = time.process_time()
    time.sleep(4)
    share = (time.process_time() - before) / 4
    assert share < 0.3  # of one processor; a spinning loop takes all that it gets
