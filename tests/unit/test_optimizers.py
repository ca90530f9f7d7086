"""AdamW with moments in 8 bits: bytes, what a checkpoint keeps, learning rates that change, what is refused without torchao."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from raydistill.config.reading import load
from raydistill.distillation import optimizers
from raydistill.distillation.finite import Finite
from raydistill.distillation.gradients import Gradients
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.planning.counting import count_trainer
from raydistill.spaces import meta

LR = 1e-3
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao (pip install 'raydistill[quantize]')"
)


def network():
    """Two large parameters, of which one has no whole blocks, and small ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 65), nn.Linear(65, 3))


def gradients(net, kind, warmup=0):
    parameters = list(net.parameters())
    share = (lambda n: min(1.0, (n + 1) / warmup)) if warmup else None
    return Gradients({"student": optimizers.make(parameters, LR, kind)}, 1, Finite(), share=share)


def train(net, found, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        found.set_rates(step)
        found.accumulate(net(x).square().mean(), "student")
        found.step(student=1.0)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@needs_torchao
def test_moments_take_as_many_bytes_as_are_counted():
    for kind in ("adamw", "adamw8bit"):
        net = network()
        found = gradients(net, kind)
        train(net, found, 1)
        state = optimizers.state_dict(found.optimizers["student"])["state"].values()
        moments = [value for own in state for name, value in own.items() if name != "step"]
        stored = [one for value in moments for one in (value.values() if isinstance(value, dict) else [value])]
        tables = sum(2 * 4 * optimizers.STEPS for p in net.parameters() if p.numel() == 64 * 128) if "8" in kind else 0
        assert sum(one.nbytes for one in stored) + tables == optimizers.moments_bytes(net.parameters(), kind)
        assert {one.dtype for one in stored} == ({torch.float32} if kind == "adamw" else {torch.float32, torch.uint8})


@needs_torchao
def test_a_checkpoint_of_plain_tensors_goes_on_with_the_same_bits_and_learning_rates():
    """Also while the learning rate grows, which torchao keeps in a tensor."""
    whole = network()
    found = gradients(whole, "adamw8bit", warmup=4)
    train(whole, found, 2)
    file = io.BytesIO()
    torch.save({"weights": whole.state_dict(), "gradients": found.state_dict()}, file)
    train(whole, found, 3, first=2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    again = gradients(resumed, "adamw8bit", warmup=4)
    resumed.load_state_dict(saved["weights"])
    again.load_state_dict(saved["gradients"])
    train(resumed, again, 3, first=2)
    assert torch.equal(flat(whole), flat(resumed))
    assert float(again.optimizers["student"].param_groups[0]["lr"]) == pytest.approx(LR)


@needs_torchao
def test_steps_in_8_bits_go_where_those_in_32_bits_go():
    start = flat(network())
    moved = []
    for kind in ("adamw", "adamw8bit"):
        net = network()
        train(net, gradients(net, kind), 5)
        moved.append(flat(net) - start)
    assert not torch.equal(*moved)
    assert torch.cosine_similarity(*moved, 0) > 0.99


@needs_torchao
@pytest.mark.full
def test_where_torchao_is_installed_it_says_nothing():
    """diffusers imports it."""
    code = "import raydistill.spaces, sys; assert 'torchao' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_torchao_it_is_refused_before_anything_starts(tmp_path, monkeypatch):
    config = load(overrides=[f"storage={tmp_path}", "fake_score.optimizer=adamw8bit"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"^fake_score\.optimizer=adamw8bit: torchao is not installed: pip install"):
        check_inputs(config)


@pytest.mark.full
def test_the_planner_counts_8_bits_without_torchao():
    student, teacher = (meta.open_space(name) for name in ("shapes:sd15", "shapes:flux"))
    small = ["distill.batch_size=2", "fake_score.updates=1"]
    one, other = (
        count_trainer(load(overrides=[*small, f"student.optimizer={kind}"]), student, teacher)
        for kind in ("adamw", "adamw8bit")
    )
    network = student.load_network()
    parameters = list(network.parameters())
    saved = optimizers.moments_bytes(parameters, "adamw") - optimizers.moments_bytes(parameters, "adamw8bit")
    assert saved > 0.2 * optimizers.moments_bytes(parameters, "adamw"), (
        "half of these small parameters have no whole blocks"
    )
    assert (
        one.weights.optimizers - other.weights.optimizers
        == one.resident - other.resident
        == one.peak - other.peak
        == saved
    )
