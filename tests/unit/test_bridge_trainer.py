"""Bridge training without Ray: it learns, resumes bit by bit, divides batches, and measures on held-out pairs."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import Objective
from raydistill.bridge.trainer import BridgeTrainer, build_trainer
from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.data.pairs import PairSet, write_pairs
from raydistill.errors import NonFiniteError
from raydistill.pictures import fidelity
from raydistill.shapes.captions import single_scenes
from raydistill.shapes.render import render
from raydistill.spaces import load_space


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    """Student latents that decide the teacher's: a smooth teacher map, and its mean-pooled first channels."""
    folder, generator = tmp_path_factory.mktemp("pairs"), torch.Generator().manual_seed(0)
    for shard in range(2):
        z_student = torch.randn(24, 4, 8, 8, generator=generator)
        z_teacher = torch.nn.functional.interpolate(z_student.repeat(1, 2, 1, 1), scale_factor=2, mode="nearest")
        ids = range(24 * shard, 24 * shard + 24)
        write_pairs(
            folder,
            shard,
            prompts=[f"a red circle {i}" for i in ids],
            prompt_ids=list(ids),
            seeds=list(ids),
            z_teacher=z_teacher,
            z_student=z_student,
        )
    return folder


@pytest.fixture
def make(sd_folder, flux_folder, pairs_folder):
    def make(*overrides: str, rank: int = 0, world_size: int = 1) -> BridgeTrainer:
        config = load(
            None,
            [
                f"student.model={sd_folder}", f"teacher.model={flux_folder}", "bridge.batch_size=8", "bridge.embed_dim=16",
                "bridge.depths=[2]", "bridge.lr=5e-3", "bridge.attention.weight=0", *overrides,
            ],
        )  # fmt: skip
        trainer = build_trainer(config, pairs_folder)
        trainer.objective.rank, trainer.objective.world_size = (
            rank,
            world_size,
        )  # batches only; a real group would wrap the module in DDP
        return trainer

    return make


def run(trainer, steps):
    return [trainer.step(trainer.objective.batch(trainer.step_count)) for _ in range(steps)]


def test_thirty_steps_lower_the_l1(make):
    trainer = make()
    before, _ = trainer.validation()
    losses = [m["loss/latent_l1"] for m in run(trainer, 30)]
    after, picture = trainer.validation()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert after["eval/latent_l1"] < 0.85 * before["eval/latent_l1"]
    assert picture.width > 2 * 64
    assert trainer.bridge.training


def test_attention_loss_is_added_and_its_gradient_reaches_the_projector(make):
    with_attention, without = make("bridge.attention.weight=1"), make()
    (first,), (plain,) = run(with_attention, 1), run(without, 1)
    assert first["loss/latent_l1"] == plain["loss/latent_l1"]
    assert first["loss/bridge"] == pytest.approx(first["loss/latent_l1"] + first["loss/attention"])
    a, b = (torch.cat([p.grad.flatten() for p in t.bridge.trainable_parameters()]) for t in (with_attention, without))
    assert (a - b).norm() > 1e-3 * b.norm()


def test_parts_of_a_batch_give_the_update_of_the_whole_up_to_rounding(make):
    settings = ["bridge.attention.weight=1"]
    whole, parts = make(*settings), make(*settings, "bridge.micro_batches=4")
    (one,), (several,) = run(whole, 1), run(parts, 1)
    assert several == pytest.approx(one, rel=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in t.bridge.trainable_parameters()]) for t in (whole, parts)]
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_workers_gradients_are_averaged_once_an_update(make):
    """After the last part; each of the others would cost as much communication again."""

    class Several(torch.nn.Module):
        def __init__(self, bridge):
            super().__init__()
            self.bridge, self.alone, self.averaged = bridge, False, []

        @contextlib.contextmanager
        def no_sync(self):
            self.alone = True
            yield
            self.alone = False

        def forward(self, z_student):
            self.averaged.append(not self.alone)
            return self.bridge(z_student)

    trainer = make("bridge.micro_batches=4")
    trainer.module = Several(trainer.bridge)
    run(trainer, 2)
    assert trainer.module.averaged == 2 * [False, False, False, True]


def test_resumed_training_equals_uninterrupted_bit_by_bit(make):
    whole, first = make("bridge.attention.weight=1"), make("bridge.attention.weight=1")
    run(whole, 4)
    run(first, 2)
    resumed = make("bridge.attention.weight=1", "run.seed=0")
    torch.randn(5)  # global random state must not matter
    resumed.load_state_dict(first.state_dict())
    run(resumed, 2)
    for a, b in zip(whole.bridge.trainable_parameters(), resumed.bridge.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_is_the_papers(make):
    group = make().optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.0, 0.999), 1e-8, 5e-3)


def test_a_cosine_decay_ends_at_zero_and_follows_the_step_across_a_resume(make):
    settings = ("bridge.lr_decay=cosine", "bridge.steps=4")
    trainer = make(*settings)
    rates = []
    for _ in range(4):
        run(trainer, 1)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([5e-3, 5e-3 * (1 + 0.5**0.5) / 2, 2.5e-3, 5e-3 * (1 - 0.5**0.5) / 2])
    assert trainer.lr(4) == 0
    resumed = make(*settings)
    resumed.load_state_dict(trainer.state_dict() | {"step": 2})
    run(resumed, 1)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-3)


def test_workers_divide_the_batch_of_one_worker(make):
    alone = make().objective.batch(5).ids
    halves = [make(rank=rank, world_size=2).objective.batch(5).ids for rank in (0, 1)]
    assert np.array_equal(np.concatenate(halves), alone)
    assert len(halves[0]) == 4


def test_every_epoch_visits_each_training_pair_once_and_no_held_out_one(make):
    trainer = make("bridge.validation_share=0.25")
    count = len(trainer.objective.training_ids)
    assert count == 36
    assert len(trainer.objective.held_out_ids) == 12
    visited = np.concatenate([trainer.objective.batch(step).ids for step in range(9)])  # 72 = two epochs
    assert sorted(visited[:36]) == sorted(visited[36:]) == trainer.objective.training_ids.tolist()
    assert not np.array_equal(visited[:36], visited[36:])


def test_validation_is_of_the_decoded_held_out_latents(make, pairs_folder, flux_folder):
    """A Bridge that answers with the true latents is perfect; one that adds an offset has that latent L1."""
    trainer = make()
    rows, teacher = PairSet(pairs_folder).rows(range(48)), load_space(flux_folder)
    truth = {
        z_student.numpy().tobytes(): z_teacher.float()
        for z_student, z_teacher in zip(rows.z_student, rows.z_teacher, strict=True)
    }

    class Oracle(torch.nn.Module):
        offset = 0.0

        def forward(self, features):
            return torch.stack([truth[z.half().numpy().tobytes()] for z in self.seen]) + self.offset

    oracle = Oracle()
    trainer.bridge.projector = oracle
    trainer.bridge.prior.register_forward_pre_hook(lambda module, args: setattr(oracle, "seen", args[0]))
    perfect, _ = trainer.validation()
    assert perfect == {"eval/psnr": 100.0, "eval/ssim": pytest.approx(1.0), "eval/l1": 0.0, "eval/latent_l1": 0.0}
    oracle.offset = 0.25
    shifted, _ = trainer.validation()
    held_out = PairSet(pairs_folder).rows(trainer.objective.held_out_ids).z_teacher.float()
    vae = teacher.load_vae()
    with torch.no_grad():
        true, made = teacher.decode(vae, held_out), teacher.decode(vae, held_out + 0.25)
    assert shifted["eval/latent_l1"] == pytest.approx(0.25, rel=1e-5)
    assert shifted["eval/l1"] == pytest.approx(float((true - made).abs().mean() / 2), rel=1e-4)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(make):
    trainer = make()
    parameters = trainer.bridge.trainable_parameters()
    before = [p.clone() for p in parameters]
    parameters[0].register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NonFiniteError, match="step 0: the gradient is not finite"):
        trainer.step(trainer.objective.batch(0))
    assert all(map(torch.equal, before, parameters))


def test_divergence_stops_before_the_weights_are_touched(make):
    trainer = make()
    batch = trainer.objective.batch(0)
    batch.z_student[0] = float("nan")
    before = [p.clone() for p in trainer.bridge.trainable_parameters()]
    with pytest.raises(NonFiniteError, match="step 0: .*latent_l1.* not finite"):
        trainer.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.bridge.trainable_parameters(), strict=True))


def test_unusable_settings_are_refused(make, sd_folder, pairs_folder):
    good, student = make().objective, load_space(sd_folder)
    identity = good.settings.model_copy(update={"projector": "identity"})
    with pytest.raises(ValueError, match="identity has nothing to train"):
        BridgeTrainer(Bridge.create(student, student, identity), good)
    with pytest.raises(ValueError, match=r"batch_size \(8\) must be a multiple of 3 workers"):
        Objective(good.pairs, good.settings, seed=0, world_size=3)
    weighted = good.settings.model_copy(
        update={"attention": good.settings.attention.model_copy(update={"weight": 1.0})}
    )
    with pytest.raises(ValueError, match="needs an attention probe"):
        Objective(good.pairs, weighted, seed=0)


def test_mixed_precision_is_close_to_full_precision_and_keeps_float32_weights(make):
    full, mixed = make("bridge.attention.weight=1"), make("bridge.attention.weight=1", "bridge.mixed_precision=true")
    batch = full.objective.batch(0)
    with torch.no_grad():
        expected, parts = full.objective(full.module, batch, 0)
        loss, _ = mixed.objective(mixed.module, batch, 0)
    assert loss.dtype == torch.float32
    assert loss != expected  # it is another arithmetic
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    losses = [m["loss/latent_l1"] for m in run(mixed, 20)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert {p.dtype for p in mixed.bridge.trainable_parameters()} == {torch.float32}


@pytest.mark.parametrize("table_bytes", [1 << 20, 1])
def test_captions_equal_the_encoders_own_output(flux_folder, table_bytes):
    space, prompts = load_space(flux_folder), ["a red circle", "a blue square", "a red circle"]
    captions = PromptTable(space, prompts, max_bytes=table_bytes, batch_size=1)
    assert (captions._text is None) == (table_bytes > 1)  # what a table holds needs no encoder
    conditioning = captions(prompts)
    expected = space.encode_prompts(space.load_text(), prompts)
    assert conditioning.keys() == expected.keys()
    assert all(torch.allclose(conditioning[name], expected[name], atol=1e-5) for name in expected)


# -- image metrics ----------------------------------------------------------------------------------------


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One channel in [0, 1], every window in a loop, float64."""
    weights = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    )
    weights /= weights.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mu_a, mu_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mu_a) ** 2).sum(), (weights * (b - mu_b) ** 2).sum()
            cov = (weights * (a - mu_a) * (b - mu_b)).sum()
            values.append(
                (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4) / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )
    return float(np.mean(values))


def two_pictures(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, or drawn with flat areas, where float32 has no digits left for a variance; [2, 3, 14, 16] each."""
    if kind == "drawn":
        x = render(single_scenes()[:2], 16, seed=0)[..., 1:-1, :].clamp(-1, 1)
        return x, 0.9 * x
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 14, 16, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("kind", ["noise", "drawn"])
def test_ssim_and_psnr_equal_their_definitions(kind):
    x, y = two_pictures(kind)
    unit = [((v.double() + 1) / 2).numpy() for v in (x, y)]
    expected = [np.mean([naive_ssim(unit[0][b, c], unit[1][b, c]) for c in range(3)]) for b in range(2)]
    assert fidelity.ssim(y, x).tolist() == pytest.approx(expected, abs=1e-6)
    assert fidelity.ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)
    expected = -10 * np.log10(((unit[0] - unit[1]) ** 2).mean(axis=(1, 2, 3)))
    assert fidelity.psnr(y, x).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_psnr_and_l1_of_a_known_offset():
    x = torch.zeros(2, 3, 12, 12)
    y = x + torch.tensor([0.2, 0.02])[:, None, None, None]  # 0.1 and 0.01 of the data range
    assert fidelity.psnr(y, x).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert fidelity.l1(y, x).tolist() == pytest.approx([0.1, 0.01])
    assert fidelity.psnr(x, x).tolist() == [100, 100]


@pytest.mark.parametrize("metric", [fidelity.l1, fidelity.psnr, fidelity.ssim])
def test_different_shapes_are_refused(metric):
    with pytest.raises(ValueError, match="two equal"):
        metric(torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 13))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        fidelity.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
