"""The text side of the student's reward (`reward.metric`): once a prompt, without a gradient, beside the text encoders.

| metric | tensor | of a prompt |
|---|---|---|
| judge | attributes, int64 [3 P + 1] | what a caption of the shapes world asks for (`shapes.judge.attributes_of`) |
| clipscore, pickscore | text, float32 [D] | features of a CLIP model's text tower |

`RewardTexts` is to `TextEncoder` and `PromptTable` what a Space is: they load what it loads, and cache what it encodes.
transformers' CLIP is imported inside functions: it takes a second, which a run without such a reward need not spend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from raydistill.errors import InputError
from raydistill.shapes.captions import POSITIONS
from raydistill.shapes.judge import attributes_of
from raydistill.spaces import Conditioning
from raydistill.spaces.folder import without_bars
from raydistill.spaces.meta import without_initial_values
from raydistill.storage.resolve import local_path

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

REWARD = "reward"  # role of its columns in a batch


@dataclass(frozen=True)
class Published:
    """Sizes of its authors' model, for counting where no weights are here."""

    vision: dict[str, int]
    text: dict[str, int]
    width: int


PUBLISHED = {
    "clipscore": Published(  # openai/clip-vit-large-patch14
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        768,
    ),
    "pickscore": Published(  # its network is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        1024,
    ),
}  # fmt: skip


def clip_config(metric: str, folder: str | None) -> CLIPConfig:
    """Of the model in a folder that is here, else of its authors'."""
    from transformers import CLIPConfig

    if folder is not None and local_path(folder).exists():
        return CLIPConfig.from_pretrained(local_path(folder))
    known = PUBLISHED[metric]
    return CLIPConfig(vision_config=known.vision, text_config=known.text, projection_dim=known.width)


def load_clip(folder: str | Path, *, vision: bool) -> CLIPModel:
    """One tower of a CLIP model, float32, frozen.

    Raises:
        InputError: the folder holds no weights that can be read.
    """
    from transformers import CLIPModel

    try:
        with without_bars():
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
    return _tower(model, vision)


def empty_clip(config: CLIPConfig, *, vision: bool) -> CLIPModel:
    """The same on the meta device, without weights."""
    from transformers import CLIPModel

    with without_initial_values(), torch.device("meta"):
        return _tower(CLIPModel(config), vision)


def _tower(model: CLIPModel, vision: bool) -> CLIPModel:
    other = ("text_model", "text_projection") if vision else ("vision_model", "visual_projection")
    for name in other:
        setattr(model, name, None)
    return model.eval().requires_grad_(False)


class ClipTexts(nn.Module):
    """Prompts -> features. Texts are cut at the model's length, and filled up to it: a prompt's numbers are its own."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, D] float32."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        return self.model.get_text_features(**tokens).pooler_output.float()


class RewardTexts:
    """What a reward has to know of prompts.

    Args:
        metric: `reward.metric`.
        places: folder of each of its weights, by name.
    """

    def __init__(self, metric: str, places: Mapping[str, str]) -> None:
        self.metric, self.places = metric, places

    def load_text(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Float32 whatever is asked for: a picture is compared with it."""
        from transformers import CLIPTokenizer

        if self.metric == "judge":
            return nn.Identity()
        tokenizer = CLIPTokenizer.from_pretrained(self.places.get(f"{self.metric}.processor", self.places[self.metric]))
        return ClipTexts(load_clip(self.places[self.metric], vision=False), tokenizer)

    def encode_prompts(self, text: nn.Module, prompts: Sequence[str]) -> Conditioning:
        """Tensors [B, …] of prompts."""
        return {"attributes": attributes_of(prompts)} if self.metric == "judge" else {"text": text(prompts)}

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes of one prompt and dtypes of what `encode_prompts` returns; reads no weights."""
        if self.metric == "judge":
            return {"attributes": ((3 * len(POSITIONS) + 1,), torch.int64)}
        width = clip_config(self.metric, self.places.get(self.metric)).projection_dim
        return {"text": ((width,), torch.float32)}
