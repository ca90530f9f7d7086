"""Shards of latent pairs: round trip, atomicity, resumability, order, split, and errors that name file and column."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_sets import load_pairs
from PIL import Image

from raydistill.bridge.objective import split
from raydistill.data.pairs import (
    PairSet,
    about_shard,
    captioned_previews,
    existing_shards,
    shard_file,
    write_pairs,
)
from raydistill.errors import InputError
from raydistill.pictures.files import png_bytes
from raydistill.storage.atomic import remove_abandoned


def write(folder, shard, first, count, z_teacher=None, previews=None):
    ids = torch.arange(first, first + count)
    z_teacher = ids[:, None, None, None].expand(-1, 2, 4, 4).float() if z_teacher is None else z_teacher
    z_student = -ids[:, None, None, None].expand(-1, 1, 2, 2).float()
    return write_pairs(
        folder,
        shard,
        prompts=[f"prompt {i}" for i in ids.tolist()],
        prompt_ids=10 * ids,
        seeds=ids + 7,
        z_teacher=z_teacher,
        z_student=z_student,
        previews=previews,
    )


def test_rows_come_back_as_written_across_shards(tmp_path):
    picture = Image.new("RGB", (3, 2), (250, 0, 10))
    write(tmp_path, 0, 0, 3, previews=[png_bytes(picture), None, b"x"])
    write(tmp_path, 2, 3, 4)
    pairs = PairSet(tmp_path, (2, 4, 4), (1, 2, 2))
    assert len(pairs) == 7
    rows = pairs.rows([6, 0, 4, 0])
    assert rows.prompts == ["prompt 6", "prompt 0", "prompt 4", "prompt 0"]
    assert rows.prompt_ids.tolist() == [60, 0, 40, 0]
    assert rows.seeds.tolist() == [13, 7, 11, 7]
    assert rows.z_teacher.dtype == rows.z_student.dtype == torch.float16
    assert torch.equal(rows.z_teacher, torch.tensor([6.0, 0, 4, 0]).half()[:, None, None, None].expand(-1, 2, 4, 4))
    assert torch.equal(rows.z_student[:, 0, 1, 1], -torch.tensor([6.0, 0, 4, 0]).half())
    assert Image.open(io.BytesIO(rows.previews[1])).getpixel((2, 1)) == (250, 0, 10)
    assert rows.previews[0] is None
    everything = load_pairs(tmp_path)
    assert everything.z_teacher[:, 0, 0, 0].tolist() == list(range(7))
    assert everything.ids.tolist() == list(range(7))
    with pytest.raises(IndexError, match="0 … 6"):
        pairs.rows([7])


def test_shards_of_other_programs_may_hold_views(tmp_path):
    for shard, first in ((0, 0), (1, 3)):
        write(tmp_path, shard, first, 3, previews=[b"x", None, b"y"])
    wanted, file = PairSet(tmp_path).rows([4, 0, 2]), shard_file(tmp_path, 1)
    table = pq.read_table(file)
    for name, kind in (("prompt", pa.string_view()), ("preview", pa.binary_view())):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, file)
    assert pq.read_schema(file).field("prompt").type == pa.string_view()
    rows = PairSet(tmp_path).rows([4, 0, 2])
    assert (rows.prompts, rows.previews) == (wanted.prompts, wanted.previews)
    assert torch.equal(rows.z_teacher, wanted.z_teacher)


def test_latents_keep_their_layout(tmp_path):
    z_teacher = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    write(tmp_path, 0, 0, 3, z_teacher.permute(0, 1, 3, 2))  # not contiguous
    assert torch.equal(load_pairs(tmp_path).z_teacher, z_teacher.permute(0, 1, 3, 2).half())


def test_any_parquet_reader_sees_a_tensor_column(tmp_path):
    table = pq.read_table(write(tmp_path, 0, 0, 2))
    assert table.schema.field("z_T").type == pa.fixed_shape_tensor(pa.float16(), [2, 4, 4])
    assert table.column_names == ["prompt", "prompt_id", "seed", "z_T", "z_S"]


def test_existing_shards_are_the_complete_ones(tmp_path):
    assert existing_shards(tmp_path / "nowhere") == []
    write(tmp_path, 3, 0, 1)
    write(tmp_path, 0, 1, 1)
    (tmp_path / ".pairs-00001.parquet.3f2a").write_bytes(b"half a shard")
    assert existing_shards(tmp_path) == [0, 3]
    assert len(PairSet(tmp_path)) == 2


def test_failed_write_leaves_the_old_shard_and_no_rubbish(tmp_path, monkeypatch):
    write(tmp_path, 0, 0, 2)

    def full_disk(table, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, 0, 5, 2)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["pairs-00000.parquet"]
    assert load_pairs(tmp_path).prompts == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"z_T": None}, "column z_T is missing"),
        (
            {"z_S": pa.array([[0.0]] * 2)},
            "column z_S must be a fixed-shape tensor of float16, or of uint16 for bfloat16, not list",
        ),
        (
            {"z_S": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 1, 3, 3), "f2"))},
            r"z_S has shape \(1, 3, 3\)",
        ),
    ],
)
def test_wrong_shards_are_named_with_their_column(tmp_path, change, said):
    write(tmp_path, 0, 0, 2)
    table = pq.read_table(write(tmp_path, 1, 2, 2))
    for name, column in change.items():
        table = table.drop_columns(name)
        table = table if column is None else table.append_column(name, column)
    pq.write_table(table, shard_file(tmp_path, 1))
    with pytest.raises(InputError, match=rf"pairs-00001\.parquet: .*{said}"):
        PairSet(tmp_path)


def test_unusable_folders_say_why(tmp_path):
    with pytest.raises(InputError, match="no pairs-"):
        PairSet(tmp_path)
    shard_file(tmp_path, 0).write_bytes(b"not parquet")
    with pytest.raises(InputError, match="pairs-00000.parquet: not a readable parquet"):
        PairSet(tmp_path)
    write(tmp_path, 0, 0, 2)
    with pytest.raises(InputError, match=r"z_T has shape \(2, 4, 4\), but \(2, 8, 8\) is needed"):
        PairSet(tmp_path, (2, 8, 8))


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="z_T has values that are not finite in float16"):
        write(tmp_path, 0, 0, 2, torch.full((2, 2, 4, 4), 1e6))
    with pytest.raises(ValueError, match=r"z_T must be \[2, C, H, W\]"):
        write(tmp_path, 0, 0, 2, torch.zeros(3, 2, 4, 4))
    assert existing_shards(tmp_path) == []


def test_order_is_a_permutation_that_follows_seed_and_epoch(tmp_path):
    for shard in range(4):
        write(tmp_path, shard, 5 * shard, 5)
    pairs, ids = PairSet(tmp_path), np.arange(1, 20)
    orders = [pairs.order(ids, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == ids.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert np.array_equal(orders[1], PairSet(tmp_path).order(ids, 0, 1))


def test_order_of_a_large_set_stays_within_the_cached_shards(tmp_path):
    for shard in range(6):
        write(tmp_path, shard, 5 * shard, 5)
    order = PairSet(tmp_path, cached_shards=2).order(np.arange(30), 0, 0)
    windows = [sorted({int(i) // 5 for i in order[start : start + 10]}) for start in (0, 10, 20)]
    assert all(len(window) == 2 for window in windows)
    assert sum(windows, []) != list(range(6))
    assert any(order[i] // 5 != order[i + 1] // 5 for i in range(9))  # both shards of a window are mixed


def test_split_shares_no_prompt_and_holds_out_the_share(tmp_path):
    z = torch.zeros(100, 1, 2, 2)
    write_pairs(
        tmp_path,
        0,
        prompts=[f"p{i // 2}" for i in range(100)],
        prompt_ids=torch.arange(100) // 2,
        seeds=range(100),
        z_teacher=z,
        z_student=z,
    )
    pairs = PairSet(tmp_path)
    training, held_out = split(pairs, 0.1, seed=0)
    assert sorted([*training, *held_out]) == list(range(100))
    assert len(held_out) == 10
    assert not {i // 2 for i in training} & {i // 2 for i in held_out}
    assert not np.array_equal(held_out, split(pairs, 0.1, seed=1)[1])


def test_a_text_on_several_lines_is_one_prompt(tmp_path):
    z = torch.zeros(40, 1, 2, 2)
    texts = [f"p{i % 20}" for i in range(40)]
    write_pairs(tmp_path, 0, prompts=texts, prompt_ids=range(1, 41), seeds=range(40), z_teacher=z, z_student=z)
    training, held_out = split(PairSet(tmp_path), 0.1, seed=0)
    assert len(held_out) == 4
    assert not {texts[i] for i in training} & {texts[i] for i in held_out}


def test_split_of_one_prompt_is_by_row(tmp_path):
    z = torch.zeros(10, 1, 2, 2)
    write_pairs(tmp_path, 0, prompts=[""] * 10, prompt_ids=[0] * 10, seeds=range(10), z_teacher=z, z_student=z)
    training, held_out = split(PairSet(tmp_path), 0.2, seed=0)
    assert len(training) == 8
    assert len(held_out) == 2


def test_a_shard_tells_what_it_covers_even_when_it_is_empty(tmp_path):
    failed = [{"row": 3, "prompt_id": 9, "prompt": "é", "reason": "broken"}]
    z = torch.ones(1, 2, 4, 4)
    write_pairs(
        tmp_path,
        0,
        prompts=["a"],
        prompt_ids=[1],
        seeds=[0],
        z_teacher=z,
        z_student=z[:, :1, :2, :2],
        rows=[2],
        teacher=("org/name", "abc"),
        about={"rows": 2, "failed": failed},
    )
    write_pairs(
        tmp_path,
        1,
        prompts=[],
        prompt_ids=[],
        seeds=[],
        z_teacher=z[:0],
        z_student=z[:0, :1, :2, :2],
        rows=[],
        teacher=("org/name", "abc"),
        about={"rows": 4, "failed": []},
    )
    write(tmp_path, 2, 0, 3)
    assert about_shard(tmp_path, 0) == {"rows": 2, "failed": failed}
    assert about_shard(tmp_path, 1)["rows"] == 4
    assert about_shard(tmp_path, 2) == {"rows": 3, "failed": []}
    assert pq.read_table(shard_file(tmp_path, 0))["teacher"].to_pylist() == ["org/name"]
    pairs = PairSet(tmp_path, (2, 4, 4), (1, 2, 2))
    assert len(pairs) == 4
    assert pairs.rows([3, 0]).prompts == ["prompt 2", "a"]
    with pytest.raises(ValueError, match="at least 1"):
        write_pairs(tmp_path, 3, prompts=[], prompt_ids=[], seeds=[], z_teacher=z[:0], z_student=z[:0])


def test_only_old_unfinished_files_are_removed(tmp_path):
    write(tmp_path, 0, 0, 2)
    kill = "import os; from raydistill.storage.atomic import replacing; from pathlib import Path\n"
    kill += "with replacing(Path('pairs-00001.parquet')) as file: file.write_bytes(b'half'); os._exit(9)"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", kill], cwd=tmp_path).returncode == 9
    fresh, old = (file for file in tmp_path.iterdir() if file.name.startswith("."))
    older = tmp_path / ".pairs-00002.parquet.aa"  # of an earlier version
    older.write_bytes(b"half")
    assert existing_shards(tmp_path) == [0]
    for file in (old, older):
        os.utime(file, (time.time() - 7200,) * 2)
    remove_abandoned(tmp_path, "pairs-*.parquet")
    assert sorted(file.name for file in tmp_path.iterdir()) == [fresh.name, "pairs-00000.parquet"]


@pytest.mark.parametrize(("count", "seen"), [(2, [0, 5]), (5, [0, 2, 5, 6, 8]), (99, list(range(10)))])
def test_previews_are_spread_over_the_shards(tmp_path, count, seen):
    for shard in range(2):
        ids = range(5 * shard, 5 * shard + 5)
        write(
            tmp_path, shard, 5 * shard, 5, previews=[png_bytes(Image.new("RGB", (4, 4), (25 * i, 0, 255))) for i in ids]
        )
    images, prompts = captioned_previews([shard_file(tmp_path, shard) for shard in range(2)], count)
    assert prompts == [f"prompt {i}" for i in seen]
    expected = torch.tensor([[25.0 * i, 0, 255] for i in seen]) / 127.5 - 1
    assert images.shape == (len(seen), 3, 4, 4)
    torch.testing.assert_close(images[:, :, 2, 1], expected)
