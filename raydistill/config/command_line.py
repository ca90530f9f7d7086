"""The command line of the jobs: `[--config FILE] [--help] [--print-config] [key=value …]`."""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from raydistill.config.reading import fields, get, load, to_yaml
from raydistill.config.schema import Config
from raydistill.errors import InputError


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "|".join(
            str(value).lower() if isinstance(value, bool) else str(value) for value in typing.get_args(annotation)
        )
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(annotation))
    if origin is dict:
        return "{key: value, …}"
    if origin is list:
        return f"[{_type_name(typing.get_args(annotation)[0])}, …]"
    return getattr(annotation, "__name__", str(annotation))


def help_text(purpose: str, config: Config) -> str:
    """`--help`: purpose, usage, every key with type, value and meaning."""
    script = Path(sys.argv[0]).name
    lines = [
        purpose.strip(),
        "",
        f"usage: python3 jobs/{script} [--config FILE] [--help] [--print-config] [key=value …]",
        "",
        "  --config FILE    YAML file; default configs/shapes.yaml",
        "  --print-config   print the resulting configuration and stop",
        "  key=value        override one key, for example student.lr=1e-5",
        "",
        "keys (type) = value: meaning",
    ]
    for key, field, _ in fields():
        value = json.dumps(get(config, key))
        lines.append(f"  {key} ({_type_name(field.annotation)}) = {value}: {field.description}")
    return "\n".join(lines)


def from_command_line(purpose: str, arguments: Sequence[str] | None = None) -> Config:
    """Configuration of a job script. Prints and exits for --help (0), --print-config (0) and mistakes (2)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--config", nargs="?", const="")
    told, overrides = parser.parse_known_args(arguments)
    try:
        if told.config == "":
            raise InputError("--config needs a file name")
        if unknown := [argument for argument in overrides if argument.startswith("-")]:
            raise InputError(f"unknown option {unknown[0]}; options are --config, --help, --print-config")
        config = load(told.config, overrides)
    except InputError as error:
        print("configuration error:\n  " + str(error).replace("\n", "\n  "), file=sys.stderr)
        raise SystemExit(2) from None
    if told.help:
        print(help_text(purpose, config))
        raise SystemExit(0)
    if told.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config
