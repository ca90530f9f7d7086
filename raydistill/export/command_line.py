"""What the command lines of `jobs/sample.py`, `merge.py` and `evaluate.py` share. Imports no torch: --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from raydistill.storage.resolve import place_argument

DTYPES = ("float32", "float16", "bfloat16")
STUDENT_HELP = "export's folder, run's name or folder, URI of one, or MLflow run id"


class _Paragraphs(argparse.HelpFormatter):
    """Wraps each paragraph to the terminal. One with indented lines, as examples are, stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            p if "\n  " in p else super(_Paragraphs, self)._fill_text(p, width, indent) for p in paragraphs
        )


def parser_of(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with --storage."""
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=_Paragraphs)
    parser.add_argument("--storage", type=place_argument, default=Path("outputs"), metavar="FOLDER",
                        help="where runs are (default: outputs)")  # fmt: skip
    return parser


def add_tracking_uri(parser: argparse.ArgumentParser) -> None:
    """Where to ask for a run id."""
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), metavar="URI",
                        help="MLflow, for a run id that is not in storage (default: $MLFLOW_TRACKING_URI)")  # fmt: skip


def count(least: int) -> Callable[[str], int]:
    """Type of an option that takes a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is needed")
        return int(text)

    return number


def report_error(error: Exception) -> int:
    """Print an error; exit code 2 for wrong input, which is always a ValueError and says what to do, else 1."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1
