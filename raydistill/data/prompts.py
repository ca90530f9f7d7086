"""Prompt files: read, check row by row, and put in a reproducible order.

A row's number is its 1-based line in a text file (txt, csv, tsv, jsonl), and its 1-based place in a parquet file, a JSON
list or a folder. It is both what reports name and the prompt's stable id. Prompts, ids and their order lie on disk
(`texts`), so that memory does not grow with the file.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from raydistill.config.schema import Config
from raydistill.data.holdout import Side
from raydistill.data.prompt_rows import BadRow, checked, rows_of_all
from raydistill.data.texts import Numbers, Texts, permutation, repeated
from raydistill.errors import InputError
from raydistill.storage.globs import expand, fetch_all, is_pattern
from raydistill.storage.resolve import resolve

ROWS_NAMED = 5  # row numbers given per kind of bad row
MAX_CHARACTERS = 2000  # of a prompt, where nothing else is said


# -- what was read --------------------------------------------------------------------------------------


@dataclass
class PromptReport:
    """Counts of one file: rows = good + aside + all bad ones."""

    source: str
    rows: int = 0
    good: int = 0
    _: KW_ONLY
    duplicates: int = 0  # rows whose text appeared before (equal hashes of 64 bits); they are kept
    aside: int = 0  # prompts of the other side (`holdout`)
    held_out: bool = False  # the good ones are the held-out side
    hidden: int = 0  # lines that bad rows cover beside their first: quoted text, or rows behind a stray quotation mark
    bad: dict[str, int] = field(default_factory=dict)  # kind -> rows
    first_bad: dict[str, list[int]] = field(default_factory=dict)  # kind -> its first row numbers
    names: dict[int, str] = field(default_factory=dict)  # of these rows, where a number says too little

    def add_bad(self, kind: str, row: int, name: str | None = None) -> None:
        self.bad[kind] = self.bad.get(kind, 0) + 1
        named = self.first_bad.setdefault(kind, [])
        if len(named) < ROWS_NAMED:
            named.append(row)
            self.names |= {row: name} if name else {}

    def __str__(self) -> str:
        text = f"{self.source}: {self.good} prompts of {self.rows} rows"
        if self.duplicates:
            text += f", {self.duplicates} repeated"
        if self.aside:
            text += f"; {self.aside} are {'to train on' if self.held_out else 'held out'}"
        return text + ("; bad rows: " + self.bad_rows() if self.bad else "")

    def bad_rows(self) -> str:
        """« 2 blank (rows 3, 8), 1 not JSON (row 9) », or « 1 blank (2.txt) »."""
        kinds = []
        for kind, count in self.bad.items():
            rows = self.first_bad[kind]
            what = "" if self.names else "rows " if count > 1 else "row "
            more = ", …" if count > len(rows) else ""
            kinds.append(f"{count} {kind} ({what}{', '.join(self.names.get(row, str(row)) for row in rows)}{more})")
        return ", ".join(kinds) + (f"; in their quotation marks lie {self.hidden} more lines" if self.hidden else "")


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
    share = config.evaluation.holdout
    return _configured(config, config.prompts.path, None if share is None else Side(share, held_out=False))


def held_out_prompts(config: Config) -> PromptSet:
    """The prompts that a run is judged on, read by the same rules. Raises InputError."""
    evaluation = config.evaluation
    if evaluation.holdout is not None:
        return _configured(config, config.prompts.path, Side(evaluation.holdout, held_out=True))
    assert evaluation.prompts is not None  # the schema wants one of the two
    return _configured(config, evaluation.prompts)


def _configured(config: Config, path: str, side: Side | None = None) -> PromptSet:
    rules = config.prompts
    found = fetch_all(expand(path)) if is_pattern(path) else resolve(path)
    return read_prompts(found, rules.column, rules.on_bad_row, rules.max_characters, side, source=path)


def read_prompts(
    path: str | Path | Sequence[Path],
    column: str | Sequence[str] = "prompt",
    on_bad_row: Literal["skip", "fail"] = "skip",
    max_characters: int = MAX_CHARACTERS,
    side: Side | None = None,
    source: str | None = None,
) -> PromptSet:
    """Read a prompt file or folder; surrounding white space is dropped, repeated prompts are kept.

    Args:
        path: .txt (one prompt a line), .csv or .tsv (with a header line), .jsonl, .json (a list of texts or objects),
            .parquet, or a folder of .json lists and of .txt files with one prompt each; all but parquet may be compressed
            (.txt.gz …). Or several files, whose rows are numbered through.
        column: column or key of the prompt, or several, of which the first that is there counts; not used for .txt.
        on_bad_row: leave bad rows out and count them, or refuse the file at the first one.
        max_characters: longer prompts are bad rows.
        side: of a file that is split, whose prompts alone are read; they keep their row numbers.
        source: what messages call several files.

    Raises:
        InputError: no such file, not readable, unknown suffix, missing column, no usable row, too few
            prompts on the side, no room for temporary files, or (on_bad_row="fail") a bad row.
    """
    several = not isinstance(path, str | Path)
    files = list(map(Path, path)) if several else [Path(path)]
    path = (source or f"{files[0]}, …") if several else files[0]
    report = PromptReport(str(path), held_out=side is not None and side.held_out)
    ids, hashes = Numbers(), Numbers()

    def usable() -> Iterator[str]:
        for row in rows_of_all(files, [column] if isinstance(column, str) else column):
            report.rows += 1
            try:
                prompt = checked(row.prompt(), max_characters)
            except BadRow as bad:
                if on_bad_row == "fail":
                    raise InputError(f"{path}, {row.name or f'row {row.number}'}: {bad}") from None
                report.add_bad(str(bad), row.number, row.name)
                report.hidden += row.lines - 1
                continue
            if side is not None and not side.has(prompt):
                report.aside += 1
                continue
            ids.append(row.number)
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
    if side is not None and report.good + report.aside:
        side.check(str(path), report.good - report.duplicates, report.aside)
    if not len(prompts):
        raise InputError(f"{path}: no usable prompt in {report.rows} rows: {report.bad_rows()}")
    return PromptSet(prompts, rows, report)
