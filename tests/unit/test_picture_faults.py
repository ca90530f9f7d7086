"""Faults of people's picture sets: one odd sample, path or table costs its own row, is told, and loses nothing else."""

from __future__ import annotations

from pathlib import Path

from picture_sets import png, write_tar

from raydistill.data.holdout import Side, is_held_out
from raydistill.data.pictures import Filters, PictureRow, open_pictures
from raydistill.data.prompts import read_prompts


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
