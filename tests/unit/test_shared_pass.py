"""One pass of the fake score for the scores and the discriminator's features."""

import pytest
import torch
from test_updates import configuration, flat, make_distiller, run

from raydistill.diffusion.path import add_noise
from raydistill.distillation.schedule import distillation_step


@pytest.mark.parametrize(
    "overrides", [{}, {"distill__gradient_checkpointing": True}, {"discriminator__depths": [0.5, 1.0]}]
)
def test_one_pass_of_the_fake_score_gives_the_scores_and_the_features_with_their_gradient(spaces, tables, overrides):
    """Those of two passes at the same noised latents, of which one has a graph and ends at the features."""
    distiller = make_distiller(configuration(**overrides), spaces, tables)
    networks, made = distiller.networks, next(distiller.make())
    x = networks.x(made.seen, made.student_conditioning).detach().requires_grad_()
    x_t, t_B = made.with_graph(distiller.path, x)
    assert torch.equal(x_t, made.on_device[0])
    x0, features = networks.x0_fake_and_features(x_t, t_B, made.fake_conditioning)
    assert torch.is_grad_enabled()
    assert not x0.requires_grad
    assert torch.equal(x0, networks.x0_fake(*made.on_device, made.fake_conditioning))
    other = x.detach().clone().requires_grad_()
    noise = distiller.draws.normal(made.sample_ids, x.shape[1:], "score_noise")
    apart = networks.features(add_noise(distiller.path, other, noise, t_B), t_B, made.fake_conditioning)
    assert len(features) == len(apart) == len(distiller.config.discriminator.read_depths)
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(features, apart, strict=True))
    sums = [torch.stack([one.sum() for one in networks.logits(found)]).sum() for found in (features, apart)]
    gradients = [torch.autograd.grad(total, it)[0] for total, it in zip(sums, (x, other), strict=True)]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_a_shared_pass_saves_the_second_one_and_its_blocks_behind_the_features_keep_nothing(spaces, tables):
    """The losses are those of the plain update but for the GAN's, which has other times."""
    passes, losses = {}, {}
    for shared in (False, True):
        config = configuration(fake_score__updates=1, discriminator__shared_pass=shared)
        distiller = make_distiller(config, spaces, tables)
        blocks, seen = spaces[1].blocks(distiller.networks.fake.network), []
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, n=number, to=seen: to.append((n, torch.is_grad_enabled())))
        distiller.fake_update = lambda: None
        run(config, spaces, tables, steps=1, distiller=distiller)
        passes[shared], losses[shared] = seen, distiller.pop_metrics()
    count, half = len(blocks), round(0.5 * len(blocks))
    # the block that gives the features ends the second pass before it tells of itself
    assert passes[False] == [(n, False) for n in range(count)] + [(n, True) for n in range(half - 1)]
    assert [number for number, _ in passes[True]] == list(range(count))
    # the hook that ends the graph is the first of its block's
    assert [graph for _, graph in passes[True]] == [n < half - 1 for n in range(count)]
    assert losses[True]["loss/vsd"] == losses[False]["loss/vsd"]
    assert losses[True]["loss/gan"] != losses[False]["loss/gan"]


def test_without_vsd_a_shared_pass_is_the_gans_own(spaces, tables):
    """As in the control: there is no pass to share."""
    students = []
    for shared in (False, True):
        config = configuration(fake_score__updates=1, vsd__weight=0, discriminator__shared_pass=shared)
        distiller = make_distiller(config, spaces, tables)
        distillation_step(distiller, None, 1, overlap=False)
        students.append(flat(distiller.networks.student))
    assert torch.equal(*students)
