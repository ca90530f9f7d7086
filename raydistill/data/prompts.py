"""Prompt files: read, check row by row, and put in a reproducible order.

A row's number is its 1-based line in a text file (txt, csv, tsv, jsonl) and its 1-based index in a parquet file;
it is both what reports name and the prompt's stable id. Prompts, ids and their order lie on disk (`texts`), so that
memory does not grow with the file.
"""

from __future__ import annotations

import csv
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.config.schema import Config
from raydistill.data.texts import Numbers, Texts, holds_text, permutation, repeated, undecoded
from raydistill.errors import InputError
from raydistill.storage.resolve import resolve

ROWS_NAMED = 5  # row numbers given per kind of bad row
COLUMNS_NAMED = 20  # where the column is missing
PARQUET_ROWS = 4096  # read at a time
CSV_FIELD_LIMIT = 1 << 20  # characters; the csv module's own limit is 128 KiB and would hide what is wrong


class BadRow(Exception):
    """Why one row is no prompt; the text is the kind under which it is counted."""


Row = tuple[int, Callable[[], str]]  # row number; the prompt, or BadRow when called


# -- what was read --------------------------------------------------------------------------------------


@dataclass
class PromptReport:
    """Counts of one file: rows = good + all bad ones."""

    source: str
    rows: int = 0
    good: int = 0
    duplicates: int = 0  # rows whose text appeared before (equal hashes of 64 bits); they are kept
    bad: dict[str, int] = field(default_factory=dict)  # kind -> rows
    first_bad: dict[str, list[int]] = field(default_factory=dict)  # kind -> its first row numbers

    def add_bad(self, kind: str, row: int) -> None:
        self.bad[kind] = self.bad.get(kind, 0) + 1
        named = self.first_bad.setdefault(kind, [])
        if len(named) < ROWS_NAMED:
            named.append(row)

    def __str__(self) -> str:
        text = f"{self.source}: {self.good} prompts of {self.rows} rows"
        if self.duplicates:
            text += f", {self.duplicates} repeated"
        return text + ("; bad rows: " + self.bad_rows() if self.bad else "")

    def bad_rows(self) -> str:
        """« 2 blank (rows 3, 8), 1 not JSON (row 9) »."""
        parts = []
        for kind, count in self.bad.items():
            numbers = ", ".join(str(row) for row in self.first_bad[kind])
            more = ", …" if count > len(self.first_bad[kind]) else ""
            parts.append(f"{count} {kind} (row{'s' if count > 1 else ''} {numbers}{more})")
        return ", ".join(parts)


class PromptSet:
    """Prompts with stable ids and an endless, reproducible order.

    Attributes:
        prompts: N texts, as a sequence.
        ids: int64 [N], the row numbers of the file.
        report: what reading found.
    """

    def __init__(
        self,
        prompts: Iterable[str],
        ids: Sequence[int] | np.ndarray | None = None,
        report: PromptReport | None = None,
    ) -> None:
        self.prompts = prompts if isinstance(prompts, Texts) else Texts(prompts)
        self.ids = np.asarray(range(1, len(self.prompts) + 1) if ids is None else ids, dtype=np.int64)
        if not len(self.prompts):
            raise ValueError("a PromptSet needs at least one prompt")
        if len(self.ids) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.ids)} ids")
        self.report = report or PromptReport("list", len(self.prompts), len(self.prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's permutation of 0 … N - 1, int64 [N]; a pure function of (seed, epoch, N)."""
        return _permutation(len(self), seed, epoch)

    def at(self, seed: int, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(ids [B], prompts) at positions of the endless order: epoch p // N, entry p % N of its permutation."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions must not be negative; the smallest is {positions.min()}")
        epochs, offsets = np.divmod(positions, len(self))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.order(seed, int(epoch))[offsets[here]]
        return self.ids[rows], [self.prompts[row] for row in rows]


@functools.lru_cache(maxsize=4)  # a batch touches one epoch, or two at the seam
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))))


# -- reading --------------------------------------------------------------------------------------------


def training_prompts(config: Config) -> PromptSet:
    """The prompts that a run learns from. Raises InputError."""
    return _configured(config, config.prompts.path)


def held_out_prompts(config: Config) -> PromptSet:
    """The prompts that a run is judged on, read by the same rules. Raises InputError."""
    return _configured(config, config.evaluation.prompts)


def _configured(config: Config, path: str) -> PromptSet:
    rules = config.prompts
    return read_prompts(resolve(path), rules.column, rules.on_bad_row, rules.max_characters)


def read_prompts(
    path: str | Path,
    column: str = "prompt",
    on_bad_row: Literal["skip", "fail"] = "skip",
    max_characters: int = 2000,
) -> PromptSet:
    """Read a prompt file; surrounding white space is dropped, repeated prompts are kept.

    Args:
        path: .txt (one prompt a line), .csv or .tsv (with a header line), .jsonl, or .parquet.
        column: column or key of the prompt; not used for .txt.
        on_bad_row: leave bad rows out and count them, or refuse the file at the first one.
        max_characters: longer prompts are bad rows.

    Raises:
        InputError: no such file, not readable, unknown suffix, missing column, no usable row, no room for temporary
            files, or (on_bad_row="fail") a bad row.
    """
    path = Path(path)
    report = PromptReport(str(path))
    ids, hashes = Numbers(), Numbers()

    def usable() -> Iterator[str]:
        for row, get in _rows(path, column):
            report.rows += 1
            try:
                prompt = _checked(get(), max_characters)
            except BadRow as bad:
                if on_bad_row == "fail":
                    raise InputError(f"{path}, row {row}: {bad}") from None
                report.add_bad(str(bad), row)
                continue
            ids.append(row)
            hashes.append(hash(prompt))
            yield prompt

    try:
        prompts = Texts(usable())
        report.good, report.duplicates = len(prompts), repeated(hashes)
        rows = ids.array()
    except OSError as error:
        raise InputError(
            f"{path}: no room for its prompts in {tempfile.gettempdir()} ({error.strerror}); make some, or name another folder "
            "in TMPDIR"
        ) from error
    if not report.rows:
        raise InputError(f"{path}: the file has no rows")
    if not len(prompts):
        raise InputError(f"{path}: no usable prompt in {report.rows} rows: {report.bad_rows()}")
    return PromptSet(prompts, rows, report)


def _rows(path: Path, column: str) -> Iterator[Row]:
    try:
        yield from _open(path, column)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _open(path: Path, column: str) -> Iterator[Row]:
    """Rows of a file that exists and whose suffix is known."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a prompt file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    readers = {
        ".txt": _text_rows,
        ".csv": lambda path: _table_rows(path, column, ","),
        ".tsv": lambda path: _table_rows(path, column, "\t"),
        ".jsonl": lambda path: _json_rows(path, column),
        ".parquet": lambda path: _parquet_rows(path, column),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(readers)}")
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty")
    return readers[path.suffix.lower()](path)


def _checked(prompt: Any, max_characters: int) -> str:
    """The prompt without surrounding white space, or BadRow."""
    if prompt is None:
        raise BadRow("null")
    if not isinstance(prompt, str):
        raise BadRow("not a string")
    prompt = prompt.strip()
    if not prompt:
        raise BadRow("blank")
    if len(prompt) > max_characters:
        raise BadRow(f"longer than {max_characters} characters")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # no tokenizer takes lone surrogates
        raise BadRow("not valid UTF-8")
    return prompt


def _decode(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRow("not valid UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line, without a byte order mark."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _text_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield number, functools.partial(_decode, line)


def _json_rows(path: Path, column: str) -> Iterator[Row]:
    keys: dict[str, None] = {}  # of the rows without the column, in order of appearance
    found = False

    def prompt_of(line: bytes) -> Any:
        nonlocal found
        text = _decode(line)
        if not text.strip():
            raise BadRow("blank")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise BadRow("not JSON") from None
        if not isinstance(record, dict):
            raise BadRow("not a JSON object")
        if column not in record:
            if not found and len(keys) <= COLUMNS_NAMED:
                keys.update(dict.fromkeys(record))
            raise BadRow(f"without {column!r}")
        found = True
        return record[column]

    for number, line in _lines(path):
        yield number, functools.partial(prompt_of, line)
    if keys and not found:
        raise _missing_column(path, column, list(keys))


def _table_rows(path: Path, column: str, delimiter: str) -> Iterator[Row]:
    """Strict about quotes: a field with text behind its closing quote, or with none, is malformed, not altered."""

    def prompt_of(record: list[str] | None) -> str:
        if record is None:
            raise BadRow("malformed")
        if not record:
            raise BadRow("blank")
        if len(record) <= index:
            raise BadRow(f"without {column!r}")
        return record[index]  # undecodable bytes became surrogates, which `_checked` refuses

    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_LIMIT))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise InputError(f"{path}: the header line is malformed: {error}") from None
        if column not in header:
            raise _missing_column(path, column, header)
        index = header.index(column)
        while True:
            number = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error:
                record = None
            yield number, functools.partial(prompt_of, record)


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    damages = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of a column's name
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except damages as error:
        raise InputError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
    with file:
        if column not in names:
            raise _missing_column(path, column, names)
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
                    yield number, functools.partial(_decode, raw)
        except damages as error:
            raise InputError(f"{path}, after row {number}: {' '.join(str(error).split())}") from None


def _missing_column(path: Path, column: str, available: Sequence[str]) -> InputError:
    names = ", ".join(repr(name) for name in available[:COLUMNS_NAMED]) or "none"
    names += ", …" if len(available) > COLUMNS_NAMED else ""
    return InputError(f"{path}: no column {column!r} (prompts.column); the file has: {names}")
