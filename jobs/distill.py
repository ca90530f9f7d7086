"""Distil a one-step student from a multi-step teacher that lives in another latent space.

Stages: teacher service, teacher's own pictures, Bridge (when bridge.checkpoint is null), distillation, controls,
summary. A run is resumed by starting it again with the same run.name.
"""

from __future__ import annotations

import sys

from raydistill.driver.job import run_job


def main() -> int:
    return run_job(__doc__, "raydistill.driver.pipeline:distil", result="summary.json")


if __name__ == "__main__":
    sys.exit(main())
