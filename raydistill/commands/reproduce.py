"""The paper's tables on the shapes world, by one command: raydistill reproduce table1 | table3 [--quick] [--seeds N] …

table1: two students x (start, three teachers, merged, shared space), with the teachers' own rows.
table3: a one-step start against the raw multi-step model as the start, same steps.
Every cell is a run of its own, nested in one MLflow run; those that are done are kept, so the same command goes on where
it stopped, and table3 shares runs with table1. --seeds N: default 2, with --quick 1; --quick: half the steps. The result
is <storage>/<run.name>/<table>-<N>-seeds.json; run.name is paper, or paper-quick."""

from __future__ import annotations

import argparse
import sys

from raydistill.driver.job import Job, run_job
from raydistill.driver.table_names import TABLES, result_name


def main() -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the rest is the configuration's
    own.add_argument("--quick", action="store_true")
    own.add_argument("--seeds", nargs="?", const="")
    options, arguments = own.parse_known_args()
    quick, seeds = options.quick, 1 if options.quick else 2
    if options.seeds is not None:
        if not options.seeds.isdecimal() or int(options.seeds) < 1:
            print("error: --seeds needs a number of at least 1", file=sys.stderr)
            return 2
        seeds = int(options.seeds)
    wanted = [argument for argument in arguments if argument in TABLES]
    if len(wanted) != 1 and not {"-h", "--help"} & set(arguments):
        print(f"error: name one table, {' or '.join(TABLES)}", file=sys.stderr)
        return 2
    table = wanted[0] if wanted else TABLES[0]
    others = [argument for argument in arguments if argument not in TABLES]
    if not any(argument.startswith("run.name=") for argument in others):
        others.append(f"run.name=paper{'-quick' if quick else ''}")

    def run(config, folder, inputs):
        from raydistill.driver.paper_tables import reproduce  # once the command line is known to be right

        reproduce(table, seeds, quick, config, folder, inputs)

    def check(config, folder, inputs):
        from raydistill.driver.paper_tables import check  # likewise

        check(table, seeds, quick, config, folder)

    return run_job(__doc__, Job(run=run, result=result_name(table, seeds), check=check), others)
