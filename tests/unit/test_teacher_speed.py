"""Attention, compiled blocks and 8 bits of whole teachers: what is refused before a launch, and what becomes of scores."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from raydistill.config.networks import TeacherServiceConfig
from raydistill.errors import InputError
from raydistill.planning import memory
from raydistill.spaces import load_space
from raydistill.spaces.meta import numel
from raydistill.teachers import speed
from raydistill.teachers.plain import Whole

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install 'raydistill[quantize]'"
)


def config(**keys):
    return TeacherServiceConfig(**{"backend": "plain", "slice": 4} | keys)


@pytest.fixture
def flux(flux_folder):
    return load_space(flux_folder)


@pytest.fixture
def unet(sd_folder):
    return load_space(sd_folder)


def scores(space, teacher):
    return speed.FixedBatch(space, 4, torch.float32, CPU).scores(teacher.network, 3.0)


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0))


def test_what_cannot_work_is_refused_before_a_launch(flux, unet, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("torch" if name == "torchao" else name))
    for keys, said in (
        ({"attention": "cudnn"}, r"teachers\.attention=cudnn needs GPUs: set teachers\.gpus_per_rank"),
        ({"attention": "sage", "gpus_per_rank": 1}, r"teachers\.attention=sage: the package sageattention is not"),
        ({"quantize": "fp8", "dtype": "bfloat16"}, r"teachers\.quantize=fp8 needs GPUs"),
        ({"quantize": "fp8", "gpus_per_rank": 1}, r"fp8 needs teachers\.dtype=bfloat16, not float32"),
    ):
        with pytest.raises(InputError, match=said):
            speed.check(config(**keys), flux)
    with pytest.raises(InputError, match=r"attention=math: diffusers chooses no kernels for a UNet2DConditionModel"):
        speed.check(config(attention="math"), unet)
    with pytest.raises(InputError, match="no linear layer in the blocks of .* multiples of 16; use none"):
        speed.check(config(quantize="int8"), unet)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(InputError, match=r"torchao is not installed: pip install 'raydistill\[quantize\]'"):
        speed.check(config(quantize="int8"), flux)
    assert speed.check(config(attention="math", compile=True), flux) == []


def test_every_attention_is_one_of_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = TeacherServiceConfig.model_fields["attention"].annotation.__args__
    assert set(names) == {"auto", *speed.KERNELS}
    assert {kernel.backend for kernel in speed.KERNELS.values()} <= {name.value for name in AttentionBackendName}


def test_another_kernel_computes_the_same_attention_and_a_network_that_takes_none_is_refused(flux, unet, monkeypatch):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(
        attention_dispatch._AttentionBackendRegistry, "_active_backend", "native"
    )  # restored afterwards
    plain, math = (Whole(flux, config(attention=name), CPU) for name in ("auto", "math"))
    chosen = {m.processor._attention_backend for m in math.network.modules() if hasattr(m, "processor")}
    assert chosen == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(scores(flux, math), scores(flux, plain), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="attention=math: diffusers chooses no kernels"):
        Whole(unet, config(attention="math"), CPU)


@needs_torchao
def test_a_teacher_in_8_bits_keeps_the_direction_of_its_gradients_and_says_how_well(flux):
    whole, small = Whole(flux, config(), CPU), Whole(flux, config(quantize="int8"), CPU)
    layers = speed.quantised_layers(whole.network)
    assert "proj_out" not in layers
    assert "x_embedder" not in layers
    kinds = {name: type(module.weight).__name__ for name, module in small.network.named_modules() if name in layers}
    assert set(kinds.values()) == {"Int8Tensor"}
    assert type(small.network.proj_out.weight) is torch.nn.Parameter
    found = small.facts()["quantize_cosine"]
    assert 0.98 < found < 1
    assert not torch.equal(scores(flux, small), scores(flux, whole))
    assert cosine(scores(flux, small), scores(flux, whole)) > 0.999
    assert small.facts()["full_numel"] == whole.facts()["full_numel"] == numel(whole.network)
    assert "quantize_cosine" not in whole.facts()


@needs_torchao
def test_a_quantised_teacher_that_is_too_far_off_does_not_start(flux):
    with pytest.raises(
        InputError, match=r"cosine to the unquantised one is 0\.\d+, below teachers\.quantize_cosine=1;"
    ):
        Whole(flux, config(quantize="int8", quantize_cosine=1.0), CPU)


def test_weights_that_pass_layer_by_layer_give_the_same_scores_and_are_as_they_were(flux, unet):
    """As a GPU gets them while its teacher's unquantised scores are computed."""
    for space in (flux, unet):
        network, batch = space.load_network(), speed.FixedBatch(space, 2, torch.float32, CPU)
        expected, before = batch.scores(network, 3.0), {k: v.clone() for k, v in network.state_dict().items()}
        with speed.passing(network, CPU):
            assert all(parameter.is_meta for parameter in network.parameters())
            assert torch.equal(batch.scores(network, 3.0), expected)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        assert torch.equal(batch.scores(network, 3.0), expected)


def test_the_planner_counts_8_bit_weights_as_such(flux):
    from types import SimpleNamespace

    from raydistill.config.reading import load
    from raydistill.planning.counts import Cost, Teacher

    network = Teacher(
        parameters=1000, buffers=10, piece=100, samples=4, score=Cost(1.0, 77), evaluations=2, large_linear=900
    )
    counts = SimpleNamespace(network=network)
    whole, small = (
        memory.whole_bytes(counts, load(overrides=["teachers.dtype=bfloat16", f"teachers.quantize={kind}"]))
        for kind in ("none", "fp8")
    )
    assert whole == 1010 * 2 + 77
    assert small == 110 * 2 + 900 + 77


def test_blocks_that_only_the_family_names_are_compiled_too(flux, unet):
    network = unet.load_network()
    assert speed.repeated_blocks(unet, network) == ["BasicTransformerBlock"]
    network = flux.load_network()
    named = speed.repeated_blocks(flux, network)
    network._repeated_blocks = []  # as diffusers has it of SD 3
    assert speed.repeated_blocks(flux, network) == sorted(named)


def test_a_network_without_blocks_runs_as_it_is_with_a_line(flux, caplog):
    network = flux.load_network()
    flux.block_lists, network._repeated_blocks = (), []
    speed.compile_blocks(flux, network)
    assert "a FluxTransformer2DModel has no repeated blocks; it runs without being compiled" in caplog.text
    assert all(module._compiled_call_impl is None for module in network.modules())


@pytest.mark.full
def test_compiled_blocks_give_the_same_scores(flux):
    """Inductor compiles them with the machine's C++ compiler, while the teacher is loaded."""
    plain, fast = Whole(flux, config(), CPU), Whole(flux, config(compile=True), CPU)
    blocks = flux.blocks(fast.network)
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    torch.testing.assert_close(scores(flux, fast), scores(flux, plain), atol=1e-4, rtol=1e-4)
