"""The three updates of a worker: what they change, their order, resumes, the fake score, a Bridge trained along."""

import copy
import gc
import itertools

import pytest
import torch
from answers import Answer
from captions import CAPTIONS
from lanes import full_but

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import build_objective
from raydistill.config.reading import load
from raydistill.data.pairs import PairSet, write_pairs
from raydistill.distillation.batches import Real
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.networks import load_real, load_unet
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.errors import NonFiniteError
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space

# -- one worker, in process -----------------------------------------------------------------------------


def configuration(**changes):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    small = ["bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=4", "discriminator.width=8"]
    return load(overrides=[*small, "student.lr=1e-3", "fake_score.lr=1e-3", "discriminator.lr=1e-2", *overrides])


def batches(tables, size=4, captions=3):
    for slot in itertools.count():
        ids = list(range(slot * size, slot * size + size))
        rows = [i % captions for i in ids]
        yield {"sample_id": ids} | {
            f"{role}.{name}": value[rows].numpy()
            for role, table in zip(("student", "teacher"), tables, strict=True)
            for name, value in table.items()
        }


def make_distiller(config, spaces, tables, anchor=None):
    student_space, teacher_space = spaces
    generator = torch.Generator().manual_seed(5)
    real = Real(torch.randn(8, *teacher_space.latent_shape, generator=generator), tables[1], torch.arange(8) % 3)
    torch.manual_seed(7)
    bridge = Bridge.create(student_space, teacher_space, config.bridge)
    return build_distiller(
        config,
        student_space=student_space,
        teacher_space=teacher_space,
        student=student_space.load_network(),
        bridge=bridge,
        fake_network=teacher_space.load_network(),
        real=real,
        source=batches(tables),
        anchor=anchor,
    )


class LocalTeacher:
    """Dense teacher; notes the student's weights at submission, which must be those of the update."""

    def __init__(self, space, empty):
        self.space, self.empty, self.network = space, empty, space.load_network()

    def __call__(self, made):
        with torch.no_grad():
            scores = self.space.predict_x0(
                self.network, made.x_t, made.t_B, made.teacher_conditioning, self.empty, guidance_scale=3.0
            )
        return Answer(scores)


def run(config, spaces, tables, steps=2, overlap=True, distiller=None):
    distiller = distiller or make_distiller(config, spaces, tables)
    submit = LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()})
    for _ in range(steps):
        distillation_step(distiller, submit, config.fake_score.updates, overlap)
    return distiller


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_an_update_changes_the_student_the_fake_score_and_the_head_and_nothing_else(spaces, tables):
    config = configuration(fake_score__updates=1)
    distiller = make_distiller(config, spaces, tables)
    frozen = [p for n, p in distiller.networks.fake.network.named_parameters() if "lora_" not in n]
    before = {
        "student": flat(distiller.networks.student).clone(),
        "bridge": flat(distiller.networks.bridge).clone(),
        "base": torch.cat([p.detach().flatten() for p in frozen]).clone(),
        "lora": torch.cat([p.detach().flatten() for p in distiller.networks.fake.trainable().values()]).clone(),
        "head": flat(distiller.networks.discriminator).clone(),
    }
    run(config, spaces, tables, steps=1, distiller=distiller)
    assert not torch.equal(before["student"], flat(distiller.networks.student))
    assert not torch.equal(
        before["lora"], torch.cat([p.flatten() for p in distiller.networks.fake.trainable().values()])
    )
    assert not torch.equal(before["head"], flat(distiller.networks.discriminator))
    assert torch.equal(before["bridge"], flat(distiller.networks.bridge))
    assert torch.equal(before["base"], torch.cat([p.flatten() for p in frozen]))
    assert all(p.grad is None for p in distiller.networks.bridge.parameters())


def test_the_optimizers_are_the_papers_each_with_its_learning_rate(spaces, tables):
    distiller = make_distiller(configuration(), spaces, tables)
    groups = {name: optimizer.param_groups[0] for name, optimizer in distiller.gradients.optimizers.items()}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "student": 1e-3,
        "fake": 1e-3,
        "discriminator": 1e-2,
    }
    for group in groups.values():
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.0, 0.999), 1e-8, 0.0)


def test_overlap_changes_no_bit(spaces, tables):
    config = configuration(fake_score__updates=2)
    overlapped = run(config, spaces, tables, overlap=True)
    sequential = run(config, spaces, tables, overlap=False)
    assert torch.equal(flat(overlapped.networks.student), flat(sequential.networks.student))
    other = run(configuration(fake_score__updates=2, run__seed=1), spaces, tables)
    assert not torch.equal(flat(overlapped.networks.student), flat(other.networks.student))


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_restored_run_goes_on_with_the_same_bits(spaces, tables, warmup):
    """With learning rates that grow as well, of which the resume falls into the middle."""
    config = configuration(fake_score__updates=1, student__ema_decay=0.9, distill__warmup_steps=warmup)
    whole = run(config, spaces, tables, steps=3)
    first = run(config, spaces, tables, steps=2)
    state = copy.deepcopy(first.state_dict())
    resumed = make_distiller(config, spaces, tables)
    for _ in range(2 * 2):
        next(resumed.batches.source)
    resumed.load_state_dict(state)
    run(config, spaces, tables, steps=1, distiller=resumed)
    assert torch.equal(flat(whole.networks.student), flat(resumed.networks.student))
    assert torch.equal(flat(whole.networks.ema), flat(resumed.networks.ema))
    assert torch.equal(flat(whole.networks.discriminator), flat(resumed.networks.discriminator))


def rates(distiller):
    return {name: one.param_groups[0]["lr"] for name, one in distiller.gradients.optimizers.items()}


@pytest.mark.full
def test_all_learning_rates_grow_over_the_warm_up_in_every_update_alike(spaces, tables):
    full = {"student": 1e-3, "fake": 1e-3, "discriminator": 1e-2}
    warm = make_distiller(configuration(fake_score__updates=2, distill__warmup_steps=2), spaces, tables)
    for share in (0.5, 1.0, 1.0):
        run(configuration(fake_score__updates=2), spaces, tables, steps=1, distiller=warm)
        assert rates(warm) == pytest.approx({name: share * rate for name, rate in full.items()})
    plain = run(configuration(fake_score__updates=1), spaces, tables, steps=1)
    assert rates(plain) == full
    first = [
        run(configuration(fake_score__updates=1, distill__warmup_steps=n), spaces, tables, steps=1) for n in (0, 1)
    ]
    assert torch.equal(*(flat(one.networks.student) for one in first))  # a warm-up of one update is none
    assert torch.equal(flat(plain.networks.student), flat(first[0].networks.student))


@pytest.mark.parametrize("ema_decay", full_but([0.6, 0.999], 0.6))
def test_the_average_of_the_student_follows_its_warmed_up_recursion_across_a_resume(spaces, tables, ema_decay):
    """mean <- d mean + (1 - d) student with d = min(ema_decay, (n + 1) / (n + 10)) after n updates, in float64."""
    config = configuration(fake_score__updates=1, student__ema_decay=ema_decay)
    distiller = make_distiller(config, spaces, tables)
    expected = flat(distiller.networks.student).double()
    start = expected.clone()
    for n in range(7):
        if n == 4:
            state = copy.deepcopy(distiller.state_dict())
            distiller = make_distiller(config, spaces, tables)
            for _ in range(n * 2):
                next(distiller.batches.source)
            distiller.load_state_dict(state)
        run(config, spaces, tables, steps=1, distiller=distiller)
        decay = min(ema_decay, (n + 1) / (n + 10))
        expected = decay * expected + (1 - decay) * flat(distiller.networks.student).double()
        torch.testing.assert_close(flat(distiller.networks.ema).double(), expected, rtol=1e-6, atol=2e-7)
    moved = (flat(distiller.networks.student).double() - start).norm()
    assert (expected - start).norm() > 0.1 * moved  # without warm-up 0.999 would have kept the start
    assert (expected - flat(distiller.networks.student).double()).norm() > 1e-3 * moved
    assert distiller.networks.evaluated is distiller.networks.ema


def test_weights_that_are_not_finite_are_named_and_change_nothing(spaces, tables):
    distiller = make_distiller(configuration(), spaces, tables)
    for parameter in itertools.islice(distiller.networks.fake.network.parameters(), 1):
        parameter.data.fill_(float("nan"))
    before = flat(distiller.networks.student).clone(), flat(distiller.networks.discriminator).clone()
    with pytest.raises(
        NonFiniteError, match=r"^the fake score, .* teacher's copy: not finite in samples \[0, 1, 2, 3\]"
    ):
        distiller.fake_update()
    assert torch.equal(before[0], flat(distiller.networks.student))
    assert torch.equal(before[1], flat(distiller.networks.discriminator))


def test_without_vsd_only_the_gan_teaches(spaces, tables):
    config = configuration(vsd__weight=0, fake_score__updates=1)
    distiller = make_distiller(config, spaces, tables)
    before = flat(distiller.networks.student).clone()
    distillation_step(distiller, None, 1, overlap=True)
    assert not torch.equal(before, flat(distiller.networks.student))
    assert "loss/vsd" not in distiller.pop_metrics()


def test_a_lora_fake_score_starts_as_the_teacher_and_is_all_that_is_checkpointed(spaces, tables):
    config, (_, space) = configuration(), spaces
    fake = FakeScore(space, space.load_network(), config.fake_score, [0.5])
    x_t, t_B = torch.randn(4, *space.latent_shape), torch.rand(4)
    with torch.no_grad():
        torch.testing.assert_close(
            fake(x_t, t_B, tables[1])[0], space.predict(space.load_network(), x_t, t_B, tables[1]), rtol=1e-5, atol=1e-5
        )
    assert all("lora_" in name for name in fake.trainable())
    suffixes = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in fake.trainable()}
    assert {"to_q", "to_k", "to_v", "proj_mlp", "proj_out"} <= suffixes


@pytest.mark.parametrize("index", [0, 1])
def test_early_features_equal_those_of_a_whole_forward(spaces, tables, index):
    space = spaces[index]
    fake = FakeScore(space, space.load_network(), configuration().fake_score, [0.5])
    x_t, t_B = torch.randn(4, *space.latent_shape, requires_grad=True), torch.rand(4)
    (features,) = fake.features(x_t, t_B, tables[index])
    torch.testing.assert_close(features, fake(x_t, t_B, tables[index])[1][0])
    features.square().mean().backward()
    assert x_t.grad.abs().sum() > 0


@pytest.mark.full
def test_the_discriminator_learns_to_tell_real_from_fake():
    """Shipped teacher samples against the shipped one-step start, over the full range of noise."""
    config = load(overrides=["discriminator.lr=2e-3", "fake_score.updates=1"])
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    samples = PairSet(WEIGHTS / "samples" / "flux").rows(range(96))
    table = [space.encode_prompts(space.load_text(), samples.prompts) for space in (student, teacher)]
    real = Real(samples.z_teacher, table[1], torch.arange(96))
    bridge = Bridge.load(WEIGHTS / "bridge" / "sd15-flux", student, teacher)
    unet = load_unet(student, "shapes:sd15-onestep")
    stream = batches(table, size=12, captions=96)
    distiller = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=unet,
        bridge=bridge,
        fake_network=teacher.load_network(),
        real=real,
        source=stream,
    )
    accuracies = []
    for _ in range(120):
        distiller.fake_update()
        accuracies.append(distiller.pop_metrics()["discriminator/accuracy"])
    # 40 updates of 24 pictures: guessing gives 0.5 with a standard deviation of 0.016
    assert sum(accuracies[:10]) / 10 < 0.56
    assert sum(accuracies[-40:]) / 40 > 0.56


def test_the_heads_loss_reaches_the_fake_score_where_it_is_asked_to(spaces, tables):
    """Section 3 of the method: DMD2 does so, by default nothing of it does. Student samples and teacher samples alike."""
    found = {}
    for weight in (0.0, 0.25, 1e6):
        distiller = make_distiller(configuration(discriminator__fake_weight=weight), spaces, tables)
        gradients, step = {}, distiller.gradients.step

        def spy(gradients=gradients, distiller=distiller, step=step, **norms):
            for name in norms:
                gradients[name] = torch.cat([p.grad.flatten() for p in distiller.gradients.parameters(name)])
            return step(**norms)

        distiller.gradients.step = spy
        distiller.fake_update()
        found[weight] = gradients
    none, some, most = (found[weight]["fake"] for weight in found)
    difference = some - none
    assert difference.abs().max() > 1e-6
    torch.testing.assert_close(difference / 0.25, (most - none) / 1e6, rtol=1e-2, atol=1e-5)  # linear in the weight
    distiller = make_distiller(configuration(discriminator__fake_weight=0.25), spaces, tables)
    part = distiller.batches.next()[0]
    row = distiller.fake_side.student_gradients(part)
    student_half = torch.cat([p.grad.flatten() for p in distiller.gradients.parameters("fake")]) - none
    distiller.adversary.real_gradients(row, part)
    both = torch.cat([p.grad.flatten() for p in distiller.gradients.parameters("fake")]) - none
    assert student_half.abs().max() > 1e-6
    assert (both - student_half).abs().max() > 1e-6
    assert torch.equal(both, difference)


def test_a_full_fake_score_trains_everything(spaces, tables):
    config, (_, space) = configuration(fake_score__kind="full"), spaces
    fake = FakeScore(space, space.load_network(), config.fake_score, [0.5])
    assert sum(p.numel() for p in fake.trainable().values()) == sum(p.numel() for p in fake.network.parameters())


def test_recomputed_activations_change_no_number(spaces, tables):
    """Also of the GAN's path, whose forward pass ends inside a block that is recomputed."""
    kept, recomputed = (
        run(configuration(distill__gradient_checkpointing=value), spaces, tables) for value in ("false", "true")
    )
    assert recomputed.networks.student.is_gradient_checkpointing
    assert recomputed.networks.fake.network.is_gradient_checkpointing
    state, again = kept.state_dict(), recomputed.state_dict()
    for part in ("student", "fake", "discriminator"):
        for name, value in state[part].items():
            assert torch.equal(value, again[part][name]), f"{part} {name}"


# -- a Bridge that is trained along ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(spaces, tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("pairs"), torch.Generator().manual_seed(9)
    z_student, z_teacher = (torch.randn(24, *space.latent_shape, generator=generator) for space in spaces)
    write_pairs(
        folder,
        0,
        prompts=[f"{CAPTIONS[i % 3]} {i}" for i in range(24)],
        prompt_ids=list(range(24)),
        seeds=[0] * 24,
        z_teacher=z_teacher,
        z_student=z_student,
    )
    return folder


def make_joint(spaces, tables, pairs, **changes):
    config = configuration(
        fake_score__updates=1,
        bridge__trainable=True,
        bridge__trainable_lr=1e-3,
        bridge__batch_size=4,
        student__model=spaces[0].folder,
        teacher__model=spaces[1].folder,
        **changes,
    )
    return config, make_distiller(config, spaces, tables, build_objective(config, pairs))


@pytest.mark.parametrize("left_out", [False, True])
def test_a_bridge_trained_along_takes_both_losses_and_keeps_its_prior(spaces, tables, pairs, left_out):
    """A student's sample that is left out counts as zero; the pairs are all there."""
    config, distiller = make_joint(spaces, tables, pairs)
    if left_out:
        spoilt = next(batches(tables))
        spoilt["student.prompt_embeds"][0] = float("nan")
        distiller.batches.source = itertools.chain([spoilt], itertools.islice(batches(tables), 1, None))
    before = {name: flat(part).clone() for name, part in (
        ("projector", distiller.networks.bridge.projector), ("prior", distiller.networks.bridge.prior), ("student", distiller.networks.student)
    )}  # fmt: skip
    taken = {}

    def spy(loss, *names, **more):
        if "bridge" in names:
            taken["with_anchor"] = loss * more.get("weight", 1.0)
        return accumulate(loss, *names, **more)

    accumulate, distiller.gradients.accumulate = distiller.gradients.accumulate, spy
    run(config, spaces, tables, steps=1, distiller=distiller)
    metrics = distiller.pop_metrics()
    assert not torch.equal(before["projector"], flat(distiller.networks.bridge.projector))
    assert not torch.equal(before["student"], flat(distiller.networks.student))
    assert torch.equal(before["prior"], flat(distiller.networks.bridge.prior))
    assert metrics["bridge/grad_norm"] > 0
    own = metrics["bridge/latent_l1"] + metrics["bridge/attention"]
    distilled = metrics["loss/vsd"] + config.discriminator.weight * metrics["loss/gan"]
    share = 0.75 if left_out else 1.0
    assert taken["with_anchor"].item() == pytest.approx(share * distilled + config.bridge.anchor_weight * own, rel=1e-4)


def test_the_teachers_scores_decide_where_a_bridge_goes_that_is_trained_along(spaces, tables, pairs):
    projectors = []
    for guidance in (1.0, 3.0):
        _, distiller = make_joint(spaces, tables, pairs)
        teacher = LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()})

        def scores(made, guidance=guidance, teacher=teacher):
            return Answer(teacher(made).result() * guidance)

        distillation_step(distiller, scores, 1, overlap=True)
        projectors.append(flat(distiller.networks.bridge.projector))
    assert not torch.equal(*projectors)


def test_a_bridge_trained_along_resumes_with_the_same_bits_in_either_order_of_work(spaces, tables, pairs):
    config, whole = make_joint(spaces, tables, pairs)
    run(config, spaces, tables, steps=3, distiller=whole)
    _, first = make_joint(spaces, tables, pairs)
    run(config, spaces, tables, steps=2, overlap=False, distiller=first)
    _, resumed = make_joint(spaces, tables, pairs)
    for _ in range(2 * 2):
        next(resumed.batches.source)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    run(config, spaces, tables, steps=1, distiller=resumed)
    assert torch.equal(flat(whole.networks.bridge.projector), flat(resumed.networks.bridge.projector))
    assert torch.equal(flat(whole.networks.student), flat(resumed.networks.student))


def test_the_best_student_is_kept_with_the_bridge_of_its_update(spaces, tables, pairs):
    config, distiller = make_joint(spaces, tables, pairs)
    run(config, spaces, tables, steps=1, distiller=distiller)
    best = copy.deepcopy(distiller.networks.best_state())
    student, projector = flat(distiller.networks.evaluated).clone(), flat(distiller.networks.bridge.projector).clone()
    run(config, spaces, tables, steps=1, distiller=distiller)
    assert not torch.equal(projector, flat(distiller.networks.bridge.projector))
    distiller.networks.load_best_state(best)
    assert torch.equal(student, flat(distiller.networks.evaluated))
    assert torch.equal(projector, flat(distiller.networks.bridge.projector))


def graphs():
    gc.collect()
    return sum(isinstance(one, torch.Tensor) and one.grad_fn is not None for one in gc.get_objects())


GAN = {"depths": [0.5, 1.0], "r1_weight": 1, "standardize": True, "fake_weight": 0.25}
SWITCHES = {f"discriminator__{key}": value for key, value in GAN.items()}


@pytest.mark.parametrize("shared", [False, True])
def test_no_graph_outlives_its_update(spaces, tables, pairs, shared):
    before = graphs()  # one that did would hold a hook that holds it, for ever
    config, distiller = make_joint(spaces, tables, pairs, discriminator__shared_pass=shared, **SWITCHES)
    run(config, spaces, tables, steps=1, distiller=distiller)
    assert graphs() == before


def test_without_pairs_no_bridge_is_trained_along(spaces, tables):
    with pytest.raises(ValueError, match="no pairs to anchor"):
        make_distiller(configuration(bridge__trainable=True), spaces, tables)


def test_real_data_in_memory_are_bounded(spaces, pairs):
    real = load_real(pairs, spaces[1], count=5)
    assert real.latents.shape == (5, *spaces[1].latent_shape)
    assert len(real.rows) == 5
    assert len(load_real(pairs, spaces[1], count=1000).rows) == 24
