"""Prompt sets of evaluations: files with an optional category column, and the published sets by name.

A picture is decided by its prompt's number (its row in the file) and its seed. A set that is larger than the file goes
round it again with the next seed; a smaller one takes a seeded sample, since a file may be sorted.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path

from raydistill.data.holdout import Side
from raydistill.data.prompt_rows import BadRow, checked, rows_of
from raydistill.data.prompts import MAX_CHARACTERS, PromptSet, read_prompts
from raydistill.errors import InputError
from raydistill.pictures.picture import Picture
from raydistill.shapes.captions import sample_scene
from raydistill.storage.place import Place
from raydistill.storage.resolve import SHAPES_PREFIX, local_path
from raydistill.storage.staging import local_copy

# Looked for where no column is named.
PROMPT_COLUMNS, CATEGORY_COLUMNS = ("prompt", "Prompt", "caption"), ("category", "Category")
PAIRS = "shapes-pairs"  # two objects, held out
PAIRS_COUNT = 128


# Sets that their authors publish as files: (place below the folder of prompt sets, where to get it).
PUBLISHED = {
    "parti": ("PartiPrompts.tsv", "https://github.com/google-research/parti: PartiPrompts.tsv"),
    "hpsv2": ("hpsv2", "https://huggingface.co/datasets/zhwang/HPDv2: benchmark/*.json (four lists)"),
    "hpsv3": ("hpsv3", "https://huggingface.co/datasets/MizzenAI/HPDv3: benchmark/benchmark_*.json (twelve lists)"),
    "imagereward": ("imagereward.json", "https://github.com/THUDM/ImageReward: benchmark/benchmark-prompts.json"),
    "dpg": ("dpg", "https://github.com/TencentQQGYLab/ELLA: dpg_bench/prompts/*.txt (one prompt a file)"),
}  # fmt: skip
EMBEDDED = {"heldout": f"{SHAPES_PREFIX}heldout.txt"}


@dataclass(frozen=True)
class CategorisedPrompts:
    """A prompt set, and the category of each prompt id that has one."""

    name: str
    prompts: PromptSet
    categories: dict[int, str]

    def pictures(self, count: int | None, seed: int) -> list[Picture]:
        """`count` pictures (None: one a prompt) in their order."""
        total = len(self.prompts) if count is None else count
        ids, texts = self.prompts.at(seed, range(total))
        return [
            Picture(index, number, text, seed + index // len(self.prompts), self.categories.get(number, ""))
            for index, (number, text) in enumerate(zip(ids.tolist(), texts, strict=True))
        ]


def open_prompts(
    name: str,
    sets: Place,
    column: str | None = None,
    category_column: str | None = None,
    holdout: float | None = None,
) -> CategorisedPrompts:
    """The prompts that `name` names: a file, a folder of them, an embedded set, or a published one.

    Args:
        name: a file or folder that `read_prompts` reads (each .json list of a folder is a category); heldout and
            shapes-pairs; or a key of PUBLISHED.
        sets: folder where the published sets were put.
        column: of the prompt; None: prompt, Prompt or caption.
        category_column: of the category; None: category or Category, where the file has it.
        holdout: only the prompts that a run with this `evaluation.holdout` holds out; None: all.

    Raises:
        InputError: no such set, or one that cannot be used.
    """
    side = None if holdout is None else Side(holdout, held_out=True)
    if name == PAIRS:
        if side is not None:
            raise InputError(f"--holdout belongs to a file of training prompts (--prompts FILE), not to {PAIRS}")
        return CategorisedPrompts(name, PromptSet(_held_out_pairs(PAIRS_COUNT)), {})
    path = local_path(EMBEDDED.get(name, name))
    if name in PUBLISHED and not path.exists():
        place, source = PUBLISHED[name]
        path = sets / place
        if not path.exists():
            raise InputError(f"{name}: get it from {source}, and put it at {path}")
        path = local_copy(path)
    if not path.exists():
        known = ", ".join([*EMBEDDED, PAIRS, *PUBLISHED])
        raise InputError(f"{path}: no such file, and no set of that name; sets: {known}")
    title = name if name in PUBLISHED or name in EMBEDDED else path.resolve().stem
    title += "" if side is None else "-heldout"
    return CategorisedPrompts(title, _read(path, column, side), _categories(path, category_column))


def _held_out_pairs(count: int) -> list[str]:
    """Different captions of two objects that no training set contains, in a fixed order."""
    rng, captions = random.Random(0), {}
    while len(captions) < count:
        captions[sample_scene(rng, held_out=True, two_objects=1.0).caption] = None
    return list(captions)


def _read(path: Path, column: str | None, side: Side | None = None) -> PromptSet:
    try:
        return read_prompts(path, column or PROMPT_COLUMNS, side=side)
    except InputError as error:
        text = str(error).replace("(prompts.column)", "(--column)")
        for key, option in (("evaluation.holdout=", "--holdout "), ("evaluation.prompts", "--prompts")):
            text = text.replace(key, option)
        raise InputError(text) from None


def _categories(path: Path, column: str | None) -> dict[int, str]:
    """Categories by prompt id: a column, or the names of a folder's lists."""
    found: dict[int, str] = {}
    if path.suffix.lower() == ".txt" and path.is_file():
        if column:
            raise InputError(f"{path}: a text file has no columns (--category-column {column})")
        return found
    columns = False
    try:
        for row in rows_of(path, [column] if column else CATEGORY_COLUMNS):
            if row.listed_in:
                found[row.number] = row.listed_in.removeprefix("benchmark_")
            if row.bare:
                continue
            columns = True
            with contextlib.suppress(BadRow):
                value = row.prompt()
                found[row.number] = checked(value if value is None else str(value), MAX_CHARACTERS)
    except InputError as error:
        if column:
            raise InputError(str(error).replace("(prompts.column)", "(--category-column)")) from None
    if column and not columns:
        raise InputError(f"{path}: bare texts have no columns (--category-column {column})")
    return found
