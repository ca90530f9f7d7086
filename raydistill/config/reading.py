"""Reading a configuration: YAML files that extend each other, then dotted overrides (`student.lr=1e-5`), then validation.

A wrong key, type or value is one line of an InputError. It names the key, its file, and the nearest key that there is.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from raydistill.config.keys import Free, Origin, Section
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge, trains_bridge
from raydistill.config.yaml_text import MOST_CHARACTERS, MOST_LEVELS, TOO_DEEP, dump, parse
from raydistill.errors import InputError, mask

CONTROLS = ("no_vsd", "shared_space")  # distillations that a run is compared with
STAGES = ("synthesis", "samples", "bridge", "distill", *CONTROLS)
_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they lie in the package (setup.py), in a checkout beside it.
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
NO_RUNS = {"kuberay"}  # files there that describe clusters
MOST_FILES = 100  # that a configuration extends in all, each as often as it is named
MOST_SHOWN, MOST_MISTAKES = 100, 20  # characters of a wrong value; mistakes that are told
_OF_A_NAME = "[key]"  # pydantic's last part of a place, where a mapping's name is wrong and not its value


def fields(
    section: type[Section] = Config, prefix: str = "", around: Free | None = None
) -> Iterator[tuple[str, FieldInfo, Free | None]]:
    """(dotted key, field, mark) of every leaf; the mark may stand at a section around it."""
    for name, field in section.model_fields.items():
        mark = field.json_schema_extra if isinstance(field.json_schema_extra, Free) else around
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.", mark)
        else:
            yield prefix + name, field, mark


def nearest(key: str) -> str:
    """« did you mean …?» for an unknown key, or an empty string. All keys whose last part it is are named."""
    keys = [name for name, *_ in fields()]
    section, _, leaf = key.rpartition(".")
    leaves = {k.rpartition(".")[2] for k in keys}
    if not section:
        close = [k for k in keys if k.rpartition(".")[2] == leaf]
        close = close or difflib.get_close_matches(key, list(Config.model_fields), n=1, cutoff=0.6)
        near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
        close = close or [k for k in keys if k.rpartition(".")[2] in near]
    else:
        close = difflib.get_close_matches(key, [k for k in keys if k.startswith(f"{section}.")], n=1, cutoff=0.8)
        close = close or [k for k in keys if k.rpartition(".")[2] == leaf]
        close = close or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    *first, last = close or [""]
    return f"; did you mean {', '.join(first) + ' or ' if first else ''}{last}?" if close else ""


def _merge(base: dict, extra: dict, around: str = "") -> dict:
    """`extra` over `base`, section by section. An empty mapping clears a key that is a mapping, as node labels are."""
    result = dict(base)
    for key, value in extra.items():
        path = f"{around}{key}"
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        cleared = value == {} and path in _mappings()
        result[key] = _merge(result[key], value, f"{path}.") if both and not cleared else value
    return result


@functools.cache
def _mappings() -> frozenset[str]:
    """Keys whose value is itself a mapping."""
    return frozenset(key for key, field, _ in fields() if typing.get_origin(field.annotation) is dict)


def _keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys of sections and leaves."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def shipped() -> list[str]:
    """Names of the configurations of the package, as `--config` takes them."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem not in NO_RUNS)


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that `--config`, or `extends:` in a file of the folder `beside`, names.

    A file of that path comes first. Otherwise it is the name of a shipped one: `sdxl_sd15`, `teachers/sdxl`. Where there is
    neither, the path is returned as it was named.
    """
    path = Path(name).expanduser() if beside is None else beside / name
    ours = CONFIGS / f"{str(name).removesuffix('.yaml')}.yaml"
    # not Path.is_file, which raises where a name is too long
    return ours if not os.path.isfile(path) and not Path(name).is_absolute() and os.path.isfile(ours) else path


def read_yaml(
    file: Path, extended_by: tuple[Path, ...] = (), opened: list[Path] | None = None
) -> tuple[dict, dict[str, str]]:
    """One YAML file on top of those that its `extends:` names: a file relative to it, a shipped name, or a list; later ones win.

    Args:
        extended_by: the files that lead to this one.
        opened: every file that was read so far, which this one joins.

    Returns:
        the tree, and for every dotted key the file that it comes from.

    Raises:
        InputError: a file is missing, is no mapping, extends itself, or extends too many; the message names it.
    """
    opened = [] if opened is None else opened
    text = _text(file, extended_by)
    if file.resolve() in (other.resolve() for other in extended_by):
        raise InputError(f"{extended_by[-1]}: extends {file}, which extends it")
    opened.append(file)
    if len(opened) > MOST_FILES:
        raise InputError(f"{opened[0]}: extends more than {MOST_FILES} files, one after another or together")
    tree = parse(text, str(file)) or {}
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must be a mapping of sections, not a {type(tree).__name__}")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise InputError(f"{file}: extends must be a file name or a list of file names, not {shown(parents)}")
    below: dict = {}
    origins: dict[str, str] = {}
    for name in parents:
        parent, parent_origins = read_yaml(find_config(name, file.parent), (*extended_by, file), opened)
        below, origins = _merge(below, parent), origins | parent_origins
    return _merge(below, tree), origins | dict.fromkeys(_keys(tree), str(file))


def _text(file: Path, extended_by: Sequence[Path]) -> str:
    """What a configuration file holds. Raises InputError naming it."""
    name = f"{extended_by[-1]}: extends {file}, which" if extended_by else f"--config {file}:"
    try:
        if file.is_dir():
            raise InputError(f"{name} is a folder; name a file in it")
        if not file.is_file():
            if extended_by:
                raise InputError(f"{name} does not exist")
            close = difflib.get_close_matches(file.stem, shipped(), n=1)
            hint = f"did you mean {close[0]}?" if close else f"shipped are {', '.join(shipped())}"
            raise InputError(f"{name} no such file, and no shipped configuration; {hint}")
        with file.open(encoding="utf-8") as stream:
            return stream.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not valid YAML: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None


def _override(text: str) -> dict:
    """`section.key=value` as a tree. Raises InputError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"{mask('override', text)!r}: overrides look like section.key=value (see --help)")
    if not value.strip():
        raise InputError(f"{key}: there is nothing after the =")
    segments = key.split(".")
    if len(segments) > MOST_LEVELS:
        raise InputError(f"unknown key {key[:MOST_SHOWN]}…: {TOO_DEEP}")
    parsed = parse(value, key)
    for count in range(1, len(segments)):  # a name in a mapping may have a point itself: weights.pickscore.processor
        if ".".join(segments[:count]) in _mappings():
            segments = [*segments[:count], ".".join(segments[count:])]
            break
    for segment in reversed(segments):
        parsed = {segment: parsed}
    return parsed


def _where(key: str, origins: Mapping[str, str]) -> str:
    """The file that a key, or the nearest section around it, comes from: ` (in FILE)`; else nothing."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" (in {origins[key]})" if origins.get(key) else ""


def shown(value: Any, key: str = "") -> str:
    """A wrong value for a message: cut, and without secrets."""
    try:
        text = repr(mask(key, value)) if isinstance(value, str) else mask(key, repr(value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def validate(tree: dict, origins: Mapping[str, str] | None = None) -> Config:
    """Check a plain tree; `origins` says which file a dotted key comes from.

    Raises InputError: one line per mistake.
    """
    origins = origins or {}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = []
        problems = _of_keys(error.errors())
        for problem in problems[:MOST_MISTAKES]:
            loc = [str(segment) for segment in problem["loc"]]
            of_a_name = loc[-1:] == [_OF_A_NAME]
            key = ".".join(
                segment for segment in loc if not segment.startswith(("constrained", "function", _OF_A_NAME))
            )
            if of_a_name:
                name = shown(problem["input"])
                lines.append(
                    f"{key}: a name must be a text, not {name}; give it quotes of its own{_where(key, origins)}"
                )
            elif problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key}{nearest(key)}{_where(key, origins)}")
            else:
                value = problem["input"]
                got = "" if isinstance(value, dict) else f" (got {shown(value, key)})"
                text = problem["msg"].removeprefix("Value error, ")
                if problem["type"] == "string_type" and isinstance(value, int | float):
                    text += f"; a text that looks like a number, yes or no needs quotes of its own: '{key}=\"…\"'"
                lines.append(f"{key + ': ' if key else ''}{text}{got}{_where(key, origins)}")
        if len(problems) > MOST_MISTAKES:
            lines.append(f"and {len(problems) - MOST_MISTAKES} more mistakes")
        raise InputError("\n".join(lines)) from None


def _of_keys(problems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One problem a key: a number or a word is refused once as each."""
    found: list[Mapping[str, Any]] = []
    for problem in problems:
        *key, kind = problem["loc"] or ("",)
        if found and str(kind).startswith("literal[") and [*found[-1]["loc"][:-1]] == key:
            word = problem["msg"].removeprefix("Input should be ")
            found[-1] = {**found[-1], "msg": f"{found[-1]['msg']}, or {word}"}
        else:
            found.append(problem)
    return found


def load(file: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a shipped configuration by name (default: shapes), override, validate. Raises InputError."""
    tree, origins = read_yaml(find_config(file) if file else CONFIGS / "shapes.yaml")
    typed: set[str] = set()
    for text in overrides:
        extra = _override(text)
        tree = _merge(tree, extra)
        typed.update(_keys(extra))
    origins |= dict.fromkeys(typed, "")  # whoever typed it needs no file name
    origin = Origin(file=str(file or "shapes"), overrides=tuple(overrides), keys=frozenset(typed))
    return validate(tree, origins).of(origin)


def get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for segment in key.split("."):
        value = getattr(value, segment)
    return value


def _lacks_reals(config: Config) -> bool:
    return config.discriminator.weight > 0 and config.discriminator.real_data is None


def needs_pairs(config: Config) -> bool:
    """Whether a run has a use for pairs, or teacher samples, that it does not find elsewhere than in `bridge.pairs`."""
    gan = _lacks_reals(config) and config.discriminator.real_source == "pairs"
    stored = trains_bridge(config) and not streams_bridge(config)
    return stored or config.bridge.trainable or gan


def draws_pairs(config: Config) -> bool:
    """Whether the run's own pairs are of pictures that a model draws, and not of real images."""
    return needs_pairs(config) and config.bridge.pairs is None and config.synthesis.images is None


def draws_samples(config: Config) -> bool:
    """Whether pictures are drawn for the discriminator alone: the run's pairs are of other pictures, or it needs none."""
    return _lacks_reals(config) and config.discriminator.real_source == "samples" and not draws_pairs(config)


def draws(config: Config) -> bool:
    """Whether a run draws pictures, for whatever use."""
    return draws_pairs(config) or draws_samples(config)


def other_drawer(config: Config) -> bool:
    """Whether another model than the teacher draws them."""
    return config.synthesis.teacher not in (None, config.teacher.model)


def stages_of(config: Config) -> list[str]:
    """The stages of a whole run, in their order."""
    return [
        *(["synthesis"] if needs_pairs(config) and config.bridge.pairs is None else []),
        *(["samples"] if draws_samples(config) else []),
        *(["bridge"] if trains_bridge(config) else []),
        "distill",
        *(name for name in CONTROLS if name in config.controls),
    ]


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value."""
    return {key: get(config, key) for key, *_ in fields()}


def changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration with other values of some sections. Raises InputError."""
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return validate(tree).of(config.origin)


def drawing_config(config: Config) -> Config:
    """The configuration with the model that draws pictures as its teacher, on a service of its own."""
    if not other_drawer(config):
        return config
    shards = config.synthesis.shards or config.teachers.shards
    model = {"model": config.synthesis.teacher, "guidance_scale": None}
    return changed(config, {"teacher": model, "teachers": {"shards": shards, "service": None}})


def mathematical(config: Config) -> dict[str, Any]:
    """The keys that decide the numbers of a run; a resume must not change them.

    A key that decides them in some configurations only is always there; in the others it has its default.
    """
    return {
        key: get(config, key) if mark is None or mark.unless(config) else field.default
        for key, field, mark in fields()
        if mark is None or mark.unless is not None
    }


def config_hash(config: Config) -> str:
    """Short hash of `mathematical`."""
    return hashlib.sha256(json.dumps(mathematical(config), sort_keys=True).encode()).hexdigest()[:12]


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, which `from_yaml` reads back the same."""
    return dump(config.model_dump())


def from_yaml(text: str) -> Config:
    """A whole configuration, as `to_yaml` writes it. Raises InputError: no YAML, or wrong keys or values."""
    return validate(parse(text, "configuration"))
