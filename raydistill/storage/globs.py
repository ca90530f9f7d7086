"""One value of a configuration that names many files: `*`, `?`, `[..]`, `**` and braces, over local paths and URIs.

    /data/cc12m/*.tar    s3://bucket/set/{00000..00099}.tar    hf://datasets/org/name/data/{train,test}-*.parquet

`*` and `?` cross no slash, and `**` does. Braces are written as WebDataset writes them: a range of numbers, whose leading
zeros count, or a list. A local file whose name has such characters is meant by itself.
"""

from __future__ import annotations

import functools
import glob
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from raydistill.errors import InputError
from raydistill.storage.place import DENIED, Place, Remote, cause, is_uri, remote
from raydistill.storage.staging import fetch

MOST = 1_000_000  # names that braces may make
FETCHERS = 8  # threads
_WILD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_QUERY = re.compile(r"://.*\?[^/]*=")  # of a URI, where `?` stands for a character otherwise
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Found:
    """A file that a pattern names."""

    place: Place
    size: int  # bytes


def is_pattern(text: str) -> bool:
    """Whether `text` may name several files. Raises InputError: `~` of nobody."""
    wild = _WILD.search(text) or _BRACES.search(text)
    return wild is not None and (is_uri(text) or not _local_path(text).exists())


def expand(pattern: str) -> list[Found]:
    """The files of a pattern, by name, each once.

    Raises:
        InputError: there is none, a name that braces spell out is missing, or the store refuses.
        OSError: the store does not answer.
    """
    if _QUERY.search(pattern):
        remote(pattern)  # which refuses it without repeating what may be a secret
    patterns = list(dict.fromkeys(_spelled_out(pattern)))
    named = [name for name in patterns if not _WILD.search(name)]
    found = [
        *_exactly(named, pattern),
        *(one for name in patterns if _WILD.search(name) for one in _matching(name, pattern)),
    ]
    if not found:
        raise InputError(f"{pattern}: no such files")
    return sorted({str(one.place): one for one in found}.values(), key=lambda one: str(one.place))


def fetch_all(found: list[Found]) -> list[Path]:
    """Local copies of the files, as `staging.fetch` makes them. Raises as it."""
    with ThreadPoolExecutor(FETCHERS) as pool:
        return list(pool.map(_fetched, (one.place for one in found)))


def _fetched(place: Place) -> Path:
    return fetch(str(place)) if isinstance(place, Remote) else place


def _spelled_out(pattern: str) -> Iterator[str]:
    """A pattern without braces for each choice from them. Raises InputError."""
    pieces = _BRACES.split(pattern)  # text, choices, text, …
    choices = [_choices(piece, pattern) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    if functools.reduce(lambda count, some: count * len(some), choices, 1) > MOST:
        raise InputError(f"{pattern}: its braces spell out more than {MOST:,} names")
    return map("".join, itertools.product(*choices))


def _choices(braces: str, pattern: str) -> list[str]:
    bounds = _RANGE.fullmatch(braces)
    if bounds is None:
        if "," not in braces:
            raise InputError(f"{pattern}: {{{braces}}} is no range of numbers, as in {{00000..00099}}")
        return braces.split(",")
    first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
    if last < first or last - first >= MOST:
        raise InputError(f"{pattern}: {{{braces}}} is no range of at most {MOST:,} ascending numbers")
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _exactly(names: list[str], pattern: str) -> Iterator[Found]:
    """Files that are spelled out. Raises InputError: one is missing."""
    places = [remote(name) if _is_remote(name) else _local_path(name) for name in names]
    for folder in dict.fromkeys(place.parent for place in places):
        there = {place: size for place, size in _files_in(folder, pattern)}
        for place in (place for place in places if place.parent == folder):
            if place not in there:
                raise InputError(f"{place}: no such file, but {pattern} names it")
            yield Found(place, there[place])


def _files_in(folder: Place, pattern: str) -> Iterator[tuple[Place, int]]:
    """The files right below a folder, with their sizes."""
    if isinstance(folder, Remote):
        yield from ((folder / name, size) for name, size, _ in _listed(folder, pattern) if name and "/" not in name)
    elif folder.is_dir():
        yield from ((file, file.stat().st_size) for file in folder.iterdir() if file.is_file())


def _matching(name: str, pattern: str) -> Iterator[Found]:
    """Files that a pattern without braces names."""
    if not _is_remote(name):
        names = glob.iglob(str(_local_path(name)), recursive=True)
        yield from (Found(file, file.stat().st_size) for file in map(Path, names) if file.is_file())
        return
    scheme, _, key = name.partition("://")
    folders = key.split("/")
    fixed = next(index for index, name in enumerate(folders) if _WILD.search(name))
    base, wanted = remote(f"{scheme}://{'/'.join(folders[:fixed])}"), _regex("/".join(folders[fixed:]))
    yield from (Found(base / name, size) for name, size, _ in _listed(base, pattern) if wanted.fullmatch(name))


def _is_remote(name: str) -> bool:
    return is_uri(name) and not name.startswith("file://")


def _local_path(name: str) -> Path:
    if name.startswith("file://"):
        return Path(unquote(name.removeprefix("file://")))
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~somebody who has no home here
        raise InputError(f"{name}: {error}") from None


def _listed(base: Remote, pattern: str) -> list[tuple[str, int, int]]:
    try:
        return base.entries()
    except FileNotFoundError as error:
        raise InputError(f"{pattern}: {cause(error, base.scheme)}") from error
    except OSError as error:
        text = cause(error, base.scheme)
        raise (InputError if DENIED.search(text) else OSError)(f"{pattern}: cannot be read: {text}") from error


def _regex(pattern: str) -> re.Pattern[str]:
    """As glob.glob matches: a hidden name must be spelled out."""
    pieces, begins = [], True  # whether a name begins
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if begins and _WILD.match(token) and token != "**/":
            pieces.append(r"(?!\.)")
        begins = token.endswith("/")
        if token == "**/":
            pieces.append(r"(?:(?!\.)[^/]+/)*")
        elif token == "**":
            pieces.append(r".*")
        elif token in ("*", "?"):
            pieces.append(r"[^/]*" if token == "*" else r"[^/]")
        elif len(token) > 2:
            pieces.append("[" + ("^" + token[2:-1] if token[1] == "!" else token[1:-1]) + "]")
        else:
            pieces.append(re.escape(token))
    return re.compile("".join(pieces))
