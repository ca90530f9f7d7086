"""The caption grammar of the shapes world: scenes, their captions, and the held-out split.

A scene is one object, or two objects on opposite sides, on a plain background. Every caption can be
parsed back into its scene, so a judge can compare what was asked for with what was drawn.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass, replace

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("left", "right", "top", "bottom", "center")
BACKGROUNDS = ("white", "gray", "black")
PAIRED_POSITIONS = (("left", "right"), ("top", "bottom"))
ATTRIBUTES = ("size", "color", "shape", "position", "background")
WORDS = (*SIZES, *COLORS, *SHAPES, *POSITIONS, *BACKGROUNDS, "a", "at", "the", "and", "on", "background")

_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(POSITIONS)})"
_CAPTION = re.compile(rf"^{_OBJECT}(?: and {_OBJECT})? on a ({'|'.join(BACKGROUNDS)}) background$")


@dataclass(frozen=True)
class Object:
    """One coloured shape."""

    size: str
    color: str
    shape: str
    position: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape} at the {self.position}"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background."""

    objects: tuple[Object, ...]
    background: str

    @property
    def caption(self) -> str:
        return f"{' and '.join(map(str, self.objects))} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True for the tenth of all scenes that no training set may contain."""
        return hashlib.blake2b(self.caption.encode(), digest_size=4).digest()[0] % 10 == 0


def parse(caption: str) -> Scene:
    """Inverse of `Scene.caption`. Raises ValueError when the caption is not of the grammar."""
    match = _CAPTION.match(caption.strip().lower())
    if match is None:
        raise ValueError(f"not a caption of the shapes world: {caption!r} (for example {single_scenes()[0].caption!r})")
    groups = match.groups()
    objects = tuple(Object(*groups[i : i + 4]) for i in (0, 4) if groups[i] is not None)
    return Scene(objects, groups[8])


def single_scenes(held_out: bool | None = None) -> list[Scene]:
    """All 720 one-object scenes, or only the held-out (True) or training (False) ones."""
    scenes = [
        Scene((Object(size, color, shape, position),), background)
        for size, color, shape, position, background in itertools.product(SIZES, COLORS, SHAPES, POSITIONS, BACKGROUNDS)
    ]
    return [scene for scene in scenes if held_out is None or scene.held_out == held_out]


def sample_scene(rng: random.Random, held_out: bool | None = None, two_objects: float = 0.25) -> Scene:
    """A random scene; with probability `two_objects` it has two objects on opposite sides."""
    while True:
        pair = rng.choice(PAIRED_POSITIONS) if rng.random() < two_objects else (rng.choice(POSITIONS),)
        objects = tuple(Object(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), p) for p in pair)
        scene = Scene(objects, rng.choice(BACKGROUNDS))
        if held_out is None or scene.held_out == held_out:
            return scene


def corrupt(scene: Scene, rate: float, rng: random.Random) -> Scene:
    """Redraw each attribute uniformly with probability `rate`: how weak students get their captions."""

    def maybe(value: str, choices: tuple[str, ...]) -> str:
        return rng.choice(choices) if rng.random() < rate else value

    objects = tuple(
        replace(o, size=maybe(o.size, SIZES), color=maybe(o.color, COLORS), shape=maybe(o.shape, SHAPES))
        for o in scene.objects
    )
    if len(objects) == 1:
        objects = (replace(objects[0], position=maybe(objects[0].position, POSITIONS)),)
    elif rng.random() < rate:
        pair = rng.choice(PAIRED_POSITIONS)
        objects = tuple(replace(o, position=p) for o, p in zip(objects, pair, strict=True))
    return Scene(objects, maybe(scene.background, BACKGROUNDS))


def evaluation_captions(count: int, seed: int = 0) -> list[str]:
    """`count` held-out one-object captions, every one as often as the others (±1), in a seeded order."""
    rng = random.Random(seed)
    captions: list[str] = []
    while len(captions) < count:
        round_ = [scene.caption for scene in single_scenes(held_out=True)]
        rng.shuffle(round_)
        captions += round_
    return captions[:count]
