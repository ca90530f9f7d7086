"""Plan a run before it costs anything: does it fit, on what, hours and price; where the money goes, what would save most,
what is needed. Starts nothing, downloads nothing.

With --full: parameters, memory by role, bytes of a score request, FLOPs and seconds of a step, the number of teacher
replicas at which trainers never wait, and hours, GPU-hours and dollars by stage, for the kinds of GPU that plan.* names.

Counting takes up to a few minutes at real sizes. Counts are kept, so the same plan is there at once the next time, also
with other GPUs, prices, numbers of steps and pairs.
"""

from __future__ import annotations

import logging
import sys

from raydistill.config.command_line import from_command_line

FULL = "--full"


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != FULL]
    config = from_command_line(__doc__, arguments)
    # once the command line is known to be right
    from raydistill.planning.counts import as_counts
    from raydistill.planning.gpus import known_gpus
    from raydistill.planning.kept import find_counts
    from raydistill.planning.report import details
    from raydistill.planning.slices import with_slice
    from raydistill.planning.verdict import title, verdict, wrapped

    logging.disable(logging.WARNING)
    try:
        gpus = known_gpus(config)
        print(title(config), flush=True)
        if config.teachers.slice == "auto":
            config = with_slice(config)
            print(
                wrapped("slice", f"teachers.slice=auto is {config.teachers.slice} on {config.plan.teacher_gpu}"),
                flush=True,
            )
        counts = as_counts(config, find_counts(config))
        print(verdict(counts, config, gpus))
    except (ValueError, OSError) as error:  # every input error of the project is a ValueError, and says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was counted is kept", file=sys.stderr)
        return 130
    full = len(arguments) < len(sys.argv) - 1
    print(f"\n{details(counts, config, gpus)}" if full else f"details   {FULL}")
    return 0
