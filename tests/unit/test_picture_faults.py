"""Faults of people's picture sets: one odd sample, path or table costs its own row, is told, and loses nothing else."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from picture_sets import png, write_hub_parquet, write_tar

from raydistill.data import pictures as pictures_module
from raydistill.data.holdout import Side, is_held_out
from raydistill.data.images import BadImage, ImageSet
from raydistill.data.ordered_shards import OrderedWriter
from raydistill.data.pair_stream import read
from raydistill.data.picture_order import PictureOrder, Position
from raydistill.data.picture_probe import check_first
from raydistill.data.picture_shards import ListedShards
from raydistill.data.picture_tars import TarShards
from raydistill.data.pictures import Cursor, Filters, PictureRow, Pictures, open_pictures, open_source
from raydistill.data.prompts import read_prompts
from raydistill.data.synthesis import check_beginning
from raydistill.errors import InputError


def rows_of(source: Path | str, **columns) -> list[PictureRow]:
    return list(open_pictures(str(source), **columns).rows(0))


def told(source: Path | str, **columns) -> list[tuple[str, str]]:
    """(caption, failure) of each row."""
    return [(row.caption, row.failure) for row in rows_of(source, **columns)]


# -- held-out prompts -----------------------------------------------------------------------------------


def test_a_caption_is_held_out_in_whatever_case_and_spacing(tmp_path):
    """A prompt keeps its spaces and a caption does not: one key compares them, which the split of a file has too."""
    lines = [f"a  red   Fox number {number}" for number in range(200)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    held_out = read_prompts(tmp_path / "prompts.txt", side=Side(0.2, True)).prompts
    captions = [held_out[0], held_out[1].upper(), f" {held_out[2]}\n", held_out[3] + "!"]
    members = [one for n, text in enumerate(captions) for one in ((f"{n}.png", png(n)), (f"{n}.txt", text))]
    source = open_pictures(str(write_tar(tmp_path / "a.tar", members)))
    rows = list(source.rows(0, filters=Filters(captions=held_out)))
    assert [row.left_out for row in rows] == ["held-out caption"] * 3 + [""]
    assert all(is_held_out(row.caption, 0.2) for row in rows[:3])


# -- text that cannot be written ------------------------------------------------------------------------


def test_a_caption_with_a_lone_surrogate_is_one_failed_row_in_every_form(tmp_path):
    """JSON may spell one out. No tokenizer takes it, and no file of pairs."""
    said = '{"caption": "nice \\ud83d", "file_name": "a.png"}'
    write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.json", said), ("2.png", png(2)), ("2.txt", "good")])
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.jsonl").write_text(said)
    bad = ("", "the caption is not valid UTF-8")
    assert told(tmp_path / "a.tar") == [bad, ("good", "")]
    assert told(tmp_path / "t.jsonl") == [bad]


def test_names_that_are_no_utf_8_are_spelled_out_in_what_is_written(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(b"none")
    (row,) = rows_of(tmp_path)
    assert row.name == r"caf\udce9.png"
    assert row.data == b"none"
    with pytest.raises(BadImage, match=r"caf\\udce9\.png: UnidentifiedImageError"):
        open_source(str(tmp_path)).picture(0, 8)
    (row,) = rows_of(write_tar(tmp_path / "a.tar", [("\udce9.png", png(1))]))
    assert (row.name, row.failure) == (r"a.tar, \udce9", "")


# -- paths of tables ------------------------------------------------------------------------------------


def test_an_odd_path_in_a_table_costs_its_own_row_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module.time, "sleep", lambda seconds: pytest.fail("a path is not asked for again"))
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "loop").symlink_to("loop")
    paths = {
        "a.png": "",
        "x" * 300 + ".png": "the path is too long",
        "a\0.png": "the path has a null character",
        "a.png/b.png": "no such file",
        "loop/x.png": "its links lead in a circle",
        "\ud83d.png": "the path is not valid UTF-8",
        "./a.png": "",
    }
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"img_path": path, "prompt": "p"}) for path in paths))
    assert [row.failure for row in rows_of(tmp_path / "t.jsonl")] == list(paths.values())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_does_not_answer_is_asked_again(tmp_path, monkeypatch, number):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.jsonl").write_text('{"img_path": "a.png"}')
    read, lost, pauses = ListedShards._read, [1, 2], []

    def flaky(self, path: str) -> bytes:
        if lost:
            raise OSError(number, os.strerror(lost.pop()))
        return read(self, path)

    monkeypatch.setattr(ListedShards, "_read", flaky)
    monkeypatch.setattr(pictures_module.time, "sleep", pauses.append)
    assert told(tmp_path / "t.jsonl") == [("", "")]
    assert len(pauses) == 2


# -- captions -------------------------------------------------------------------------------------------


def captions_of(source: ImageSet | Pictures) -> list[str]:
    return list(source.prompts) if isinstance(source, ImageSet) else [row.caption for row in source.rows(0)]


def test_a_set_has_the_same_captions_listed_and_as_a_stream(tmp_path):
    columns = {
        "text": ["hello", "a  cup"],
        "TEXT": ["hello", None],
        "captions": [["x"], []],
        "blip2_caption": ["b", "c"],
        "caption": [["x"], None],
    }
    for name, values in columns.items():
        file = write_hub_parquet(tmp_path / name / "a.parquet", [1, 2], {name: values})
        wanted = [
            " ".join((value[0] if isinstance(value, list) else value).split()) if value else "" for value in values
        ]
        listed = open_source(str(file.parent))
        assert isinstance(listed, ImageSet)
        for source in (listed, open_source(str(file)), open_source(str(file.parent), streamed=True)):
            assert captions_of(source) == wanted, name
            assert f"captions in {name!r}" in str(source)
        assert captions_of(open_source(str(file.parent / "*.parquet"), caption_column=name.lower())) == wanted
    several = {"caption_0": [["a", "b"]] * 20, "caption_1": ["c"] * 20}
    file = write_hub_parquet(tmp_path / "several.parquet", range(20), several)
    assert set(captions_of(open_source(str(file)))) == set(captions_of(open_pictures(str(file)))) == {"a", "b", "c"}


def test_columns_that_counted_before_go_on_alone(tmp_path):
    """The wider rule adds nothing to sets that had captions: their pairs stay."""
    columns = {"caption": ["a"] * 20, "caption_2": ["b"] * 20, "Text": ["c"] * 20, "captions": ["d"] * 20}
    file = write_hub_parquet(tmp_path / "a.parquet", range(20), columns)
    assert set(captions_of(open_pictures(str(file)))) == {"a", "b"}
    assert set(captions_of(open_source(str(file)))) == {"a"}
    known = open_pictures(str(file))
    assert not known.shards.wider
    only = write_hub_parquet(tmp_path / "b.parquet", [1], {"captions": ["d"]})
    assert open_pictures(str(only)).shards.wider == ["captions"]


def test_a_folder_with_a_table_or_tars_further_down_is_read_by_them(tmp_path):
    inner = tmp_path / "photos" / "train"
    inner.mkdir(parents=True)
    (inner / "a.png").write_bytes(png(1))
    (inner / "metadata.csv").write_text("file_name,text\na.png,a red thing\n")
    assert captions_of(open_source(str(tmp_path / "photos"))) == ["a red thing"]
    assert captions_of(open_source(str(tmp_path / "photos"), streamed=True)) == ["a red thing"]
    (tmp_path / "tars" / "00").mkdir(parents=True)
    write_tar(tmp_path / "tars" / "00" / "0.tar", [("1.png", png(1)), ("1.txt", "one")])
    assert captions_of(open_source(str(tmp_path / "tars"))) == ["one"]
    write_hub_parquet(tmp_path / "set" / "data" / "a.parquet", [1])
    assert captions_of(open_source(str(tmp_path / "set"))) == ["cap 1"]
    for hidden in (inner / ".old.tar", inner / ".metadata.csv"):
        hidden.write_text("x")
    (inner / "metadata.csv").unlink()
    assert isinstance(open_source(str(tmp_path / "photos")), ImageSet)


def test_suffixes_in_a_tar_count_in_any_case_and_keys_by_the_wider_rule(tmp_path):
    members = [
        ("1.PNG", png(1)), ("1.TXT", "hello"), ("2.png", png(2)), ("2.JSON", '{"caption": "hi"}'),
        ("3.png", png(3)), ("3.json", '{"blip2_caption": "b"}'), ("4.png", png(4)), ("4.json", '{"TEXT": "t", "n": 1}'),
        ("5.png", png(5)), ("5.json", '{"title": "t"}'),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    assert told(tar) == [(caption, "") for caption in ("hello", "hi", "b", "t", "")]
    assert str(open_pictures(str(tar))).endswith("; captions in '.TXT'")
    last = write_tar(tmp_path / "b.tar", members[-2:])
    assert str(open_pictures(str(last))).endswith("; no captions: its JSON file's keys are 'title'")
    assert told(last, caption_column="Title") == [("t", "")]
    assert str(open_pictures(str(last), caption_column="title")).endswith("; captions in 'title'")
    assert str(open_pictures(str(write_tar(tmp_path / "c.tar", members[:1])))).endswith(
        "no captions: its files are '.PNG'"
    )


def test_a_table_and_a_folder_say_where_their_captions_are(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    assert str(open_pictures(str(tmp_path))).endswith("no captions: no .txt files of the same names")
    (tmp_path / "a.txt").write_text("one")
    assert str(open_pictures(str(tmp_path))).endswith("captions of 1 in .txt files")
    (tmp_path / "t.csv").write_text("file_name,Title,x_caption\na.png,a,b\n")
    assert str(open_pictures(str(tmp_path / "t.csv"))).endswith("; captions in 'x_caption'")
    (tmp_path / "t.csv").write_text("file_name,Title\na.png,a\n")
    assert str(open_pictures(str(tmp_path / "t.csv"))).endswith("; no captions: its columns are 'file_name', 'Title'")


# -- tables ---------------------------------------------------------------------------------------------


def test_a_table_is_never_in_memory_as_a_whole(tmp_path):
    count = 9_000
    (tmp_path / "t.csv").write_text("file_name,text\n" + "".join(f"{n}.png,{'word ' * 20}{n}\n" for n in range(count)))
    (tmp_path / "one.csv").write_text("file_name,text\na.png,x\n")
    open_pictures(str(tmp_path / "one.csv"))  # what is imported with the first table is no table
    tracemalloc.start()
    pictures = open_pictures(str(tmp_path / "t.csv"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pictures.shards._entries) == count
    assert peak < 3 << 20, peak


@pytest.mark.parametrize("name", ["metadata.csv.gz", "metadata.jsonl.gz"])
@pytest.mark.parametrize("kind", ["damaged", "cut"])
def test_a_damaged_table_is_one_line_that_names_it(tmp_path, name, kind):
    noise = random.Random(0)
    rows = "".join(f"{noise.randbytes(20).hex()}.png,x\n" for _ in range(4000))
    data = bytearray(gzip.compress(f"file_name,text\n{rows}".encode()))
    if kind == "cut":
        data = data[:-40]
    else:
        data[2000:2100] = noise.randbytes(100)
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(InputError, match=rf"{name}: its compressed bytes are damaged \(") as refused:
        open_pictures(str(tmp_path / name))
    assert "\n" not in str(refused.value)


# -- pictures of a sample -------------------------------------------------------------------------------


def test_a_picture_that_a_sample_lacks_is_a_failed_row_that_names_the_key(tmp_path):
    members = [
        ("1.depth.png", png(1)), ("1.jpg", png(2)), ("1.txt", "x"), ("2.png", png(3)), ("3.DEPTH.webp", png(4)),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)

    def taken(column: str) -> list[bytes | str]:
        return [row.failure or row.data for row in rows_of(tar, image_column=column)]

    assert taken("image") == [png(1), png(3), png(4)]
    assert taken("jpg") == [png(2), png(3), "no 'jpg' (synthesis.image_column) among its files (DEPTH.webp)"]
    assert taken("depth.png") == [png(1), "no 'depth.png' (synthesis.image_column) among its files (png)", png(4)]
    assert taken("depth") == [png(1), "no 'depth' (synthesis.image_column) among its files (png)", png(4)]
    assert all("no 'imgg' (synthesis.image_column)" in failure for failure in taken("imgg"))
    assert "of .depth.png, .jpg the first is taken (synthesis.image_column names another)" in str(
        open_pictures(str(tar))
    )
    assert "is taken" not in str(open_pictures(str(tar), "jpg"))


# -- sets of which nothing can be used ------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Pictures:
    """Tars of 1,000, 1,000 and 500 pictures: the first ten of each have 12 pixels a side, the others 8."""
    folder, small, large = tmp_path_factory.mktemp("many"), png(1, 8, 8), png(2, 12, 12)
    for shard in range(3):
        count = 500 if shard == 2 else 1000
        write_tar(folder / f"{shard}.tar", ((f"{n}.png", large if n < 10 else small) for n in range(count)))
    return open_pictures(str(folder))


def read_rows(monkeypatch) -> list[tuple[int, int]]:
    """Fills with what is read from now on."""
    read, seen = TarShards.rows, []

    def counted(self, shard: int, start: int = 0):
        for number, row in enumerate(read(self, shard, start), start=start):
            seen.append((shard, number))
            yield row

    monkeypatch.setattr(TarShards, "rows", counted)
    return seen


def test_a_set_that_is_nearly_all_left_out_is_refused_after_its_first_rows(many, monkeypatch):
    seed = next(seed for seed in range(99) if many.order(seed, 0)[-1] == 2)  # the short tar comes last
    seen = read_rows(monkeypatch)
    check_first(many, seed, Filters(min_pixels=12))  # 20 of 2,000 are 1 %
    assert len(seen) == 1010
    seen.clear()
    every = Filters(min_pixels=13)
    refusals = []
    for _ in range(2):
        with pytest.raises(InputError) as refused:
            check_first(many, seed, every)
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]
    why = "of the first 2,000 pictures 0 can be used: 2,000 are smaller than synthesis.min_pixels=13"
    assert refusals[0].startswith(f"synthesis.images: {many.source}: {why}; name another set")
    assert len(seen) == 2 * 2000
    seen.clear()
    check_first(many, seed, Filters())
    assert len(seen) == 20
    other = next(seed for seed in range(99) if many.order(seed, 0)[0] == 2)
    check_first(many, other, Filters(min_pixels=12), wanted=15)


def test_what_left_pictures_out_is_counted_by_reason(tmp_path):
    small, broken = png(1, 8, 8), png(2, 16, 16)[:-60]
    members = [one for n in range(1200) for one in ((f"{n}.png", small), (f"{n}.txt", "Held  out" if n < 700 else "c"))]
    members += [(f"b{n}.png", broken) for n in range(820)]
    pictures = open_pictures(str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(InputError) as refused:
        check_first(pictures, 0, Filters(min_pixels=9, captions=["held out"]))
    text = str(refused.value)
    assert "0 can be used: 800 cannot be read (the last one: a.tar, b799: " in text
    assert "), 700 have captions that are held out, 500 are smaller than synthesis.min_pixels=9; " in text
    few = write_tar(tmp_path / "few.tar", members[: 2 * 1100])
    check_first(open_pictures(str(few)), 0, Filters(min_pixels=9))  # is read whole, and refused then


def test_synthesis_and_bridge_look_first_and_never_where_something_was_made(many, tmp_path):
    every = Filters(min_pixels=13)
    order = PictureOrder(pictures=many, seed=0, held_out=0.5, window=4, filters=every)
    with pytest.raises(InputError, match="2,000 are smaller than synthesis.min_pixels=13"):
        next(read(order, Position(), 1, 4))
    with pytest.raises(InputError, match="no picture is held out"):  # all are read, as this run's were
        next(read(order, Position(Cursor(0, 1, 3)), 1, 4))
    recipe = SimpleNamespace(source=many, seed=0, filters=every, count=None)
    settings = {"limit": None, "shard_size": 4, "shards": 3, "seed": 0, "teacher": ("t", "r"), "max_failed_rows": 0}
    writer = OrderedWriter(tmp_path, **settings, settings={}, notes={})
    with pytest.raises(InputError, match="2,000 are smaller than synthesis.min_pixels=13"):
        check_beginning(recipe, writer)
    writer.cursor = (0, 7)
    check_beginning(recipe, writer)
