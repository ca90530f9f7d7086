"""Train the Bridge alone: teacher samples through the teacher service (unless bridge.pairs names a set), then the
projector. The result is <storage>/<run.name>/bridge, to be named in bridge.checkpoint.

With --ablate: the component, objective and architecture tables of the Bridge on this pair of spaces, each variant with
bridge.ablation_seeds seeds and the same number of steps and parameters; <storage>/<run.name>/ablation.json."""

from __future__ import annotations

import sys

from raydistill.driver.job import Job, run_job

STAGES = "raydistill.driver.single_stages"
UNTRAINED = {"bridge": {"checkpoint": None}}


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--ablate"]
    ablate = len(arguments) < len(sys.argv) - 1
    if ablate:
        run, result, check = "ablate_bridge", "ablation.json", "check_ablation"
    else:
        run, result, check = "bridge_only", "bridge/bridge.json", "check_trainable"
    roles = ["teacher rank", "drawer rank", "synthesis, prompts", "synthesis, pictures", "Bridge training"]
    job = Job(
        run=f"{STAGES}:{run}",
        result=result,
        changes=UNTRAINED,
        check=f"{STAGES}:{check}",
        roles=roles,
        stages=("synthesis", "bridge"),
    )
    return run_job(__doc__, job, arguments)
