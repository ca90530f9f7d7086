"""YAML as people type it: numbers such as 1e-5, dates as text, no key twice, and no text that grows when it is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

from raydistill.errors import InputError

MOST_CHARACTERS = 1 << 18  # a configuration with every key has 8,000
MOST_VALUES = 10_000  # with every alias written out
MOST_LEVELS = 50
TOO_DEEP = f"nested too deeply, at most {MOST_LEVELS} levels are read"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, as everybody expects. YAML 1.1 wants 1.0e-5. Dates stay text."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts texts in quotes where `_Loader`, or another reader of YAML, would see a number or a date."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
_DATE = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse(text: str, name: str) -> Any:
    """A YAML text as plain values.

    Args:
        name: of the text, with which an error begins.

    Raises:
        InputError: no YAML, a key twice in one mapping, or too long or too deep a text; names the line.
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{name}: more than {MOST_CHARACTERS} characters, which no configuration has")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, name, {})
        return loader.construct_document(node)
    except InputError:
        raise
    except yaml.reader.ReaderError as error:
        raise InputError(f"{name}: not valid YAML: character {error.character:#x} is not allowed") from None
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold a password
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{name}: not valid YAML: {where}{error.problem or error.context}") from None
    except RecursionError:
        raise InputError(f"{name}: {TOO_DEEP}") from None
    except (ValueError, TypeError, LookupError, AttributeError):  # of PyYAML, whose constructors do not look before
        raise InputError(
            f"{name}: not valid YAML: a number is too long, or a tag is on a value of another kind"
        ) from None


def _check(node: yaml.Node, name: str, seen: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values and levels from a node on, with every alias written out. Raises InputError.

    Args:
        seen: what this returned for nodes by id; None: of one that this node lies in.
    """
    line = node.start_mark.line + 1
    if id(node) in seen:
        if (known := seen[id(node)]) is None:
            raise InputError(f"{name}: line {line}: an alias contains itself")
        return known
    seen[id(node)] = None
    below = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
        below = [child for pair in below for child in pair]
    values, levels = 1, 0
    for child in below:
        more, deep = _check(child, name, seen)
        values, levels = values + more, max(levels, deep)
    if values > MOST_VALUES:
        raise InputError(f"{name}: line {line}: more than {MOST_VALUES} values, with its aliases written out")
    if levels >= MOST_LEVELS:
        raise InputError(f"{name}: line {line}: {TOO_DEEP}")
    seen[id(node)] = values, levels + 1
    return values, levels + 1


def _check_keys(node: yaml.MappingNode, name: str) -> None:
    """Raises InputError naming a key that a mapping has twice, and both lines."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise InputError(f"{name}: line {line}: key {key.value} is there twice, first in line {lines[key.value]}")
        lines[key.value] = line


def dump(tree: Any) -> str:
    """Plain values as YAML, which `parse` reads back the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
