"""Metrics that need nothing beyond this project's own packages: the shapes world's judge, its Fréchet distance, CLIPScore,
PickScore.

A scorer takes picture files and prompts and returns columns of one number a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from raydistill.evaluation.subject import Subject, load_painter
from raydistill.pictures.files import load_image, save_png
from raydistill.pictures.grids import to_pil
from raydistill.pictures.picture import Picture
from raydistill.shapes.judge import Judge, columns_of
from raydistill.storage.staging import on_this_machine


class Drawing:
    """Writes the files of pictures."""

    def __init__(self, subject: Subject, device: str, dtype: str, threads: int | None = None) -> None:
        _limit(threads)
        self.painter, self.title = load_painter(subject, device, getattr(torch, dtype)), subject.title

    def __call__(self, pictures: Sequence[Picture], files: Sequence[str]) -> None:
        Path(files[0]).parent.mkdir(parents=True, exist_ok=True)
        for picture, file, image in zip(pictures, files, self.painter.draw(pictures), strict=True):
            save_png(Path(file), to_pil(image), picture.facts | {"model": self.title})


def _limit(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


class JudgeScorer:
    """Columns mean, all, one an attribute, and relation (None for captions of one object); see shapes/judge.py."""

    def __init__(self, folder: str, threads: int | None = None) -> None:
        _limit(threads)
        self.judge = Judge.load(on_this_machine(folder))

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        images = torch.stack([load_image(file) for file in files])
        columns = columns_of(self.judge.compare(images, prompts))
        columns["relation"] = self.judge.relation(images, prompts)
        return {name: values.tolist() for name, values in columns.items()}


class _Clip:
    """A CLIP model's view of pictures and texts, in float32. Texts are cut at the model's length."""

    def __init__(
        self, folder: str, processor: str | None = None, device: str = "cpu", threads: int | None = None
    ) -> None:
        """
        Args:
            folder: of the model.
            processor: folder of tokenizer and picture processor; None: the model's.
        """
        _limit(threads)
        around = processor or folder
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(around)
        self.length = self.model.config.text_config.max_position_embeddings
        if Path(around, "preprocessor_config.json").is_file():
            self.processor = CLIPImageProcessorPil.from_pretrained(around)
        else:
            size = self.model.config.vision_config.image_size
            self.processor = CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            )
        self.to(device)

    def to(self, device: str | torch.device) -> None:
        """Where it computes from now on."""
        self.device = torch.device(device)
        self.model.to(self.device)

    @torch.no_grad()
    def cosines(self, files: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
        """Cosine [B] of each picture's features and its prompt's."""
        # one by one: the files may differ in size
        pixels = [self.processor(Image.open(file), return_tensors="pt")["pixel_values"] for file in files]
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        out = self.model(
            pixel_values=torch.cat(pixels).to(self.device),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        return F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())


class ClipScorer(_Clip):
    """CLIPScore (Hessel et al. 2021): 100 · max(cos(image features, text features), 0), the scale of torchmetrics.

    The paper's own scale is 2.5 instead of 100, with "A photo depicts" before the text; neither is used here.
    """

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        return {"clipscore": (100 * self.cosines(files, prompts).clamp_min(0)).tolist()}


class PickScorer(_Clip):
    """PickScore (Kirstain et al. 2023): a CLIP-H trained on people's choices; its logit scale (100) times the cosine.

    About 20. Of two pictures of a prompt that differ by 1, it expects people to choose the better one in 73 % of cases.
    """

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        return {"pickscore": (self.model.logit_scale.exp() * self.cosines(files, prompts)).tolist()}


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (Heusel et al. 2017) of Gaussians fitted to [N, D] and [M, D].

    In float64, with unbiased covariances.     (Σ₁ Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: no complex square root is needed.

    Raises:
        ValueError: fewer than two rows, or different D.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {list(features.shape)} and {list(reference.shape)}")
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"two pictures at least on either side, not {len(features)} and {len(reference)}")
    x, y = features.double(), reference.double()
    cov_x, cov_y = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + cov_x.trace() + cov_y.trace() - 2 * middle
    return max(float(distance), 0.0)


@torch.no_grad()
def judge_features(folder: str | Path, files: Sequence[str | Path]) -> torch.Tensor:
    """The judge's features [N, 128] of picture files, which may differ in size."""
    judge = Judge.load(on_this_machine(folder))
    return torch.cat([judge.embed(load_image(file)[None]) for file in files])


def judge_frechet(folder: str, files: Sequence[str], reference: Sequence[str], threads: int | None = None) -> float:
    """Fréchet distance of the judge's features between two sets of picture files."""
    _limit(threads)
    return frechet_distance(judge_features(folder, files), judge_features(folder, reference))
