"""The reward in the student's loss: its gradient, its parts, what is left out, the scorers' numbers, refusals, the plan."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captions import CAPTIONS
from lanes import full_but
from PIL import Image
from test_leaving_out import gradients_of, scores_of, without
from test_updates import SWITCHES, batches, configuration, flat, graphs, run
from tiny_clip import write_clip
from transformers import CLIPImageProcessorPil

from raydistill.bridge.model import Bridge
from raydistill.config.networks import REWARD_MODELS
from raydistill.config.reading import load
from raydistill.data.encode import PromptEncoder
from raydistill.data.reward_texts import REWARD, RewardTexts
from raydistill.distillation.batches import Real
from raydistill.distillation.reward import is_chosen, load_reward
from raydistill.distillation.reward_models import model_of
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError, NonFiniteError
from raydistill.evaluation.metrics import check_reward
from raydistill.evaluation.rewards import WEIGHTS as OF_METRICS
from raydistill.evaluation.scorers import ClipScorer, PickScorer
from raydistill.pictures.files import load_image
from raydistill.planning.counting import count, count_trainer
from raydistill.planning.counts import Wanted
from raydistill.planning.verdict import _needs
from raydistill.shapes import WEIGHTS
from raydistill.shapes.captions import parse
from raydistill.shapes.judge import Judge, attributes_of
from raydistill.shapes.render import render
from raydistill.spaces import load_space
from raydistill.spaces.meta import open_space

JUDGE = {"judge": str(WEIGHTS / "judge")}
TWO = "a small red circle at the left and a large blue cross at the right on a black background"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def places_of(metric, clip):
    return JUDGE if metric == "judge" else dict.fromkeys((metric, f"{metric}.processor"), str(clip))


def rewarded(spaces, tables, places=JUDGE, stream=lambda source: source, **changes):
    """As `make_distiller`, with a reward of the same weights each time."""
    changes = {"reward__metric": "judge", "reward__weight": 3.0, "fake_score__updates": 1} | changes
    config, (student, teacher) = configuration(**changes), spaces
    texts, columns = RewardTexts(config.reward.metric, places), {}
    if config.reward.is_on:
        known = texts.encode_prompts(texts.load_text(), CAPTIONS[:3])
        columns = {f"{REWARD}.{name}": value.numpy() for name, value in known.items()}

    def source():
        for batch in batches(tables):
            rows = [number % 3 for number in batch["sample_id"]]
            yield batch | {name: column[rows] for name, column in columns.items()}

    latents = torch.randn(8, *teacher.latent_shape, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=Bridge.create(student, teacher, config.bridge),
        fake_network=teacher.load_network(),
        real=Real(latents, tables[1], torch.arange(8) % 3),
        source=stream(source()),
        reward=load_reward(config, student, places),
    )


def test_no_graph_outlives_an_update_with_a_reward(spaces, tables):
    before = graphs()
    distiller = rewarded(spaces, tables, **SWITCHES)
    run(distiller.config, spaces, tables, steps=1, distiller=distiller)
    assert graphs() == before


def students(distiller, spaces, tables):
    """The student's gradient of a first update, before clipping; what was made of it."""
    made = []

    def update():
        parts, scores = scores_of(distiller, spaces, tables)
        made.extend(parts)
        distiller.student_update(parts, scores)

    return gradients_of(distiller, update)["student"], made


# -- the term ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", full_but(["judge", "clipscore", "pickscore"], "pickscore"))
def test_the_students_gradient_gets_the_gradient_of_the_mean_reward_of_what_ships(spaces, tables, clip, metric):
    """By hand: one graph from the student's weights through its decoder and the scorer, of the whole batch."""
    places = places_of(metric, clip)
    with_it = rewarded(spaces, tables, places, reward__metric=metric, reward__ramp_steps=2)
    found, made = students(with_it, spaces, tables)
    plain, _ = students(rewarded(spaces, tables, reward__weight=0), spaces, tables)
    fresh = rewarded(spaces, tables, places, reward__metric=metric)
    networks, space, part = fresh.networks, spaces[0], made[0]
    z_student = networks.z_student(part.seen, part.student_conditioning)
    pictures = space.decode(space.load_vae(), z_student)
    mean = model_of(metric, places, space.resolution)(pictures, part.reward_conditioning).mean()
    expected = torch.autograd.grad(-1.5 * mean, list(networks.student.parameters()), allow_unused=True)
    expected = torch.cat([g.flatten() for g in expected if g is not None])
    assert expected.norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(found - plain, expected, rtol=2e-3, atol=2e-5 * found.abs().max().item())
    metrics = with_it.pop_metrics()
    assert metrics["reward/mean"] == pytest.approx(mean.item(), rel=1e-5)
    of_latents = torch.autograd.grad(-1.5 * model_mean(fresh, part, z_student), z_student)[0] * z_student.numel()
    assert metrics["reward/gradient_norm"] == pytest.approx(of_latents.square().mean().sqrt().item(), rel=1e-3)
    assert metrics["others/gradient_norm"] > 0
    assert not any(p.requires_grad or p.grad is not None for p in fresh.reward.model.parameters())


def model_mean(distiller, part, z_student):
    return distiller.reward.model(z_student, part.reward_conditioning).mean()


@pytest.mark.full
@pytest.mark.parametrize(("share", "chosen"), [(1.0, [0, 1, 2, 3]), (0.5, [1, 3]), (0.25, [3])])
def test_a_share_of_the_samples_is_rewarded_however_the_batch_is_cut(spaces, tables, share, chosen):
    assert [
        number for number in range(4) if is_chosen(load(overrides=[f"reward.share={share}"]).reward, number)
    ] == chosen
    whole, one = (rewarded(spaces, tables, reward__share=share, distill__micro_batches=parts) for parts in (1, 4))
    read = []
    one.reward.model.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    gradients = [students(distiller, spaces, tables)[0] for distiller in (whole, one)]
    assert read == [1] * len(chosen)
    assert (gradients[0] - gradients[1]).norm() < 2e-4 * gradients[0].norm()
    metrics = [distiller.pop_metrics() for distiller in (whole, one)]
    for name in ("reward/mean", "reward/gradient_norm", "others/gradient_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3), name


def test_a_sample_whose_reward_is_not_finite_counts_as_zero(spaces, tables):
    spoilt = rewarded(spaces, tables)
    three = rewarded(spaces, tables, stream=lambda source: without(source, 2))
    forward = spoilt.reward.model.forward

    def broken(latents, texts):
        asked = attributes_of([CAPTIONS[2]])
        return forward(latents, texts) * (float("nan") if torch.equal(texts["attributes"], asked) else 1.0)

    spoilt.reward.model.forward = broken
    found, expected = (students(distiller, spaces, tables)[0] for distiller in (spoilt, three))
    assert (found - 0.75 * expected).norm() < 1e-4 * found.norm()
    assert spoilt.left_out == [] or spoilt.left_out[0][1] == [2]
    spoilt.pop_metrics()
    assert spoilt.left_out[0][0] == "the reward: not finite in samples [2] of 4 (sample ids [2])"
    strict = rewarded(spaces, tables, distill__non_finite_share=0)
    strict.reward.model.forward = broken
    with pytest.raises(NonFiniteError, match="the reward: not finite"):
        students(strict, spaces, tables)


LANES = {
    "lora, truncated, recomputed": {
        "student__kind": "lora",
        "student__rank": 2,
        "student__ema_decay": 0.9,
        "fake_score__kind": "truncated",
        "distill__gradient_checkpointing": True,
    },
    "full, parts, a share": {"fake_score__kind": "full", "distill__micro_batches": 2, "reward__share": 0.5},
    "two steps in float16": {
        "student__steps": 2,
        "student__autocast": "float16",
        "distill__mixed_precision": True,
        "distill__micro_batches": 2,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("lane", LANES)
def test_overlap_and_a_resume_change_no_bit(spaces, tables, lane):
    changes = LANES[lane]
    whole, sequential = (
        run(one.config, spaces, tables, steps=2, overlap=overlap, distiller=one)
        for overlap in (True, False)
        for one in [rewarded(spaces, tables, **changes)]
    )
    assert torch.equal(flat(whole.networks.student), flat(sequential.networks.student))
    first = rewarded(spaces, tables, **changes)
    run(first.config, spaces, tables, steps=1, distiller=first)
    assert not any("reward" in name for name in first.state_dict())
    resumed = rewarded(spaces, tables, **changes, stream=lambda source: itertools.islice(source, 2, None))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed.config, spaces, tables, steps=1, distiller=resumed)
    assert torch.equal(flat(whole.networks.student), flat(resumed.networks.student))
    other = run(first.config, spaces, tables, steps=2, distiller=rewarded(spaces, tables, **changes, reward__weight=0))
    assert not torch.equal(flat(whole.networks.student), flat(other.networks.student))


@pytest.mark.full
def test_a_reward_in_bfloat16_points_where_one_in_float32_does(spaces, clip):
    """Of the pictures that the shipped decoder makes of noise."""
    space = load_space(WEIGHTS / "sd15")
    noise = torch.randn(4, *space.latent_shape, generator=torch.Generator().manual_seed(3))
    texts = attributes_of([CAPTIONS[0]] * 4)
    gradients = []
    for mixed in (False, True):
        config = load(overrides=["reward.metric=judge", "reward.weight=1", f"distill.mixed_precision={mixed}"])
        reward = load_reward(config, space, JUDGE)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            latents = noise.clone().requires_grad_(True)
            gradients.append(torch.autograd.grad(reward(latents, {"attributes": texts}).sum(), latents)[0].flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


# -- the scorers' own numbers -------------------------------------------------------------------------------


def picture_file(folder, side):
    """A scene of smooth and of sharp places, as a file has it."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, size=side, mode="bicubic")[0].clamp(0, 1)
    smooth[:, side // 4 : side // 2, side // 3 :] = 1 - smooth[:, side // 4 : side // 2, side // 3 :]
    file = folder / f"{side}.png"
    Image.fromarray((255 * smooth.permute(1, 2, 0)).round().to(torch.uint8).numpy()).save(file)
    return file


@pytest.mark.parametrize(("metric", "scorer"), [("clipscore", ClipScorer), ("pickscore", PickScorer)])
def test_a_clip_reward_is_the_scorers_number_of_the_same_picture(clip, tmp_path, metric, scorer):
    """Within 0.01 of a cosine, of a network of random weights that feels every rounded pixel."""
    texts = RewardTexts(metric, places_of(metric, clip))
    known, scale = (
        texts.encode_prompts(texts.load_text(), CAPTIONS[:3]),
        {"clipscore": 100, "pickscore": math.exp(2.6592)},
    )
    for side in (64, 96):
        file = picture_file(tmp_path, side)
        expected = scorer(str(clip))([str(file)] * 3, CAPTIONS[:3])[metric]
        picture = load_image(str(file))[None].expand(3, -1, -1, -1)
        found = model_of(metric, places_of(metric, clip), side)(picture, known).tolist()
        assert min(expected) > 0.2 * scale[metric]
        assert found == pytest.approx(expected, abs=0.01 * scale[metric])


@pytest.mark.parametrize("side", [512, 200])
def test_a_picture_is_prepared_as_the_published_models_processor_does(tmp_path, side, clip):
    """Within what a processor loses: it rounds to 256 values after each of two passes, also where a kernel overshoots."""
    file = picture_file(tmp_path, side)
    processor = CLIPImageProcessorPil()
    model = model_of("clipscore", places_of("clipscore", clip), side)
    published = type(model)(model.model, processor, side, learned_scale=False)
    expected = processor(Image.open(file), return_tensors="pt")["pixel_values"][0]
    difference = (published.prepared(load_image(str(file))[None])[0] - expected) * published.spread * 255
    assert expected.shape == (3, 224, 224)
    assert difference.abs().mean() < 0.35
    assert (difference.abs() > 1).float().mean() < 1e-3
    assert difference.abs().max() < 4


def test_the_judges_reward_is_its_own_loss_of_the_caption(tmp_path):
    judge, scenes = Judge.load(WEIGHTS / "judge"), [parse(CAPTIONS[0]), parse(TWO)]
    pictures = render(scenes, 64, 0)
    found = judge.log_likelihood(pictures, attributes_of([scene.caption for scene in scenes]))
    expected = [-judge.loss(picture[None], [scene]) for picture, scene in zip(pictures, scenes, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    wrong = judge.log_likelihood(pictures, attributes_of([scene.caption for scene in scenes[::-1]]))
    assert (wrong < found - 1).all()
    large = torch.nn.functional.interpolate(pictures, size=96, mode="bilinear")
    reward = model_of("judge", JUDGE, 96)(large, {"attributes": attributes_of([s.caption for s in scenes])})
    torch.testing.assert_close(reward, judge.log_likelihood(large, attributes_of([s.caption for s in scenes])))
    assert attributes_of([""]).unique().tolist() == [-100]


def test_encoders_bring_what_a_reward_knows_of_a_prompt_and_nothing_of_teacher_samples(spaces, clip):
    for metric in ("judge", "pickscore"):
        texts = RewardTexts(metric, places_of(metric, clip))
        encoder = PromptEncoder({"student": str(spaces[0].folder)}, reward=texts)
        name, (shape, dtype) = next(iter(texts.layout.items()))
        columns = encoder({"prompt": np.array(CAPTIONS[:2], object), "real": np.array([False, True])})
        found = torch.from_numpy(columns[f"{REWARD}.{name}"])
        expected = texts.encode_prompts(texts.load_text(), [CAPTIONS[0], ""])[name]
        assert (found.shape, found.dtype) == ((2, *shape), dtype)
        torch.testing.assert_close(found, expected)


# -- refusals, and the plan ---------------------------------------------------------------------------------


def test_a_reward_that_would_pick_the_best_as_well_is_refused(clip, tmp_path, monkeypatch):
    clips = [f"evaluation.weights.{name}={clip}" for name in ("clipscore", "pickscore", "pickscore.processor")]
    both = ["evaluation.metrics=[clipscore,pickscore]", "evaluation.judge=null", "reward.weight=1", *clips]
    for trained, picks in (("clipscore", "pickscore"), ("pickscore", "clipscore")):
        settings = [*both, f"reward.metric={trained}"]
        found = check_reward(load(overrides=[*settings, f"evaluation.metric={picks}"]))
        assert found[trained] == str(clip)
        with pytest.raises(
            InputError, match=rf"evaluation\.metric={trained}: the student is trained on it .*name another"
        ):
            check_inputs(load(overrides=[*settings, f"evaluation.metric={trained}", f"storage={tmp_path}"]))
    judged = ["reward.metric=judge", "reward.weight=1"]
    with pytest.raises(InputError, match=r"evaluation\.metric=mean: .*another judge in reward\.weights\.judge"):
        check_inputs(load(overrides=[*judged, f"storage={tmp_path}"]))
    torch.manual_seed(1)
    Judge().save(tmp_path / "other")
    other = load(overrides=[*judged, f"reward.weights.judge={tmp_path / 'other'}"])
    assert check_reward(other) == {"judge": str(tmp_path / "other")}
    assert check_reward(load(overrides=["reward.metric=judge"])) is None
    assert {name: OF_METRICS[name][0].repo for name in REWARD_MODELS} == REWARD_MODELS
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        InputError, match=r"PickScore_v1 \(about 4 GB\).*or name a copy: reward\.weights\.pickscore=FOLDER"
    ):
        check_reward(load(overrides=["reward.metric=pickscore", "reward.weight=1"]))
    with pytest.raises(InputError, match=r"reward\.weights\.judge=.*no judge"):
        check_reward(load(overrides=[*judged, f"reward.weights.judge={clip}"]))
    with pytest.raises(
        InputError, match=r"reward\.weights\.hpsv2: no reward has such weights; names: judge, clipscore"
    ):
        check_reward(load(overrides=[*judged, "reward.weights.hpsv2=x"]))
    with pytest.raises(InputError, match=r"^reward: weight=2, and reward\.metric names no reward"):
        load(overrides=["reward.weight=2"])


@pytest.mark.full
def test_the_plan_counts_what_a_reward_needs():
    """Weights, a picture's decoder, its backward pass, the text tower; and names what is fetched."""
    student, teacher = open_space("shapes:sd15"), open_space("shapes:flux")
    judged = ["reward.metric=judge", "reward.weight=1"]
    settings = ([], [*judged, "reward.share=0.5"], judged)
    plain, half, whole = (count_trainer(load(overrides=one), student, teacher) for one in settings)
    kept = load_reward(load(overrides=judged), load_space(WEIGHTS / "sd15"), JUDGE)
    assert plain.weights.reward == 0
    assert whole.weights.reward == sum(p.nbytes for p in kept.parameters()) > 1e6
    held = whole.resident - plain.resident - whole.weights.reward
    assert 0 <= held < 20_000  # matrices that resize
    assert whole.student.flops - plain.student.flops == 2 * (half.student.flops - plain.student.flops) > 0
    assert (whole.make.flops, whole.fake.flops) == (plain.make.flops, plain.fake.flops)
    config = load(overrides=["reward.metric=pickscore", "reward.weight=1"])
    assert count(Wanted("text", config))["reward text_encoder"].parameters == pytest.approx(354e6, rel=0.01)
    assert "yuvalkirstain/PickScore_v1 (reward.metric)" in _needs(
        SimpleNamespace(models=SimpleNamespace(terms=[])), config
    )
    large = count_trainer(config, student, teacher)
    assert large.weights.reward / 4 == pytest.approx(632e6, rel=0.01)
    assert large.student.peak > plain.student.peak + large.weights.reward
