"""The discriminator: channels that drown the others, several depths, R1 without a double backward pass."""

from __future__ import annotations

import copy

import pytest
import student_updates
import tiny_flow_pipelines
import torch
from test_updates import configuration, flat, make_distiller, run

from raydistill.config.reading import load
from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.path import add_noise
from raydistill.diffusion.timesteps import sample_t
from raydistill.distillation.adversary import TIMES
from raydistill.distillation.batches import T_MAX, T_MIN
from raydistill.distillation.discriminator import Discriminator, Head, moments_of
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.losses import approximate_r1, fake_logits_loss, real_logits_loss
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.planning.counting import count_trainer
from raydistill.spaces import load_space
from raydistill.spaces.meta import open_space

THREE = "[0.2,0.5,0.9]"


# -- channels that drown the others -----------------------------------------------------------------------


def massive(real, count, generator):
    """Features of 3 channels of 96 that are 300 times as large as the others; real ones differ in the small channels."""
    features = torch.randn(count, 96, 4, 4, generator=generator)
    features[:, 8:24] += 0.35 if real else -0.35
    features[:, :3] = 300 * (features[:, :3] + 1)
    return features


def area_under_curve(standardize):
    """Of a head that has learned for 150 updates to tell real from fake features, on others."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    head = Discriminator([96], 16, standardize)
    if standardize:
        head.take(moments_of([massive(True, 512, generator)]))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, betas=(0.0, 0.999), weight_decay=0.0)
    for _ in range(150):
        real, fake = (head([massive(kind, 16, generator)])[0] for kind in (True, False))
        optimizer.zero_grad()
        (real_logits_loss(real) + fake_logits_loss(fake)).backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = (head([massive(kind, 256, generator)])[0].mean((1, 2)) for kind in (True, False))
    return (real[:, None] > fake[None]).float().mean().item()


def test_a_head_sees_behind_massive_channels_where_it_standardises():
    blind, seeing = (area_under_curve(standardize) for standardize in (False, True))
    assert seeing > 0.98
    assert blind < 0.75


def test_the_statistics_are_those_of_the_first_teacher_samples_over_t_and_stay(spaces, tables):
    """By hand, from the same draws; the same after a resume."""
    config = configuration(fake_score__updates=1, discriminator__standardize=True, discriminator__depths="[0.3,0.8]")
    distiller = make_distiller(config, spaces, tables)
    reference = make_distiller(config, spaces, tables)
    part = reference.batches.next()[0]  # the student's
    part = reference.batches.next()[0]
    latents, conditioning = reference.feed.of(part.sample_ids)
    found = []
    for place in range(TIMES):
        ids, shift = part.sample_ids, reference.draws.shift
        t_B = sample_t((place + uniform(0, ids, f"statistics_t/{place}")) / TIMES, T_MIN, T_MAX, shift)
        eps = normal(0, ids, latents.shape[1:], f"statistics_noise/{place}")
        with torch.no_grad():
            found.append(reference.networks.features(add_noise(reference.path, latents, eps, t_B), t_B, conditioning))
    run(config, spaces, tables, steps=1, distiller=distiller)
    heads = distiller.networks.discriminator.heads
    for head, features in zip(heads, zip(*found, strict=True), strict=True):
        of_all = torch.cat(features).double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(head.mean.double(), of_all.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.spread.double(), of_all.std(1, correction=0), rtol=1e-4, atol=1e-5)
        assert head.spread.min() > 0
    state = copy.deepcopy(distiller.state_dict())
    run(config, spaces, tables, steps=1, distiller=distiller)
    for name, value in state["discriminator"].items():
        now = distiller.networks.discriminator.state_dict()[name]
        assert torch.equal(now, value) == name.endswith(("mean", "spread")), name  # the weights alone have moved
    resumed = make_distiller(config, spaces, tables)
    for _ in range(2):
        next(resumed.batches.source)
    resumed.load_state_dict(state)
    assert resumed.networks.discriminator.measured
    run(config, spaces, tables, steps=1, distiller=resumed)
    for name, value in distiller.networks.discriminator.state_dict().items():
        assert torch.equal(value, resumed.networks.discriminator.state_dict()[name]), name
    assert torch.equal(flat(distiller.networks.student), flat(resumed.networks.student))


@pytest.mark.full
def test_the_statistics_of_a_batch_in_parts_are_those_of_the_whole(spaces, tables):
    heads = []
    for parts in (1, 2):
        changes = {"discriminator__standardize": True, "distill__micro_batches": parts}
        distiller = make_distiller(configuration(**changes), spaces, tables)
        distiller.fake_update()
        heads += distiller.networks.discriminator.heads
    torch.testing.assert_close(heads[0].mean, heads[1].mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads[0].spread, heads[1].spread, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_single_head_without_a_name_is_read():
    old, new = Head(6, 8), Discriminator([6], 8)
    new.load_state_dict(old.state_dict())
    features = torch.randn(2, 6, 4, 4)
    assert torch.equal(old(features), new([features])[0])


# -- several depths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_every_depth_gives_the_features_of_its_block(spaces, tables, index):
    """Of a UNet and of a transformer: as a single depth gives them, and as a whole forward pass does."""
    space = spaces[index]
    network = space.load_network()
    fake = FakeScore(space, space.load_network(), configuration().fake_score, [0.2, 0.5, 0.9])
    x_t, t_B = torch.randn(4, *space.latent_shape, requires_grad=True), torch.rand(4)
    found, whole = fake.features(x_t, t_B, tables[index]), fake(x_t, t_B, tables[index])[1]
    assert len(found) == len(whole) == 3
    assert all(map(torch.equal, found, whole))
    assert len({float(one.detach().sum()) for one in found}) == 3
    for depth, one in zip((0.2, 0.5), found, strict=False):
        alone = FakeScore(space, space.load_network(), configuration().fake_score, [depth])
        assert torch.equal(alone.features(x_t, t_B, tables[index])[0], one)
    if index == 0:  # up blocks are those of a UNet's second half
        assert space.feature_blocks(network, [0.5, 0.9]) == [network.mid_block, network.up_blocks[-1]]
    sum(one.square().mean() for one in found).backward()
    assert x_t.grad.abs().sum() > 0


def test_without_a_gan_no_depth_is_read(spaces, tables):
    """Not even two that are the same block: nothing looks at them before the start."""
    config = configuration(discriminator__weight=0, discriminator__depths="[0.99,1.0]", fake_score__updates=1)
    distiller = make_distiller(config, spaces, tables)
    fake = distiller.networks.fake
    assert not any(module._forward_hooks for module in fake.network.modules())
    before = torch.cat([p.detach().flatten() for p in fake.trainable().values()])
    distiller.fake_update()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in fake.trainable().values()]))
    with pytest.raises(InputError, match="are the same block"):
        make_distiller(configuration(discriminator__depths="[0.99,1.0]"), spaces, tables)


def test_each_depth_has_a_head_that_learns_and_pulls_and_one_depth_is_the_default(spaces, tables):
    default, single = (
        run(configuration(fake_score__updates=1, **more), spaces, tables, steps=2)
        for more in ({}, {"discriminator__depths": "[0.5]"})
    )
    for part in ("student", "discriminator"):
        assert torch.equal(flat(getattr(default.networks, part)), flat(getattr(single.networks, part)))
    config = configuration(fake_score__updates=1, discriminator__depths=THREE)
    several = make_distiller(config, spaces, tables)
    before = [flat(head).clone() for head in several.networks.discriminator.heads]
    run(config, spaces, tables, steps=2, distiller=several)
    assert len(before) == 3
    assert not any(map(torch.equal, before, map(flat, several.networks.discriminator.heads)))
    assert not torch.equal(flat(default.networks.student), flat(several.networks.student))
    resumed = make_distiller(config, spaces, tables)
    resumed.load_state_dict(copy.deepcopy(several.state_dict()))
    assert torch.equal(flat(resumed.networks.discriminator), flat(several.networks.discriminator))


def test_depths_that_a_network_does_not_have_are_refused_before_anything_starts(tmp_path):
    for depths in ("[0.5,0.5]", "[0.9,0.5]"):
        with pytest.raises(InputError, match=r"^discriminator: depths \(0\..*must increase"):
            load(overrides=[f"discriminator.depths={depths}"])
    with pytest.raises(InputError, match=r"discriminator\.depths\.1: "):
        load(overrides=["discriminator.depths=[0.5,1.5]"])

    def same(depths, *overrides):
        """Distinct blocks of the teacher as it is."""
        first, second = (depth.replace(".", r"\.") for depth in depths)
        message = (
            rf"^discriminator\.depths: {first} and {second} are the same block of the fake score; name fewer depths"
        )
        settings = (f"storage={tmp_path}", "controls=[]", f"discriminator.depths=[{','.join(depths)}]")
        with pytest.raises(InputError, match=message):
            check_inputs(load(overrides=[*settings, *overrides]))

    same(["0.28", "0.32"], "fake_score.kind=truncated")  # of the four blocks that are left of five
    same(["0.26", "0.4"], "controls=[shared_space]")  # the student's UNet is the teacher there


# -- R1 ---------------------------------------------------------------------------------------------------


def test_r1_by_finite_differences_is_the_squared_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=generator).double()
    weight = torch.randn(5, 3, 3, 3, generator=generator).double()

    def logits(x):
        return torch.nn.functional.conv2d(x, weight, padding=1).tanh().mean((1, 2, 3))

    wanted = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logits(wanted).sum(), wanted)
    exact = gradient.square().sum((1, 2, 3)).mean()
    draws = [torch.randn(x.shape, generator=generator).double() for _ in range(1500)]
    found = torch.stack([approximate_r1(logits(x), logits(x + 1e-3 * n), 1e-3) for n in draws]).mean()
    assert found.item() == pytest.approx(exact.item(), rel=0.1)


@pytest.mark.full
def test_r1_takes_part_in_the_heads_gradient_by_its_weight_alone(spaces, tables):
    def gradients(**changes):
        distiller, taken = make_distiller(configuration(**changes), spaces, tables), {}
        step = distiller.gradients.step

        def spy(**norms):
            for name in norms:
                taken[name] = torch.cat([p.grad.flatten() for p in distiller.gradients.parameters(name)])
            return step(**norms)

        distiller.gradients.step = spy
        distiller.fake_update()
        return taken, distiller.pop_metrics()

    none, metrics = gradients()
    assert "discriminator/r1" not in metrics
    (some, metrics), (more, _) = (gradients(discriminator__r1_weight=weight) for weight in (50.0, 100.0))
    assert metrics["discriminator/r1"] > 0
    difference = some["discriminator"] - none["discriminator"]
    assert difference.abs().max() > 1e-3
    twice = more["discriminator"] - none["discriminator"]
    assert (twice - 2 * difference).norm() < 1e-2 * twice.norm()
    assert torch.equal(some["fake"], none["fake"])  # it reaches the fake score where the head's losses do
    reached = [
        gradients(discriminator__r1_weight=weight, discriminator__fake_weight=0.1)[0]["fake"] for weight in (0, 0.5)
    ]
    assert not torch.equal(*reached)


@pytest.mark.full
@pytest.mark.parametrize(
    "switches", [("r1_weight=1",), ("depths=[0.5,0.99]",), ("depths=[0.5,0.99]", "standardize=true")]
)
def test_the_planner_counts_what_is_computed_besides(switches):
    """One more pass for R1; with deeper features, more of a pass for each of teacher samples and the student's pull."""
    plain, more = (
        count_trainer(config, *(open_space(config.student.model), open_space(config.teacher.model)), batch=4)
        for config in (load(), load(overrides=[f"discriminator.{switch}" for switch in switches]))
    )
    assert more.fake.flops > 1.05 * plain.fake.flops
    if "r1_weight=1" not in switches:
        assert more.student.flops > 1.02 * plain.student.flops
        assert more.weights.discriminator > 1.5 * plain.weights.discriminator


def test_heads_are_made_for_a_teacher_that_reads_no_empty_text(spaces, tmp_path):
    """Z-Image's text refiner takes at least one token; the last block lies behind it."""
    teacher = load_space(tiny_flow_pipelines.SAVE["z-image"](tmp_path / "z-image"))
    worker = student_updates.distiller(spaces[0], teacher, "discriminator.depths=[1]", "student.kind=full")
    assert [p.shape[1] for p in worker.networks.discriminator.parameters() if p.ndim == 4]
