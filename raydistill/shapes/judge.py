"""The judge: a small network that reads the attributes of a shapes-world picture back.

It looks at the five positions a grammar object can have and says, for each, whether an object is there
and of which shape, colour and size; and which background the picture has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from raydistill.shapes.captions import ATTRIBUTES, BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene, parse

COLUMNS = ("mean", "all", *ATTRIBUTES)  # of the judge's table
_HEADS = {"shape": 1 + len(SHAPES), "color": len(COLORS), "size": len(SIZES)}
RESOLUTION = 64
UNASKED = -100  # what cross_entropy leaves out: an attribute that a caption does not name


def attributes_of(captions: Sequence[str]) -> torch.Tensor:
    """What each caption asks of each of the P positions, int64 [B, 3 P + 1]: shape (0: nothing there), colour, size; background.

    Of an empty caption nothing is asked. Raises ValueError: another is not of the grammar.
    """
    rows = torch.full((len(captions), len(_HEADS) * len(POSITIONS) + 1), UNASKED)
    for row, caption in enumerate(captions):
        if not caption:
            continue
        scene = parse(caption)
        shape, color, size = rows[row, :-1].view(len(_HEADS), len(POSITIONS))
        shape[:] = 0
        for item in scene.objects:
            cell = POSITIONS.index(item.position)
            shape[cell] = 1 + SHAPES.index(item.shape)
            color[cell], size[cell] = COLORS.index(item.color), SIZES.index(item.size)
        rows[row, -1] = BACKGROUNDS.index(scene.background)
    return rows


class Judge(nn.Module):
    """Images of any size in [-1, 1] -> logits per position; see `read` and `score`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [3, width // 2, width, 2 * width, 2 * width]
        self.features = nn.Sequential(
            *[
                layer
                for c_in, c_out in zip(channels[:-1], channels[1:], strict=True)
                for layer in (nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())
            ]
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 16, 128), nn.SiLU())
        self.head = nn.Linear(128, len(POSITIONS) * sum(_HEADS.values()) + len(BACKGROUNDS))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 128] features (also used for Fréchet distances)."""
        images = images.float()
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            images = F.interpolate(images, size=RESOLUTION, mode="bilinear", antialias=True)
        return self.hidden(self.features(images))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits: shape [B, P, 1 + shapes] (class 0: nothing there), color, size [B, P, ·], background [B, ·]."""
        logits = self.head(self.embed(images))
        background = logits[:, -len(BACKGROUNDS) :]
        per_position = logits[:, : -len(BACKGROUNDS)].unflatten(1, (len(POSITIONS), -1))
        return dict(zip(_HEADS, per_position.split(list(_HEADS.values()), dim=2), strict=True)) | {
            "background": background
        }

    def loss(self, images: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
        """Cross entropy against the true scenes; colour and size count only where there is an object."""
        logits = self(images)
        target = {name: torch.full((len(scenes), len(POSITIONS)), -100) for name in _HEADS}
        target["shape"][:] = 0
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                column = POSITIONS.index(item.position)
                target["shape"][row, column] = 1 + SHAPES.index(item.shape)
                target["color"][row, column] = COLORS.index(item.color)
                target["size"][row, column] = SIZES.index(item.size)
        background = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
        terms = [F.cross_entropy(logits[name].flatten(0, 1), target[name].flatten()) for name in _HEADS]
        return sum(terms) + F.cross_entropy(logits["background"], background)

    def log_likelihood(self, images: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        """Log-probability [B] of each picture's own attributes, differentiable: -`loss` of the picture alone.

        Args:
            attributes: [B, 3 P + 1], of `attributes_of`.
        """
        logits = self(images)
        *objects, background = attributes.split([len(POSITIONS)] * len(_HEADS) + [1], dim=1)
        result = -F.cross_entropy(logits["background"].float(), background[:, 0], reduction="none")
        for name, asked in zip(_HEADS, objects, strict=True):
            each = F.cross_entropy(logits[name].float().flatten(0, 1), asked.flatten(), reduction="none")
            result = result - each.view(asked.shape).sum(1) / (asked != UNASKED).sum(1).clamp_min(1)
        return result

    def _read(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Logit of an object being there [B, P]; most likely shape, color and size [B, P]; background [B]."""
        logits = self(images)
        shapes = logits["shape"][:, :, 1:]
        found = {"shape": shapes.argmax(2), "color": logits["color"].argmax(2), "size": logits["size"].argmax(2)}
        occupied_logit = torch.logsumexp(shapes, dim=2) - logits["shape"][:, :, 0]
        return occupied_logit, found, logits["background"].argmax(1)

    @torch.no_grad()
    def compare(self, images: torch.Tensor, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Per image and attribute: the share of the caption's objects that were drawn as asked, [B] in [0, 1].

        Position: of the asked positions, how many are among the n most likely occupied ones (n objects asked).
        Shape, colour and size are read where an object was found: at the asked position when it is among
        those, else at the most likely free one, so that one misplaced object is one error, not four.
        """
        occupied_logit, found, background = self._read(images)
        names = {"shape": SHAPES, "color": COLORS, "size": SIZES}
        result = {name: torch.zeros(len(captions)) for name in ATTRIBUTES}
        for row, caption in enumerate(captions):
            scene = parse(caption)
            best = occupied_logit[row].topk(len(scene.objects)).indices.tolist()
            asked = [POSITIONS.index(item.position) for item in scene.objects]
            free = [position for position in best if position not in asked]
            for item, position in zip(scene.objects, asked, strict=True):
                hit = position in best
                cell = position if hit else free.pop(0)
                result["position"][row] += hit / len(asked)
                for name, choices in names.items():
                    right = choices[int(found[name][row, cell])] == getattr(item, name)
                    result[name][row] += right / len(asked)
            result["background"][row] = float(BACKGROUNDS[int(background[row])] == scene.background)
        return result

    @torch.no_grad()
    def relation(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Whether the two objects stand to each other as asked, [B]: 1, 0, or NaN where the caption has one object.

        Right: the two most likely occupied positions are the asked ones, and what is read there (size, colour, shape)
        fits the caption's objects better this way round than exchanged. Two equal objects need the positions alone.
        """
        occupied_logit, found, _ = self._read(images)
        read = (found["size"], found["color"], found["shape"])
        result = torch.full((len(captions),), float("nan"))
        for row, caption in enumerate(captions):
            objects = parse(caption).objects
            if len(objects) != 2:
                continue
            cells = [POSITIONS.index(item.position) for item in objects]
            wanted = [(SIZES.index(o.size), COLORS.index(o.color), SHAPES.index(o.shape)) for o in objects]
            seen = [tuple(int(values[row, cell]) for values in read) for cell in cells]
            straight, exchanged = (
                sum(a == b for want, got in zip(wanted, order, strict=True) for a, b in zip(want, got, strict=True))
                for order in (seen, seen[::-1])
            )
            there = set(occupied_logit[row].topk(2).indices.tolist()) == set(cells)
            result[row] = float(there and (straight > exchanged or wanted[0] == wanted[1]))
        return result

    def accuracy(self, images: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Mean accuracy per attribute, their mean under `mean`, and `all` (every attribute right)."""
        return table_of(self.compare(images, captions))

    def right(self, images: torch.Tensor, captions: Sequence[str]) -> list[bool]:
        """Whether every attribute of a picture is right."""
        return _all_right(self.compare(images, captions)).tolist()

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors` (fp16) and `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        (folder / "config.json").write_text(json.dumps({"width": self.features[0].out_channels * 2}))

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote; weights become float32."""
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
        return judge.eval().requires_grad_(False)


def table_of(right: dict[str, torch.Tensor]) -> dict[str, float]:
    """The table of `Judge.accuracy`, of what `Judge.compare` gives."""
    table = {name: float(right[name].mean()) for name in ATTRIBUTES}
    return table | {"mean": sum(table.values()) / len(table), "all": float(_all_right(right).float().mean())}


def columns_of(right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The columns of that table, one number a picture, each [B]."""
    table = torch.stack([right[name] for name in ATTRIBUTES])
    return {"mean": table.mean(0), "all": _all_right(right).float(), **right}


def _all_right(right: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B] booleans: every attribute is right."""
    return torch.stack([right[name] for name in ATTRIBUTES]).amin(0) > 0.999
