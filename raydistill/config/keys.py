"""What the keys of a configuration are made of: sections, kinds of numbers, and the mark of what a resume may change."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

if TYPE_CHECKING:
    from raydistill.config.schema import Config

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]  # steps, pictures, rows
Batch = Annotated[int, Field(ge=1, le=65_536)]  # samples, or pictures, at once
Few = Annotated[int, Field(ge=1, le=10_000)]  # processes, threads, channels, layers, requests
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
NonNegative = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]  # 30 years
Patience = Annotated[Seconds, Field(gt=0)]
Gpus = Annotated[float, Field(ge=0, le=10_000)]  # of one process, in Ray's count
Cpus = Annotated[Gpus, Field(gt=0)]


def dotted(places: Any) -> Any:
    """`weights.hpsv3.base=PLACE` names hpsv3.base, as a file does that writes the name with its point."""
    if not isinstance(places, dict):
        return places
    inner = {
        f"{name}.{option}": value
        for name, values in places.items()
        if isinstance(values, dict)
        for option, value in values.items()
    }
    return inner | {name: value for name, value in places.items() if not isinstance(value, dict)}


Places = Annotated[dict[str, str], BeforeValidator(dotted)]  # of weights, by name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_without_brackets(cls, value: Any, field: ValidationInfo) -> Any:
        """`controls=no_vsd,shared_space` and `bridge.depths=2` are lists too."""
        listed = typing.get_origin(cls.model_fields[str(field.field_name)].annotation) is list
        if not listed or isinstance(value, bool) or not isinstance(value, str | int):
            return value
        return [one.strip() for one in str(value).split(",")]

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What differs from the defaults."""
        fields = type(self).model_fields
        return ((name, value) for name, value in super().__repr_args__() if value != fields[str(name)].default)


@dataclass(frozen=True)
class Origin:
    """What a configuration was read from. It decides nothing: configurations of other origins are equal.

    Attributes:
        program: what was typed before the arguments; None: it was read by a script or a notebook.
        file: as it was named; None: it was made otherwise.
        overrides: as they were typed, secrets and all.
        keys: dotted keys that these set.
    """

    program: str | None = field(default=None, compare=False)
    file: str | None = field(default=None, compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)
    keys: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Free:
    """Marks a key, or a section, that decides no number of a run. A resume may change it.

    What numbers depend on besides is no matter of the configuration: the kind of hardware, and which workers were lost.

    Attributes:
        unless: the configurations in which the key decides numbers after all; None: there are none.
    """

    unless: Callable[[Config], bool] | None = None

    def __call__(self, schema: dict[str, Any]) -> None:
        """What pydantic calls to add to a JSON schema."""
        schema["free"] = True


def free(default: Any, unless: Callable[[Config], bool] | None = None, **arguments: Any) -> Any:
    """A `Field` marked as `Free`. Every other field decides numbers."""
    return Field(default, json_schema_extra=Free(unless), **arguments)
