"""How a run's teachers are held, decided once: before its launch, by the driver. A resumed run keeps what was decided."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.config.reading import changed
from raydistill.config.schema import Config
from raydistill.driver.run_folder import RunFolder, saved_config, with_backend

ROLE = "teacher rank"  # of planning.memory.ROLES


def decided(config: Config, run: RunFolder, roles: Sequence[str] | None = None) -> Config:
    """The configuration without teachers.backend=auto and teachers.slice=auto.

    Ranks on CPUs share the teacher, and take 8 samples. On GPUs the planner decides: it counts the teacher once, and keeps what it counted.

    Args:
        roles: as in `planning.memory.check_launch`; a job without teachers decides nothing that counts.

    Raises InputError: models that cannot be counted, or an unknown kind of GPU.
    """
    if config.teachers.backend != "auto" and config.teachers.slice != "auto":
        return config
    if (saved := saved_config(run)) is not None:
        return with_backend(config, saved)
    if config.teachers.gpus_per_rank == 0 or config.plan.launch == "ignore" or (roles and ROLE not in roles):
        return with_backend(config, config)
    from raydistill.planning import memory, slices  # they build networks to count them

    config = slices.with_slice(config)
    if config.teachers.backend == "auto":
        config = changed(config, {"teachers": {"backend": memory.decided_backend(config)}})
    return config
