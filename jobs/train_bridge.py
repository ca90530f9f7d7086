"""Train the Bridge alone: teacher samples through the teacher service (unless bridge.pairs names a set), then the
projector. The result is <storage>/<run.name>/bridge, to be named in bridge.checkpoint."""

from __future__ import annotations

import sys

from raydistill.distill.pipeline import bridge_only
from raydistill.job import run_job


def main() -> int:
    return run_job(__doc__, bridge_only, result="bridge/bridge.json", changes={"bridge": {"checkpoint": None}})


if __name__ == "__main__":
    sys.exit(main())
