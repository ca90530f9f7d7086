"""Folders of an evaluation, as tests make them."""

from __future__ import annotations

from pathlib import Path

import torch

from raydistill.evaluation.folder import EvaluationFolder
from raydistill.pictures.files import save_png
from raydistill.pictures.grids import to_pil
from raydistill.pictures.picture import Picture


def items_of(prompts: list[str], categories: tuple[str, ...] = ("",)) -> list[Picture]:
    return [Picture(i, i + 1, p, 0, categories[i % len(categories)]) for i, p in enumerate(prompts)]


def folder_of(folder: Path, items: list[Picture], images: torch.Tensor | None = None) -> Path:
    """`folder` with these pictures, `images`: (len(items), 3, height, width) in [0, 1]; without, none is drawn yet."""
    EvaluationFolder.create(folder, items, {"batch_size": 2})
    for item, image in zip(items, images if images is not None else [], strict=images is not None):
        save_png(folder / "pictures" / item.file_name, to_pil(image), item.facts)
    return folder
