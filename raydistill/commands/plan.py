"""Plan a run before it costs anything: does it fit, how many teachers, hours and price. Starts nothing, downloads nothing.

Prints parameters, memory by role and kind of GPU, bytes of a score request, FLOPs and seconds of a step, the number of
teacher replicas at which trainers never wait, and hours, GPU-hours and dollars of the run.
"""

from __future__ import annotations

import logging
import sys

from raydistill.config.command_line import from_command_line


def main() -> int:
    config = from_command_line(__doc__)
    logging.disable(logging.WARNING)
    from raydistill.planning.report import report  # once the command line is known to be right: torch takes seconds

    try:
        print(report(config))
    except ValueError as error:  # every input error of the project is one, and says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
