"""A frozen copy whose matrices are kept in bfloat16: under autocast the bits of a float32 one, in half the memory."""

from __future__ import annotations

import pytest
import tiny_diffusion_pipelines as diffusion
import tiny_flow_pipelines as flow
import torch
from lanes import full_but

from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.distillation.fake_score import FakeScore
from raydistill.errors import InputError
from raydistill.precision import autocast
from raydistill.spaces import load_space

SAVE = flow.SAVE | {"sdxl": diffusion.save_sdxl, "kolors": diffusion.save_kolors, "pixart": diffusion.save_pixart}
CAPTIONS = ["a small red circle at the left", "a large blue square at the top"]
MIXED = "distill.mixed_precision=true"


@pytest.fixture(scope="module", params=full_but(SAVE, *flow.SHORT, "sdxl", "kolors", "pixart"))
def case(request, tmp_path_factory):
    """A family, latents and the conditioning of two captions."""
    space = load_space(SAVE[request.param](tmp_path_factory.mktemp(request.param)))
    latents = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(3))
    return space, latents, TextEncoder(space).encode(CAPTIONS)


def fake_score(space, base_dtype, *overrides):
    config = load(overrides=[MIXED, "fake_score.rank=4", f"fake_score.base_dtype={base_dtype}", *overrides])
    torch.manual_seed(0)
    fake = FakeScore(space, space.load_network(), config.fake_score, [0.5])
    for parameter in fake.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)  # or a LoRA would do nothing yet
    return fake


def computed(fake, latents, conditioning):
    """Prediction, features, and the gradients of both in what is trained and in the latents."""
    x_t = latents.clone().requires_grad_()
    t_B = torch.tensor([0.3, 0.8])
    with autocast(x_t.device, True):
        prediction, (features,) = fake(x_t, t_B, conditioning)
        (alone,) = fake.features(x_t, t_B, conditioning)
    loss = prediction.float().square().mean() + features.float().square().mean() + alone.float().abs().mean()
    inputs = {"x_t": x_t} | fake.trainable()
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {"prediction": prediction, "features": features, "alone": alone} | dict(zip(inputs, gradients, strict=True))


def test_every_bit_is_that_of_a_base_in_float32(case):
    space, latents, conditioning = case
    exact, narrow = (fake_score(space, dtype) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in narrow.trainable().values()} == {torch.float32}
    kept = sum(p.numel() for p in narrow.network.parameters() if p.dtype == torch.bfloat16)
    assert kept > 0.6 * sum(p.numel() for p in exact.network.parameters() if not p.requires_grad)
    expected, found = (computed(fake, latents, conditioning) for fake in (exact, narrow))
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or (value.dtype == found[name].dtype and torch.equal(value, found[name])), name


def test_where_it_would_change_numbers_it_is_refused():
    with pytest.raises(InputError, match=r"set distill\.mixed_precision=true, or use float32"):
        load(overrides=["fake_score.base_dtype=bfloat16"])


def test_what_is_trained_stays_in_float32(case):
    fake = fake_score(case[0], "bfloat16", "fake_score.kind=full")
    assert {p.dtype for p in fake.network.parameters()} == {torch.float32}
