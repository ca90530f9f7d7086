"""Streams of real pictures: every form is read, in an order of (seed, epoch) alone, from any cursor on, and what is bad is told."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_sets import png, write_hub_parquet, write_tar, write_tars
from PIL import Image

from raydistill.data import pictures as pictures_module
from raydistill.data.images import BadImage, ImageSet
from raydistill.data.picture_shards import LISTED
from raydistill.data.pictures import Cursor, Filters, Pictures, open_pictures, open_source
from raydistill.errors import InputError
from raydistill.storage.place import remote


def told(rows) -> list[tuple[str, str, str]]:
    return [(row.name, row.caption, row.failure) for row in rows]


def whole(source: Path | str, **columns) -> list[tuple[str, str, str]]:
    return told(open_pictures(str(source), **columns).rows(0))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    assert write_tars(folder, (4, 6, 5)) == 15
    return folder


def test_a_webdataset_gives_every_sample_once_with_its_picture_and_caption(tars):
    pictures = open_pictures(str(tars))
    rows = list(pictures.rows(3))
    assert sorted(told(rows)) == [(f"0000{t}.tar, {n:06d}", f"cap {n}", "") for t, n in
                                  [(0, n) for n in range(4)] + [(1, n) for n in range(4, 10)] + [(2, n) for n in range(10, 15)]]  # fmt: skip
    row = rows[0]
    number = int(row.caption.split()[1])
    assert row.data == png(number)
    assert np.array_equal(row.picture(64), np.asarray(Image.open(io.BytesIO(png(number)))).transpose(2, 0, 1))
    size = sum(f.stat().st_size for f in tars.iterdir()) / 1e9
    assert str(pictures) == f"{tars}: 3 tars, {size:.3g} GB; captions in '.txt'"


def test_the_order_is_of_seed_and_epoch_alone_and_rows_of_a_shard_keep_theirs(tars):
    pictures = open_pictures(str(tars / "*.tar"))
    orders = {}
    for seed, epoch in itertools.product(range(4), range(3)):
        rows = told(pictures.rows(seed, epoch))
        assert told(open_pictures(str(tars)).rows(seed, epoch)) == rows
        shards = [name for name, _ in itertools.groupby(name.partition(",")[0] for name, *_ in rows)]
        assert sorted(shards) == ["00000.tar", "00001.tar", "00002.tar"]
        for shard in shards:
            keys = [name for name, *_ in rows if name.startswith(shard)]
            assert keys == sorted(keys)
        orders[seed, epoch] = tuple(shards)
    assert len(set(orders.values())) > 2


def test_reading_goes_on_at_every_cursor_in_another_process_too(tars):
    pictures = pickle.loads(pickle.dumps(open_pictures(str(tars))))
    rows = list(pictures.rows(1))
    for done, row in enumerate(rows, start=1):
        assert told(pictures.rows(1, start=(row.after.shard, row.after.row))) == told(rows[done:])
    endless = pictures.endless(1)
    first = list(itertools.islice(endless, 40))
    assert told(first[:15]) == told(rows)
    assert told(first[15:30]) == told(pictures.rows(1, 1))
    assert told(itertools.islice(pictures.endless(1, start=first[21].after), 18)) == told(first[22:])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_readers_share_an_epoch_without_gaps_or_repeats(tars, world):
    pictures = open_pictures(str(tars))
    shares = [list(pictures.rows(2, share=(rank, world))) for rank in range(world)]
    assert sorted(told(row for share in shares for row in share)) == sorted(told(pictures.rows(2)))
    for rank, share in enumerate(shares):
        if not share:  # of 4 rows in a shard the seventh reader has none
            continue
        middle = share[len(share) // 2]
        later = pictures.rows(2, share=(rank, world), start=(middle.after.shard, middle.after.row))
        assert told(later) == told(share[len(share) // 2 + 1 :])


def test_captions_of_a_sample_come_from_text_files_then_from_its_json(tmp_path):
    said = {"caption": "in json", "width": 64, "caption_2": ["x", "y"]}
    write_tar(tmp_path / "a.tar", [
        ("a/1.jpg", png(1)), ("a/1.txt", "in text\n"), ("a/1.json", json.dumps(said)),
        ("a/2.seg.png", png(2)), ("a/2.png", png(3)), ("a/2.json", json.dumps(said)),
        ("a/3.webp", png(4)), ("a/4.json", "{}"), ("a/5.png", png(5)), ("a/5.json", "{"), ("a/6.png", png(6)), ("a/6.txt", b"caf\xe9"),
    ])  # fmt: skip
    assert whole(tmp_path / "a.tar", caption_column="caption", image_column="png") == [
        ("a.tar, a/1", "in json", ""),
        ("a.tar, a/2", "in json", ""),
        ("a.tar, a/3", "", ""),
        ("a.tar, a/4", "", "no picture among its files (json)"),
        ("a.tar, a/5", "", "its JSON file is none"),
        ("a.tar, a/6", "", ""),
    ]
    rows = list(open_pictures(str(tmp_path / "a.tar"), "png").rows(0))
    assert rows[0].caption == "in text"
    assert rows[1].data == png(3)
    assert rows[5].failure == "the caption is not valid UTF-8"
    chosen = {next(itertools.islice(open_pictures(str(tmp_path)).rows(seed), 1, None)).caption for seed in range(30)}
    assert chosen == {"in json", "x", "y"}


def test_a_tar_that_breaks_off_or_is_out_of_order_loses_nothing_silently(tmp_path, tars):
    data = (tars / "00001.tar").read_bytes()
    header = data.rindex(b"000007.png")
    texts = {
        "in-a-picture": data[: header + 1000],
        "in-a-header": data[: header + 100],
        "between": data[:header],
        "damaged": data[:header] + b"\xff" * 512 + data[header + 512 :],
        "only-zeros": data[:header] + bytes(2 << 20),
        "one-behind-the-other": data + data,
    }
    for name, content in texts.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    for file in sorted(tmp_path.iterdir()):
        pictures = open_pictures(str(file))
        rows = list(pictures.rows(0))
        # a sample's last file is known by the next one
        sure = {"in-a-picture": 3, "only-zeros": 3, "one-behind-the-other": 6}.get(file.stem, 2)
        assert [row.caption for row in rows[:sure]] == [f"cap {4 + n}" for n in range(sure)]
        lost = rows[sure:]
        assert {row.name for row in lost} == {f"{file.name}, after {3 + sure:06d}"}
        assert all(row.failure.startswith("the tar breaks off (") for row in lost)
        assert all(row.failure.endswith(f"{len(lost)} row{'s are' if len(lost) > 1 else ' is'} lost") for row in lost)
        if len(texts[file.stem]) <= header + 1000:  # all of it came, and nobody knows what there was
            assert "at least 1 row is lost" in lost[0].failure
        elif file.stem != "only-zeros":
            assert abs(len(lost) - (6 - sure or 6)) <= 1
        else:
            assert len(lost) > 20
        for start in range(5):
            assert told(pictures.rows(0, start=(0, start))) == told(rows[start:])
    padded = data + bytes(900_000)  # as of a writer with large records
    (tmp_path / "padded.tar").write_bytes(padded)
    assert [row.failure for row in open_pictures(str(tmp_path / "padded.tar")).rows(0)] == [""] * 6
    mixed = write_tar(tmp_path / "m.tar", [("1.png", png(1)), ("2.png", png(2)), ("1.txt", "one"), ("2.txt", "two")])
    failures = [row.failure for row in open_pictures(str(mixed)).rows(0)]
    assert failures[:2] == ["", ""]
    assert all("not next to each other" in failure for failure in failures[2:])
    assert len(failures) == 4


def test_a_compressed_tar_is_read_too(tmp_path, tars):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tars / "00000.tar").read_bytes()))
    assert [caption for _, caption, _ in whole(tmp_path / "a.tar.gz")] == ["cap 0", "cap 1", "cap 2", "cap 3"]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tars / "00000.tar").read_bytes())[:-5000])
    assert whole(tmp_path / "a.tar.gz")[-1][2].startswith("the tar breaks off (")


def test_memory_does_not_grow_with_a_shard(tmp_path):
    """A tar of 64 MB, and a parquet file of 64 MB in one row group, with what a few rows take."""
    data, rows = os.urandom(1 << 20), 64
    write_tar(tmp_path / "a.tar", ((f"{n}.jpg", data) for n in range(rows)))
    table = pa.table({"image": pa.array([data[n:] for n in range(rows)]), "text": ["x"] * rows})
    pq.write_table(table, tmp_path / "a.parquet", write_batch_size=4, use_dictionary=False)  # pages of 4 rows
    del table
    for name in ("a.tar", "a.parquet"):
        pictures, pool = open_pictures(str(tmp_path / name)), pa.default_memory_pool()
        pa.default_memory_pool().release_unused()
        before, peak = pool.bytes_allocated(), 0
        tracemalloc.start()
        for row in pictures.rows(0):
            assert len(row.data) > rows
            peak = max(peak, pool.bytes_allocated() - before)
        _, traced = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert traced + peak < 40 << 20, (name, traced, peak)


def test_a_damaged_row_group_costs_its_own_rows_wherever_reading_begins(tmp_path):
    pages = {"write_batch_size": 1, "data_page_size": 1, "use_dictionary": False, "compression": "none"}  # one a row
    file = write_hub_parquet(tmp_path / "x.parquet", range(40), row_group_size=17, **pages)
    data = bytearray(file.read_bytes())
    begin, end = data.index(png(15)) + len(png(15)), data.index(png(16))
    data[begin:end] = b"\xff" * (end - begin)  # the header of row 17's page
    file.write_bytes(data)
    pictures = open_pictures(str(file))
    rows = list(pictures.rows(0))
    assert [bool(row.failure) for row in rows] == [False] * 16 + [True] + [False] * 23
    assert (rows[16].name, rows[17].name) == ("x.parquet, after row 16", "x.parquet, row 18")
    assert rows[16].failure.endswith("; 1 row is lost")
    for start in range(len(rows) + 1):
        assert told(pictures.rows(0, start=(0, start))) == told(rows[start:])
    file.write_bytes(data[:-100])  # without what says how many rows there are
    [lost] = pictures.rows(0)
    assert (lost.name, lost.failure[:19]) == ("x.parquet, after row 0", "the file breaks off")


def test_parquet_as_the_hub_has_it(tmp_path):
    lists = {"caption_0": [["a", "b"], []] * 10, "caption_1": ["c", None] * 10, "caption_score": [0.5] * 20}
    write_hub_parquet(tmp_path / "data" / "train-00000.parquet", range(20), lists, row_group_size=6)
    pictures = open_pictures(str(tmp_path / "data/train-*.parquet"))
    rows = list(pictures.rows(0))
    assert [row.data for row in rows] == [png(n) for n in range(20)]
    assert {row.caption for row in rows[::2]} == {"a", "b", "c"}
    assert {row.caption for row in rows[1::2]} == {""}
    assert rows[7].name == "train-00000.parquet, row 8"
    for start in range(21):
        assert told(pictures.rows(0, start=(0, start))) == told(rows[start:])
    other = pa.table({"jpg": [png(1), None], "blip2_caption": ["one", "two"], "n": [1, 2]})
    pq.write_table(other, tmp_path / "x.parquet")
    assert whole(tmp_path / "x.parquet", caption_column="blip2_*") == [
        ("x.parquet, row 1", "one", ""),
        ("x.parquet, row 2", "", "no bytes in column 'jpg'"),
    ]


def test_a_parquet_file_that_breaks_off_ends_with_rows_that_say_so(tmp_path, bucket, monkeypatch):
    file = write_hub_parquet(tmp_path / "x.parquet", range(40), row_group_size=20)
    data = bytearray(file.read_bytes())
    middle = pq.read_metadata(file).row_group(1).column(0).dictionary_page_offset
    data[middle : middle + 40] = b"\xff" * 40
    file.write_bytes(data)
    pictures = open_pictures(str(file))
    rows = list(pictures.rows(0))
    assert all(row.failure.startswith("the file breaks off (") for row in rows[20:])
    assert rows[-1].failure.endswith("; 20 rows are lost")
    assert [row.usable for row in rows] == [True] * 20 + [False] * 20
    assert rows[-1].name == "x.parquet, after row 20"
    for start in range(len(rows) + 1):
        assert told(pictures.rows(0, start=(0, start))) == told(rows[start:])
    pauses: list[float] = []
    monkeypatch.setattr(pictures_module.time, "sleep", pauses.append)
    folder = remote(f"{bucket}/set")
    folder.upload(tmp_path)
    there = list(open_pictures(f"{folder}/*.parquet").rows(0))
    assert [(row.data, row.failure) for row in there] == [(row.data, row.failure) for row in rows]
    assert there[-1].name == f"{folder}/x.parquet, after row 20"
    assert pauses == [2.0, 4.0, 8.0]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_tables_name_pictures_beside_them(tmp_path, packed):
    (tmp_path / "train").mkdir()
    for n in range(3):
        (tmp_path / "train" / f"{n}.png").write_bytes(png(n))

    def write(name: str, text: str) -> Path:
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
        return tmp_path / name

    table = write(
        f"metadata.csv{packed}", 'file_name,text\ntrain/0.png,"one, two"\ntrain/9.png,nine\n../x.png,x\nonly\n'
    )
    expected = [
        ("train/0.png", "one, two", ""),
        ("train/9.png", "", "no such file"),
        ("../x.png", "", "the path leads out of the folder"),
        (f"metadata.csv{packed}, row 5", "", "malformed"),
    ]
    assert whole(tmp_path) == expected
    assert whole(table) == expected
    table.unlink()
    lines = [
        '{"img_path": "./train/1.png", "prompt": "a cup"}',
        "",
        "no",
        '{"img_path": "train/2.png"}',
        '{"prompt": "x"}',
    ]
    anno = write(f"anno.jsonl{packed}", "\n".join(lines))
    said = [(Path(name).name, caption, failure) for name, caption, failure in whole(anno)]
    assert said == [
        ("1.png", "a cup", ""),
        (f"anno.jsonl{packed}, row 3", "", "not a JSON object"),
        ("2.png", "", ""),
        (f"anno.jsonl{packed}, row 5", "", "no path in 'img_path'"),
    ]
    before = open_pictures(str(anno)).fingerprint
    write(f"anno.jsonl{packed}", "\n".join(lines).replace("a cup", "a mug"))
    assert open_pictures(str(anno)).fingerprint != before


def test_a_folder_of_many_pictures_is_read_in_parts(tmp_path):
    data = png(0, 8, 8)
    for n in range(LISTED + 3):
        (tmp_path / f"{n:04d}.png").write_bytes(data)
    (tmp_path / "0001.txt").write_text(" a\n cup ")
    (tmp_path / ".hidden.png").write_bytes(data)
    pictures = open_pictures(str(tmp_path))
    rows = list(pictures.rows(0))
    assert len(pictures.shards) == 2
    assert sorted(row.name for row in rows) == [f"{n:04d}.png" for n in range(LISTED + 3)]
    assert {row.name: row.caption for row in rows if row.caption} == {"0001.png": "a cup"}


def test_filters_pass_over_small_pictures_and_held_out_captions_and_tell_broken_ones(tmp_path):
    members = [
        ("1.png", png(1, 40, 64)),
        ("2.png", png(2)),
        ("2.txt", "held out"),
        ("3.png", png(3)),
        ("4.png", b"none"),
    ]
    pictures = open_pictures(str(write_tar(tmp_path / "a.tar", members)))
    rows = list(pictures.rows(0, filters=Filters(min_pixels=41, captions={"held out"})))
    assert [row.left_out for row in rows] == ["small", "held-out caption", "", ""]
    assert [row.usable for row in rows] == [False, False, True, False]
    assert rows[3].failure.startswith("UnidentifiedImageError")
    with pytest.raises(BadImage, match=r"a\.tar, 4: UnidentifiedImageError"):
        rows[3].picture(8)
    with pytest.raises(InputError, match="no usable picture in all of reader 0's share of 1"):
        list(itertools.islice(pictures.endless(0, filters=Filters(min_pixels=1000)), 5))


def test_a_store_that_goes_away_is_asked_again_at_the_row_that_did_not_come(tars, monkeypatch):
    pictures, pauses, lost = open_pictures(str(tars)), [], {3, 4, 9}
    expected, read = told(pictures.rows(0)), pictures.shards.rows
    count = itertools.count()

    def flaky(shard: int, start: int = 0):
        for row in read(shard, start):
            if next(count) in lost:
                raise OSError("connection reset")
            yield row

    monkeypatch.setattr(pictures.shards, "rows", flaky)
    monkeypatch.setattr(pictures_module.time, "sleep", pauses.append)
    assert told(pictures.rows(0)) == expected
    assert pauses == [2.0, 4.0, 2.0]
    lost.update(range(10_000))
    with pytest.raises(OSError, match=r"tars.*/0000\d\.tar, row 1: connection reset"):
        list(pictures.rows(0))


def test_the_fingerprint_is_of_names_and_sizes_not_of_where_they_lie(tmp_path, tars):
    for name in ("a", "b"):
        write_tars(tmp_path / name, (2, 2))
    a, b = (open_pictures(str(tmp_path / name)) for name in "ab")
    assert a.fingerprint == b.fingerprint == open_pictures(str(tmp_path / "a/{00000..00001}.tar")).fingerprint
    os.rename(tmp_path / "b/00001.tar", tmp_path / "b/00002.tar")
    assert open_pictures(str(tmp_path / "b")).fingerprint != a.fingerprint
    assert open_pictures(str(tmp_path / "a"), caption_column="json").fingerprint != a.fingerprint


def test_what_cannot_be_read_is_said_in_one_line(tmp_path):
    def refused(path, **columns) -> str:
        with pytest.raises(InputError) as error:
            open_pictures(str(path), **columns)
        return str(error.value)

    assert refused(tmp_path / "none").endswith("none: no such file or folder, or nothing in it")
    assert refused(tmp_path / "*.tar").endswith("*.tar: no such files")
    (tmp_path / "notes.md").write_text("x")
    assert "no tars, parquet files, tables of pictures or pictures" in refused(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    assert "a.tar, after its beginning: the tar breaks off" in refused(tmp_path)
    file = write_hub_parquet(tmp_path / "p" / "x.parquet", [1])
    assert "no column 'jpg' (synthesis.image_column); the file has: 'image', 'text'" in refused(
        file, image_column="jpg"
    )
    assert "column 'text' (synthesis.image_column) holds string, not bytes" in refused(file, image_column="text")
    assert "no column 'b' of strings (synthesis.caption_column)" in refused(file, caption_column="b")
    (tmp_path / "p" / "a.png").write_bytes(png(1))
    assert "has parquet files and image files; name one kind" in refused(tmp_path / "p")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert "no column 'file_name' with paths of pictures (synthesis.image_column); it has: 'a', 'b'" in refused(
        tmp_path / "t.csv"
    )


def test_plain_folders_and_parquet_files_stay_as_they_were_unless_a_part_is_enough(tmp_path, tars):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(1))
    file = write_hub_parquet(tmp_path / "p" / "x.parquet", [1])
    for plain in (tmp_path / "photos", file, file.parent):
        assert isinstance(open_source(str(plain)), ImageSet)
        assert isinstance(open_source(str(plain), streamed=True), Pictures)
    assert isinstance(open_source(str(tars)), Pictures)
    assert isinstance(open_source(str(file.parent / "*.parquet")), Pictures)
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cup"}')
    assert [row.caption for row in open_source(str(tmp_path / "photos")).rows(0)] == ["a cup"]
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(str(tmp_path / "nowhere"))


def test_cursors_are_ordered_as_they_are_read():
    assert Cursor() < Cursor(0, 0, 1) < Cursor(0, 1) < Cursor(1)
