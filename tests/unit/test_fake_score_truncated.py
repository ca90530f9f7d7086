"""The truncated fake score: the first and last blocks of every transformer family, trained; UNets are refused."""

from __future__ import annotations

import copy
import itertools
import weakref
from types import SimpleNamespace

import pytest
import tiny_diffusion_pipelines
import tiny_flow_pipelines
import torch
from lanes import full_but
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raydistill.bridge.model import Bridge
from raydistill.config.networks import FakeScoreConfig
from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.distillation.batches import Real
from raydistill.distillation.discriminator import Discriminator
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.planning.counting import count_trainer
from raydistill.planning.memory import trainer_remedies
from raydistill.spaces import load_space
from raydistill.spaces.meta import open_space

SAVE = {**tiny_flow_pipelines.SAVE, "pixart": tiny_diffusion_pipelines.save_pixart}
DEPTH = {
    "sd3": 4,
    "flux-dev": 5,
    "flux2": 5,
    "z-image": 5,
    "chroma": 5,
    "sana": 4,
    "qwen-image": 4,
    "pixart": 4,
}  # two of the five come first, in their own list
PROMPTS = ["a small red circle at the left on a white background", "two blue squares"]
CUTS = [(1, 1), (2, 1), (1, -2)]  # first, last blocks; negative: of the depth, so that the second block alone goes


class Case:
    """One family's tiny folder, with inputs of two samples."""

    def __init__(self, name, folder):
        self.name, self.space = name, load_space(SAVE[name](folder))
        self.conditioning = TextEncoder(self.space).encode(PROMPTS)
        generator = torch.Generator().manual_seed(4)
        self.x_t = torch.randn(2, *self.space.latent_shape, generator=generator)
        self.t_B = torch.tensor([0.3, 0.8])

    def predict(self, network):
        return self.space.predict(network, self.x_t, self.t_B, self.conditioning)

    def cut(self, first, last):
        return first, last if last > 0 else DEPTH[self.name] + last

    def fake_score(self, first, last, depth_fraction=0.5):
        config = FakeScoreConfig(kind="truncated", first_blocks=first, last_blocks=last)
        return FakeScore(self.space, self.space.load_network(), config, [depth_fraction])


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


every_family = pytest.mark.parametrize("case", full_but(SAVE, *tiny_flow_pipelines.SHORT, "pixart"), indirect=True)
every_cut = pytest.mark.parametrize(("first", "last"), CUTS)


def blocks_by_hand(name, network):
    """In the order in which diffusers' forward methods run them."""
    if name == "z-image":
        return [*network.noise_refiner, *network.layers]
    if name in ("flux-dev", "flux2", "chroma"):
        return [*network.transformer_blocks, *network.single_transformer_blocks]
    return list(network.transformer_blocks)


def numel(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# -- every family -----------------------------------------------------------------------------------------


@every_family
def test_blocks_are_listed_in_the_order_in_which_they_run(case):
    network, ran = case.space.load_network(), []
    blocks = case.space.blocks(network)
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    with torch.no_grad():
        case.predict(network)
    assert len(blocks) == DEPTH[case.name]
    assert ran == blocks == blocks_by_hand(case.name, network)


@every_family
def test_all_blocks_are_the_full_network_to_the_bit(case):
    full = case.space.load_network()
    depth = DEPTH[case.name]
    with torch.no_grad():
        expected = case.predict(full)
        for first in range(1, depth):
            cut = case.space.truncated(case.space.load_network(), first, depth - first)
            assert torch.equal(case.predict(cut), expected)
            assert [name for name, _ in cut.named_parameters()] == [name for name, _ in full.named_parameters()]


@every_cut
@every_family
def test_the_output_is_that_of_the_full_network_whose_dropped_blocks_do_nothing(case, first, last):
    first, last = case.cut(first, last)
    full = case.space.load_network()
    for block in blocks_by_hand(case.name, full)[first : DEPTH[case.name] - last]:

        def nothing(*args, **kwargs):
            tokens = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            text = kwargs.get("encoder_hidden_states")
            pair = text is not None and case.name != "pixart"  # blocks of text and image tokens return both
            return (text, tokens) if pair else tokens

        block.forward = nothing
    fake = case.fake_score(first, last)
    with torch.no_grad():
        prediction, _ = fake(case.x_t, case.t_B, case.conditioning)
        assert prediction.shape == case.x_t.shape
        assert torch.equal(prediction, case.predict(full))
        assert not torch.allclose(prediction, case.predict(case.space.load_network()), atol=1e-4)


@every_cut
@every_family
def test_exactly_the_dropped_blocks_parameters_go_and_all_others_are_trained(case, first, last):
    first, last = case.cut(first, last)
    network = case.space.load_network()
    before = numel([network])
    blocks = blocks_by_hand(case.name, network)
    dropped, kept = blocks[first : len(blocks) - last], [*blocks[:first], *blocks[len(blocks) - last :]]
    gone = [weakref.ref(p) for block in dropped for p in block.parameters()]
    shrinks_by = numel(dropped)
    fake = FakeScore(
        case.space, network, FakeScoreConfig(kind="truncated", first_blocks=first, last_blocks=last), [0.5]
    )  # fmt: skip
    assert shrinks_by > 0
    assert numel([fake]) == before - shrinks_by
    assert blocks_by_hand(case.name, fake.network) == kept
    assert sum(p.numel() for p in fake.trainable().values()) == numel([fake])
    del blocks, dropped, network
    assert not any(parameter() is not None for parameter in gone)  # their memory is free


@every_family
def test_gradients_reach_every_parameter_that_the_full_networks_output_depends_on(case):
    def reached(network):
        network.requires_grad_(True).zero_grad(set_to_none=True)
        (case.predict(network) * case.x_t).sum().backward()
        return {id(p) for p in network.parameters() if p.grad is not None and p.grad.any()}

    network = case.space.load_network()
    whole = reached(network)
    cut = case.space.truncated(network, 1, 1)
    remaining = {id(p) for p in cut.parameters()}
    assert reached(cut) == whole & remaining
    assert len(whole & remaining) > 0.8 * len(remaining)


@pytest.mark.parametrize("depth_fraction", [0.01, 0.5, 1.0])
@every_family
def test_the_discriminators_features_are_found_in_what_is_left(case, depth_fraction):
    fake = case.fake_score(2, 1, depth_fraction)
    block = {0.01: 0, 0.5: 1, 1.0: 2}[depth_fraction]  # of the three that are left; round(1.5) is 2
    assert case.space.feature_block(fake.network, depth_fraction) is case.space.blocks(fake.network)[block]
    x_t = case.x_t.clone().requires_grad_()
    (features,) = fake.features(x_t, case.t_B, case.conditioning)
    assert features.shape[-2:] == (4, 4)
    torch.testing.assert_close(features, fake(x_t, case.t_B, case.conditioning)[1][0])
    Discriminator([features.shape[1]], 8)([features])[0].sum().backward()
    assert x_t.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@every_family
def test_its_state_comes_back_to_the_bit(case):
    trained = case.fake_score(1, 1)
    optimizer = torch.optim.AdamW(trained.trainable().values(), lr=1e-2)
    trained(case.x_t, case.t_B, case.conditioning)[0].square().mean().backward()
    optimizer.step()
    state = {name: p.detach().clone() for name, p in trained.trainable().items()}
    restored = case.fake_score(1, 1)
    with torch.no_grad():
        expected = trained(case.x_t, case.t_B, case.conditioning)[0]
        assert not torch.equal(restored(case.x_t, case.t_B, case.conditioning)[0], expected)
        assert state.keys() == restored.trainable().keys()
        for name, parameter in restored.trainable().items():
            parameter.copy_(state[name])
        assert torch.equal(restored(case.x_t, case.t_B, case.conditioning)[0], expected)


@every_family
def test_by_default_a_quarter_of_the_blocks_stays_at_either_end(case):
    quarter = {4: 1, 5: 2}[DEPTH[case.name]]
    fake = FakeScore(case.space, case.space.load_network(), FakeScoreConfig(kind="truncated"), [0.5])
    expected = case.fake_score(quarter, quarter)
    assert fake.trainable().keys() == expected.trainable().keys()
    for name, parameter in fake.trainable().items():
        assert torch.equal(parameter, expected.trainable()[name])


# -- refusals ---------------------------------------------------------------------------------------------


@every_family
def test_more_blocks_than_there_are_are_refused_by_key(case):
    depth = DEPTH[case.name]
    message = rf"fake_score\.kind=truncated: the first {depth} and the last 1 blocks of {depth},.*first_blocks"
    with pytest.raises(InputError, match=message):
        case.fake_score(depth, 1)
    for first, last in ((0, 1), (1, 0), (-1, 2)):
        network = case.space.load_network()
        with pytest.raises(ValueError, match="each must be at least 1"):
            case.space.truncated(network, first, last)
        assert len(case.space.blocks(network)) == depth


@pytest.mark.parametrize("name", ["sd", "sdxl", "kolors"])
def test_unets_are_refused_by_key_with_what_to_use_instead(name, diffusion_folders, sd_folder):
    space = load_space(sd_folder if name == "sd" else diffusion_folders[name])
    network = space.load_network()
    before = numel([network])
    with pytest.raises(InputError, match=r"^fake_score\.kind=truncated: .*UNet.*skip connections.*use lora or full$"):
        FakeScore(space, network, FakeScoreConfig(kind="truncated"), [0.5])
    assert numel([network]) == before


def test_numbers_of_blocks_are_at_least_one():
    for key in ("first_blocks", "last_blocks"):
        with pytest.raises(InputError, match=rf"fake_score\.{key}: .*greater than or equal to 1"):
            load(overrides=["fake_score.kind=truncated", f"fake_score.{key}=0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fake_score.first_blocks=5", "controls=[]"], "the first 5 and the last 2 blocks of 5"),
        (['controls=["shared_space"]'], r"controls names shared_space.*controls=\[no_vsd\]"),
        (["teacher.model=shapes:sd15", "bridge.checkpoint=null", "bridge.projector=identity", "controls=[]"], "UNet"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_starts(overrides, message, tmp_path):
    config = load(overrides=[f"storage={tmp_path}", "fake_score.kind=truncated", *overrides])
    with pytest.raises(InputError, match=rf"^fake_score\.kind=truncated: .*{message}"):
        check_inputs(config)
    assert not list(tmp_path.iterdir())


# -- one worker of the tiny world ---------------------------------------------------------------------------

BATCH = 4


@pytest.fixture(scope="module")
def tables(spaces):
    return [TextEncoder(space).encode(["a small red circle", "a large blue square"]) for space in spaces]


def configuration(*overrides, kind="truncated"):
    small = ["bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "discriminator.width=8"]
    cut = [f"fake_score.kind={kind}", "fake_score.first_blocks=1", "fake_score.last_blocks=2", "fake_score.lr=1e-3"]
    return load(overrides=[*small, *cut, f"distill.batch_size={BATCH}", "bridge.checkpoint=null", *overrides])


def batch_of(tables, slot):
    ids = list(range(slot * BATCH, slot * BATCH + BATCH))
    return {"sample_id": ids} | {
        f"{role}.{name}": value[[i % 2 for i in ids]].numpy()
        for role, table in zip(("student", "teacher"), tables, strict=True)
        for name, value in table.items()
    }


def make_distiller(config, spaces, tables, batches):
    student, teacher = spaces
    generator = torch.Generator().manual_seed(5)
    real = Real(torch.randn(8, *teacher.latent_shape, generator=generator), tables[1], torch.arange(8) % 2)
    torch.manual_seed(7)
    bridge = Bridge.create(student, teacher, config.bridge)
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=bridge,
        fake_network=teacher.load_network(),
        real=real,
        source=batches,
    )


def flat(tensors):
    return torch.cat([value.detach().flatten() for value in tensors])


def test_updates_on_one_batch_make_its_loss_fall_and_change_nothing_else(spaces, tables):
    distiller = make_distiller(configuration(), spaces, tables, itertools.repeat(batch_of(tables, 0)))
    others = [*distiller.networks.student.parameters(), *distiller.networks.bridge.parameters()]
    before, start = (
        flat(others).clone(),
        {name: p.detach().clone() for name, p in distiller.networks.fake.trainable().items()},
    )
    losses = []
    for _ in range(20):
        distiller.fake_update()
        losses.append(distiller.pop_metrics()["loss/fake"])
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(later < losses[0] for later in losses[5:])
    assert torch.equal(flat(others), before)
    moved = {name for name, p in distiller.networks.fake.trainable().items() if not torch.equal(p, start[name])}
    assert {"transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"} <= {
        ".".join(name.split(".")[:2]) for name in moved
    }
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("gradient_checkpointing", ["false", "true"])
def test_a_restored_run_goes_on_with_the_same_bits(gradient_checkpointing, spaces, tables):
    config = configuration(f"distill.gradient_checkpointing={gradient_checkpointing}")

    def start(first):
        return make_distiller(config, spaces, tables, (batch_of(tables, slot) for slot in itertools.count(first)))

    def update(distiller):
        distiller.fake_update()
        (made,) = distiller.make()
        distiller.student_update([made], [torch.zeros_like(made.x_t)])

    whole = start(0)
    update(whole)
    state = copy.deepcopy(whole.state_dict())
    update(whole)
    resumed = start(2)
    resumed.load_state_dict(state)
    update(resumed)
    for one, other in (
        (whole.networks.fake, resumed.networks.fake),
        (whole.networks.student, resumed.networks.student),
    ):
        assert torch.equal(flat(one.parameters()), flat(other.parameters()))


# -- planning -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(spaces):
    """A worker of each kind on meta tensors."""
    student, teacher = (open_space(space.folder) for space in spaces)
    return {
        kind: count_trainer(configuration("discriminator.weight=0", kind=kind), student, teacher)
        for kind in ("lora", "full", "truncated")
    }


def test_the_planner_counts_the_parameters_bytes_and_flops_of_what_is_left(counted, spaces, tables):
    cut, full = counted["truncated"], counted["full"]
    network = spaces[1].load_network()
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    dropped = 4 * numel(blocks[1:3])
    assert cut.weights.fake_trained == cut.gradients["fake"] == 4 * numel([network]) - dropped
    assert cut.weights.fake_frozen == 0
    assert full.weights.fake_trained - cut.weights.fake_trained == dropped
    # AdamW's two moments, and a step count for each parameter
    steps = 4 * len([p for block in blocks[1:3] for p in block.parameters()])
    assert full.weights.optimizers - cut.weights.optimizers == 2 * dropped + steps
    assert full.resident - cut.resident >= 3 * dropped
    assert full.fake.peak > cut.fake.peak

    worker = make_distiller(
        configuration("discriminator.weight=0"), spaces, tables, itertools.repeat(batch_of(tables, 0))
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        worker.fake_update()
    assert cut.fake.flops == pytest.approx(real.get_total_flops(), rel=0.05)
    assert full.fake.flops > 1.1 * cut.fake.flops


def test_where_nothing_is_frozen_sharding_the_base_is_no_remedy(counted):
    for kind, labels in (
        ("lora", ["distill.gradient_checkpointing", "fake_score.shard", "student.shard", "optimizers on the host"]),
        ("truncated", ["distill.gradient_checkpointing", "student.shard", "optimizers on the host"]),
    ):
        trainer = counted[kind]
        counts = SimpleNamespace(trainer=trainer, recomputing=trainer)
        remedies = trainer_remedies(counts, configuration("distill.workers=8", kind=kind))
        assert [label for label, _ in remedies] == labels


def test_two_plus_two_blocks_of_flux_dev_have_the_size_that_its_width_gives():
    """Weights of a double block 36 D^2 and of a single one 15 D^2; embeddings and output layer 5 D^2 + 5504 D."""
    width = 3072
    space = open_space("black-forest-labs/FLUX.1-dev")
    network = space.truncated(space.load_network(), 2, 2)
    expected = (2 * 36 + 2 * 15 + 5) * width**2 + 5504 * width
    assert numel([network]) == pytest.approx(expected, rel=0.001)
