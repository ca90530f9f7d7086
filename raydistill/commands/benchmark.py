"""Measure the system on this machine. Prints a table, writes <storage>/benchmark/SECTION.json.

usage: raydistill benchmark SECTION [options]        `SECTION --help` lists its options
       raydistill benchmark all [--storage FOLDER]   every section in a process of its own, with its defaults

Sections compare within one run, and report medians. Nothing else heavy should run beside them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from raydistill.benchmark import SECTIONS
from raydistill.config.command_line import program
from raydistill.storage.resolve import path_argument


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip() + "\n\nsections:")
        print("\n".join(f"  {name:<10}{purpose}" for name, purpose in SECTIONS.items()))
        return 0 if len(sys.argv) > 1 else 2
    name, options = sys.argv[1], sys.argv[2:]
    if name != "all" and name not in SECTIONS:
        print(f"error: no section {name!r}; there are all, {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    return _all(options) if name == "all" else _one(name, options)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{program()} {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--storage", type=path_argument, default=Path("outputs"), metavar="FOLDER", help="where results go"
    )
    return parser


def _one(name: str, options: list[str]) -> int:
    section = importlib.import_module(f"raydistill.benchmark.{name}")
    parser = _parser(name)
    parser.description = section.__doc__
    section.add_arguments(parser)
    arguments = parser.parse_args(options)
    from raydistill.benchmark.measure import command, machine  # with torch: not for a list of the sections

    result = {"section": name, "machine": machine(), "command": command()} | section.run(arguments)
    file = arguments.storage / "benchmark" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1))
    print(f"\n`{result['command']}`, {result['machine']}:\n\n{section.table(result)}\n\n{file}")
    return 0 if result.get("passed", True) else 1


def _all(options: list[str]) -> int:
    storage = _parser("all").parse_args(options).storage
    failed = []
    for name in SECTIONS:
        print(f"\n## {name}: {SECTIONS[name]}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", "raydistill.commands", "benchmark", name, "--storage", str(storage)]
        ).returncode:
            failed.append(name)
    if failed:
        print(f"error: sections that failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
