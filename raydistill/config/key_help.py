"""`--help` of the commands that read a configuration: keys by section, wrapped to the terminal."""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from raydistill.config.reading import fields, get
from raydistill.config.schema import Config
from raydistill.errors import InputError

COMMON = (
    "run.name", "storage", "student.model", "student.unet", "teacher.model", "prompts.path", "student.lr", "distill.steps",
    "distill.batch_size", "controls",
)  # fmt: skip
WHOLE_RUN = "storage, controls"  # heading of the keys of no section
OPTIONS = {
    "--config NAME|FILE": "a shipped configuration, such as sd35_medium_sd15, or a YAML file; default: shapes",
    "--help [SECTION]": "this page, or the keys of one section, such as student",
    "--print-config": "print the resulting configuration and stop",
}
OVERRIDE = {"key=value": "override one key: student.lr=1e-5 controls=no_vsd,shared_space"}


def type_name(annotation: Any) -> str:
    """A type as people write its values: `int`, `lora|full`, `[int, …]`."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "|".join(
            str(value).lower() if isinstance(value, bool) else str(value) for value in typing.get_args(annotation)
        )
    if origin in (typing.Union, types.UnionType):
        return "|".join("null" if one is type(None) else type_name(one) for one in typing.get_args(annotation))
    if origin is dict:
        return "{key: value, …}"
    if origin is list:
        return f"[{type_name(typing.get_args(annotation)[0])}, …]"
    return getattr(annotation, "__name__", str(annotation))


def help_text(
    purpose: str, program: str, config: Config, topic: str = "", options: Mapping[str, str] | None = None
) -> str:
    """The whole page; with a topic the keys of that section, or that key, alone. `options`: those of this command alone.

    Raises:
        InputError: there is no such section or key; names the nearest.
    """
    width = max(40, shutil.get_terminal_size().columns)
    known = {key: field for key, field, _ in fields()}
    if topic:
        chosen = _of_topic(topic, list(known))
        return "\n".join(_entries(((key, known[key]) for key in chosen), config, width))
    options = options or {}
    own = "".join(f"[{option}] " for option in options)
    usage = f"usage: {program} [--config NAME|FILE] [--help [SECTION]] [--print-config] {own}[key=value …]"
    lines = [*_wrapped(usage, width, hanging=7), "", *_paragraphs(purpose, width), ""]
    for option, meaning in (OPTIONS | options | OVERRIDE).items():
        lines += _wrapped(f"  {option:<19}  {meaning}", width, hanging=23)
    lines += ["", "COMMON KEYS (type) = value", *_entries(((key, known[key]) for key in COMMON), config, width)]
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for key, field in known.items():
        if key not in COMMON:
            sections.setdefault(key.partition(".")[0] if "." in key else WHOLE_RUN, []).append((key, field))
    for section, entries in sections.items():
        lines += ["", section.upper() if section != WHOLE_RUN else section, *_entries(entries, config, width)]
    return "\n".join(lines)


def _of_topic(topic: str, keys: list[str]) -> list[str]:
    """Keys of a section, a key itself, or all keys whose last part it is."""
    found = [key for key in keys if key == topic or key.startswith(f"{topic}.")]
    found = found or [key for key in keys if key.rpartition(".")[2] == topic]
    if found:
        return found
    names = sorted({key.partition(".")[0] for key in keys} | set(keys))
    close = difflib.get_close_matches(topic, names, n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else f"sections are {', '.join(dict.fromkeys(k.partition('.')[0] for k in keys))}"
    )
    raise InputError(f"--help {topic}: no such section or key; {hint}")


def _entries(entries: Iterable[tuple[str, FieldInfo]], config: Config, width: int) -> list[str]:
    lines = []
    for key, field in entries:
        lines += _wrapped(f"  {key} ({type_name(field.annotation)}) = {json.dumps(get(config, key))}", width, hanging=6)
        lines += textwrap.wrap(field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _paragraphs(text: str, width: int) -> list[str]:
    paragraphs = [textwrap.fill(" ".join(one.split()), width) for one in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs).splitlines()


def _wrapped(text: str, width: int, hanging: int) -> list[str]:
    """Lines of at most `width`; only what has no blank is longer."""
    return textwrap.wrap(
        text, width, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True,
    )  # fmt: skip
