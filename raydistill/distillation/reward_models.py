"""Rewards of pictures, differentiable in the picture: the numbers of the scorers of `evaluation`, without a picture file.

| `reward.metric` | r(picture, prompt) |
|---|---|
| judge | log-probability of the caption's attributes, at most 0 |
| clipscore | 100 · cosine of picture and prompt; `clipscore` itself is that, and 0 where it is below 0 |
| pickscore | the model's logit scale times that cosine |

A scorer's own preparation of a picture (resize, crop, normalise) is done on tensors. Resizing is two matrix products: torch's
own has a backward pass on GPUs that adds in any order, and a resume would not have the same bits.

Shapes: B pictures [B, 3, S, S] in [-1, 1], D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.data.reward_texts import clip_config, empty_clip, load_clip
from raydistill.errors import InputError
from raydistill.shapes.judge import RESOLUTION, Judge
from raydistill.spaces import Conditioning
from raydistill.storage.staging import on_this_machine

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel

KERNELS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # by PIL's number of a filter


class Resize(nn.Module):
    """Square pictures of `side` pixels -> `size`, of which the middle `crop` are kept; with antialiasing, as PIL does."""

    def __init__(self, side: int, size: int, kernel: Literal["bilinear", "bicubic"], crop: int | None = None) -> None:
        super().__init__()
        crop = crop or size
        identity = torch.eye(side, device="cpu")[None, None]
        rows = F.interpolate(identity, size=(size, side), mode=kernel, antialias=True, align_corners=False)[0, 0]
        first = (size - crop) // 2
        self.register_buffer("rows", rows[first : first + crop].clone(), persistent=False)  # [crop, side]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 3, side, side] -> [B, 3, crop, crop]."""
        return self.rows @ pictures @ self.rows.T


class JudgeReward(nn.Module):
    """Of captions of the shapes world."""

    def __init__(self, judge: Judge, side: int) -> None:
        super().__init__()
        self.judge, self.resize = judge, Resize(side, RESOLUTION, "bilinear")

    def forward(self, pictures: torch.Tensor, texts: Conditioning) -> torch.Tensor:
        """[B]."""
        return self.judge.log_likelihood(self.resize(pictures), texts["attributes"])


class ClipReward(nn.Module):
    """Of a CLIP model's picture tower.

    Args:
        model: with its picture tower.
        processor: how it wants pictures prepared.
        side: pixels of a picture's side.
        learned_scale: the cosine is multiplied by the model's own logit scale; False: by 100.

    Raises:
        InputError: pictures are prepared in another way than published CLIP models do.
    """

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessorPil, side: int, learned_scale: bool) -> None:
        super().__init__()
        size, crop = processor.size.get("shortest_edge") or processor.size.get("height"), processor.crop_size
        crop = crop["height"] if processor.do_center_crop else size
        usual = processor.do_resize and processor.do_rescale and processor.do_normalize
        if not (usual and size and crop <= size and int(processor.resample) in KERNELS):
            raise InputError(
                "preprocessor_config.json: a reward resizes (bilinear or bicubic), crops within that, rescales and normalises"
            )
        self.model, self.learned_scale = model, learned_scale
        self.resize = Resize(side, size, KERNELS[int(processor.resample)], crop)
        for name, values in (("mean", processor.image_mean), ("spread", processor.image_std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    def prepared(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the tower sees [B, 3, crop, crop]."""
        resized = ((self.resize(pictures) + 1) / 2).clamp(0, 1)  # a bicubic kernel overshoots
        return (resized - self.mean) / self.spread

    def forward(self, pictures: torch.Tensor, texts: Conditioning) -> torch.Tensor:
        """[B]."""
        features = self.model.get_image_features(pixel_values=self.prepared(pictures)).pooler_output
        scale = self.model.logit_scale.exp() if self.learned_scale else 100.0
        return scale * F.cosine_similarity(features.float(), texts["text"].float())


def picture_processor(metric: str, places: Mapping[str, str], image_size: int) -> CLIPImageProcessorPil:
    """As the scorer's: that of the folder, or where it has none one of the model's own size."""
    from transformers import CLIPImageProcessorPil  # slow to import, and a run without such a reward has no use for it

    around = places.get(f"{metric}.processor") or places.get(metric)
    if around is not None and Path(around, "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(around)
    square = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)


def model_of(metric: str, places: Mapping[str, str], side: int) -> nn.Module:
    """The reward of pictures of `side` pixels, float32, frozen.

    Args:
        places: folder of each of its weights, by name.

    Raises:
        InputError: weights that cannot be read.
    """
    if metric == "judge":
        return JudgeReward(Judge.load(on_this_machine(places["judge"])), side)
    return _of_clip(metric, load_clip(places[metric], vision=True), places, side)


def empty_model_of(metric: str, places: Mapping[str, str], side: int) -> nn.Module:
    """The same without weights, of the authors' sizes where the places are not on this machine."""
    if metric == "judge":
        with torch.device("meta"):
            return JudgeReward(Judge().eval().requires_grad_(False), side)
    return _of_clip(metric, empty_clip(clip_config(metric, places.get(metric)), vision=True), places, side)


def _of_clip(metric: str, model: CLIPModel, places: Mapping[str, str], side: int) -> ClipReward:
    processor = picture_processor(metric, places, model.config.vision_config.image_size)
    return ClipReward(model, processor, side, learned_scale=metric == "pickscore")
