"""The command line of a run: `[--config NAME|FILE] [--help [SECTION]] [--print-config] [key=value …]`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from raydistill.config.key_help import help_text
from raydistill.config.reading import load, to_yaml
from raydistill.config.schema import Config
from raydistill.errors import InputError, mask


def program() -> str:
    """What was typed before the arguments: `raydistill distill`, or `python3 jobs/distill.py`."""
    script = Path(sys.argv[0])
    return f"python3 {script.parent.name}/{script.name}" if script.suffix == ".py" else script.name


def shown_command(config: Config) -> str:
    """What makes the run once more, without secrets: the command as it was typed, or the library's call."""
    origin = config.origin
    if origin.file is None:
        return "raydistill.distill(config)"
    overrides = [f"{key}={mask(key, value)}" for key, _, value in (text.partition("=") for text in origin.overrides)]
    if origin.program is None:
        return f"raydistill.distill({', '.join(map(repr, [origin.file, *overrides]))})"
    return f"{origin.program} --config {shlex.join([origin.file, *overrides])}"


def from_command_line(
    purpose: str, arguments: Sequence[str] | None = None, options: Mapping[str, str] | None = None
) -> Config:
    """Configuration of a command. Prints and exits for --help (0), --print-config (0) and mistakes (2).

    Args:
        options: further ones of the command and their meaning, which it has taken from the arguments itself.
    """
    options = options or {}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--config", nargs="?", const="")
    given, overrides = parser.parse_known_args(arguments)
    topic = given.help or ""
    if "=" in topic:  # an override that follows --help
        topic, overrides = "", [topic, *overrides]
    try:
        if given.config == "":
            raise InputError("--config needs a name or a file")
        if unknown := [argument for argument in overrides if argument.startswith("-")]:
            known = ", ".join(["--config", "--help", "--print-config", *options])
            raise InputError(f"unknown option {unknown[0]}; options are {known}")
        config = load(given.config, overrides)
        config.of(dataclasses.replace(config.origin, program=program()))
        page = None if given.help is None else help_text(purpose, program(), config, topic, options)
    except InputError as error:
        print("configuration error:\n  " + str(error).replace("\n", "\n  "), file=sys.stderr)
        raise SystemExit(2) from None
    if page is not None:
        print(page)
        raise SystemExit(0)
    if given.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config
