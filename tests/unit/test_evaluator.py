"""The fixed set of an evaluation: a fair choice of prompts, and the same pictures every time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from raydistill.config.reading import CONFIGS, load
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.evaluation.evaluator import FixedPrompts, draw_teacher
from raydistill.shapes import WEIGHTS
from raydistill.shapes.captions import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, parse
from raydistill.spaces import load_space


@pytest.fixture(scope="module")
def shipped() -> PromptSet:
    return read_prompts(WEIGHTS / "prompts.txt")


@pytest.mark.parametrize("seed", [1234, 1235])
def test_a_part_of_a_sorted_file_is_a_mix_of_it(shipped, seed):
    """The first 256 of the 979 shipped prompts have one object, one size and few colours."""
    assert len(shipped) == 979
    assert {parse(prompt).objects[0].size for prompt in shipped.prompts[:256]} == {"small"}
    fixed = FixedPrompts(shipped, 256, seed)
    assert len(fixed.captions) == len(set(fixed.captions)) == 256
    scenes = [parse(caption) for caption in fixed.captions]
    choices = {"size": SIZES, "color": COLORS, "shape": SHAPES, "position": POSITIONS}
    for name, values in choices.items():
        counts = Counter(getattr(scene.objects[0], name) for scene in scenes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 256 / len(values) / 2
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    # a third of the file has two objects; 256 of it have 85 with a standard deviation of 6.5
    assert 60 <= sum(len(scene.objects) == 2 for scene in scenes) <= 111


@pytest.mark.parametrize("count", [10, 67, 100, 200, 512])
def test_few_prompts_repeat_equally_often(count):
    prompts = read_prompts(WEIGHTS / "heldout.txt")
    counts = Counter(FixedPrompts(prompts, count, 3).captions)
    low, high = divmod(count, len(prompts))
    assert {counts[prompt] for prompt in prompts.prompts} <= {low, low + (high > 0)}
    assert sum(counts.values()) == count


def test_the_choice_depends_on_the_seed_alone(shipped):
    first = FixedPrompts(shipped, 64, 5)
    assert first.captions == FixedPrompts(shipped, 64, 5).captions
    assert first.captions != FixedPrompts(shipped, 64, 6).captions
    assert first.captions == FixedPrompts(shipped, 256, 5).captions[:64]  # a larger set has the same pictures first


def test_every_picture_has_noise_of_its_own_whatever_the_batches(shipped):
    fixed, space = FixedPrompts(shipped, 10, 5), load_space(WEIGHTS / "sd15")
    whole = fixed.noise(space, 0, 10)
    parts = [(fixed.noise(space, start, stop), captions) for start, stop, captions in fixed.batches(4)]
    assert torch.equal(torch.cat([noise for noise, _ in parts]), whole)
    assert sum((captions for _, captions in parts), []) == fixed.captions
    assert len({tuple(noise.flatten().tolist()) for noise in whole}) == 10
    assert not torch.equal(whole, FixedPrompts(shipped, 10, 6).noise(space, 0, 10))


@pytest.mark.parametrize(("judge", "drawn"), [(None, 6), ("shapes:judge", 20)])
def test_without_a_judge_a_teacher_draws_what_is_shown(judge, drawn):
    """At real sizes the others would cost minutes each, for nothing."""
    settings = [
        "evaluation.count=20",
        "evaluation.grid=6",
        "evaluation.batch_size=8",
        f"evaluation.judge={judge or 'null'}",
    ]
    config = load(CONFIGS / "shapes.yaml", settings)
    space, asked = load_space(WEIGHTS / "flux"), []
    network = space.load_network()

    class Drawn:
        def __init__(self, *request):
            asked.append(len(request[0]))
            self.latents = space.sample(network, *request[:3], 1, 1.0)

        def result(self, check_finite):
            return self.latents

    fixed = FixedPrompts(read_prompts(WEIGHTS / "heldout.txt"), 20, 3)
    pictures, table = draw_teacher(Drawn, space, fixed, config, 1.0)
    assert sum(asked) == len(pictures) == drawn
    assert bool(table) == (judge is not None)


def test_pictures_of_the_teacher_that_are_not_finite_cost_no_more_than_themselves(capsys):
    config = load(CONFIGS / "shapes.yaml", ["evaluation.batch_size=2"])
    space = load_space(WEIGHTS / "flux")
    fixed = FixedPrompts(read_prompts(WEIGHTS / "heldout.txt"), 4, 3)

    class Answer:
        def __init__(self, noise, *_):
            self.latents = noise.clone()
            self.latents[1, 0, 0, 0] = torch.nan

        def result(self, check_finite):
            assert not check_finite
            return self.latents

    asked = []

    def scores(pictures, captions):
        asked.append((len(pictures), captions))
        return {"own": [float(picture.mean().isfinite()) for picture in pictures]}

    pictures, table = draw_teacher(Answer, space, fixed, config, 1.0, scores)
    assert asked == [(2, fixed.captions[::2])]
    assert table["own"] == 1.0
    assert all(math.isfinite(value) for value in table.values())
    assert (pictures[1::2] == -1).all()
    assert not (pictures[::2] == -1).all()
    assert "2 of 4 pictures are not finite, and left out of its row: [1, 3]" in capsys.readouterr().out


def test_texts_are_encoded_in_the_dtype_that_is_asked_for():
    space = load_space(WEIGHTS / "flux")
    table = PromptTable(space, ["a", "b", "a"])
    whole, half = table.columns, PromptTable(space, ["a", "b", "a"], torch.bfloat16).columns
    assert table.row == {"a": 0, "b": 1}
    assert {name: value.dtype for name, value in half.items()} == dict.fromkeys(whole, torch.bfloat16)
    for name, value in whole.items():
        torch.testing.assert_close(half[name].float(), value, rtol=0.05, atol=0.05)
