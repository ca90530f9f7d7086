"""Text files that people bring: UTF-8 with or without a byte order mark, UTF-16 and UTF-32; `\\n`, `\\r\\n` and `\\r` end lines.

Bytes that cannot be decoded become a lone surrogate, which no text has (`undecodable`): the rest of the file stays usable.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterable, Iterator
from typing import TextIO
from unicodedata import category

from raydistill.storage.place import Place, Remote

HEAD = 1 << 12  # bytes that decide about the encoding
LEAST = 6  # bytes of UTF-16 without a mark; fewer zeros may be separators
SURE = 64  # bytes; from there on a file whose last character is cut is UTF-16 too
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROL = re.compile("[\x01-\x08\x0e-\x1f]")
_NO_TEXT = ("Cc", "Cn", "Co", "Cs")  # categories of characters
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

LONE = "raydistill.lone_surrogates"  # for `errors`
codecs.register_error(LONE, lambda error: ("\udcff", error.end))


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these bytes.

    UTF-16 without a mark is recognised by its zeros: three quarters of the bytes at odd (or even) places, none elsewhere.
    Scripts without these are recognised where UTF-8 makes no sense, and UTF-16 makes characters and most of the line ends.
    """
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if len(head) >= SURE or (len(head) >= LEAST and len(head) % 2 == 0):
        for encoding, high, low in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
            if 4 * high.count(0) >= 3 * len(high) and not low.count(0):
                return encoding
    text = _decoded(head, "utf-8")
    if b"\0" in head and (text is None or _CONTROL.search(text)):
        for encoding in ("utf-16-le", "utf-16-be"):
            text = _decoded(head, encoding) or ""
            ends = text.count("\n")
            if (
                ends > 1
                and 2 * ends > head.count(b"\n")
                and all(category(c) not in _NO_TEXT or c.isspace() for c in text)
            ):
                return encoding
    return "utf-8"


def _decoded(head: bytes, encoding: str) -> str | None:
    """None where it cannot be; a last character may be cut."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None


def open_text(path: Place) -> TextIO:
    """A text file, which may be compressed (.gz), decoded; line ends are kept as they are.

    Raises:
        OSError, EOFError, zlib.error: it cannot be read, or its compressed bytes are damaged. Reading raises them too.
    """
    stream = path.filesystem.open_input_stream(path.key) if isinstance(path, Remote) else path.open("rb")
    unpacked = gzip.GzipFile(fileobj=stream) if path.name.lower().endswith(".gz") else stream
    buffered = io.BufferedReader(unpacked, 1 << 16)
    return io.TextIOWrapper(buffered, encoding_of(buffered.peek(HEAD)[:HEAD]), LONE, newline="")


def decoded_text(data: bytes) -> str:
    """A whole text; bytes that are none become a lone surrogate."""
    return data.decode(encoding_of(data[:HEAD]), LONE)


def read_text(path: Place) -> str:
    """All of a text file. Raises OSError."""
    with open_text(path) as stream:
        return stream.read()


def lines_of(stream: Iterable[str]) -> Iterator[str]:
    """Lines of an `open_text`, with their ends; of `\\r\\r\\n`, which two programs made of one end, as one."""
    pending = ""
    for line in stream:
        if pending and line != "\r\n":
            yield pending
            pending = ""
        if line.endswith("\r"):
            pending = line
        else:
            yield pending + line
            pending = ""
    if pending:
        yield pending


def printable(text: str) -> str:
    """The same text where it can be written; lone surrogates, as of file names that are no UTF-8, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def undecodable(text: str) -> bool:
    """Whether a text has what no encoding has, and no tokenizer takes."""
    return _LONE_SURROGATES.search(text) is not None
