"""The Bridge: its prior, its projectors, and saved Bridges that refuse another pair of VAEs."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raydistill.bridge.model import Bridge, SpatialPrior, projector_parameters, reach, vae_fingerprint
from raydistill.bridge.resampling import Resize, downsampler, power_of_two, upsampler
from raydistill.config.networks import BridgeConfig as Settings
from raydistill.errors import InputError
from raydistill.spaces import load_space

SMALL = {"embed_dim": 8, "depths": [2], "heads": 2, "window": 4}


def other_vae(folder, destination, **change):
    """A copy of a pipeline folder with one VAE weight changed."""
    shutil.copytree(folder, destination)
    file = destination / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.bias"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    return load_space(destination)


def test_prior_is_the_start_of_the_students_own_decoder(spaces):
    """The rest of the decoder, run on the prior's features, gives the VAE's own picture."""
    student, _ = spaces
    vae, z_student = student.load_vae(), torch.randn(2, 4, 8, 8)
    decoder = vae.decoder
    for n in (0, 1, 2):
        x = SpatialPrior(student, vae, n)(z_student)
        for block in decoder.up_blocks[n:]:
            x = block(x)
        picture = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
        assert torch.allclose(picture.clamp(-1, 1), student.decode(vae, z_student), atol=1e-6)


def test_prior_announces_its_channels_and_grid(spaces):
    student, _ = spaces
    for n in (0, 1, 2):
        prior = SpatialPrior(student, student.load_vae(), n)
        assert prior(torch.randn(1, 4, 8, 8)).shape == (1, prior.out_channels, 8 * 2**n, 8 * 2**n)
    with pytest.raises(InputError, match="doubles 2 times, but 3"):
        SpatialPrior(student, student.load_vae(), 3)


@pytest.mark.parametrize("projector", ["swinir", "unet", "mlp"])
@pytest.mark.parametrize("prior", [True, False])
def test_every_variant_maps_grid_to_grid_and_gradients_reach_the_student(spaces, projector, prior):
    bridge = Bridge.create(*spaces, Settings(projector=projector, prior=prior, **SMALL)).train()
    z_student = torch.randn(2, 4, 8, 8, requires_grad=True)
    z_hat = bridge(z_student)
    assert z_hat.shape == (2, 8, 16, 16)
    z_hat.square().mean().backward()
    assert z_student.grad.abs().sum() > 0
    trainable = {id(p) for p in bridge.trainable_parameters()}
    assert all((p.grad is not None and p.requires_grad) == (id(p) in trainable) for p in bridge.parameters())
    assert trainable
    assert bridge.prior is None or not any(m.training for m in bridge.prior.modules())


def test_mlp_sees_one_pixel_only_and_unet_more(spaces):
    for projector, pixels in (("mlp", 1), ("unet", 2)):
        bridge = Bridge.create(*spaces, Settings(projector=projector, **SMALL))
        features = torch.randn(1, bridge.prior.out_channels, 16, 16, requires_grad=True)
        bridge.projector(features)[0, :, 8, 8].sum().backward()
        touched = features.grad[0].abs().sum(0).nonzero()
        assert (len(touched) == 1) == (pixels == 1)


def test_identity_passes_equal_spaces_through_and_refuses_others(spaces):
    student, teacher = spaces
    bridge, z = Bridge.create(student, student, Settings(projector="identity")), torch.randn(2, 4, 8, 8)
    assert torch.equal(bridge(z), z)
    assert not bridge.trainable_parameters()
    with pytest.raises(InputError, match=r"identity needs equal latent shapes.*\(4, 8, 8\).*\(8, 16, 16\)"):
        Bridge.create(student, teacher, Settings(projector="identity"))


def at(space, channels: int, side: int):
    """The space with latents of another shape; its VAE is as it was."""
    other = load_space(space.folder)
    other.latent_shape = (channels, side, side)
    return other


@pytest.mark.parametrize(
    ("ratio", "with_prior"),
    [
        (2, (1, 1)), (1, (0, 1)), (4, (2, 1)),
        (8, (2, 2)),  # the decoder doubles twice: the rest is the projector's
        (Fraction(1, 2), (0, Fraction(1, 2))), (Fraction(1, 4), (0, Fraction(1, 4))),
        (3, (2, Fraction(3, 4))), (Fraction(3, 2), (1, Fraction(3, 4))), (Fraction(2, 3), (0, Fraction(2, 3))),
    ],
)  # fmt: skip
def test_the_prior_brings_as_much_as_it_can_and_the_projector_the_rest(spaces, ratio, with_prior):
    student = at(spaces[0], 4, 12)
    teacher = at(spaces[1], 8, int(12 * ratio))
    assert reach(student, teacher, prior=True) == with_prior
    assert reach(student, teacher, prior=False) == (0, ratio)


@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(1, 40), st.sampled_from(("swinir", "unet", "mlp")), st.booleans()
)
@example(8, 4, 32, "swinir", True)  # coarser, as Sana's grid is of SD 1.5's
@example(8, 2, 32, "swinir", False)
@example(8, 24, 3, "unet", True)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_two_grids_and_channels_are_joined(spaces, side, teacher_side, channels, projector, prior):
    """The shape is the teacher's, every parameter is counted beforehand and learns, and the student gets a gradient."""
    student, teacher = at(spaces[0], 4, side), at(spaces[1], channels, teacher_side)
    settings = Settings(projector=projector, prior=prior, embed_dim=4, depths=[1], heads=1, window=4)
    torch.manual_seed(0)
    bridge = Bridge.create(student, teacher, settings).train()
    z_student = torch.randn(2, 4, side, side, requires_grad=True)
    z_hat = bridge(z_student)
    assert z_hat.shape == (2, channels, teacher_side, teacher_side)
    assert sum(p.numel() for p in bridge.trainable_parameters()) == projector_parameters(student, teacher, settings)
    (z_hat * torch.randn_like(z_hat)).sum().backward()
    assert z_student.grad.isfinite().all()
    assert z_student.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bridge.trainable_parameters())


@given(st.fractions(Fraction(1, 300), 300, max_denominator=400))
def test_power_of_two_is_the_smallest_that_suffices(scale):
    assert power_of_two(scale) == math.ceil(math.log2(scale))


def test_going_down_loses_no_pixel_and_resizing_equals_torch_s_own():
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    downsampler(3, Fraction(1, 4))(x).sum().backward()
    assert (x.grad != 0).all()  # each is moved into the features
    assert upsampler(3, 3)(torch.zeros(1, 3, 5, 5)).shape == (1, 3, 15, 15)
    expected = F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(Resize(Fraction(2, 3))(x), expected)
    assert Resize(Fraction(1))(x) is x


def test_rows_and_columns_of_two_ratios_are_refused(spaces):
    wide = at(spaces[1], 8, 16)
    wide.latent_shape = (8, 16, 8)
    with pytest.raises(InputError, match=r"teacher latents \(16x8.*must be in one ratio to the student's \(8x8"):
        reach(spaces[0], wide, prior=True)


def test_latents_of_another_space_are_refused(spaces):
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
        Bridge.create(*spaces, Settings(**SMALL))(torch.randn(1, 8, 8, 8))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 1e-3)])
def test_saved_bridge_comes_back_frozen_and_equal(spaces, tmp_path, dtype, tolerance):
    bridge, z = Bridge.create(*spaces, Settings(**SMALL)), torch.randn(2, 4, 8, 8)
    bridge.save(tmp_path / "bridge", {"eval/psnr": 30.0}, dtype)
    loaded = Bridge.load(tmp_path / "bridge", *spaces)
    with torch.no_grad():  # a graph would choose another attention kernel
        assert (loaded(z) - bridge(z)).abs().max() <= tolerance
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((tmp_path / "bridge/bridge.json").read_text())["metrics"] == {"eval/psnr": 30.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bridge"]
    stored = load_file(tmp_path / "bridge/projector.safetensors")
    assert set(stored) == set(bridge.projector.state_dict())
    assert {t.dtype for t in stored.values()} == {dtype}


def test_saving_again_replaces_the_old_bridge(spaces, tmp_path):
    first, second = (Bridge.create(*spaces, Settings(**SMALL)) for _ in range(2))
    first.save(tmp_path / "bridge")
    second.save(tmp_path / "bridge")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(Bridge.load(tmp_path / "bridge", *spaces)(z), second(z))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_bridge_of_another_vae_is_refused_by_name(spaces, sd_folder, flux_folder, tmp_path, role):
    Bridge.create(*spaces, Settings(**SMALL)).save(tmp_path / "bridge")
    changed = other_vae(sd_folder if role == "student" else flux_folder, tmp_path / "other")
    pair = (changed, spaces[1]) if role == "student" else (spaces[0], changed)
    with pytest.raises(InputError, match=f"{tmp_path / 'bridge'}: .*another {role} VAE.*{tmp_path / 'other'}"):
        Bridge.load(tmp_path / "bridge", *pair)


def test_fingerprint_follows_tensors_and_scaling_but_not_file_metadata(spaces, sd_folder, tmp_path):
    student, _ = spaces
    copied = tmp_path / "copy"
    shutil.copytree(sd_folder, copied)
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(dict(reversed(load_file(file).items())), file, metadata={"format": "pt", "note": "another day"})
    assert vae_fingerprint(load_space(copied)) == vae_fingerprint(student)
    config = json.loads((copied / "vae/config.json").read_text())
    (copied / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert vae_fingerprint(load_space(copied)) != vae_fingerprint(student)
    assert vae_fingerprint(other_vae(sd_folder, tmp_path / "other")) != vae_fingerprint(student)


def test_folders_that_are_no_bridge_say_so(spaces, tmp_path):
    with pytest.raises(InputError, match="not a saved Bridge"):
        Bridge.load(tmp_path, *spaces)
    Bridge.create(*spaces, Settings(**SMALL)).save(tmp_path / "bridge")
    (tmp_path / "bridge/projector.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="missing or damaged"):
        Bridge.load(tmp_path / "bridge", *spaces)
