"""Repeated blocks that are compiled: an update's numbers up to rounding, with hooks that read and end a pass outside the graphs.

In most tests torch's "aot_eager" stands for inductor: the same capture and the same graphs of both passes, without a C++
compiler.
"""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from answers import Answer
from torch._dynamo.utils import counters

from raydistill.bridge.model import Bridge
from raydistill.bridge.swinir import SwinLayer
from raydistill.config.reading import fields, load
from raydistill.distillation import compiled
from raydistill.distillation.batches import Real
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.spaces import load_space
from raydistill.teachers.speed import repeated_blocks

SMALL = (
    "bridge.embed_dim=16", "bridge.depths=[2]", "bridge.heads=2", "fake_score.rank=4", "fake_score.updates=1",
    "discriminator.width=8", "student.lr=1e-3", "fake_score.lr=1e-3", "distill.batch_size=2",
)  # fmt: skip
CAPTIONS = ["a small red circle at the left", "a large blue square at the top"]


@pytest.fixture
def build(sd_folder, flux_folder, diffusion_folders):
    """`build(family, *overrides)` -> a worker whose teacher is of the family, the same each time."""

    def start(family, *overrides):
        config = load(overrides=[*SMALL, *overrides])
        student = load_space(sd_folder)
        teacher = load_space(flux_folder if family == "flux" else diffusion_folders[family])
        tables = [space.encode_prompts(space.load_text(), CAPTIONS) for space in (student, teacher)]
        columns = {
            f"{role}.{name}": value.numpy()
            for role, table in zip(("student", "teacher"), tables, strict=True)
            for name, value in table.items()
        }
        latents = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(7)
        bridge = Bridge.create(student, teacher, config.bridge)
        return build_distiller(
            config,
            student_space=student,
            teacher_space=teacher,
            student=student.load_network(),
            bridge=bridge,
            fake_network=teacher.load_network(),
            real=Real(latents, tables[1], torch.arange(4) % len(CAPTIONS)),
            source=({"sample_id": [2 * slot, 2 * slot + 1]} | columns for slot in itertools.count()),
        )

    return start


def updated(worker):
    """Trained weights and losses after an update."""
    distillation_step(worker, lambda made: Answer(torch.zeros_like(made.x_t)), 1, overlap=True)
    state, metrics = worker.state_dict(), worker.pop_metrics()
    weights = {name: torch.cat([p.flatten() for p in state[name].values()]) for name in ("student", "fake")}
    return weights, {name: value for name, value in metrics.items() if name.startswith("loss/")}


def compare(build, family, *overrides):
    """Returns the compiled worker."""
    (weights, losses), plain = updated(build(family, *overrides)), build(family, *overrides)
    start = {"student": torch.cat([p.detach().flatten() for p in plain.networks.student.parameters()])}
    torch._dynamo.reset()
    counters.clear()
    worker = build(family, "distill.compile=true", *overrides)
    found, others = updated(worker)
    assert others == pytest.approx(losses, rel=1e-3)
    moved = (weights["student"] - start["student"]).norm()
    # AdamW turns a gradient's rounding near 0 into a step of the learning rate
    assert (found["student"] - weights["student"]).norm() <= 0.1 * moved
    assert (found["fake"] - weights["fake"]).norm() <= 0.1 * weights["fake"].norm()
    assert counters["stats"]["unique_graphs"] > 0
    assert dict(counters["graph_break"]) == {}
    return worker


def compiled_forwards(network, names):
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    assert blocks
    return ["forward" in vars(block) for block in blocks]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("flux", ("distill.gradient_checkpointing=true", "discriminator.shared_pass=true")),
        ("sdxl", ("distill.mixed_precision=true",)),
    ],
)
def test_an_updates_numbers_are_those_of_plain_blocks(build, monkeypatch, family, overrides):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    worker = compare(build, family, *overrides)
    networks = worker.networks
    for space, network in ((networks.student_space, networks.student), (networks.teacher_space, networks.fake.network)):
        assert all(compiled_forwards(network, repeated_blocks(space, network)))
    assert all(compiled_forwards(networks.bridge, [SwinLayer.__name__]))


def everything(fake, *inputs):
    """Prediction and features of a whole pass, and the features of one that ends at them."""
    prediction, features = fake(*inputs)
    return [prediction, *features, *fake.features(*inputs)]


def test_a_pass_is_read_and_ended_at_a_block_that_is_compiled(diffusion_folders, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # of dynamo's graphs, which hooks would break
    torch._dynamo.reset()
    counters.clear()
    space = load_space(diffusion_folders["pixart"])
    torch.manual_seed(0)
    fake = FakeScore(space, space.load_network(), load(overrides=SMALL).fake_score, [0.5])
    latents, t_B = torch.randn(2, *space.latent_shape), torch.tensor([0.3, 0.8])
    conditioning = space.encode_prompts(space.load_text(), CAPTIONS)
    with torch.no_grad():
        plain = everything(fake, latents, t_B, conditioning)
        compiled.compile_network(space, fake.network)
        assert all(compiled_forwards(fake.network, repeated_blocks(space, fake.network)))
        found = everything(fake, latents, t_B, conditioning)
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        graphs = counters["stats"]["unique_graphs"]
        with compiled.as_it_is(fake):  # as pictures are drawn: one sample, of which there is no graph
            one = {name: value[:1] for name, value in conditioning.items()}
            drawn = everything(fake, latents[:1], t_B[:1], one)
            assert counters["stats"]["unique_graphs"] == graphs
    for few, all_of in zip(drawn, found, strict=True):
        torch.testing.assert_close(few, all_of[:1], rtol=1e-4, atol=1e-5)
    assert 1 <= graphs <= 2, "blocks of a class share their graphs; the first one's input may lie otherwise in memory"
    assert dict(counters["graph_break"]) == {}


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_inductor_gives_the_same_update(build):
    compare(build, "flux")


def test_it_decides_numbers():
    assert "distill.compile" not in {name for name, _, mark in fields() if mark is not None}
