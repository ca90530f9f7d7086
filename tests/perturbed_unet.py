"""A UNet whose weights come from no folder."""

import torch
from diffusers import UNet2DConditionModel

from raydistill.spaces.base import Space


def perturbed(space: Space, seed: int) -> UNet2DConditionModel:
    """The folder's UNet with other weights, so that none can come from the folder itself."""
    unet = space.load_network()
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet
