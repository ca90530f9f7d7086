"""How many pairs a Bridge needs: what the sets hold, what is measured, and that nothing is done twice."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.benchmark import pairs
from raydistill.benchmark.pair_sets import Sets, installed_photographs
from raydistill.benchmark.pairs import BridgeCell, Results, add_arguments, run, table
from raydistill.data.pairs import PairSet
from raydistill.errors import InputError
from raydistill.shapes.captions import parse
from raydistill.spaces import load_space
from raydistill.storage.resolve import resolve


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """count, images -> Sets in a folder of their own."""
    spaces = [load_space(resolve(f"shapes:{name}")) for name in ("flux", "sd15")]

    def make(count, images=None):
        return Sets(tmp_path_factory.mktemp("sets"), *spaces, count=count, images=images, share=0.5, seed=3)

    return make


def same(a, b) -> bool:
    return torch.equal(a.z_teacher, b.z_teacher) and torch.equal(a.z_student, b.z_student) and a.prompts == b.prompts


@pytest.mark.parametrize("source", ["renders", "pictures+"])
def test_the_first_rows_are_those_of_a_larger_set(sets, source):
    few, more = sets(3).make(source), sets(5).make(source)
    assert (len(few), len(more)) == (3, 5)
    assert same(few.rows(range(3)), more.rows(range(3)))


def test_renders_are_scenes_that_no_prompt_file_has(sets):
    captions = sets(40).make("renders").prompts()
    known = (
        resolve("shapes:prompts.txt").read_text().splitlines() + resolve("shapes:heldout.txt").read_text().splitlines()
    )
    assert not set(captions) & set(known)
    assert not any(parse(caption).held_out for caption in captions)
    assert len(set(captions)) > 30


@pytest.mark.full
def test_changed_sets_are_of_the_same_pictures(sets):
    both = sets(6)
    plain, changed = (both.make(source).rows(range(6)) for source in ("renders", "renders+"))
    assert plain.prompts == changed.prompts
    alike = [torch.equal(a, b) for a, b in zip(plain.z_teacher, changed.z_teacher, strict=True)]
    assert 0 < sum(alike) < 6


@pytest.mark.full
def test_a_folder_of_pictures_is_read_in_a_seeded_order_with_its_captions(sets, tmp_path):
    for number in range(6):
        Image.new("RGB", (70, 70), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    found = sets(4, tmp_path).make("pictures")
    assert len(found) == 4
    assert found.prompts() != sorted(found.prompts())
    assert found.prompts() == sets(9, tmp_path).make("pictures").prompts()[:4]
    assert len(sets(9, tmp_path).make("pictures")) == 6, "no more than there are"


def test_there_are_photographs_in_an_install():
    sizes = [Image.open(file).size for file in installed_photographs()]
    assert len(sizes) == 3
    assert min(min(size) for size in sizes) >= 400


def test_an_unknown_source_is_refused_by_name(sets):
    with pytest.raises(InputError, match="--sources: no 'photos'; there are teacher, renders, pictures, mix, teacher"):
        sets(2).make("photos")


def cell(folder, **changes) -> BridgeCell:
    told = {"source": "renders", "size": 250, "seed": 0, "steps": 5, "batch": 4, "subset": ("here", "abc")}
    return BridgeCell(**told | changes, measured={"psnr_samples": ("there", "def")}, folder=folder)


def test_results_are_known_by_all_that_decides_them_and_by_no_folder(tmp_path):
    file = tmp_path / "deep" / "results.jsonl"
    results = Results(file)
    assert results.of(cell(tmp_path)) is None
    results.add(cell(tmp_path), {"psnr_samples": 20.0})
    results.add(cell(tmp_path, seed=1), {"psnr_samples": 21.0})
    assert [json.loads(line)["found"] for line in file.read_text().splitlines()] == [
        {"psnr_samples": 20.0},
        {"psnr_samples": 21.0},
    ]
    again = Results(file)
    assert again.of(cell(tmp_path / "elsewhere", subset=("moved", "abc"))) == {"psnr_samples": 20.0}
    for changes in (
        {"subset": ("here", "xyz")},
        {"steps": 6},
        {"batch": 8},
        {"size": 300},
        {"seed": 2},
        {"source": "teacher"},
    ):
        assert again.of(cell(tmp_path, **changes)) is None


def test_the_table_has_means_spreads_and_the_number_of_seeds():
    row = {"source": "renders", "pairs": 1000}
    rows = [
        row | {"seed": 0, "psnr_samples": 20.0, "psnr_beside": 18.0},
        row | {"seed": 1, "psnr_samples": 21.0, "psnr_beside": 18.0},
        {"source": "shipped", "pairs": 0, "seed": 0, "psnr_samples": 31.4, "psnr_beside": 26.1},
        row | {"seed": 0, "accuracy": 0.9},
    ]
    settings = {
        "images": "crops",
        "augment": 0.5,
        "steps": 300,
        "batch": 8,
        "updates": 120,
        "held_out": 256,
        "pictures": 512,
    }
    lines = table({"rows": rows, **settings}).splitlines()
    assert lines[2] == "| renders | 1,000 | 20.50 ± 0.71 (2) | 18.00 ± 0.00 (2) | 0.900 (1) |"
    assert lines[3] == "| shipped | – | 31.40 (1) | 26.10 (1) | – |"
    assert "50% of the rows are changed. pictures: crops." in lines[5]


@pytest.mark.full
def test_a_small_run_measures_every_cell_and_goes_on(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = "--sizes 8 12 99 --sources mix teacher --seeds 1 --students 1 --student-sizes 12 --steps 2 --updates 1 --held-out 8"
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.fromarray(np.full((64, 64, 3), 60 * number, np.uint8)).save(images / f"{number}.png")
    arguments = parser.parse_args([*line.split(), "--pictures", "8", "--parallel", "1", "--images", str(images)])
    arguments.storage = tmp_path
    result = run(arguments)
    told = [(row["source"], row["pairs"], sorted(set(row) - {"source", "pairs", "seed"})) for row in result["rows"]]
    psnrs, accuracy = ["psnr_beside", "psnr_samples"], ["accuracy"]
    assert told == [
        ("mix", 8, psnrs),
        ("mix", 12, psnrs),  # four pictures of each source
        ("teacher", 8, psnrs),
        ("teacher", 12, psnrs),
        ("teacher", 99, psnrs),
        ("shipped", 0, psnrs),
        ("mix", 12, accuracy),
        ("teacher", 12, accuracy),
        ("shipped", 0, accuracy),
    ]
    shipped, untrained = result["rows"][5], result["rows"][3]
    assert shipped["psnr_samples"] > 28 > untrained["psnr_samples"] > 5
    folder = tmp_path / "benchmark" / "pairs"
    mix = PairSet(folder / "subsets" / "mix-12").rows(range(12))
    assert [bool(caption) for caption in mix.prompts] == [True, True, False] * 4, "a third of each"
    before = (folder / "results.jsonl").stat().st_mtime_ns
    assert run(arguments) == result
    assert (folder / "results.jsonl").stat().st_mtime_ns == before, "nothing was done again"
    assert table(result).count("\n| ") == 6  # one line a cell; the heading begins the text
    assert pairs.SHIPPED in table(result)
