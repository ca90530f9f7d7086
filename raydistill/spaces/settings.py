"""Configuration files of model folders, read as the class that they name reads them; whatever they hold, never their code.

Files come from anywhere. What is wrong with one ends as one line, an InputError that names the file and, where that can
be told, the key.
"""

from __future__ import annotations

import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
from diffusers.configuration_utils import ConfigMixin, LegacyConfigMixin
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config

from raydistill.config.reading import shown
from raydistill.errors import InputError

LARGEST = 10**6  # of whole numbers in a network's or scheduler's configuration
LONGEST = 1000  # of lists, and of stacks of layers
DEEPEST = 8  # lists and objects in each other
SIDE = 8192  # pixels, or latent pixels
Made = TypeVar("Made")


def _kind_and_text(error: BaseException) -> str:
    """Kind and text of an error of a library, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Whatever the files at `place` make a library raise becomes an InputError that names them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # files from anywhere may fail in any way
        raise InputError(f"{place}: {_kind_and_text(error)}") from error


class Settings(dict[str, Any]):
    """A JSON object of a model folder. What is asked for and is not there, or is of another kind, is named with its file.

    Attributes:
        stated: the keys that the file itself has; further ones are defaults of its class.
    """

    def __init__(self, values: dict[str, Any], file: str = "", defaults: dict[str, Any] | None = None) -> None:
        super().__init__((defaults or {}) | values)
        self.file, self.stated = file, frozenset(values)

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.file}: lacks {key!r}")

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error of a value that is not what is `wanted`."""
        return InputError(f"{self.file}: {key} is {shown(self[key])}, not {wanted}")

    def whole(self, key: str, most: int = LARGEST) -> int:
        """A whole number, 1 … `most`."""
        value = self[key]
        if not _is_number(value) or value != int(value) or not 1 <= value <= most:
            raise self.wrong(key, f"a whole number from 1 to {most}")
        return int(value)

    def number(self, key: str) -> float:
        """A finite number."""
        if not _is_number(self[key]):
            raise self.wrong(key, "a finite number")
        return self[key]

    def several(self, key: str) -> list[Any]:
        """A list with at least one element."""
        value = self[key]
        if not isinstance(value, (list, tuple)) or not value:
            raise self.wrong(key, "a list with at least one element")
        return list(value)

    def side(self, key: str = "sample_size") -> int:
        """The side of a square: one whole number, or two equal ones."""
        value = self[key]
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not _is_number(value) or value != int(value) or not 1 <= value <= SIDE:
            raise self.wrong(key, f"the side of a square (a whole number up to {SIDE}, or two equal ones)")
        return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_settings(file: Path) -> Settings:
    """A JSON object. Raises InputError, which names the file, where it is missing or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{file}: cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds no JSON object")
    return Settings(values, str(file))


# -- the class that a file names ----------------------------------------------------------------------------


def diffusers_class(config: Settings, kind: type = ConfigMixin) -> type:
    """The class that a part's configuration means, as diffusers maps it.

    `Transformer2DModel`, for example, is the older name of `PixArtTransformer2DModel`.

    Raises:
        InputError: this diffusers has no such class, or it is not a `kind`.
    """
    name = config["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, kind):
        raise InputError(
            f"{config.file}: _class_name: diffusers {diffusers.__version__} has no class {shown(name)}"
            + ("" if kind is ConfigMixin else f" that is a {kind.__name__}")
        )
    if issubclass(found, LegacyConfigMixin):  # diffusers has no public function for this
        norm = config.get("norm_type")
        found = _fetch_remapped_cls_from_config({"norm_type": norm if isinstance(norm, str) else None}, found)
    return found


def through_class(config: Settings, kind: type = ConfigMixin) -> Settings:
    """The configuration with its class's own values where the file has none, as diffusers reads it.

    Raises:
        InputError: as `diffusers_class`, or numbers and lists that no network has.
    """
    parameters = inspect.signature(diffusers_class(config, kind).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    unset = config.get("_use_default_values")
    unset = {"_use_default_values", *(unset if isinstance(unset, list) else ())}
    stated = {key: value for key, value in config.items() if key not in unset}
    check_extent(Settings(stated, config.file), LARGEST)
    return Settings(stated, config.file, defaults)


def check_extent(config: Settings, largest: float) -> None:
    """Refuse numbers, lists and nesting that would fill the memory, or take hours, before a class finds them wrong.

    Args:
        largest: of whole numbers that are no numbers of layers.
    """
    for key, value in config.items():
        most = LONGEST if "layers" in key else largest
        for leaf, length, depth in _leaves(value):
            whole = isinstance(leaf, int) and abs(leaf) > most
            if whole or depth > DEEPEST or (length > LONGEST and key != "trained_betas"):
                raise config.wrong(key, f"a value up to {most}, in lists of at most {LONGEST}")


def _leaves(value: Any, length: int = 0, depth: int = 0) -> Iterator[tuple[Any, int, int]]:
    """(plain value, the longest list around it, how deep it lies)."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    if inside is None or depth > DEEPEST:
        yield value, length, depth
        return
    for item in inside:
        yield from _leaves(item, max(length, len(inside)), depth + 1)


# -- what is built from a file ------------------------------------------------------------------------------


@contextmanager
def blaming(config: Settings, made_by: Callable[..., Any]) -> Iterator[None]:
    """What goes wrong while an object is made from its configuration, or used, becomes an InputError that names the file.

    The keys whose values are of another kind than the class takes, or that the error speaks of, are named too.

    Args:
        made_by: the class; its `__init__` says which kinds of values it takes.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a class makes of foreign values
        text, odd = _kind_and_text(error), []
        for key in sorted(config.stated):
            value = config[key]
            if not _is_taken(made_by, key, value) or (isinstance(value, str) and value and value in str(error)):
                odd.append(f"{key} is {shown(value)}; ")
        raise InputError(f"{config.file}: {''.join(odd)}{made_by.__name__} cannot use it ({text})") from error


def built(config: Settings, made_by: Callable[..., Any], make: Callable[[], Made]) -> Made:
    """make(), which builds an object of a class from its configuration. Raises as `blaming`."""
    with blaming(config, made_by):
        return make()


def _is_taken(made_by: Callable[..., Any], key: str, value: Any) -> bool:
    """Whether a value is of the kind that the class's annotation or default names; True where it says nothing."""
    parameter = inspect.signature(made_by.__init__).parameters.get(key)
    if parameter is None or value == parameter.default:
        return True
    if value in ([], {}) and parameter.default:
        return False
    try:
        hint = typing.get_type_hints(made_by.__init__).get(key)
    except NameError:  # annotations that mean something to type checkers alone
        return True
    return hint is None or _fits(value, hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if not isinstance(origin, type):
        return True
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (list, tuple):
        elements = [one for one in arguments if one is not Ellipsis]
        listed = isinstance(value, (list, tuple))
        return listed and (not elements or all(any(_fits(v, one) for one in elements) for v in value))
    return isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
