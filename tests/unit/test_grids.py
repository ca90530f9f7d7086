"""Sample grids show the right pixels in the right places, and captions that can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import ImageFont
from rich.console import Console

from raydistill.driver.summary import kept_pictures
from raydistill.evaluation.summary import markdown, table, write_summary
from raydistill.pictures.files import save_pictures
from raydistill.pictures.grids import GAP, MARGIN, PAPER, RIGHT, WRONG, before_after, grid, to_pil, wrap


def flat(*colours: tuple[float, float, float], size: int = 32) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, size, size)


RED, GREEN, BLUE = (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0)


def test_pixels_are_exact():
    image = torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4)
    expected = np.round((image.numpy().transpose(1, 2, 0) + 1) / 2 * 255)
    assert np.abs(np.asarray(to_pil(image)).astype(float) - expected).max() <= 1
    assert np.array_equal(np.asarray(to_pil(image, 3))[::3, ::3], np.asarray(to_pil(image)))


def test_grid_puts_every_picture_in_its_cell_and_captions_below():
    sheet = grid(flat(RED, GREEN, BLUE), ["one", "two", "three"], columns=2, scale=3)
    step = 96 + GAP
    assert sheet.width == 2 * MARGIN + 2 * 96 + GAP
    assert sheet.getpixel((MARGIN + 48, MARGIN + 48)) == (255, 0, 0)
    assert sheet.getpixel((MARGIN + step + 48, MARGIN + 48)) == (0, 255, 0)
    below = np.asarray(sheet.crop((MARGIN, MARGIN + 97, MARGIN + 96, MARGIN + 96 + GAP + 8)))
    assert below.min() < 100  # ink
    second_row = np.asarray(sheet)[MARGIN + 96 + GAP :, MARGIN + 48]
    assert (second_row == (0, 0, 255)).all(-1).sum() == 96
    assert sheet.getpixel((MARGIN + step + 48, sheet.height - MARGIN - 40)) == PAPER  # the empty cell


def test_title_takes_its_own_space():
    plain, titled = grid(flat(RED), ["a"]), grid(flat(RED), ["a"], title="step 100")
    assert titled.height > plain.height
    assert titled.width == plain.width


@pytest.mark.parametrize("text", ["", "word", "a large red circle in the top left of a blue background", "x" * 200])
def test_wrapped_lines_fit_and_lose_nothing(text):
    font = ImageFont.load_default(size=11)
    lines = wrap(text, font, 96, 1000)
    assert all(font.getlength(line) <= 96 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


class CountingFont:
    """Measures as a font does, and counts the characters."""

    def __init__(self) -> None:
        self.font, self.characters = ImageFont.load_default(size=12), 0

    def getlength(self, text: str) -> float:
        self.characters += len(text)
        return self.font.getlength(text)


@pytest.mark.parametrize("pattern", ["x", "一只红色的杯子", "a red cup on a table ", "e\u0301\u0301", "\u200b", "iW "])
@pytest.mark.parametrize("lines", [5, 10**6])
def test_wrapping_measures_no_more_than_a_text_is_long(pattern, lines):
    """A number of measured characters for each character, whatever the length; none beyond the last line shown."""
    counts = []
    for length in (500, 2000, 8000):
        font = CountingFont()
        shown = wrap((pattern * length)[:length], font, 128, lines)
        assert len(shown) <= lines
        counts.append(font.characters)
    assert counts[-1] <= 10 * 8000
    assert counts[2] <= (1 if lines == 5 else 4.1) * counts[1]
    assert counts[1] <= (1 if lines == 5 else 4.1) * counts[0]


def test_caption_that_does_not_fit_ends_in_an_ellipsis():
    font = ImageFont.load_default(size=11)
    lines = wrap("a large red circle " * 20, font, 96, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 96 for line in lines)


def test_before_after_rows_have_one_size_whatever_the_teachers():
    sheet = before_after(
        {"before": flat(RED, RED), "after": flat(GREEN, GREEN), "teacher": flat(BLUE, BLUE, size=64)},
        ["a", "b"],
        scale=3,
    )
    colours = np.asarray(sheet).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert (colours == colour).all(-1).sum() == 2 * 96 * 96
    rows = [np.flatnonzero((np.asarray(sheet) == c).all(-1).any(1))[0] for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert rows == sorted(rows)
    assert before_after({"before": flat(RED), "after": flat(GREEN)}, ["a"], scale=3).height < sheet.height


def test_a_title_and_marks_say_what_is_right():
    rows = {"before": flat(BLUE, BLUE), "teacher": flat(BLUE, BLUE)}
    plain = before_after(rows, ["a", "b"], scale=3)
    sheet = before_after(rows, ["a", "b"], scale=3, title="a run", right={"before": [True, False]})
    assert sheet.height > plain.height
    right, wrong = (np.flatnonzero((np.asarray(sheet) == colour).all(-1).any(0)) for colour in (RIGHT, WRONG))
    assert 0 < right.max() < wrong.min()
    assert not (np.asarray(plain) == WRONG).all(-1).any()


def test_a_table_of_six_attributes_fits_eighty_columns(capsys):
    scores = dict.fromkeys(("mean", "size", "color", "shape", "position", "background", "all"), 0.5)
    Console(width=80).print(table({"student before": scores, "control: shared space": scores}, title="a run"))
    out = capsys.readouterr().out
    assert "…" not in out
    assert "background" in out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert len([line for line in out.splitlines() if "0.500" in line]) == 2


def test_many_prompts_make_several_bands():
    images = flat(*[RED] * 5)
    assert before_after({"before": images, "after": images}, list("abcde"), columns=2).height == pytest.approx(
        3 * before_after({"before": images[:2], "after": images[:2]}, list("ab"), columns=2).height
    )


def test_mismatched_input_is_refused():
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        grid(flat(RED), ["a", "b"])
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\]"):
        grid(torch.zeros(3, 8, 8), ["a"])
    with pytest.raises(ValueError, match="2 captions for 1 after"):
        before_after({"before": flat(RED, RED), "after": flat(RED)}, ["a", "b"])


def test_table_shows_all_rows_with_the_mean_first():
    result = table({"student before": {"colour": 0.5, "mean": 0.43}, "teacher": {"mean": 0.9, "size": 1.0}})
    assert [column.header for column in result.columns] == ["", "mean", "colour", "size"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 (closed with the process)
    console.print(result)
    lines = console.export_text().splitlines()
    assert any("student before" in line and "0.430" in line and "–" in line for line in lines)
    assert any("teacher" in line and "0.900" in line and "1.000" in line for line in lines)


def test_markdown_is_the_same_table():
    text = markdown({"student": {"size": 1.0, "mean": 0.5}, "teacher": {"size": 0.25}})
    assert text.splitlines() == [
        "|  | mean | size |",
        "|---|---|---|",
        "| student | 0.500 | 1.000 |",
        "| teacher | – | 0.250 |",
    ]


def test_summary_is_valid_json_and_replaces_whole_files(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_summary(path, {"old": 1})
    write_summary(path, {"mean": torch.tensor(0.5), "nan": float("nan"), "list": [np.float32(1.5)], "at": tmp_path})
    assert json.loads(path.read_text()) == {"mean": 0.5, "nan": None, "list": [1.5], "at": str(tmp_path)}
    with pytest.raises(TypeError):
        write_summary(path, {"bad": object()})
    assert json.loads(path.read_text())["mean"] == 0.5
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_run_whose_grid_changed_shows_what_all_its_parts_kept(tmp_path):
    (tmp_path / "distill").mkdir()
    save_pictures(tmp_path / "distill" / "before.safetensors", flat(RED, RED, RED))
    save_pictures(tmp_path / "distill" / "after.safetensors", flat(GREEN, GREEN))
    save_pictures(tmp_path / "teacher.safetensors", flat(BLUE, BLUE, BLUE, size=64))
    rows = kept_pictures(tmp_path)
    assert {label: len(row) for label, row in rows.items()} == {"before": 2, "after": 2, "teacher": 2}
    assert before_after(rows, ["a", "b"]).width > 0


def test_a_run_whose_teacher_s_row_failed_shows_the_others(tmp_path):
    (tmp_path / "distill").mkdir()
    for name in ("before", "after"):
        save_pictures(tmp_path / "distill" / f"{name}.safetensors", flat(RED))
    assert list(kept_pictures(tmp_path)) == ["before", "after"]
