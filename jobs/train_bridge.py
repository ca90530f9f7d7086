"""Train the Bridge alone: teacher samples through the teacher service (unless bridge.pairs names a set), then the
projector. The result is <storage>/<run.name>/bridge, to be named in bridge.checkpoint."""

from __future__ import annotations

import sys

from raydistill.config import from_command_line
from raydistill.preflight import check_inputs, create_run_folder, open_run_folder


def main() -> int:
    config = from_command_line(__doc__)
    config = config.model_copy(update={"bridge": config.bridge.model_copy(update={"checkpoint": None})})
    try:
        run = open_run_folder(config)
        inputs = check_inputs(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from raydistill.cluster import connected
    from raydistill.distill.pipeline import RunFailed, bridge_only

    create_run_folder(run, config)
    try:
        with connected():
            bridge_only(config, run, inputs)
    except RunFailed as error:
        print(f"error: {error}\nrun {run.name} can be continued with run.name={run.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
