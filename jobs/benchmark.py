"""Measure one thing: `python jobs/benchmark.py SECTION`; prints its table, writes <storage>/benchmark/SECTION.json."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

SECTIONS = {"chaos": "raydistill.benchmark.chaos"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    for name, module in SECTIONS.items():
        if name in sys.argv[1:2] or not sys.argv[1:] or sys.argv[1].startswith("-"):
            loaded = importlib.import_module(module)
            section = sections.add_parser(name, help=loaded.__doc__.splitlines()[0], description=loaded.__doc__)
            section.add_argument("--storage", default="outputs", help="folder that roots everything it writes")
            loaded.add_arguments(section)
        else:
            sections.add_parser(name)
    arguments = parser.parse_args()
    from raydistill.evaluation.summary import write_summary

    module = importlib.import_module(SECTIONS[arguments.section])
    result = module.run(arguments)
    print(module.table(result))
    file = write_summary(Path(arguments.storage) / "benchmark" / f"{arguments.section}.json", result)
    print(f"\nwritten to {file}")
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
