"""Distil a one-step student from a multi-step teacher that lives in another latent space.

Stages: teacher service, teacher's own pictures, Bridge (when bridge.checkpoint is null), distillation, controls,
summary. A run is resumed by starting it again with the same run.name, and extended with a larger distill.steps.
"""

from __future__ import annotations

from raydistill.driver.job import Job, run_job

JOB = Job(
    run="raydistill.driver.pipeline:distil",
    result="summary.json",
    check="raydistill.driver.preflight:check_distillation",
    extends=True,
)


def main() -> int:
    return run_job(__doc__, JOB)
