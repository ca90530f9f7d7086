"""Prompt sets of evaluations: files with an optional category column, and the published sets by name.

A picture is decided by its prompt's number (its row in the file) and its seed. A set that is larger than the file goes
round it again with the next seed; a smaller one takes a seeded sample, since a file may be sorted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raydistill.data.prompts import PromptReport, PromptSet, read_prompts
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
    name: str, sets: Place, column: str | None = None, category_column: str | None = None
) -> CategorisedPrompts:
    """The prompts that `name` names: a file, a folder of them, an embedded set, or a published one.

    Args:
        name: a file that `read_prompts` reads; a .json list of texts or objects; a folder of .json lists (each file a
            category) or of .txt files (one prompt each); heldout and shapes-pairs; or a key of PUBLISHED.
        sets: folder where the published sets were put.
        column: of the prompt; None: prompt, Prompt or caption.
        category_column: of the category; None: category or Category, where the file has it.

    Raises:
        InputError: no such set, or one that cannot be used.
    """
    if name == PAIRS:
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
    if path.is_dir() or path.suffix.lower() == ".json":
        return _collected(title, path, column, category_column)
    return _tabular(title, path, column, category_column)


def _held_out_pairs(count: int) -> list[str]:
    """Different captions of two objects that no training set contains, in a fixed order."""
    rng, captions = random.Random(0), {}
    while len(captions) < count:
        captions[sample_scene(rng, held_out=True, two_objects=1.0).caption] = None
    return list(captions)


def _tabular(title: str, path: Path, column: str | None, category_column: str | None) -> CategorisedPrompts:
    prompts = _first(path, (column,) if column else PROMPT_COLUMNS, "--column")
    if path.suffix.lower() == ".txt":
        if category_column:
            raise InputError(f"{path}: a text file has no columns (--category-column {category_column})")
        return CategorisedPrompts(title, prompts, {})
    try:
        found = _first(path, (category_column,) if category_column else CATEGORY_COLUMNS, "--category-column")
    except InputError:
        if category_column:
            raise
        return CategorisedPrompts(title, prompts, {})
    return CategorisedPrompts(title, prompts, dict(zip(found.ids.tolist(), found.prompts, strict=True)))


def _first(path: Path, columns: Iterable[str], option: str) -> PromptSet:
    """The texts of the first of these columns that the file has."""
    error = None
    for column in columns:
        try:
            return read_prompts(path, column)
        except InputError as failed:
            error = error or InputError(str(failed).replace("(prompts.column)", f"({option})"))
            if "no column" not in str(failed):
                break
    raise error


def _collected(title: str, path: Path, column: str | None, category_column: str | None) -> CategorisedPrompts:
    """A .json list, or a folder of such lists or of single prompts; numbered from 1 in the order of file names."""
    texts: list[str] = []
    categories: dict[int, str] = {}
    files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: a folder without .json or .txt files")
    for file in files:
        entries = [file.read_text(encoding="utf-8", errors="strict")] if file.suffix == ".txt" else _json_list(file)
        for row, entry in enumerate(entries, start=1):
            record = entry if isinstance(entry, dict) else {"prompt": entry}
            text = next((record[c] for c in ((column,) if column else PROMPT_COLUMNS) if c in record), None)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{file}, entry {row}: no prompt ({column or 'prompt'})")
            texts.append(text.strip())
            names = (category_column,) if category_column else CATEGORY_COLUMNS
            category = next((record[c] for c in names if c in record), None)
            if category is None and path.is_dir() and file.suffix == ".json":
                category = file.stem.removeprefix("benchmark_")
            if category is not None:
                categories[len(texts)] = str(category)
    report = PromptReport(str(path), len(texts), len(texts), len(texts) - len(set(texts)))
    return CategorisedPrompts(title, PromptSet(texts, report=report), categories)


def _json_list(file: Path) -> list:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: must be a JSON list of prompts")
    return entries
