"""Numbers that follow from how many student updates there were: learning rates, the GAN's weight, the average's decay.

n counts the updates before this one. Nothing here has a state, so a resume goes on with the same numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from raydistill.config.networks import DiscriminatorConfig, RewardConfig, StudentConfig
from raydistill.config.schema import Config
from raydistill.config.stages import DistillConfig, decays

RAMP_UP = 0.05  # of the half-life: at most so large a share of the updates so far (EDM, arXiv 2206.00364)


def ramp(n: int, steps: int) -> float:
    """Grows from 1 / steps to 1 over the first `steps` updates; 0: it is 1."""
    return min(1.0, (n + 1) / steps) if steps else 1.0


def rate_share(distill: DistillConfig, n: int) -> float:
    """Share of every learning rate: warm-up, then what `distill.schedule` makes of p, the share of the rest that is over.

    cosine: (1 + cos(pi p)) / 2        linear: 1 - p        p = (n - warmup_steps) / (steps - warmup_steps)
    """
    rest = distill.steps - distill.warmup_steps
    p = min(1.0, max(0.0, (n - distill.warmup_steps) / rest)) if rest > 0 else 0.0
    decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p}[distill.schedule]
    return ramp(n, distill.warmup_steps) * decay


def shares(config: Config) -> Callable[[int], float] | None:
    """`rate_share` of a configuration; None: it is always 1."""
    varies = config.distill.warmup_steps > 0 or decays(config)
    return functools.partial(rate_share, config.distill) if varies else None


def gan_weight(gan: DiscriminatorConfig, n: int) -> float:
    """Of the generator's loss."""
    return gan.weight * ramp(n, gan.ramp_steps)


def reward_weight(reward: RewardConfig, n: int) -> float:
    """Of the mean reward in the student's loss."""
    return reward.weight * ramp(n, reward.ramp_steps)


def power_of(sigma_rel: float) -> float:
    """gamma of the power-function average whose relative width this is (Karras et al. 2024, arXiv 2312.02696):

    sigma_rel = (gamma + 1)^½ / ((gamma + 2) (gamma + 3)^½), a polynomial of third degree in gamma.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def decay(student: StudentConfig, n: int) -> float:
    """Of the student's moving average, mean <- d mean + (1 - d) student.

    constant    d = min(ema_decay, (n + 1) / (n + 10)): warmed up, or a short run's average would still be its start
    power       d = (1 - 1 / (n + 1))^(gamma + 1): update i counts as i^gamma; the start not at all
    half_life   d = ½^(1 / h), h = min(ema_half_life, 0.05 (n + 1))
    """
    if student.ema == "power":
        return (1 - 1 / (n + 1)) ** (power_of(student.ema_sigma_rel) + 1)
    if student.ema == "half_life":
        return 0.5 ** (1 / min(student.ema_half_life, RAMP_UP * (n + 1)))
    return min(student.ema_decay, (n + 1) / (n + 10))
