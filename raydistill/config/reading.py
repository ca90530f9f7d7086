"""Reading a configuration: YAML files that extend each other, then dotted overrides (`student.lr=1e-5`), then validation.

A wrong key, type or value is one line of an InputError. It names the key, its file, and the nearest key that there is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from raydistill.config.schema import Config, Free, Section, trains_bridge
from raydistill.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they lie in the package (setup.py), in a checkout beside it.
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
NO_RUNS = {"kuberay"}  # files there that describe clusters


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


def _merge(base: dict, extra: dict) -> dict:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both else value
    return result


def _keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys of sections and leaves."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, as everybody expects. YAML 1.1 wants 1.0e-5."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts texts in quotes where `_Loader` would read a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _parse(text: str) -> Any:
    """YAML as plain values. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def shipped() -> list[str]:
    """Names of the configurations of the package, as `--config` takes them."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem not in NO_RUNS)


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that `--config`, or `extends:` in a file of the folder `beside`, names.

    A file of that path comes first. Otherwise it is the name of a shipped one: `sdxl_sd15`, `teachers/sdxl`. Where there is
    neither, the path is returned as it was named.
    """
    path = Path(name).expanduser() if beside is None else beside / name
    if path.is_file():
        return path
    ours = CONFIGS / f"{str(name).removesuffix('.yaml')}.yaml"
    return ours if not Path(name).is_absolute() and ours.is_file() else path


def read_yaml(file: Path, extended_by: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """One YAML file on top of those that its `extends:` names: a file relative to it, a shipped name, or a list; later ones win.

    Returns:
        the tree, and for every dotted key the file that it comes from.

    Raises:
        InputError: a file is missing, is not a mapping, or extends itself; the message names it.
    """
    if not file.is_file():
        if extended_by:
            raise InputError(f"{extended_by[-1]}: extends {file}, which does not exist")
        close = difflib.get_close_matches(file.stem, shipped(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"shipped are {', '.join(shipped())}"
        raise InputError(f"--config {file}: no such file, and no shipped configuration; {hint}")
    if file.resolve() in (other.resolve() for other in extended_by):
        raise InputError(f"{extended_by[-1]}: extends {file}, which extends it")
    try:
        tree = _parse(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must be a mapping of sections, not a {type(tree).__name__}")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise InputError(f"{file}: extends must be a file name or a list of file names, not {parents!r}")
    below: dict = {}
    origins: dict[str, str] = {}
    for name in parents:
        part, part_origins = read_yaml(find_config(name, file.parent), (*extended_by, file))
        below, origins = _merge(below, part), origins | part_origins
    return _merge(below, tree), origins | dict.fromkeys(_keys(tree), str(file))


def _override(text: str) -> dict:
    """`section.key=value` as a tree. Raises InputError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"{text!r}: overrides look like section.key=value (see --help)")
    try:
        parsed: Any = _parse(value)
    except yaml.YAMLError:
        raise InputError(f"{text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _where(key: str, origins: Mapping[str, str]) -> str:
    """The file that a key, or the nearest section around it, comes from: ` (in FILE)`; else nothing."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" (in {origins[key]})" if origins.get(key) else ""


def validate(tree: dict, origins: Mapping[str, str] | None = None) -> Config:
    """Check a plain tree; `origins` says which file a dotted key comes from.

    Raises InputError: one line per mistake.
    """
    origins = origins or {}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(
                str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "function"))
            )
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key}{nearest(key)}{_where(key, origins)}")
            else:
                got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
                text = problem["msg"].removeprefix("Value error, ")
                if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
                    text += "; a text that looks like a number needs quotes, as in 'run.name=\"1e5\"'"
                lines.append(f"{key + ': ' if key else ''}{text}{got}{_where(key, origins)}")
        raise InputError("\n".join(lines)) from None


def load(file: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a shipped configuration by name (default: shapes), override, validate. Raises InputError."""
    tree, origins = read_yaml(find_config(file) if file else CONFIGS / "shapes.yaml")
    for text in overrides:
        extra = _override(text)
        tree = _merge(tree, extra)
        origins |= dict.fromkeys(_keys(extra), "")  # whoever typed it needs no file name
    return validate(tree, origins)


def get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def needs_pairs(config: Config) -> bool:
    """Whether a run has a use for pairs, or teacher samples, that it does not find elsewhere than in `bridge.pairs`."""
    gan = config.discriminator.weight > 0 and config.discriminator.real_data is None
    return trains_bridge(config) or config.bridge.trainable or gan


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value."""
    return {key: get(config, key) for key, *_ in fields()}


def changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration with other values of some sections. Raises InputError."""
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return validate(tree)


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
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def from_yaml(text: str) -> Config:
    """A whole configuration, as `to_yaml` writes it. Raises InputError: no YAML, or wrong keys or values."""
    try:
        tree = _parse(text)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}") from None
    return validate(tree)
