"""Records of CSV and TSV files. One bad record costs its own line, never the lines behind it.

In CSV (RFC 4180) quotes are strict: a field with text behind its closing quote, or with none, is malformed, not altered.
So is one that two stray marks of different rows enclose: the lines between are rows by themselves, as prose is not.
TSV has no quotes of its own: a line is a record, and a quotation mark is text. But programs write quoted fields to it,
so a field in well-formed quotes loses them. It may span lines where these could be no records by themselves, or where the
header is quoted too, as by a program that quotes everything.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import TextIO

MANY = 20  # lines; in a file of one column every line without a comma looks like a row
FIELD_LIMIT = 1 << 20  # characters; the csv module's own limit is 128 KiB and would hide what is wrong
_QUOTED = re.compile('"((?:[^"]|"")*)"')


class _Lines:
    """Lines for a `csv.reader`, which can be given back."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._returned = stream, deque()
        self.taken: list[str] = []  # since the present record began
        self.number = 1  # of the line at which it began

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._stream)
        self.taken.append(line)
        return line

    def begin(self) -> None:
        """What was taken so far is done with."""
        self.number += len(self.taken)
        self.taken.clear()

    def keep_first(self) -> str:
        """Give back all lines of the record but its first."""
        self._returned.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        return self.taken[0]


class CsvRecords:
    """Iterates over (1-based number of the first line, fields); None for the fields of a malformed record."""

    delimiter = ","

    def __init__(self, stream: TextIO) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
        self._lines = _Lines(stream)
        self._reader = csv.reader(self._lines, delimiter=self.delimiter, strict=True)
        self._columns = 0  # 0: there was no header yet
        self._all_quoted = False  # the header

    def __iter__(self) -> Iterator[tuple[int, list[str] | None]]:
        return self

    def __next__(self) -> tuple[int, list[str] | None]:
        self._lines.begin()
        try:
            record = next(self._reader)
        except csv.Error:
            record = None
        record = self._settled(record)
        if not self._columns and record is not None:
            self._columns = len(record)
            self._all_quoted = self._lines.taken[0].count('"') == 2 * self._columns
        return self._lines.number, record

    @property
    def lines(self) -> int:
        """Lines of the record that came last."""
        return len(self._lines.taken)

    def _settled(self, record: list[str] | None) -> list[str] | None:
        taken = self._lines.taken
        if record is None or (self._columns and not self._all_quoted and self._are_rows(taken)):
            self._lines.keep_first()
            return None
        return record

    def _are_rows(self, lines: list[str]) -> bool:
        """Whether most lines of one record with quotes are rows by themselves: no quotes between, no commas of prose."""
        if len(lines) < 3 or (self._columns == 1 and len(lines) <= MANY):
            return False
        ends = [line.replace('"', "") for line in (lines[0], lines[-1])]
        whole = sum(
            line.count(",") == self._columns - 1 and ", " not in line and '"' not in line
            for line in (*lines[1:-1], *ends)
        )
        return 4 * whole >= 3 * len(lines)


class TsvRecords(CsvRecords):
    """As `CsvRecords`; no record is malformed, and the first one decides what a whole line is."""

    delimiter = "\t"

    def _settled(self, record: list[str] | None) -> list[str]:
        if record is None or not self._all_quoted and self._are_tsv_rows(self._lines.taken, record):
            line = self._lines.keep_first().rstrip("\r\n")
            quoted = ((_QUOTED.fullmatch(field), field) for field in line.split("\t"))
            record = [found[1].replace('""', '"') if found else field for found, field in quoted] if line else []
        return record

    def _are_tsv_rows(self, lines: list[str], record: list[str]) -> bool:
        """Whether what reads as one record with quotes is a row, or several, by its tabs alone."""
        whole = [line.count("\t") + 1 == self._columns for line in lines]
        return any(whole[1:-1]) or (whole[0] and (whole[-1] or len(record) != self._columns))
