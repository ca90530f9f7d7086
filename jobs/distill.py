"""Distil a one-step student from a multi-step teacher that lives in another latent space.

Stages: teacher service, teacher's own pictures, Bridge (when bridge.checkpoint is null), distillation, controls,
summary. A run is resumed by starting it again with the same run.name.
"""

from __future__ import annotations

import sys

from raydistill.config import from_command_line
from raydistill.preflight import check_inputs, create_run_folder, open_run_folder


def main() -> int:
    config = from_command_line(__doc__)
    try:
        run = open_run_folder(config)
        if run.finished:
            print(f"run {run.name} is finished: {run.path / 'summary.json'}")
            return 0
        inputs = check_inputs(config)
    except ValueError as error:  # every input error of the project is one, and says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    from raydistill.cluster import connected
    from raydistill.distill.pipeline import RunFailed, distil

    create_run_folder(run, config)
    try:
        with connected():
            distil(config, run, inputs)
    except RunFailed as error:
        print(f"error: {error}\nrun {run.name} can be continued with run.name={run.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
