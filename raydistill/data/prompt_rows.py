"""Rows of prompt files in every format: files, JSON lists, and folders of lists and texts.

What is wrong with one row is a `BadRow`, which readers count. What is wrong with a whole file is an InputError.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.tables import CsvRecords, TsvRecords
from raydistill.data.text_files import LONE, lines_of, open_text, read_text, undecodable
from raydistill.data.texts import holds_text, undecoded
from raydistill.errors import InputError

COLUMNS_NAMED = 20  # where the column is missing
PARQUET_ROWS = 4096  # read at a time
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but tabs and line ends


class BadRow(Exception):
    """Why one row is no prompt; the text is the kind under which it is counted."""


class Row(NamedTuple):
    """One row of a file, or one entry of the lists and texts of a folder."""

    number: int  # from 1
    prompt: Callable[[], Any]  # the prompt, unchecked; raises BadRow
    name: str | None = None  # what messages call it, where a number says too little
    listed_in: str | None = None  # the list of a folder that it is in
    bare: bool = False  # a text of a list or folder, which no column holds
    lines: int = 1  # of the file, which it covers


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a prompt file or folder, in the order of their numbers.

    Args:
        path: as for `read_prompts`.
        columns: names that the prompt's column or key may have; the first that is there is it.

    Raises:
        InputError: nothing there, not readable, unknown suffix, or no such column.
    """
    try:
        yield from _open(path, columns)
    except gzip.BadGzipFile as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: its compressed bytes are damaged ({error})") from None


def rows_of_all(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Row]:
    """Rows of one file or folder, or of several, numbered through; messages name file and row. Raises as `rows_of`."""
    if len(files) == 1:
        yield from rows_of(files[0], columns)
        return
    before = 0
    for file in files:
        number = 0
        for row in rows_of(file, columns):
            number = row.number
            yield row._replace(number=before + number, name=f"{file.name}, {row.name or f'row {number}'}")
        before += number


def checked(prompt: Any, max_characters: int) -> str:
    """The prompt without surrounding white space, or BadRow."""
    if prompt is None:
        raise BadRow("null")
    if not isinstance(prompt, str):
        raise BadRow("not a string")
    prompt = prompt.strip()
    if not prompt:
        raise BadRow("blank")
    if undecodable(prompt):
        raise BadRow("not valid UTF-8")
    if len(prompt) > max_characters:
        raise BadRow(f"longer than {max_characters} characters")
    if _CONTROL.search(prompt):
        raise BadRow("with control characters")
    return prompt


def _open(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    if path.is_dir():
        return _folder_rows(path, columns)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    readers = {".txt": _line_rows, ".csv": _table_rows, ".tsv": _table_rows, ".jsonl": _object_rows, ".json": _list_rows,
               ".parquet": _parquet_rows}  # fmt: skip
    suffix = _suffix(path)
    if suffix not in readers or (suffix == ".parquet" and path.suffix.lower() == ".gz"):
        raise InputError(
            f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(readers)}, and .gz of all but the last"
        )
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty")
    return readers[suffix](path, columns)


def _suffix(path: Path) -> str:
    """What says the format, also of a compressed file."""
    name = path.name.lower().removesuffix(".gz")
    return name[name.rindex(".") :] if "." in name[1:] else ""


def _missing_column(path: Path, columns: Sequence[str], available: Sequence[str]) -> InputError:
    names = ", ".join(repr(name) for name in available[:COLUMNS_NAMED]) or "none"
    names += ", …" if len(available) > COLUMNS_NAMED else ""
    return InputError(f"{path}: no column {columns[0]!r} (prompts.column); the file has: {names}")


# -- texts, tables --------------------------------------------------------------------------------------


def _line_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with open_text(path) as stream:
        for number, line in enumerate(lines_of(stream), start=1):
            yield Row(number, functools.partial(str, line))


def _table_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    def prompt_of(record: list[str] | None) -> str:
        if record is None:
            raise BadRow("malformed")
        if not record:
            raise BadRow("blank")
        if len(record) <= index:
            raise BadRow(f"without {column!r}")
        return record[index]

    with open_text(path) as stream:
        records = (TsvRecords if _suffix(path) == ".tsv" else CsvRecords)(stream)
        _, header = next(records, (1, []))
        if header is None:
            raise InputError(f"{path}: the header line is malformed")
        column = next((name for name in columns if name in header), None)
        if column is None:
            raise _missing_column(path, columns, header)
        index = header.index(column)
        for number, record in records:
            yield Row(number, functools.partial(prompt_of, record), lines=records.lines)


# -- JSON -----------------------------------------------------------------------------------------------


class _Objects:
    """Finds prompts in objects, and knows which keys there were where none had one."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self._keys: dict[str, None] = {}  # in order of appearance
        self._found = False

    def prompt_of(self, record: Any) -> Any:
        """Raises BadRow."""
        if not isinstance(record, dict):
            raise BadRow("not a JSON object")
        for column in self.columns:
            if column in record:
                self._found = True
                return record[column]
        if not self._found and len(self._keys) <= COLUMNS_NAMED:
            self._keys.update(dict.fromkeys(record))
        raise BadRow(f"without {self.columns[0]!r}")

    def row(self, number: int, entry: Any, name: str, listed_in: str | None = None) -> Row:
        """An entry of a list, where a bare text is a prompt, whatever the column is called."""
        if isinstance(entry, dict):
            return Row(number, functools.partial(self.prompt_of, entry), name, listed_in)
        self._found |= isinstance(entry, str)
        return Row(number, lambda: entry, name, listed_in, bare=True)

    def end(self) -> None:
        """Raises InputError where objects had keys, but never the prompt's."""
        if self._keys and not self._found:
            raise _missing_column(self.path, self.columns, list(self._keys))


def _object_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    objects = _Objects(path, columns)

    def prompt_of(line: str) -> Any:
        if undecodable(line):
            raise BadRow("not valid UTF-8")
        if not line.strip():
            raise BadRow("blank")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise BadRow("not JSON") from None
        return objects.prompt_of(record)

    with open_text(path) as stream:
        for number, line in enumerate(lines_of(stream), start=1):
            yield Row(number, functools.partial(prompt_of, line))
    objects.end()


def _list_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    objects = _Objects(path, columns)
    for number, entry in enumerate(_list(path), start=1):
        yield objects.row(number, entry, f"entry {number}")
    objects.end()


def _list(path: Path) -> list[Any]:
    """A JSON list of texts or objects."""
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: must be a JSON list of prompts")
    return entries


# -- folders --------------------------------------------------------------------------------------------


def _folder_rows(folder: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Entries of .json lists, and .txt files of one prompt each, in the order of file names; hidden files are left out."""
    files = sorted(f for f in folder.iterdir() if _suffix(f) in (".json", ".txt") and not f.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: a folder without .json or .txt files")
    objects, number = _Objects(folder, columns), 0
    for file in files:
        listed = _suffix(file) == ".json"
        for position, entry in enumerate(_list(file) if listed else [read_text(file)], start=1):
            number += 1
            name = f"{file.name}, entry {position}" if listed else file.name
            yield objects.row(number, entry, name, file.stem if listed else None)
    objects.end()


# -- parquet --------------------------------------------------------------------------------------------


def _decoded(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors=LONE)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    damages = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of a column's name
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except damages as error:
        raise InputError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
    with file:
        column = next((name for name in columns if name in names), None)
        if column is None:
            raise _missing_column(path, columns, names)
        if names.count(column) > 1:
            raise InputError(f"{path}: {names.count(column)} columns are named {column!r}")
        kind = file.schema_arrow.field(column).type
        if not holds_text(kind):
            raise InputError(f"{path}: column {column!r} holds {kind}, not strings")
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for raw in undecoded(batch.column(0)):
                    number += 1
                    yield Row(number, functools.partial(_decoded, raw))
        except damages as error:
            raise InputError(f"{path}, after row {number}: {' '.join(str(error).split())}") from None
