"""Tables that name picture files beside them: metadata.csv and metadata.jsonl as the hub's image folders have them, and JSON lines with
`img_path`. Their rows lie on disk (`texts`), so that memory does not grow with the table."""

from __future__ import annotations

import contextlib
import json
import posixpath
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raydistill.data.picture_columns import NOT_UTF8, captions_in_words, chosen, named_captions
from raydistill.data.tables import CsvRecords, TsvRecords
from raydistill.data.text_files import lines_of, open_text, undecodable
from raydistill.errors import InputError
from raydistill.storage.place import Place, Remote, cause

TABLES = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
PATHS = ("file_name", "img_path", "image_path", "filename", "file", "path", "image")  # columns of the picture's path

Entry = tuple[str, tuple[str, ...] | str]


def table_entries(table: Place, folder: Place, image_column: str, captions: Sequence[str] | None) -> Iterator[Entry]:
    """(path below `folder`, captions, or why there are none) of each row of one table.

    Raises:
        InputError: the table cannot be read, or names no pictures.
    """
    with _readable(table):
        yield from _entries(table, folder, image_column, captions)


def about_table(table: Place, image_column: str, captions: Sequence[str] | None) -> str:
    """Which columns of a table have captions, by its first row. Raises InputError."""
    with _readable(table):
        record = next((record for _, record in _records(table) if not isinstance(record, str)), {})
        columns = [name for name in record if name != _path_column(table, record, image_column)]
    return captions_in_words(chosen(columns, captions), record)


@contextlib.contextmanager
def _readable(table: Place) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise InputError(f"{table}: its compressed bytes are damaged ({error})") from error
    except OSError as error:
        text = cause(error, table.scheme) if isinstance(table, Remote) else str(error)
        raise InputError(f"{table}: cannot be read: {text}") from error


def _entries(table: Place, folder: Place, image_column: str, captions: Sequence[str] | None) -> Iterator[Entry]:
    below = posixpath.relpath(str(table.parent), str(folder))
    named, column = f"{table.name}, row", None
    for number, record in _records(table):
        if isinstance(record, str):
            yield f"{named} {number}", record
            continue
        column = column or _path_column(table, record, image_column)
        path = record.get(column)
        if not isinstance(path, str) or not path.strip():
            yield f"{named} {number}", f"no path in {column!r}"
            continue
        texts = named_captions({key: value for key, value in record.items() if key != column}, captions)
        bad = any(map(undecodable, texts))
        where = path.strip() if below == "." else posixpath.join(below, path.strip())
        yield where, NOT_UTF8 if bad else texts


def _path_column(table: Place, record: Mapping[str, Any], image_column: str) -> str:
    """Raises InputError."""
    if image_column in record:
        return image_column
    known = next((name for name in PATHS if name in record), None)
    known = known or next((name for name in record if name.endswith("_file_name")), None)
    if known is None or image_column != "image":  # the default, which names nothing
        listed = ", ".join(map(repr, record))
        wanted = image_column if image_column != "image" else PATHS[0]
        raise InputError(
            f"{table}: no column {wanted!r} with paths of pictures (synthesis.image_column); it has: {listed}"
        )
    return known


def _records(table: Place) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number from 1, the row by column, or why it is none)."""
    with open_text(table) as stream:
        if table.name.lower().removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(lines_of(stream), start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                yield number, record if isinstance(record, dict) else "not a JSON object"
            return
        records = (TsvRecords if ".tsv" in table.name.lower() else CsvRecords)(stream)
        _, header = next(records, (1, None))
        if not header:
            raise InputError(f"{table}: no header line")
        for number, fields in records:
            if fields is None or len(fields) != len(header):
                yield number, "malformed"
            else:
                yield number, dict(zip(header, fields, strict=True))
