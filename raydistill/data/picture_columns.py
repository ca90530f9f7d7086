"""Which columns, keys and files of a set hold pictures and captions: one rule for sets that are listed and for streams.

A name counts as it is written. Where none does, it counts in any case, and among a few names more.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from raydistill.data.text_files import LONE
from raydistill.data.texts import holds_bytes, holds_text, undecoded
from raydistill.errors import InputError
from raydistill.storage.place import Place

CAPTIONS = ("caption", "text", "prompt", "caption_*")  # columns or keys, where none is named
WIDER = ("caption", "captions", "text", "prompt", "caption_*", "*_caption")  # in any case, where there is none of those
IMAGE = "image"  # the default of synthesis.image_column, which names nothing
NOT_UTF8 = "the caption is not valid UTF-8"
LISTED = 20  # names in a message


def names_of(caption_column: str | None) -> list[str] | None:
    """The names that `synthesis.caption_column` lists; None: it names none."""
    return None if caption_column is None else [name.strip() for name in caption_column.split(",")]


def chosen(
    available: Iterable[str],
    names: Sequence[str] | None,
    default: Sequence[str] = CAPTIONS,
    wider: Sequence[str] = WIDER,
) -> list[str]:
    """Those of the available names that are of captions, in the order of `names`.

    Args:
        names: that were asked for, with `*` for any letters; None: `default`, and where it finds none, `wider`.
    """
    available = list(available)
    exact, loose = (names, names) if names else (default, wider)
    found = [one for name in exact for one in available if fnmatch.fnmatchcase(one, name)]
    found = found or [one for name in loose for one in available if fnmatch.fnmatchcase(one.lower(), name.lower())]
    return list(dict.fromkeys(found))


def by_wider_rule(found: Sequence[str], names: Sequence[str] | None, default: Sequence[str] = CAPTIONS) -> list[str]:
    """`found` where no name of it counts as it is written, else []: earlier versions found no captions there."""
    return [] if any(fnmatch.fnmatchcase(one, name) for one in found for name in names or default) else list(found)


def flat(values: Iterable[Any]) -> tuple[str, ...]:
    """The captions among values, which may be lists of them; white space is one space, and empty ones are none."""
    texts = (text for value in values for text in (value if isinstance(value, list | tuple) else [value]))
    return tuple(one for text in texts if isinstance(text, str) and (one := " ".join(text.split())))


def named_captions(record: Mapping[str, Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """The captions that a record of columns or keys holds, several where it has several or lists of them.

    `names`: as of `chosen`.
    """
    return flat(record[key] for key in chosen(record, names))


def choice(identity: tuple[int, ...], count: int) -> int:
    """One of `count`, by a hash of the identity."""
    return int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()) % count


def captions_in_words(found: Sequence[str], available: Iterable[str], kind: str = "columns") -> str:
    """Where captions are, for people."""
    if found:
        return f"captions in {_listed(found)}"
    return f"no captions: its {kind} are {_listed(list(available))}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:LISTED])) + (", …" if len(names) > LISTED else "")


# -- parquet --------------------------------------------------------------------------------------------


def holds_picture(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, or structs with a field `bytes`."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_picture(kind.field(index).type)
    return holds_bytes(kind)


def holds_captions(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, or lists of them."""
    return holds_text(kind.value_type if _is_list(kind) else kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def columns_of(
    place: Place, schema: pa.Schema, image_column: str, captions: Sequence[str] | None
) -> tuple[str, list[str]]:
    """(column of pictures, columns of captions) of a parquet file.

    Raises:
        InputError: a column that was asked for is not there, or holds something else.
    """
    names = schema.names
    pictures = [name for name in names if holds_picture(schema.field(name).type)]
    image = image_column if image_column in names else ""
    if not image and len(pictures) == 1 and image_column == IMAGE:
        image = pictures[0]
    listed = ", ".join(map(repr, names))
    if not image:
        raise InputError(f"{place}: no column {image_column!r} (synthesis.image_column); the file has: {listed}")
    if image not in pictures:
        kind = schema.field(image).type
        raise InputError(f"{place}: column {image!r} (synthesis.image_column) holds {kind}, not bytes")
    found = chosen((name for name in names if name != image and holds_captions(schema.field(name).type)), captions)
    if captions and not found:
        said = ",".join(captions)
        raise InputError(f"{place}: no column {said!r} of strings (synthesis.caption_column); the file has: {listed}")
    return image, found


def texts_of(column: pa.ChunkedArray) -> Iterator[list[str | None]]:
    """The texts of each row of a column of strings or of lists of them; what is no UTF-8 becomes a lone surrogate."""

    def decoded(raws: Sequence[bytes | None]) -> list[str | None]:
        return [None if raw is None else raw.decode(errors=LONE) for raw in raws]

    for chunk in column.chunks:
        if not _is_list(chunk.type):
            yield from ([text] for text in decoded(undecoded(chunk)))
            continue
        texts, bounds = decoded(undecoded(chunk.values)), chunk.offsets.to_pylist()
        for is_there, first, stop in zip(chunk.is_valid().to_pylist(), bounds, bounds[1:], strict=False):
            yield texts[first:stop] if is_there else []
