"""Guided scores that keep the spread of unguided ones: as diffusers computes them, on their way through a request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny_flow_pipelines import SAVE

from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.diffusion.guidance import classifier_free, rescaled
from raydistill.distillation.local import LocalScores
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.distilled import check_scores
from raydistill.teachers.request import ScoreRequest, TeacherError, check_payload


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(share):
    generator = torch.Generator().manual_seed(0)
    conditional, other = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    guided = classifier_free(conditional, other, 7.5)
    found = rescaled(guided, conditional, share)
    torch.testing.assert_close(found, rescale_noise_cfg(guided, conditional, share))
    spread = found.std((1, 2, 3)) / conditional.std((1, 2, 3))
    assert torch.allclose(spread, torch.ones(3), atol=1e-4) == (share == 1.0)


def test_the_share_reaches_the_teacher_in_the_request_and_in_this_process(flux_folder):
    space = load_space(flux_folder)
    network, x_t, t_B = space.load_network(), torch.randn(2, *space.latent_shape), torch.tensor([0.3, 0.8])
    text = TextEncoder(space)
    conditioning, empty = text.encode(["a small red circle", "two blue squares"]), text.encode_unconditional()
    plain, most = (space.predict_x0(network, x_t, t_B, conditioning, empty, 5.0, share) for share in (0.0, 1.0))
    assert torch.equal(plain, space.predict_x0(network, x_t, t_B, conditioning, empty, 5.0))
    assert not torch.equal(plain, most)
    prediction = space.predict_guided(network, x_t, t_B, conditioning, empty, 5.0, 1.0)
    spread = prediction.std((1, 2, 3)) / space.predict(network, x_t, t_B, conditioning).std((1, 2, 3))
    torch.testing.assert_close(spread, torch.ones(2), rtol=1e-4, atol=1e-4)
    made = type("Made", (), {"x_t": x_t, "t_B": t_B, "teacher_conditioning": conditioning})
    assert torch.equal(LocalScores(space, network, empty, 5.0, 1.0)(made).result(), most)
    payload = ScoreRequest(x_t, t_B, conditioning, empty, 5.0, 0.7).payload()
    assert payload["guidance_rescale"] == 0.7
    assert "guidance_rescale" not in ScoreRequest(x_t, t_B, conditioning, empty, 5.0).payload()
    for wrong in (1.5, -0.1, np.nan, "much"):
        with pytest.raises(TeacherError, match="guidance_rescale"):
            check_payload(payload | {"guidance_rescale": wrong})


def test_a_teacher_that_takes_its_scale_as_an_input_is_refused(tmp_path):
    space = load_space(SAVE["flux-dev"](tmp_path))
    with pytest.raises(InputError, match=r"^vsd\.guidance_rescale: .* set it to 0$"):
        check_scores(load(overrides=["vsd.guidance_rescale=0.7"]), space)
    check_scores(load(), space)
